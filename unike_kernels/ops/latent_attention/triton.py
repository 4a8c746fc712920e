"""Attention over retrieved memory entries, gate and blend on a GPU, in one launch (paper, Eq. 2, 7 and 8).

Work. Tokens are taken some hundreds at a time, in a pass of four phases; all blocks meet in between.
  1. A tile of tokens belongs to a team of blocks, each with a slice of the columns. Each block adds up its share of the
     logits; the team meets; the softmax is taken once and kept; each block averages the values in its slice, and takes
     their and the host's squares. A tile is one token, whose retrieved rows are read once, some 16 KB at a time; or,
     where a sequence shares its ids, up to 64 tokens, and logits and averages are tensor core products.
  2. Enc_sem's first layer: with `projected` values one more average in phase 1, else a matrix product of its own.
  3. Enc_sem's second layer: a matrix product over all tokens of the pass, so that w2 is read once for 64 of them. A
     block has a tile of tokens and columns, and adds up its share of the squares and of the products with the anchor.
  4. alpha, and the blend, in the tiles and slices of phase 1.
Blocks exchange: for each token k numbers a slice, r of Enc_sem, h_know, and five sums a slice. Everything is added in
an order that depends on shapes alone.

Slices. One token is cut into 128, so that every multiprocessor has a part; four blocks then share the columns of the
keys and split the entries, so that the logits come in 32 parts. Many tokens have a block each.

Bound. One token with k = 40, d = 4096, r = 512 in bfloat16 moves 0.66 MB of keys and values, 0.08 MB of projected
values and 4.2 MB of w2: 1.5 us of an H100's memory. Three meetings of about 1 us and five rounds of loads are what it
takes. 64 tokens move 53 MB, 16 us; 512 tokens 395 MB, 118 us.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._tiles import tile_sizes
from .._triton import (
    COUNTERS,
    GIVEN,
    SCRATCH,
    Launch,
    Workspace,
    activate,
    dot,
    given,
    last_contiguous,
    meet,
    multiprocessors,
    options,
)
from .reference import Blend, LatentOperands, SemanticEncoder

WARPS = 8  # of a multiprocessor, in one block or two
PASS = 1024  # tokens, about: bounds the scratch


class Tiles(NamedTuple):
    """What `unike tune` may change."""

    load: int = 16384  # bytes of retrieved rows that a block reads at a time
    columns: int = 64  # of Enc_sem's second layer in a tile of 64 tokens
    slices: int = 128  # at most, of a token


CANDIDATES = {"load": (8192, 16384, 32768), "columns": (32, 64, 128), "slices": (32, 64, 128)}


@triton.jit
def inverse(x):
    """1 / x, and 0 for 0."""
    return tl.where(x == 0, 0.0, 1.0 / tl.where(x == 0, 1.0, x))


@triton.jit
def split_dot(x, table, total):
    """total + x table with float32 sums. Two bfloat16 parts are a float32 to 2^-18, and cost less than tf32x3."""
    if x.dtype == tl.float32 and table.dtype == tl.bfloat16:
        high = x.to(tl.bfloat16)
        low = (x - high.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(high, table, tl.dot(low, table, total))
    else:
        return dot(x, table, total)


@triton.jit
def parts_of(places, wanted, N: tl.constexpr, NB: tl.constexpr):
    """The N numbers behind each of these places, added up to NB: [BM, NB]."""
    total = tl.zeros((places.shape[0], NB), tl.float32)
    for first in tl.static_range(0, N, NB):
        at = first + tl.arange(0, NB)
        there = wanted[:, None] & (at < N)[None, :]
        total += tl.load(places[:, None] + at[None, :], mask=there, other=0.0, cache_modifier=".cg")
    return total


@triton.jit
def added(a, b, c, d, e, f, g, h, i, j):
    """Five sums in one reduction."""
    return a + f, b + g, c + h, d + i, e + j


@triton.jit
def tokens_of(slots, begin, end, per_row, tiles_per_row, BM: tl.constexpr):
    """The tokens in these places of the pass over the tiles begin, ..., end - 1, and which of them there are."""
    tile = begin + slots // BM
    if BM == 1:
        return tile.to(tl.int64), tile < end
    offset = tile % tiles_per_row * BM + slots % BM
    return (tile // tiles_per_row).to(tl.int64) * per_row + offset, (tile < end) & (offset < per_row)


@triton.jit
def item_of(
    item, groups, begin, end, per_row, tiles_per_row, width, GM: tl.constexpr, BM: tl.constexpr, N: tl.constexpr
):
    """An item of a matrix product over all tokens of a pass, which has so many groups of GM: their slots, the tokens,
    which there are, and N columns of so many, and which there are."""
    slots = item % groups * GM + tl.arange(0, GM)
    tokens, valid = tokens_of(slots, begin, end, per_row, tiles_per_row, BM)
    columns = item // groups * N + tl.arange(0, N)
    return slots, tokens, valid, columns, columns < width


@triton.jit
def entries_at(ids, at, last):
    """Entries before the last one of a token, or -1."""
    return tl.load(ids + at, mask=at < last, other=-1).to(tl.int32)


@triton.jit
def found_any(ids, k: tl.constexpr):
    """Whether there is an entry among a token's k."""
    at = tl.arange(0, triton.next_power_of_2(k))
    return tl.max(tl.load(ids + at, mask=at < k, other=-1), 0) >= 0


@triton.jit
def rows_of(table, stride, entry, columns, inside):
    """These columns of the entries' rows, 0 where there are none: [KB, W]."""
    there = (entry >= 0)[:, None] & inside[None, :]
    place = table + entry[:, None].to(tl.int64) * stride + columns[None, :]
    return tl.load(place, mask=there, other=0.0)


@triton.jit
def logits_in(
    scores, x, x_stride, head_stride, tokens, valid, table, table_stride, width, ids, heads, first, last, low, high,
    K: tl.constexpr, BM: tl.constexpr, KB: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """To scratch: what the columns low, ..., high - 1 give to the products of x with entries first, ..., last - 1."""
    for head in range(heads):
        entry = entries_at(ids, first + tl.arange(0, KB), last)
        for begin in range(first, last, KB):
            at = begin + tl.arange(0, KB)
            found, entry = entry, entries_at(ids, at + KB, last)  # those of the next step, ahead of time
            total = tl.zeros((KB, W) if BM == 1 else (BM, KB), tl.float32)
            for start in range(low, high, W):
                columns = start + tl.arange(0, W)
                inside = columns < width
                rows = rows_of(table + head * width, table_stride, found, columns, inside)
                place = x + tokens[:, None] * x_stride + head * head_stride + columns[None, :]
                query = tl.load(place, mask=valid[:, None] & inside[None, :], other=0.0)
                if BM == 1:
                    total = tl.fma(tl.broadcast_to(query.to(tl.float32), (KB, W)), rows.to(tl.float32), total)
                else:
                    total = split_dot(query, rows.T, total)
            sums = tl.sum(total, 1)[None, :] if BM == 1 else total
            tl.store(scores[:, None] + head * K + at[None, :], sums, mask=valid[:, None] & (at < last)[None, :])


@triton.jit
def softmax_of(scores, weights, ids, heads, scale, k: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr):
    """To scratch: the softmax over a token's entries, 0 behind them, from so many parts of its logits."""
    SB: tl.constexpr = min(triton.next_power_of_2(PARTS), max(1, 4096 // K))
    at = tl.arange(0, K)
    found = tl.load(ids + at, mask=at < k, other=-1) >= 0
    for head in range(heads):
        total = tl.zeros((SB, K), tl.float32)
        for first in tl.static_range(0, PARTS, SB):
            s = first + tl.arange(0, SB)
            there = (s < PARTS)[:, None] & (at < k)[None, :]
            place = scores + s[:, None] * (heads * K) + head * K + at[None, :]
            total += tl.load(place, mask=there, other=0.0, cache_modifier=".cg")
        logits = tl.where(found, tl.sum(total, 0) * scale, float("-inf"))
        largest = tl.max(logits, 0)
        # A token without an entry has no largest logit to subtract.
        lifted = tl.exp(logits - tl.where(largest == float("-inf"), 0.0, largest))
        tl.store(weights + head * K + at, lifted * inverse(tl.sum(lifted, 0)))


@triton.jit
def weigh(
    scores, weights, queries, query_stride, tokens, valid, keys, key_stride, c, ids, heads, scale, first, last, low,
    high, slots, part, count, counter,
    k: tl.constexpr, BM: tl.constexpr, SLICES: tl.constexpr, GROUPS: tl.constexpr, KB: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """A team's logits for a tile, a meeting, and where in scratch the softmax of its first token is."""
    K: tl.constexpr = triton.next_power_of_2(k)
    PARTS: tl.constexpr = SLICES // GROUPS
    size = heads * K
    logits_in(
        scores + (slots * PARTS + part % PARTS) * size, queries, query_stride, c, tokens, valid, keys, key_stride, c,
        ids, heads, first, last, low, high, K, BM, KB, W,
    )  # fmt: skip
    meet(counter, SLICES, part == 0)
    slot = tl.min(slots)
    if BM == 1:  # each block for itself
        shares = weights + (slot * SLICES + part) * size
        softmax_of(scores + slot * PARTS * size, shares, ids, heads, scale, k, K, PARTS)
        tl.debug_barrier()
    else:  # each block for some of the tokens
        shares = weights + slot * size
        for t in range(part, tl.minimum(BM, count), SLICES):
            softmax_of(scores + (slot + t) * PARTS * size, shares + t * size, ids, heads, scale, k, K, PARTS)
        meet(counter, SLICES, part == 0)
    return shares


@triton.jit
def averaged(
    table, stride, width, weights, weight_stride, ids, heads, valid, columns, inside,
    k: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, KB: tl.constexpr,
):  # fmt: skip
    """The weighted sums of the retrieved rows of a table in these columns, the heads' added up: [BM, W]."""
    total = tl.zeros((KB if BM == 1 else BM, columns.shape[0]), tl.float32)
    for head in range(heads):
        entry = entries_at(ids, tl.arange(0, KB), k)
        for first in range(0, k, KB):
            at = first + tl.arange(0, KB)
            rows = rows_of(table + head * width, stride, entry, columns, inside)
            entry = entries_at(ids, at + KB, k)  # those of the next step, ahead of time
            if BM == 1:
                weight = tl.load(weights + head * K + at)
                total = tl.fma(tl.broadcast_to(weight[:, None], total.shape), rows.to(tl.float32), total)
            else:
                place = weights + tl.arange(0, BM)[:, None] * weight_stride + head * K + at[None, :]
                there = valid[:, None] & (at < k)[None, :]
                weight = tl.load(place, mask=there, other=0.0, cache_modifier=".cg")
                total = split_dot(weight, rows, total)
    return tl.sum(total, 0)[None, :] if BM == 1 else total


@triton.jit
def product(x, weights, width, count, slots, valid, columns, inside, R: tl.constexpr, TRANSPOSED: tl.constexpr = False):
    """Rows of scratch by a matrix, x weights^T of [count, width], or x weights of [width, count]: [GM, N].

    One row is no work for tensor cores.
    """
    total = tl.zeros((slots.shape[0], columns.shape[0]), tl.float32)
    for low in range(0, width, R):
        at = low + tl.arange(0, R)
        there = valid[:, None] & (at < width)[None, :]
        rows = tl.load(x + slots[:, None] * width + at[None, :], mask=there, other=0.0, cache_modifier=".cg")
        if TRANSPOSED:
            wanted = (at < width)[:, None] & inside[None, :]
            part = tl.load(weights + at[:, None] * count + columns[None, :], mask=wanted, other=0.0)
            total = split_dot(rows, part, total)
        else:
            wanted = inside[:, None] & (at < width)[None, :]
            part = tl.load(weights + columns[:, None] * width + at[None, :], mask=wanted, other=0.0)
            if slots.shape[0] == 1:
                total += tl.sum(rows * part.to(tl.float32), 1)[None, :]
            else:
                total = split_dot(rows, part.T, total)
    return total


@triton.jit
def biased(total, bias, columns, inside):
    """total + bias in these columns."""
    return total + tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]


@triton.jit
def anchor_at(inputs, input_stride, anchor, anchor_stride, per_anchor, tokens, columns, there):
    """What Enc_sem(h_know) is compared with, in these columns."""
    if anchor is None:
        place = inputs + tokens[:, None] * input_stride
    else:
        place = anchor + (tokens // per_anchor)[:, None] * anchor_stride
    return tl.load(place + columns[None, :], mask=there, other=0.0).to(tl.float32)


@triton.jit(
    do_not_specialize=["blocks", "heads", "per_row", "per_anchor", "tiles_per_row", "tiles", "pass_tiles", "teams"]
)
def latent_attention_kernel(
    blocks, queries, inputs, keys, values, projected, ids, w1, b1, w2, b2, given, anchor, out, alpha,
    scores, weights, know, hidden, squares, cosines, counters,
    query_stride, input_stride, key_stride, value_stride, projected_stride, anchor_stride, given_stride,
    heads, c, d, r, scale, per_row, per_anchor, tiles_per_row, tiles, pass_tiles, teams,
    EQ7: tl.constexpr, MATCH: tl.constexpr, k: tl.constexpr, BM: tl.constexpr, SLICES: tl.constexpr,
    GROUPS: tl.constexpr, CUTS: tl.constexpr, WIDTHS: tl.constexpr, ENTRIES: tl.constexpr, GM: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, COLUMN_TILES: tl.constexpr,
):  # fmt: skip
    """What the first of all blocks do, so many; see above."""
    block = tl.program_id(0)
    K: tl.constexpr = triton.next_power_of_2(k)
    KEY_SLICES: tl.constexpr = SLICES // GROUPS
    GROUP: tl.constexpr = triton.cdiv(k, GROUPS)
    SB: tl.constexpr = 256 if BM == 1 else 2048 // BM
    WIDTH: tl.constexpr = WIDTHS[1]
    team, part = block // SLICES, block % SLICES
    everybody = counters + teams
    m = tl.arange(0, BM)
    c_low, first = part % KEY_SLICES * CUTS[0], part // KEY_SLICES * GROUP
    c_high, last = tl.minimum(c_low + CUTS[0], c), tl.minimum(first + GROUP, k)
    low, high = part * CUTS[1], tl.minimum((part + 1) * CUTS[1], d)
    r_low, r_high = part * CUTS[2], tl.minimum((part + 1) * CUTS[2], r)
    for begin in tl.range(0, tiles, pass_tiles, disable_licm=True):
        end = tl.minimum(begin + pass_tiles, tiles)
        stop = tl.where(team < teams, end, begin)  # blocks that are left over have no team

        for tile in tl.range(begin + team, stop, teams, disable_licm=True):
            slots = (tile - begin) * BM + m
            tokens, valid = tokens_of(slots, begin, end, per_row, tiles_per_row, BM)
            own = ids + (tile // tiles_per_row).to(tl.int64) * k
            shares = weigh(
                scores, weights, queries, query_stride, tokens, valid, keys, key_stride, c, own, heads, scale, first,
                last, c_low, c_high, slots, part, per_row - tile % tiles_per_row * BM, counters + team,
                k, BM, SLICES, GROUPS, ENTRIES[0], WIDTHS[0],
            )  # fmt: skip
            of_know = tl.zeros((BM, WIDTH), tl.float32)
            of_host, of_anchor = of_know, of_know
            for start in range(low, high, WIDTH):
                columns = start + tl.arange(0, WIDTH)
                inside = columns < d
                there = valid[:, None] & inside[None, :]
                host = tl.load(inputs + tokens[:, None] * input_stride + columns[None, :], mask=there, other=0.0)
                mean = averaged(
                    values, value_stride, d, shares, heads * K, own, heads, valid, columns, inside, k, K, BM, ENTRIES[1]
                )
                tl.store(know + slots[:, None] * d + columns[None, :], mean, mask=there)
                of_know += mean * mean
                of_host += host.to(tl.float32) * host.to(tl.float32)
                if anchor is not None:
                    other = anchor_at(inputs, input_stride, anchor, anchor_stride, per_anchor, tokens, columns, there)
                    of_anchor += other * other
            left = squares + slots * (3 * SLICES) + part
            tl.store(left, tl.sum(of_know, 1), mask=valid)
            tl.store(left + SLICES, tl.sum(of_host, 1), mask=valid)
            tl.store(left + 2 * SLICES, tl.sum(of_host if anchor is None else of_anchor, 1), mask=valid)
            if given is None and projected is not None:
                for start in range(r_low, r_high, WIDTHS[2]):
                    columns = start + tl.arange(0, WIDTHS[2])
                    inside = columns < r
                    mean = averaged(
                        projected, projected_stride, r, shares, heads * K, own, heads, valid, columns, inside,
                        k, K, BM, ENTRIES[2],
                    )  # fmt: skip
                    g = activate(biased(mean, b1, columns, inside), "gelu")
                    tl.store(hidden + slots[:, None] * r + columns[None, :], g, mask=valid[:, None] & inside[None, :])
        meet(everybody, blocks, block == 0)

        if given is None:
            groups = tl.cdiv((end - begin) * BM, GM)
            if projected is None:
                for item in tl.range(block, groups * tl.cdiv(r, FIRST[0]), blocks, disable_licm=True):
                    slots, tokens, valid, columns, inside = item_of(
                        item, groups, begin, end, per_row, tiles_per_row, r, GM, BM, FIRST[0]
                    )
                    total = product(know, w1, d, r, slots, valid, columns, inside, FIRST[1])
                    g = activate(biased(total, b1, columns, inside), "gelu")
                    tl.store(hidden + slots[:, None] * r + columns[None, :], g, mask=valid[:, None] & inside[None, :])
                meet(everybody, blocks, block == 0)
            for item in tl.range(block, groups * COLUMN_TILES, blocks, disable_licm=True):
                slots, tokens, valid, columns, inside = item_of(
                    item, groups, begin, end, per_row, tiles_per_row, d, GM, BM, SECOND[0]
                )
                total = product(hidden, w2, r, d, slots, valid, columns, inside, SECOND[1])
                sem = biased(total, b2, columns, inside)
                there = valid[:, None] & inside[None, :]
                other = anchor_at(inputs, input_stride, anchor, anchor_stride, per_anchor, tokens, columns, there)
                products = cosines + slots * (2 * COLUMN_TILES) + item // groups
                tl.store(products, tl.sum(sem * sem, 1), mask=valid)
                tl.store(products + COLUMN_TILES, tl.sum(sem * other, 1), mask=valid)
            meet(everybody, blocks, block == 0)

        for tile in tl.range(begin + team, stop, teams, disable_licm=True):
            slots = (tile - begin) * BM + m
            tokens, valid = tokens_of(slots, begin, end, per_row, tiles_per_row, BM)
            left = squares + slots * (3 * SLICES)
            of_know, of_host = parts_of(left, valid, SLICES, SB), parts_of(left + SLICES, valid, SLICES, SB)
            if given is None:
                of_anchor = parts_of(left + 2 * SLICES, valid, SLICES, SB)
                products = cosines + slots * (2 * COLUMN_TILES)
                of_sem = parts_of(products, valid, COLUMN_TILES, SB)
                along = parts_of(products + COLUMN_TILES, valid, COLUMN_TILES, SB)
                of_know, of_host, of_anchor, of_sem, along = tl.reduce(
                    (of_know, of_host, of_anchor, of_sem, along), 1, added
                )
                cosine = along * inverse(tl.sqrt(of_sem)) * inverse(tl.sqrt(of_anchor))
                gate = tl.clamp(cosine, 0.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
            else:
                of_know, of_host = tl.sum(of_know, 1), tl.sum(of_host, 1)
                gate = tl.load(given + tokens * given_stride, mask=valid, other=0.0).to(tl.float32)
            shifted = found_any(ids + (tile // tiles_per_row).to(tl.int64) * k, k)
            tl.store(alpha + tokens, tl.where(shifted, gate, 0.0), mask=valid & (part == 0))
            share = 1.0 - gate if EQ7 else gate
            stretch = tl.sqrt(of_host) * inverse(tl.sqrt(of_know)) if MATCH else tl.full((BM,), 1.0, tl.float32)
            for start in range(low, high, WIDTH):
                columns = start + tl.arange(0, WIDTH)
                there = valid[:, None] & (columns < d)[None, :]
                host = tl.load(inputs + tokens[:, None] * input_stride + columns[None, :], mask=there, other=0.0)
                place = know + slots[:, None] * d + columns[None, :]
                mean = tl.load(place, mask=there, other=0.0, cache_modifier=".cg")
                blended = (1.0 - share)[:, None] * host.to(tl.float32) + (share * stretch)[:, None] * mean
                result = tl.where(shifted, blended.to(host.dtype), host)  # without an entry the very bits
                tl.store(out + tokens[:, None] * d + columns[None, :], result, mask=there)


class Tiling(NamedTuple):
    """How tokens and columns are cut."""

    blocks: int
    warps: int
    scratch: tuple[int, ...]  # float32 of scores, weights, know, hidden, squares and cosines
    sizes: tuple[int, ...]  # the arguments of the kernel from per_row on
    shapes: tuple[object, ...]  # and those from k on


def _up(n: int) -> int:
    """The next power of two."""
    return 1 << max(0, n - 1).bit_length()


@functools.cache
def _cut(
    tokens: int, rows: int, anchors: int, heads: int, c: int, d: int, r: int, k: int, bytes_of: tuple[int, ...],
    processors: int, warps: int | None, chosen: Tiles, most_tokens: int, training: bool,
) -> Tiling:  # fmt: skip
    """For so many rows of ids and anchors, elements of so many bytes of keys, values, projected values and weights, so
    many multiprocessors, blocks of so many warps, and passes of about so many tokens. In the backward pass entries are
    not split, and one token is multiplied like several."""
    per_row = tokens // rows
    tile = min(32, _up(per_row + 1) // 2) if rows < tokens and per_row >= 16 else 1
    tiles_per_row = -(-per_row // tile)
    tiles = rows * tiles_per_row
    alone = tile == 1
    warps = warps or (WARPS // 2 if alone else WARPS)
    blocks = processors * (WARPS // warps)
    # Columns of a slice come in units of 64 bytes, or of a tensor core product.
    units = [64 // size if alone else max(16, 128 // size) for size in bytes_of]
    steps = -(-d // units[1])
    finely = alone and not training
    most = min(blocks, chosen.slices if finely else 32)
    # A tile costs its columns and, in meetings and latencies, those of about 128 more. Nearly as few share their code.
    counted = _up(tiles) if tiles <= 64 else tiles
    costs = {
        n: -(-counted // (blocks // -(-steps // n))) * (128 + n * units[1])
        for n in (1 << i for i in range(steps.bit_length() + 1))
        if -(-steps // n) <= most
    }
    slices = -(-steps // min(costs, key=costs.__getitem__))
    groups = 4 if finely and slices >= 32 else 1
    key_slices = slices // groups
    teams = min(tiles, blocks // slices)
    pass_tiles = min(tiles, teams * max(1, most_tokens // (teams * tile)))
    cuts = tuple(
        _up(-(-n // (unit * parts))) * unit
        for n, unit, parts in zip((c, d, r), units, (key_slices, slices, slices), strict=False)
    )
    if alone:
        load = chosen.load // 2 if training else chosen.load  # its kernel has no registers for more
        widths = tuple(min(cut, 2048 // size) for cut, size in zip(cuts, bytes_of, strict=False))
        entries = tuple(
            min(_up(n), max(1, load // (width * size)))
            for n, width, size in zip((-(-k // groups), k, k), widths, bytes_of, strict=False)
        )
    else:
        widths, entries = tuple(map(min, cuts, units)), (min(32, max(16, _up(k))),) * 3
    slots = pass_tiles * tile
    # Rows, columns and depth of Enc_sem's matrix products.
    if slots == 1 and not training:
        together, first, second = 1, (4, min(_up(d), 4096 // bytes_of[3])), (32, min(_up(r), 1024 // bytes_of[3]))
    else:
        together = 16 if slots <= 16 else 32 if slots < 128 else 64
        depth = 4096 // (together * bytes_of[3])
        # Each tile of columns reads the hidden layer again; from 512 tokens on wide ones are enough for all blocks.
        columns = 32 if together == 16 else chosen.columns if slots < 512 or training else max(chosen.columns, 128)
        first, second = (16, depth), (columns, depth)
    column_tiles = -(-d // second[0])
    scratch = (
        slots * key_slices * heads * _up(k), slots * (slices if alone else 1) * heads * _up(k), slots * d, slots * r,
        slots * slices * 3, slots * column_tiles * 2,
    )  # fmt: skip
    used = max(teams * slices, min(blocks, -(-slots // together) * column_tiles))
    sizes = per_row, tokens // anchors, tiles_per_row, tiles, pass_tiles, teams
    shapes = k, tile, slices, groups, cuts, widths, entries, together, first, second, column_tiles
    return Tiling(used, warps, scratch, sizes, shapes)


def tiling(
    queries: Tensor, inputs: Tensor, keys: Tensor, values: Tensor, projected: Tensor | None, encoder: SemanticEncoder,
    anchor: Tensor | None, rows: int, k: int, processors: int, warps: int | None = None,
    *, training: bool = False,
) -> Tiling:  # fmt: skip
    """For so many rows of ids and multiprocessors, and blocks of so many warps; or of the backward pass."""
    m, d = inputs.shape
    table = encoder.w1 if projected is None else projected
    return _cut(
        m, rows, m if anchor is None else len(anchor), *queries.shape[1:], d, len(encoder.w1), k,
        tuple(t.element_size() for t in (keys, values, table, encoder.w2)), processors, warps,
        tile_sizes("latent_attention", m, keys.dtype, Tiles(), CANDIDATES), PASS, training,
    )  # fmt: skip


def columns_of(ids: Tensor) -> Tensor:
    """The ids as the kernels read them: at least one a row."""
    return ids.contiguous() if ids.shape[1] else ids.new_full((len(ids), 1), -1, dtype=torch.int64)


def operands(
    queries: Tensor,
    inputs: Tensor,
    keys: Tensor,
    values: Tensor,
    encoder: SemanticEncoder,
    anchor: Tensor | None,
    projected: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, SemanticEncoder, Tensor | None, Tensor | None]:
    """As the kernels read them: heads side by side, in place where a row is contiguous."""
    queries, keys, values = (last_contiguous(t.flatten(1)) for t in (queries, keys, values))
    encoder = SemanticEncoder(*(t.contiguous() for t in encoder))
    anchor = None if anchor is None else last_contiguous(anchor)
    projected = None if projected is None else last_contiguous(projected.flatten(1))
    return queries, last_contiguous(inputs), keys, values, encoder, anchor, projected


def strides(
    queries: Tensor,
    inputs: Tensor,
    keys: Tensor,
    values: Tensor,
    projected: Tensor | None,
    anchor: Tensor | None,
    alpha: Tensor | None,
) -> tuple[int, ...]:
    """Of the rows, as the kernels take them; 0 where there are none, or one for all tokens."""
    rows = (t.stride(0) for t in (queries, inputs, keys, values))
    optional = (0 if t is None else t.stride(0) for t in (projected, anchor))
    return (*rows, *optional, 0 if alpha is None or alpha.numel() == 1 else alpha.stride(0))


def switches(blend: Blend) -> tuple[bool, bool]:
    """EQ7 and MATCH."""
    return blend.convention == "eq7", blend.norm == "match"


def latent_attention(
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
    out: tuple[Tensor, Tensor] | None = None,
    workspace: Workspace | None = None,
) -> tuple[Tensor, Tensor]:
    """The shifted output and alpha, in one launch. Any dtypes but float64; see `reference.latent_attention`.

    Args:
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
        out: [M, d] and float32 [M], contiguous; None: new ones.
        workspace: None: that of the current stream.
    """
    m = len(inputs)
    if out is None:
        out = torch.empty_like(inputs, memory_format=torch.contiguous_format), inputs.new_empty(m, dtype=torch.float32)
    if m == 0:
        return out
    ids, inputs, queries = columns_of(ids), last_contiguous(inputs), heads_in_rows(queries)
    anchor = None if anchor is None else last_contiguous(anchor)
    o = LatentOperands(queries, inputs, keys, values, ids, encoder, alpha, anchor, blend, projected)
    launch_of(o)(queries, inputs, ids, alpha, anchor, *out, workspace=workspace)
    return out


def heads_in_rows(queries: Tensor) -> Tensor:
    """[M, H, c] with the heads of a token side by side, in place where they are."""
    return last_contiguous(queries.flatten(1)).unflatten(1, queries.shape[1:])


def launch_of(o: LatentOperands) -> Launch:
    """What `latent_attention` launches for such operands, M and k >= 1, whose rows are contiguous.

    It is given queries, inputs, ids, alpha, anchor, out and its alpha.
    """
    queries, inputs, keys, values, ids, encoder, alpha, anchor, blend, projected = o
    heads, c = queries.shape[1:]
    d, r, k = inputs.shape[1], encoder.w1.shape[0], ids.shape[1]
    t = tiling(queries, inputs, keys, values, projected, encoder, anchor, len(ids), k, multiprocessors())
    queries, inputs, keys, values, encoder, anchor, projected = operands(
        queries, inputs, keys, values, encoder, anchor, projected
    )
    arguments = (
        t.blocks, GIVEN, GIVEN, keys, values, projected, GIVEN, *encoder, given(alpha), given(anchor), GIVEN, GIVEN,
        *(SCRATCH for _ in t.scratch), COUNTERS,
        *strides(queries, inputs, keys, values, projected, anchor, alpha),
        heads, c, d, r, blend.scale, *t.sizes, *switches(blend), *t.shapes,
    )  # fmt: skip
    # Not fused: a product that is added to its neighbour's in one rounding makes the sums of a warp's lanes differ.
    return Launch(
        latent_attention_kernel, t.blocks, arguments, t.scratch,
        num_warps=t.warps, **options(cooperative=True), enable_fp_fusion=False,
    )  # fmt: skip
