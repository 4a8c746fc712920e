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

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._tiles import tile_sizes
from .._triton import (
    Workspace,
    activate,
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
from .triton import operands, strides

TOKENS = 16  # of a tile: the rows of an mma
ENTRIES = 16  # of a step
BLOCKS_PER_MULTIPROCESSOR = 2


class Tiles(NamedTuple):
    """What `unike tune` may change."""

    width: int = 64  # bytes of a row in a step
    hidden: int = 64  # of Enc_sem's r numbers in a step
    slices: int = 128  # at most: each adds to the partial sums that all of a team read


CANDIDATES = {"width": (32, 64, 128), "hidden": (32, 64, 128), "slices": (32, 64, 128)}


@triton.jit
def inverse(x):
    """1 / x, and 0 for 0."""
    return tl.where(x == 0, 0.0, 1.0 / tl.where(x == 0, 1.0, x))


@triton.jit
def entries_at(ids, rows, valid, first, k, KB: tl.constexpr, SHARED: tl.constexpr):
    """Entries first, ..., first + KB - 1 of these rows of ids, -1 where there is none: [BM, KB], or shared [1, KB]."""
    at = first + tl.arange(0, KB)
    if SHARED:
        return tl.load(ids + tl.min(rows) * k + at, mask=at < k, other=-1)[None, :]
    else:
        return tl.load(ids + rows[:, None] * k + at[None, :], mask=valid[:, None] & (at < k)[None, :], other=-1)


@triton.jit
def attended(entry, weight, table, stride, columns, inside, total):
    """total + weight times these columns of the entries' rows; entry: [BM or 1, KB]."""
    if entry.shape[0] == weight.shape[0]:
        there = (entry >= 0)[:, :, None] & inside[None, None, :]
        place = table + entry[:, :, None] * stride + columns[None, None, :]
        rows = tl.load(place, mask=there, other=0.0).to(tl.float32)
        return total + tl.sum(weight[:, :, None] * rows, 1)
    else:
        at = tl.reshape(entry, (entry.shape[1],))
        there = (at >= 0)[:, None] & inside[None, :]
        rows = tl.load(table + at[:, None] * stride + columns[None, :], mask=there, other=0.0)
        return dot(weight, rows, total)


@triton.jit
def matched(entry, query, table, stride, columns, inside, total):
    """total + the products of the queries with these columns of the entries' rows."""
    if entry.shape[0] == query.shape[0]:
        there = (entry >= 0)[:, :, None] & inside[None, None, :]
        place = table + entry[:, :, None] * stride + columns[None, None, :]
        rows = tl.load(place, mask=there, other=0.0).to(tl.float32)
        return total + tl.sum(query.to(tl.float32)[:, None, :] * rows, 2)
    else:
        at = tl.reshape(entry, (entry.shape[1],))
        there = (at >= 0)[:, None] & inside[None, :]
        rows = tl.load(table + at[:, None] * stride + columns[None, :], mask=there, other=0.0)
        return dot(query, rows.T, total)


@triton.jit
def times_rows(x, table):
    """x table^T in float32: [BM, C] and [N, C] -> [BM, N]. One row is no work for tensor cores."""
    if x.shape[0] == 1:
        return tl.sum(x.to(tl.float32) * table.to(tl.float32), 1)[None, :]
    else:
        return dot(x, table.T, tl.zeros((x.shape[0], table.shape[0]), tl.float32))


@triton.jit
def logits_at(parts, entry, m, valid, first, k, slices, size, scale, KB: tl.constexpr):
    """The scaled logits of these entries [BM, KB], -inf where there is none."""
    at = first + tl.arange(0, KB)
    found = (entry >= 0) & valid[:, None]
    total = sum_of_parts(parts + m[:, None] * k + at[None, :], slices, size, found & (at < k)[None, :])
    return tl.where(found, total * scale, float("-inf"))


@triton.jit
def softmax_of(
    parts, ids, rows, valid, m, k, slices, size, scale, BM: tl.constexpr, KB: tl.constexpr, SHARED: tl.constexpr
):  # fmt: skip
    """What to subtract from a head's logits, and what to multiply their exponentials with: [BM] each."""
    largest, mass = tl.full((BM,), float("-inf"), tl.float32), tl.zeros((BM,), tl.float32)
    for first in range(0, k, KB):
        entry = entries_at(ids, rows, valid, first, k, KB, SHARED)
        logits = logits_at(parts, entry, m, valid, first, k, slices, size, scale, KB)
        above = tl.maximum(largest, tl.max(logits, 1))
        # A token without any entry so far has no largest logit to subtract.
        shift = tl.where(above == float("-inf"), 0.0, above)
        mass = mass * tl.exp(largest - shift) + tl.sum(tl.exp(logits - shift[:, None]), 1)
        largest = above
    return tl.where(largest == float("-inf"), 0.0, largest), inverse(mass)


@triton.jit
def averaged(
    table, table_stride, row_stride, ids, rows, valid, parts, m, columns, inside, k, heads, slices, size, scale,
    BM: tl.constexpr, KB: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """The softmax average of the retrieved rows of a table in these columns, the heads' added up: [BM, W]."""
    total = tl.zeros((BM, columns.shape[0]), tl.float32)
    for head in range(heads):
        own = parts + head * (BM * k)
        shift, share = softmax_of(own, ids, rows, valid, m, k, slices, size, scale, BM, KB, SHARED)
        for first in range(0, k, KB):
            entry = entries_at(ids, rows, valid, first, k, KB, SHARED)
            logits = logits_at(own, entry, m, valid, first, k, slices, size, scale, KB)
            weight = tl.exp(logits - shift[:, None]) * share[:, None]
            total = attended(entry, weight, table + head * row_stride, table_stride, columns, inside, total)
    return total


@triton.jit
def logits_in(
    scores, queries, query_stride, query_width, rows, keys, key_stride, ids, id_rows, valid, m, k, heads, c, low, high,
    BM: tl.constexpr, KB: tl.constexpr, WIDTH: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """To scratch: what the columns low, ..., high - 1 give to the logits of each head; query_width apart in queries."""
    for head in range(heads):
        for first in range(0, k, KB):
            entry = entries_at(ids, id_rows, valid, first, k, KB, SHARED)
            total = tl.zeros((BM, KB), tl.float32)
            for start in range(low, high, WIDTH):
                columns = start + tl.arange(0, WIDTH)
                inside = columns < c
                place = queries + rows[:, None] * query_stride + head * query_width + columns[None, :]
                query = tl.load(place, mask=valid[:, None] & inside[None, :], other=0.0)
                total = matched(entry, query, keys + head * c, key_stride, columns, inside, total)
            at = first + tl.arange(0, KB)
            place = scores + head * (BM * k) + m[:, None] * k + at[None, :]
            tl.store(place, total, mask=valid[:, None] & (at < k)[None, :])


@triton.jit
def first_layer(
    hidden, know, w1, projected, projected_stride, ids, id_rows, valid, scores, m, part, k, heads, slices, size, scale,
    d, r, d_slice, r_slice,
    BM: tl.constexpr, KB: tl.constexpr, WIDTH: tl.constexpr, RB: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """To scratch: Enc_sem's first layer without its bias; of projected values, or this slice's share of all of it."""
    if projected is None:
        tl.debug_barrier()  # the block's own h_know
        for low in range(0, r, RB):
            at = low + tl.arange(0, RB)
            total = tl.zeros((BM, RB), tl.float32)
            for start in range(part * d_slice, tl.minimum((part + 1) * d_slice, d), WIDTH):
                columns = start + tl.arange(0, WIDTH)
                inside = columns < d
                there = valid[:, None] & inside[None, :]
                mean = tl.load(know + m[:, None] * d + columns[None, :], mask=there, other=0.0)
                wanted = (at < r)[:, None] & inside[None, :]
                weights = tl.load(w1 + at[:, None] * d + columns[None, :], mask=wanted, other=0.0)
                total += times_rows(mean, weights)
            place = hidden + part * (BM * r) + m[:, None] * r + at[None, :]
            tl.store(place, total, mask=valid[:, None] & (at < r)[None, :])
    else:
        for start in range(part * r_slice, tl.minimum((part + 1) * r_slice, r), WIDTH):
            columns = start + tl.arange(0, WIDTH)
            inside = columns < r
            mean = averaged(
                projected, projected_stride, r, ids, id_rows, valid, scores, m, columns, inside, k, heads, slices,
                size, scale, BM, KB, SHARED,
            )  # fmt: skip
            tl.store(hidden + m[:, None] * r + columns[None, :], mean, mask=valid[:, None] & inside[None, :])


@triton.jit
def pre_activations(hidden, b1, m, at, valid, r, hidden_slices, BM: tl.constexpr):
    """Of these of Enc_sem's r numbers, [BM, RB]; 0 where there are none."""
    known = valid[:, None] & (at < r)[None, :]
    total = sum_of_parts(hidden + m[:, None] * r + at[None, :], hidden_slices, BM * r, known)
    return tl.where(known, total + tl.load(b1 + at, mask=at < r, other=0.0).to(tl.float32)[None, :], 0.0)


@triton.jit
def encoded(hidden, b1, w2, b2, m, columns, inside, valid, r, hidden_slices, BM: tl.constexpr, RB: tl.constexpr):
    """Enc_sem(h_know) in these columns, [BM, W]."""
    sem = tl.zeros((BM, columns.shape[0]), tl.float32)
    for low in range(0, r, RB):
        at = low + tl.arange(0, RB)
        g = activate(pre_activations(hidden, b1, m, at, valid, r, hidden_slices, BM), "gelu")  # of 0 it is 0
        wanted = inside[:, None] & (at < r)[None, :]
        sem += times_rows(g, tl.load(w2 + columns[:, None] * r + at[None, :], mask=wanted, other=0.0))
    sem += tl.load(b2 + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    return tl.where(valid[:, None] & inside[None, :], sem, 0.0)


@triton.jit
def anchor_at(inputs, input_stride, anchor, anchor_stride, per_anchor, rows, columns, there):
    """What Enc_sem(h_know) is compared with, in these columns."""
    if anchor is None:
        place = inputs + rows[:, None] * input_stride
    else:
        place = anchor + (rows // per_anchor)[:, None] * anchor_stride
    return tl.load(place + columns[None, :], mask=there, other=0.0).to(tl.float32)


@triton.jit
def found_any(ids, rows, valid, k, BM: tl.constexpr, KB: tl.constexpr, SHARED: tl.constexpr):
    """Which of the tokens have an entry at all, [BM]."""
    best = tl.full((BM,), -1, tl.int64)
    for first in range(0, k, KB):
        best = tl.maximum(best, tl.max(entries_at(ids, rows, valid, first, k, KB, SHARED), 1))
    return best >= 0


class Tiling(NamedTuple):
    """How tokens and columns are cut, and the arguments of `attend` that say so."""

    tile: int  # tokens: 1 or TOKENS
    shared: bool  # whether the tokens of a tile share their ids
    width: int  # columns of a step
    hidden: int  # numbers of a step
    slices: int
    teams: int
    scratch: tuple[int, ...]  # float32 of scores, hidden, know, squares and cosines
    sizes: tuple[int, ...]

    def switches(self, blend: Blend) -> tuple[object, ...]:
        """The constants of the kernel."""
        entries = ENTRIES if self.tile == 1 or self.shared else 1
        return (
            blend.convention == "eq7",
            blend.norm == "match",
            self.shared,
            self.tile,
            entries,
            self.width,
            self.hidden,
        )


def tiling(
    queries: Tensor, inputs: Tensor, tables: tuple[Tensor, ...], rows: int, k: int, r: int, projected: bool,
    anchors: int, blocks: int,
) -> Tiling:  # fmt: skip
    """For so many rows of ids and anchors, and at most so many blocks. One team for each tile, as far as they fit."""
    m, d = inputs.shape
    heads, c = queries.shape[1:]
    per_row = m // rows if rows < m else m
    tile = TOKENS if per_row >= TOKENS else 1
    tiles_per_row = triton.cdiv(per_row, tile)
    tiles = m // per_row * tiles_per_row
    chosen = Tiles()
    width = chosen.width // max(t.element_size() for t in (queries, *tables))
    steps = triton.cdiv(d, width)
    slices = max(1, min(blocks // tiles, steps, chosen.slices))
    slices = triton.cdiv(steps, triton.cdiv(steps, slices))  # none without columns
    teams = min(tiles, blocks // slices)
    tokens = teams * tile
    scratch = (
        tokens * slices * heads * k, tokens * r * (1 if projected else slices), tokens * d, tokens * slices * 3,
        tokens * slices * 2,
    )  # fmt: skip
    sliced = (triton.cdiv(triton.cdiv(n, width), slices) * width for n in (c, d, r))
    sizes = (m, per_row, m // rows, m // anchors, tiles_per_row, tiles, slices, *sliced)
    return Tiling(tile, rows < m and tile > 1, width, chosen.hidden, slices, teams, scratch, sizes)


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
