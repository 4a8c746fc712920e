"""The gradients of latent attention, gate and blend on a GPU, for those of `latent_attention`, in one launch.

They go to queries, inputs, a given alpha and a given anchor; memory and Enc_sem are constants. Work as in the forward
pass: in passes over some hundreds of tokens, teams of blocks for tiles of tokens, matrix products over all tokens of a
pass, and a meeting of all blocks between phases:
  1. logits and softmax in a team; h_know, five squares and products of it, the host and the gradient; the first layer
  2. Enc_sem(h_know), its square and its product with the anchor
  3. the gradients of inputs and anchor; those of Enc_sem(h_know), and of h_know but for what goes through Enc_sem
  4. the second layer backwards
  5. the first layer backwards, hence the gradient of h_know
  6. that times the values, in a team, hence the gradient of the logits; that times the keys: that of the queries.
A given alpha skips 2, 4 and 5. A token without an entry hands its gradient through.

Bound. One token with k = 40, d = 4096, r = 512 in bfloat16 moves keys and values twice, 1.3 MB, w1 once, or twice
without projected values, and w2 twice, 12.6 MB: 4.3 us of an H100's memory, and seven meetings of 1 us.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import (
    Workspace,
    activate,
    activate_slope,
    last_contiguous,
    launch,
    meet,
    multiprocessors,
    options,
    workspace_of,
)
from .reference import Blend, SemanticEncoder
from .triton import (
    added,
    anchor_at,
    averaged,
    biased,
    columns_of,
    found_any,
    inverse,
    item_of,
    logits_in,
    operands,
    parts_of,
    product,
    strides,
    switches,
    tiling,
    tokens_of,
    weigh,
)


@triton.jit
def softmax_backward(scores, weights, heads, scale, K: tl.constexpr, PARTS: tl.constexpr):
    """To scratch: the gradients of a token's logits, in place of its weights, whose gradients come in so many parts."""
    SB: tl.constexpr = min(triton.next_power_of_2(PARTS), max(1, 4096 // K))
    at = tl.arange(0, K)
    for head in range(heads):
        p = tl.load(weights + head * K + at, cache_modifier=".cg")
        total = tl.zeros((SB, K), tl.float32)
        for first in tl.static_range(0, PARTS, SB):
            s = first + tl.arange(0, SB)
            # An entry that there is not has weight 0 and no parts.
            there = (s < PARTS)[:, None] & (p > 0)[None, :]
            place = scores + s[:, None] * (heads * K) + head * K + at[None, :]
            total += tl.load(place, mask=there, other=0.0, cache_modifier=".cg")
        grad = tl.sum(total, 0)
        mean = tl.sum(tl.where(p > 0, p * grad, 0.0), 0)
        tl.debug_barrier()  # all warps have read the weights
        tl.store(weights + head * K + at, tl.where(p > 0, p * (grad - mean), 0.0) * scale)


@triton.jit(do_not_specialize=["heads", "per_row", "per_anchor", "tiles_per_row", "tiles", "pass_tiles", "teams"])
def latent_attention_backward_kernel(
    g, to_alpha, queries, inputs, keys, values, projected, ids, w1, b1, w2, b2, given, anchor,
    to_queries, to_inputs, to_given, to_anchor,
    scores, weights, know, hidden, squares, cosines, active, sem, to_scores, counters, g_stride,
    query_stride, input_stride, key_stride, value_stride, projected_stride, anchor_stride, given_stride,
    heads, c, d, r, scale, per_row, per_anchor, tiles_per_row, tiles, pass_tiles, teams,
    EQ7: tl.constexpr, MATCH: tl.constexpr, k: tl.constexpr, BM: tl.constexpr, SLICES: tl.constexpr,
    GROUPS: tl.constexpr, CUTS: tl.constexpr, WIDTHS: tl.constexpr, ENTRIES: tl.constexpr, GM: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, COLUMN_TILES: tl.constexpr,
):  # fmt: skip
    """See above."""
    K: tl.constexpr = triton.next_power_of_2(k)
    SB: tl.constexpr = 256 if BM == 1 else 2048 // BM
    WIDTH: tl.constexpr = WIDTHS[1]
    block, blocks = tl.program_id(0), tl.num_programs(0)
    team, part = block // SLICES, block % SLICES
    everybody = counters + teams
    m = tl.arange(0, BM)
    size = heads * K
    c_low, c_high = part * CUTS[0], tl.minimum((part + 1) * CUTS[0], c)
    low, high = part * CUTS[1], tl.minimum((part + 1) * CUTS[1], d)
    r_low, r_high = part * CUTS[2], tl.minimum((part + 1) * CUTS[2], r)
    for begin in tl.range(0, tiles, pass_tiles, disable_licm=True):
        end = tl.minimum(begin + pass_tiles, tiles)
        stop = tl.where(team < teams, end, begin)  # blocks that are left over have no team

        for tile in tl.range(begin + team, stop, teams, disable_licm=True):
            slots = (tile - begin) * BM + m
            tokens, exists = tokens_of(slots, begin, end, per_row, tiles_per_row, BM)
            own = ids + (tile // tiles_per_row).to(tl.int64) * k
            # What a token without an entry holds reaches no gradient.
            valid = exists & found_any(own, k)
            shares = weigh(
                scores, weights, queries, query_stride, tokens, exists, keys, key_stride, c, own, heads, scale,
                0, k, c_low, c_high, slots, part, per_row - tile % tiles_per_row * BM, counters + team,
                k, BM, SLICES, GROUPS, ENTRIES[0], WIDTHS[0],
            )  # fmt: skip
            of_know = tl.zeros((BM,), tl.float32)
            of_host, of_anchor, on_know, on_host = of_know, of_know, of_know, of_know
            for start in range(low, high, WIDTH):
                columns = start + tl.arange(0, WIDTH)
                inside = columns < d
                there = valid[:, None] & inside[None, :]
                mean = averaged(
                    values, value_stride, d, shares, size, own, heads, exists, columns, inside, k, K, BM, ENTRIES[1]
                )
                tl.store(know + slots[:, None] * d + columns[None, :], mean, mask=exists[:, None] & inside[None, :])
                host = tl.load(inputs + tokens[:, None] * input_stride + columns[None, :], mask=there, other=0.0)
                host = host.to(tl.float32)
                grad = tl.load(g + tokens[:, None] * g_stride + columns[None, :], mask=there, other=0.0).to(tl.float32)
                other = anchor_at(inputs, input_stride, anchor, anchor_stride, per_anchor, tokens, columns, there)
                of_know += tl.sum(mean * mean, 1)
                of_host += tl.sum(host * host, 1)
                of_anchor += tl.sum(other * other, 1)
                on_know += tl.sum(grad * mean, 1)
                on_host += tl.sum(grad * host, 1)
            left = squares + slots * (5 * SLICES) + part
            tl.store(left, of_know, mask=exists)
            tl.store(left + SLICES, of_host, mask=exists)
            tl.store(left + 2 * SLICES, of_anchor, mask=exists)
            tl.store(left + 3 * SLICES, on_know, mask=exists)
            tl.store(left + 4 * SLICES, on_host, mask=exists)
            if given is None and projected is not None:
                for start in range(r_low, r_high, WIDTHS[2]):
                    columns = start + tl.arange(0, WIDTHS[2])
                    inside = columns < r
                    mean = averaged(
                        projected, projected_stride, r, shares, size, own, heads, exists, columns, inside,
                        k, K, BM, ENTRIES[2],
                    )  # fmt: skip
                    before = biased(mean, b1, columns, inside)
                    place = slots[:, None] * r + columns[None, :]
                    tl.store(hidden + place, before, mask=exists[:, None] & inside[None, :])
                    tl.store(active + place, activate(before, "gelu"), mask=exists[:, None] & inside[None, :])
        meet(everybody, blocks, block == 0)

        if given is None:
            groups = tl.cdiv((end - begin) * BM, GM)
            if projected is None:
                for item in tl.range(block, groups * tl.cdiv(r, FIRST[0]), blocks, disable_licm=True):
                    slots, tokens, exists, columns, inside = item_of(
                        item, groups, begin, end, per_row, tiles_per_row, r, GM, BM, FIRST[0]
                    )
                    total = product(know, w1, d, r, slots, exists, columns, inside, FIRST[1])
                    before = biased(total, b1, columns, inside)
                    place = slots[:, None] * r + columns[None, :]
                    tl.store(hidden + place, before, mask=exists[:, None] & inside[None, :])
                    tl.store(active + place, activate(before, "gelu"), mask=exists[:, None] & inside[None, :])
                meet(everybody, blocks, block == 0)
            for item in tl.range(block, groups * COLUMN_TILES, blocks, disable_licm=True):
                slots, tokens, exists, columns, inside = item_of(
                    item, groups, begin, end, per_row, tiles_per_row, d, GM, BM, SECOND[0]
                )
                total = product(active, w2, r, d, slots, exists, columns, inside, SECOND[1])
                there = exists[:, None] & inside[None, :]
                s = tl.where(there, biased(total, b2, columns, inside), 0.0)
                tl.store(sem + slots[:, None] * d + columns[None, :], s, mask=there)
                other = anchor_at(inputs, input_stride, anchor, anchor_stride, per_anchor, tokens, columns, there)
                products = cosines + slots * (2 * COLUMN_TILES) + item // groups
                tl.store(products, tl.sum(s * s, 1), mask=exists)
                tl.store(products + COLUMN_TILES, tl.sum(s * other, 1), mask=exists)
            meet(everybody, blocks, block == 0)

        for tile in tl.range(begin + team, stop, teams, disable_licm=True):
            slots = (tile - begin) * BM + m
            tokens, exists = tokens_of(slots, begin, end, per_row, tiles_per_row, BM)
            valid = exists & found_any(ids + (tile // tiles_per_row).to(tl.int64) * k, k)
            left = squares + slots * (5 * SLICES)
            of_know, of_host, of_anchor, on_know, on_host = tl.reduce(
                (
                    parts_of(left, valid, SLICES, SB),
                    parts_of(left + SLICES, valid, SLICES, SB),
                    parts_of(left + 2 * SLICES, valid, SLICES, SB),
                    parts_of(left + 3 * SLICES, valid, SLICES, SB),
                    parts_of(left + 4 * SLICES, valid, SLICES, SB),
                ), 1, added,
            )  # fmt: skip
            of_know, host_norm, of_anchor = inverse(tl.sqrt(of_know)), tl.sqrt(of_host), inverse(tl.sqrt(of_anchor))
            if given is None:
                products = cosines + slots * (2 * COLUMN_TILES)
                of_sem = inverse(tl.sqrt(tl.sum(parts_of(products, valid, COLUMN_TILES, SB), 1)))
                both = of_sem * of_anchor
                cosine = tl.sum(parts_of(products + COLUMN_TILES, valid, COLUMN_TILES, SB), 1) * both
                gate = tl.clamp(cosine, 0.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
            else:
                gate = tl.load(given + tokens * given_stride, mask=valid, other=0.0).to(tl.float32)
            share = 1.0 - gate if EQ7 else gate
            stretch = host_norm * of_know if MATCH else tl.full((BM,), 1.0, tl.float32)
            to_gate = stretch * on_know - on_host
            to_gate = (-to_gate if EQ7 else to_gate) + tl.load(to_alpha + tokens, mask=valid, other=0.0)
            tl.store(to_given + tokens, to_gate, mask=exists & (part == 0))
            by_host = share * on_know * of_know * inverse(host_norm) if MATCH else tl.zeros((BM,), tl.float32)
            if given is None:
                to_cosine = tl.where((cosine >= 0) & (cosine <= 1), to_gate, 0.0)
            for start in range(low, high, WIDTH):
                columns = start + tl.arange(0, WIDTH)
                there = valid[:, None] & (columns < d)[None, :]
                everyone = exists[:, None] & (columns < d)[None, :]
                place = slots[:, None] * d + columns[None, :]
                host = tl.load(inputs + tokens[:, None] * input_stride + columns[None, :], mask=there, other=0.0)
                grad = tl.load(g + tokens[:, None] * g_stride + columns[None, :], mask=everyone, other=0.0)
                grad = grad.to(tl.float32)
                total = (1.0 - share)[:, None] * grad + by_host[:, None] * host.to(tl.float32)
                if given is None:
                    other = anchor_at(inputs, input_stride, anchor, anchor_stride, per_anchor, tokens, columns, there)
                    s = tl.load(sem + place, mask=there, other=0.0, cache_modifier=".cg")
                    of_other = both[:, None] * s - (cosine * of_anchor * of_anchor)[:, None] * other
                    of_other = to_cosine[:, None] * of_other
                    if anchor is None:
                        total += of_other
                    else:
                        tl.store(to_anchor + tokens[:, None] * d + columns[None, :], of_other, mask=everyone)
                    to_sem = to_cosine[:, None] * (both[:, None] * other - (cosine * of_sem * of_sem)[:, None] * s)
                    tl.store(sem + place, to_sem, mask=everyone)  # in its place
                result = tl.where(valid[:, None], total, grad).to(to_inputs.dtype.element_ty)
                tl.store(to_inputs + tokens[:, None] * d + columns[None, :], result, mask=everyone)
                to_know = tl.where(valid[:, None], (share * stretch)[:, None] * grad, 0.0)
                if MATCH:
                    mean = tl.load(know + place, mask=there, other=0.0, cache_modifier=".cg")
                    to_know -= (share * stretch * on_know * of_know * of_know)[:, None] * mean
                tl.store(know + place, to_know, mask=everyone)  # in its place
        meet(everybody, blocks, block == 0)

        if given is None:
            groups = tl.cdiv((end - begin) * BM, GM)
            for item in tl.range(block, groups * tl.cdiv(r, FIRST[0]), blocks, disable_licm=True):
                slots, tokens, exists, columns, inside = item_of(
                    item, groups, begin, end, per_row, tiles_per_row, r, GM, BM, FIRST[0]
                )
                total = product(sem, w2, d, r, slots, exists, columns, inside, FIRST[1], True)
                there = exists[:, None] & inside[None, :]
                place = slots[:, None] * r + columns[None, :]
                before = tl.load(hidden + place, mask=there, other=0.0, cache_modifier=".cg")
                tl.store(active + place, total * activate_slope(before, "gelu"), mask=there)  # in its place
            meet(everybody, blocks, block == 0)
            for item in tl.range(block, groups * COLUMN_TILES, blocks, disable_licm=True):
                slots, tokens, exists, columns, inside = item_of(
                    item, groups, begin, end, per_row, tiles_per_row, d, GM, BM, SECOND[0]
                )
                total = product(active, w1, r, d, slots, exists, columns, inside, SECOND[1], True)
                there = exists[:, None] & inside[None, :]
                place = know + slots[:, None] * d + columns[None, :]
                tl.store(place, total + tl.load(place, mask=there, other=0.0, cache_modifier=".cg"), mask=there)
            meet(everybody, blocks, block == 0)

        for tile in tl.range(begin + team, stop, teams, disable_licm=True):
            slots = (tile - begin) * BM + m
            tokens, exists = tokens_of(slots, begin, end, per_row, tiles_per_row, BM)
            own = ids + (tile // tiles_per_row).to(tl.int64) * k
            logits_in(
                to_scores + (slots * SLICES + part) * size, know, d, 0, slots, exists, values, value_stride, d, own,
                heads, 0, k, low, high, K, BM, ENTRIES[1], WIDTH,
            )  # fmt: skip
            meet(counters + team, SLICES, part == 0)
            slot = (tile - begin) * BM
            if BM == 1:  # each block for itself
                shares = weights + (slot * SLICES + part) * size
                softmax_backward(to_scores + slot * SLICES * size, shares, heads, scale, K, SLICES)
                tl.debug_barrier()
            else:  # each block for some of the tokens
                shares = weights + slot * size
                for t in range(part, tl.minimum(BM, per_row - tile % tiles_per_row * BM), SLICES):
                    softmax_backward(to_scores + (slot + t) * SLICES * size, shares + t * size, heads, scale, K, SLICES)
                meet(counters + team, SLICES, part == 0)
            for head in range(heads):
                for start in range(c_low, c_high, WIDTHS[0]):
                    columns = start + tl.arange(0, WIDTHS[0])
                    inside = columns < c
                    total = averaged(
                        keys + head * c, key_stride, c, shares + head * K, size, own, 1, exists, columns, inside,
                        k, K, BM, ENTRIES[0],
                    )  # fmt: skip
                    place = to_queries + tokens[:, None] * (heads * c) + head * c + columns[None, :]
                    there = exists[:, None] & inside[None, :]
                    tl.store(place, total.to(to_queries.dtype.element_ty), mask=there)


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
    ids = columns_of(ids)
    r, k = encoder.w1.shape[0], ids.shape[1]
    to_queries = torch.empty_like(queries, memory_format=torch.contiguous_format)
    to_inputs = torch.empty_like(inputs, memory_format=torch.contiguous_format)
    to_given = inputs.new_empty(m, dtype=torch.float32)
    to_anchor = None if anchor is None else inputs.new_zeros((m, d), dtype=torch.float32)
    if m > 0:
        t = tiling(
            queries, inputs, keys, values, projected, encoder, anchor, len(ids), k, multiprocessors(), training=True
        )
        rows = operands(queries, inputs, keys, values, encoder, anchor, projected)
        flat, host, flat_keys, flat_values, weights, anchors, table = rows
        workspace = workspace or workspace_of(inputs.device)
        scores, shares, know, hidden, squares, cosines = t.scratch
        scratch = scores, shares, know, hidden, squares // 3 * 5, cosines, hidden, know, scores
        grad = last_contiguous(grad)
        launch(
            latent_attention_backward_kernel, t.blocks,
            grad, grad_alpha.float().contiguous(), flat, host, flat_keys, flat_values, table, ids,
            *weights, alpha, anchors, to_queries, to_inputs, to_given, to_anchor,
            *workspace.floats(*scratch), workspace.counters, grad.stride(0),
            *strides(flat, host, flat_keys, flat_values, table, anchors, alpha),
            heads, c, d, r, blend.scale, *t.sizes, *switches(blend), *t.shapes,
            num_warps=t.warps, **options(cooperative=True), enable_fp_fusion=False,
        )  # fmt: skip
    if alpha is not None:
        to_given = (to_given.sum().reshape(1) if alpha.numel() == 1 else to_given).to(alpha.dtype)
    if anchor is not None and to_anchor is not None:
        share = to_anchor.reshape(len(anchor), m // max(len(anchor), 1), d)
        to_anchor = share.sum(1).to(anchor.dtype)
    return to_queries, to_inputs, None if alpha is None else to_given, to_anchor
