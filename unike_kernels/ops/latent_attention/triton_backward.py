"""The gradients of latent attention, gate and blend on a GPU, for those of `latent_attention`, in one launch.

They go to queries, inputs, a given alpha and a given anchor; memory and Enc_sem are constants. Work as in the forward
pass: a team of blocks for each tile of tokens, each block with a slice of every width, and a meeting wherever a number
depends on all columns:
  1. the slice's share of the logits                                                     -> k numbers a token and head
  2. h_know, five squares and products of it, the host and the gradient; the first layer -> r + 5 numbers a token
  3. Enc_sem(h_know), its square and its product with the anchor                         -> two numbers a token
  4. the gradients of inputs and anchor; Enc_sem's second layer backwards                -> r numbers a token
  5. its first layer backwards, hence the gradient of h_know; that times the values      -> k numbers a token and head
  6. the gradient of the logits, times the keys: that of the queries.
A given alpha skips 3 and 4's second half. A token without an entry hands its gradient through.

Bound. One token with k = 40, d = 4096, r = 512 in bfloat16 moves keys and values twice, 1.3 MB, w1 once, or twice
without projected values, and w2 twice, 12.6 MB: 4.3 us of an H100's memory, and five meetings of 1.5 us.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import (
    Workspace,
    activate_slope,
    dot,
    last_contiguous,
    meet,
    multiprocessors,
    options,
    sum_of_parts,
    workspace_of,
)
from .reference import Blend, SemanticEncoder
from .triton import (
    BLOCKS_PER_MULTIPROCESSOR,
    anchor_at,
    attended,
    averaged,
    encoded,
    entries_at,
    first_layer,
    found_any,
    inverse,
    logits_at,
    logits_in,
    operands,
    pre_activations,
    softmax_of,
    strides,
    tiling,
)


@triton.jit
def times_columns(x, table):
    """x table in float32: [BM, N] and [N, C] -> [BM, C]. One row is no work for tensor cores."""
    if x.shape[0] == 1:
        return tl.sum(tl.reshape(x, (x.shape[1], 1)) * table.to(tl.float32), 0)[None, :]
    else:
        return dot(x, table, tl.zeros((x.shape[0], table.shape[1]), tl.float32))


@triton.jit(
    do_not_specialize=["heads", "k", "tokens", "per_row", "per_ids", "per_anchor", "tiles_per_row", "tiles", "slices"]
)
def latent_attention_backward_kernel(
    g, to_alpha, queries, inputs, keys, values, projected, ids, w1, b1, w2, b2, given, anchor,
    to_queries, to_inputs, to_given, to_anchor,
    scores, hidden, know, sem, squares, cosines, to_hidden, to_scores, counters, g_stride,
    query_stride, input_stride, key_stride, value_stride, projected_stride, anchor_stride, given_stride,
    heads, c, d, r, k, scale, tokens, per_row, per_ids, per_anchor, tiles_per_row, tiles,
    slices, c_slice, d_slice, r_slice,
    EQ7: tl.constexpr, MATCH: tl.constexpr, SHARED: tl.constexpr,
    BM: tl.constexpr, KB: tl.constexpr, WIDTH: tl.constexpr, RB: tl.constexpr,
):  # fmt: skip
    """See above."""
    team, teams, part = tl.program_id(0) // slices, tl.num_programs(0) // slices, tl.program_id(0) % slices
    m = tl.arange(0, BM)
    size = heads.to(tl.int64) * BM * k
    scores += team * slices * size
    to_scores += team * slices * size
    know += team * BM * d
    sem += team * BM * d
    squares += team * slices * (5 * BM)
    cosines += team * slices * (2 * BM)
    to_hidden += team * slices * BM * r
    hidden_slices = slices if projected is None else 1
    hidden += team * hidden_slices * BM * r
    low, high = part * d_slice, tl.minimum((part + 1) * d_slice, d)
    for tile in range(team, tiles, teams):
        row = tile // tiles_per_row
        offset = tile % tiles_per_row * BM + m
        rows = row.to(tl.int64) * per_row + offset
        exists = (offset < per_row) & (rows < tokens)
        id_rows = rows // per_ids
        # What a token without an entry holds reaches no gradient.
        valid = exists & found_any(ids, id_rows, exists, k, BM, KB, SHARED)

        logits_in(
            scores + part * size, queries, query_stride, c, rows, keys, key_stride, ids, id_rows, valid, m, k, heads, c,
            part * c_slice, tl.minimum((part + 1) * c_slice, c), BM, KB, WIDTH, SHARED,
        )  # fmt: skip
        meet(counters + team, slices, part == 0)

        of_know = tl.zeros((BM,), tl.float32)
        of_host, of_anchor, on_know, on_host = of_know, of_know, of_know, of_know
        for start in range(low, high, WIDTH):
            columns = start + tl.arange(0, WIDTH)
            inside = columns < d
            there = valid[:, None] & inside[None, :]
            mean = averaged(
                values, value_stride, d, ids, id_rows, valid, scores, m, columns, inside, k, heads, slices, size,
                scale, BM, KB, SHARED,
            )  # fmt: skip
            tl.store(know + m[:, None] * d + columns[None, :], mean, mask=there)
            host = tl.load(inputs + rows[:, None] * input_stride + columns[None, :], mask=there, other=0.0)
            host = host.to(tl.float32)
            grad = tl.load(g + rows[:, None] * g_stride + columns[None, :], mask=there, other=0.0).to(tl.float32)
            other = anchor_at(inputs, input_stride, anchor, anchor_stride, per_anchor, rows, columns, there)
            of_know += tl.sum(mean * mean, 1)
            of_host += tl.sum(host * host, 1)
            of_anchor += tl.sum(other * other, 1)
            on_know += tl.sum(grad * mean, 1)
            on_host += tl.sum(grad * host, 1)
        left = squares + part * (5 * BM) + m
        tl.store(left, of_know)
        tl.store(left + BM, of_host)
        tl.store(left + 2 * BM, of_anchor)
        tl.store(left + 3 * BM, on_know)
        tl.store(left + 4 * BM, on_host)
        if given is None:
            first_layer(
                hidden, know, w1, projected, projected_stride, ids, id_rows, valid, scores, m, part, k, heads, slices,
                size, scale, d, r, d_slice, r_slice, BM, KB, WIDTH, RB, SHARED,
            )  # fmt: skip
        meet(counters + team, slices, part == 0)

        of_know = inverse(tl.sqrt(sum_of_parts(squares + m, slices, 5 * BM, valid)))
        host_norm = tl.sqrt(sum_of_parts(squares + BM + m, slices, 5 * BM, valid))
        of_anchor = inverse(tl.sqrt(sum_of_parts(squares + 2 * BM + m, slices, 5 * BM, valid)))
        on_know = sum_of_parts(squares + 3 * BM + m, slices, 5 * BM, valid)
        on_host = sum_of_parts(squares + 4 * BM + m, slices, 5 * BM, valid)
        if given is None:
            own = tl.zeros((BM,), tl.float32)
            along = own
            for start in range(low, high, WIDTH):
                columns = start + tl.arange(0, WIDTH)
                inside = columns < d
                there = valid[:, None] & inside[None, :]
                s = encoded(hidden, b1, w2, b2, m, columns, inside, valid, r, hidden_slices, BM, RB)
                tl.store(sem + m[:, None] * d + columns[None, :], s, mask=there)
                other = anchor_at(inputs, input_stride, anchor, anchor_stride, per_anchor, rows, columns, there)
                own += tl.sum(s * s, 1)
                along += tl.sum(s * other, 1)
            products = cosines + part * (2 * BM) + m
            tl.store(products, own)
            tl.store(products + BM, along)
            meet(counters + team, slices, part == 0)
            of_sem = inverse(tl.sqrt(sum_of_parts(cosines + m, slices, 2 * BM, valid)))
            both = of_sem * of_anchor
            cosine = sum_of_parts(cosines + BM + m, slices, 2 * BM, valid) * both
            gate = tl.clamp(cosine, 0.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
        else:
            gate = tl.load(given + rows * given_stride, mask=valid, other=0.0).to(tl.float32)

        share = 1.0 - gate if EQ7 else gate
        stretch = host_norm * of_know if MATCH else tl.full((BM,), 1.0, tl.float32)
        to_gate = stretch * on_know - on_host
        to_gate = (-to_gate if EQ7 else to_gate) + tl.load(to_alpha + rows, mask=valid, other=0.0)
        tl.store(to_given + rows, to_gate, mask=exists & (part == 0))
        by_host = share * on_know * of_know * inverse(host_norm) if MATCH else tl.zeros((BM,), tl.float32)
        if given is None:
            to_cosine = tl.where((cosine >= 0) & (cosine <= 1), to_gate, 0.0)
        for start in range(low, high, WIDTH):
            columns = start + tl.arange(0, WIDTH)
            there = valid[:, None] & (columns < d)[None, :]
            everyone = exists[:, None] & (columns < d)[None, :]
            host = tl.load(inputs + rows[:, None] * input_stride + columns[None, :], mask=there, other=0.0)
            grad = tl.load(g + rows[:, None] * g_stride + columns[None, :], mask=everyone, other=0.0).to(tl.float32)
            total = (1.0 - share)[:, None] * grad + by_host[:, None] * host.to(tl.float32)
            if given is None:
                other = anchor_at(inputs, input_stride, anchor, anchor_stride, per_anchor, rows, columns, there)
                s = tl.load(sem + m[:, None] * d + columns[None, :], mask=there, other=0.0)
                of_other = to_cosine[:, None] * (both[:, None] * s - (cosine * of_anchor * of_anchor)[:, None] * other)
                if anchor is None:
                    total += of_other
                else:
                    tl.store(to_anchor + rows[:, None] * d + columns[None, :], of_other, mask=everyone)
            result = tl.where(valid[:, None], total, grad).to(to_inputs.dtype.element_ty)
            tl.store(to_inputs + rows[:, None] * d + columns[None, :], result, mask=everyone)

        if given is None:
            for low_r in range(0, r, RB):
                at = low_r + tl.arange(0, RB)
                total = tl.zeros((BM, RB), tl.float32)
                for start in range(low, high, WIDTH):
                    columns = start + tl.arange(0, WIDTH)
                    inside = columns < d
                    there = valid[:, None] & inside[None, :]
                    other = anchor_at(inputs, input_stride, anchor, anchor_stride, per_anchor, rows, columns, there)
                    s = tl.load(sem + m[:, None] * d + columns[None, :], mask=there, other=0.0)
                    to_sem = to_cosine[:, None] * (both[:, None] * other - (cosine * of_sem * of_sem)[:, None] * s)
                    wanted = inside[:, None] & (at < r)[None, :]
                    weights = tl.load(w2 + columns[:, None] * r + at[None, :], mask=wanted, other=0.0)
                    total += times_columns(to_sem, weights)
                place = to_hidden + part * (BM * r) + m[:, None] * r + at[None, :]
                tl.store(place, total, mask=valid[:, None] & (at < r)[None, :])
            meet(counters + team, slices, part == 0)

        # From here on `sem` holds the gradient of h_know.
        for start in range(low, high, WIDTH):
            columns = start + tl.arange(0, WIDTH)
            inside = columns < d
            there = valid[:, None] & inside[None, :]
            mean = tl.load(know + m[:, None] * d + columns[None, :], mask=there, other=0.0)
            grad = tl.load(g + rows[:, None] * g_stride + columns[None, :], mask=there, other=0.0).to(tl.float32)
            total = (share * stretch)[:, None] * grad
            if MATCH:
                total -= (share * stretch * on_know * of_know * of_know)[:, None] * mean
            if given is None:
                for low_r in range(0, r, RB):
                    at = low_r + tl.arange(0, RB)
                    known = valid[:, None] & (at < r)[None, :]
                    before = sum_of_parts(to_hidden + m[:, None] * r + at[None, :], slices, BM * r, known)
                    slope = activate_slope(pre_activations(hidden, b1, m, at, valid, r, hidden_slices, BM), "gelu")
                    wanted = (at < r)[:, None] & inside[None, :]
                    weights = tl.load(w1 + at[:, None] * d + columns[None, :], mask=wanted, other=0.0)
                    total += times_columns(before * slope, weights)
            tl.store(sem + m[:, None] * d + columns[None, :], total, mask=there)
        tl.debug_barrier()  # the block's own
        logits_in(
            to_scores + part * size, sem, d, 0, m, values, value_stride, ids, id_rows, valid, m, k, heads, d, low,
            high, BM, KB, WIDTH, SHARED,
        )  # fmt: skip
        meet(counters + team, slices, part == 0)

        for head in range(heads):
            own_scores, own_grads = scores + head * (BM * k), to_scores + head * (BM * k)
            shift, portion = softmax_of(own_scores, ids, id_rows, valid, m, k, slices, size, scale, BM, KB, SHARED)
            mean_grad = tl.zeros((BM,), tl.float32)
            for first in range(0, k, KB):
                entry = entries_at(ids, id_rows, valid, first, k, KB, SHARED)
                logits = logits_at(own_scores, entry, m, valid, first, k, slices, size, scale, KB)
                p = tl.exp(logits - shift[:, None]) * portion[:, None]
                grad = logits_at(own_grads, entry, m, valid, first, k, slices, size, 1.0, KB)
                mean_grad += tl.sum(tl.where(p > 0, p * grad, 0.0), 1)
            for start in range(part * c_slice, tl.minimum((part + 1) * c_slice, c), WIDTH):
                columns = start + tl.arange(0, WIDTH)
                inside = columns < c
                total = tl.zeros((BM, WIDTH), tl.float32)
                for first in range(0, k, KB):
                    entry = entries_at(ids, id_rows, valid, first, k, KB, SHARED)
                    logits = logits_at(own_scores, entry, m, valid, first, k, slices, size, scale, KB)
                    p = tl.exp(logits - shift[:, None]) * portion[:, None]
                    grad = logits_at(own_grads, entry, m, valid, first, k, slices, size, 1.0, KB)
                    weight = tl.where(p > 0, p * (grad - mean_grad[:, None]), 0.0) * scale
                    total = attended(entry, weight, keys + head * c, key_stride, columns, inside, total)
                place = to_queries + rows[:, None] * (heads * c) + head * c + columns[None, :]
                there = exists[:, None] & inside[None, :]
                tl.store(place, tl.where(valid[:, None], total, 0.0).to(to_queries.dtype.element_ty), mask=there)
        tl.debug_barrier()  # before the next tile's logits take the place of these; several blocks have only one tile


def latent_attention_backward(
    grad: Tensor,
    grad_alpha: Tensor,
    queries: Tensor,
    inputs: Tensor,
    keys: Tensor,
    values: Tensor,
    ids: Tensor,
    encoder: SemanticEncoder,
    alpha: Tensor | None,
    anchor: Tensor | None,
    blend: Blend,
    projected: Tensor | None = None,
    *,
    workspace: Workspace | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients of `reference.latent_attention_backward` in one launch; any dtypes but float64.

    Those of an alpha or an anchor that several tokens share are then added up by torch.

    Args:
        grad: [M, d], of the output.
        grad_alpha: [M], of alpha.
        queries: [M, H, c].
        inputs: [M, d], what is shifted.
        keys: [N, H, c].
        values: [N, H, d].
        ids: int64 [R, k], the entries of each row, -1: none; R rows share the M tokens evenly.
        encoder: Enc_sem.
        alpha: [1] or [M], a given gate; None: it is computed.
        anchor: [R, d], compared with Enc_sem(h_know); None: the inputs are.
        blend: scale, convention and norm.
        projected: [N, H, r], the values multiplied by w1; None: the kernel multiplies.
        workspace: None: that of the current stream.
    """
    m, d = inputs.shape
    heads, c = queries.shape[1:]
    r, k = encoder.w1.shape[0], ids.shape[1]
    to_queries = torch.empty_like(queries, memory_format=torch.contiguous_format)
    to_inputs = torch.empty_like(inputs, memory_format=torch.contiguous_format)
    to_given = inputs.new_empty(m, dtype=torch.float32)
    to_anchor = None if anchor is None else inputs.new_zeros((m, d), dtype=torch.float32)
    if m > 0:
        t = tiling(
            queries, inputs, (keys, values), ids.shape[0], k, r, projected is not None,
            m if anchor is None else anchor.shape[0], BLOCKS_PER_MULTIPROCESSOR * multiprocessors(),
        )  # fmt: skip
        rows = operands(queries, inputs, keys, values, encoder, anchor, projected)
        flat, host, flat_keys, flat_values, weights, anchors, table = rows
        workspace = workspace or workspace_of(inputs.device)
        tokens = t.teams * t.tile
        scores, hidden, know, squares, cosines = t.scratch
        squares = tokens * t.slices * 5
        scratch = (scores, hidden, know, know, squares, cosines, tokens * t.slices * r, scores)
        grad = last_contiguous(grad)
        latent_attention_backward_kernel[(t.teams * t.slices,)](
            grad, grad_alpha.float().contiguous(), flat, host, flat_keys, flat_values, table, ids.contiguous(),
            *weights, alpha, anchors, to_queries, to_inputs, to_given, to_anchor,
            *workspace.floats(*scratch), workspace.counters, grad.stride(0),
            *strides(flat, host, flat_keys, flat_values, table, anchors, alpha),
            heads, c, d, r, k, blend.scale, *t.sizes, *t.switches(blend),
            **options(cooperative=True), enable_fp_fusion=False,
        )  # fmt: skip
    if alpha is not None:
        to_given = (to_given.sum().reshape(1) if alpha.numel() == 1 else to_given).to(alpha.dtype)
    if anchor is not None and to_anchor is not None:
        share = to_anchor.reshape(len(anchor), m // max(len(anchor), 1), d)
        to_anchor = share.sum(1).to(anchor.dtype)
    return to_queries, to_inputs, None if alpha is None else to_given, to_anchor
