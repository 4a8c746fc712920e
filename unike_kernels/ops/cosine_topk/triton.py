"""Exact cosine top-k on a GPU in one launch: estimate, threshold, canonical scores of what is left, and their order.

Work. Blocks meet between the phases.
  1. A block normalises a query: its unit row, and that in float16.
  2. A block estimates its slice of the keys for its group of up to 64 queries: products of float16 on tensor cores. It
     keeps the estimates, and the best of each of some disjoint sets of keys. Keys before and behind all that a query of
     the group may see are not read: a group of tokens that are not shifted reads none.
  3. A block finds the threshold of a query: close to the k-th best of those.
  4. A block scores the keys of its own that reach the threshold canonically: 16 interleaved float64 sums, folded in
     halves. The products of two float32 are exact in float64, so that a fused multiply-add rounds as the definition
     does.
  5. A block counts for each of them how many are better, in all slices: that is its place in the result.

Exactness. An estimate is off by at most `error_bound`. Where k keys have estimates of at least t, they have scores of
at least t - error. A key whose estimate is below t - 2 error has a lower score than all of them, and is not among the k
best: t - 2 error is the threshold. Of 15,000 random keys of d = 4096 about 80 are left for k = 40.

Bound. The keys are read once for a group of queries: 4 N d bytes, 15,000 keys of d = 4096 are 246 MB, 73 us of an
H100's memory at 3.35 TB/s. 64 queries are 7.9 Gflop of float16 products, 8 us. Four meetings of about 1 us, some 10 us
of normalising, choosing and scoring come on top. Tiles are untuned.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import (
    EVERYBODYS,
    GIVEN,
    SCRATCH,
    Launch,
    Workspace,
    given,
    last_contiguous,
    meet,
    multiprocessors,
    options,
)
from . import reference
from .reference import SearchOperands

LANES = tl.constexpr(reference.LANES)
NOTHING = tl.constexpr(-(2**63))  # below every (score, id)
QUERIES = 64  # of a group, at most
KEYS, COLUMNS = tl.constexpr(128), tl.constexpr(32)  # of a tile: 16 KB of float32
STAGES = tl.constexpr(4)  # tiles on their way, and the one in use
PAIRS = tl.constexpr(16)  # of a query and a key, scored at a time
LOOKED_AT = tl.constexpr(2048)  # estimates at a time
LEVELS = tl.constexpr(32)
SPLITS = 8  # of the keys, at least, where a launch has several groups
MOST_RESULTS = tl.constexpr(256)  # of a query
MOST_COLUMNS = 2**20
MOST_ESTIMATES = 2**24  # of a launch: 12 bytes of scratch each
WARPS = 8


@triton.jit
def halved(sums):
    """[S, L] -> [S, L / 2], the first half plus the second."""
    s: tl.constexpr = sums.shape[0]
    width: tl.constexpr = sums.shape[1] // 2
    low, high = tl.split(tl.permute(tl.reshape(sums, (s, 2, width)), (0, 2, 1)))
    return low + high


@triton.jit
def canonical_dot(a, b, norms, there, d):
    """The float64 products of the rows at pointers [S, 1], those of b divided by their norms if there are any: [S]."""
    STEPS: tl.constexpr = max(4, min(32, 512 // b.shape[0]))  # whose loads are on their way together
    sums = tl.zeros((b.shape[0], LANES), tl.float64)
    for first in range(0, d, STEPS * LANES):
        for step in tl.static_range(STEPS):
            at = first + step * LANES + tl.arange(0, LANES)[None, :]
            wanted = there & (at < d)
            x = tl.load(a + at, mask=wanted, other=0.0)
            y = tl.load(b + at, mask=wanted, other=0.0)
            y = y if norms is None else unit(y, norms)
            sums = tl.fma(x.to(tl.float64), y.to(tl.float64), sums)
    return tl.reshape(halved(halved(halved(halved(sums)))), (b.shape[0],))


@triton.jit
def norms_of(rows, there, d):
    """Canonical norms of the rows at pointers [S, 1]: 1 for a zero row, NaN for one that is not finite. [S, 1]."""
    squares = canonical_dot(rows, rows, None, there, d)
    norm = tl.where(squares == 0, 1.0, tl.sqrt(squares))
    return tl.where(squares < float("inf"), norm, float("nan"))[:, None]


@triton.jit
def unit(x, norm):
    """x / norm, rounded to float64 and then to float32, never -0."""
    return (x.to(tl.float64) / norm + 0.0).to(tl.float32)


@triton.jit
def packed(score, position):
    """(score, id) as an int64 whose order is: score descending, then id ascending."""
    bits = score.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - position).to(tl.int64)


@triton.jit
def prepare(query, queries, units, halves, d, query_stride, width):
    """To scratch: the unit row of a query, and the same in float16, with zeros up to the width."""
    W: tl.constexpr = 2048
    row = queries + query.to(tl.int64) * query_stride
    norm = norms_of(row + tl.zeros((1, 1), tl.int32), True, d)
    for first in range(0, width, W):
        at = first + tl.arange(0, W)[None, :]
        x = unit(tl.load(row + at, mask=at < d, other=0.0), norm)
        tl.store(units + query.to(tl.int64) * d + at, x, mask=at < d)
        tl.store(halves + query.to(tl.int64) * width + at, x.to(tl.float16), mask=at < width)


@triton.jit
def sight(query, ranges, m, n):
    """The keys low, ..., high - 1 that each query sees: [BM] both."""
    low = tl.zeros(query.shape, tl.int64)
    high = low + n
    if ranges is not None:
        low = tl.load(ranges + 2 * query, mask=query < m, other=0)
        high = tl.load(ranges + 2 * query + 1, mask=query < m, other=0)
    return low, high


@triton.jit
def narrowed(first, last, low, high):
    """Of the keys first, ..., last - 1 those from the first to the last one that one of these queries sees."""
    low, high = tl.maximum(low, first), tl.minimum(high, last)
    begin = tl.min(tl.where(low < high, low, last), 0)
    end = tl.max(tl.where(low < high, high, first), 0)
    return begin.to(tl.int32), end.to(tl.int32)


@triton.jit
def scan(
    query, low, high, keys, halves, estimates, maxima, first, last, split, splits, m, n, d, key_stride, width,
    NORMALIZED: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """To scratch: the estimates of the keys first, ..., last - 1, -inf where a query does not see the key or is not
    finite, and the best of each of SLOTS sets of them."""
    BM: tl.constexpr = query.shape[0]
    valid = query < m
    best = tl.full((SLOTS, BM), float("-inf"), tl.float32)
    for start in tl.range(first, last, KEYS, num_stages=1):
        key = start + tl.arange(0, KEYS)
        there = (key < last)[:, None]
        rows = keys + key.to(tl.int64)[:, None] * key_stride
        if not NORMALIZED:
            norms = norms_of(rows, there, d)
        total = tl.zeros((KEYS, BM), tl.float32)
        for begin in tl.range(0, width, COLUMNS, num_stages=STAGES):
            column = begin + tl.arange(0, COLUMNS)[None, :]
            x = tl.load(rows + column, mask=there & (column < d), other=0.0)
            x = x if NORMALIZED else unit(x, norms)
            q = tl.load(halves + query[:, None] * width + column, mask=valid[:, None], other=0.0)
            total = tl.dot(x.to(tl.float16), q.T, total)
        seen = there & (key[:, None] >= low[None, :]) & (key[:, None] < high[None, :]) & (total == total)
        total = tl.where(seen, total, float("-inf"))
        tl.store(estimates + query[None, :] * n + key[:, None], total, mask=there & valid[None, :])
        best = tl.maximum(best, tl.max(tl.reshape(total, (KEYS // SLOTS, SLOTS, BM)), 0))
    place = query[None, :] * (splits * SLOTS) + split * SLOTS + tl.arange(0, SLOTS)[:, None]
    tl.store(maxima + place, best, mask=valid[None, :])


@triton.jit
def kth_largest(values, k):
    """The k-th largest of these numbers, or less by up to 2^-20 of their range; -inf where fewer are above that."""
    there = values > float("-inf")
    low, high = tl.min(tl.where(there, values, float("inf")), 0), tl.max(values, 0)
    for _ in range(4):
        step = (high - low) / LEVELS
        levels = low + step * tl.arange(0, LEVELS)
        reached = tl.sum((values[:, None] >= levels[None, :]).to(tl.int32), 0) >= k
        low = tl.max(tl.where(reached, levels, low), 0)
        high = low + step
    return tl.where(tl.sum(there.to(tl.int32), 0) >= k, low, float("-inf"))


@triton.jit
def suspects(query, estimates, thresholds, found, first, begin, end, m, n):
    """To scratch, from `first` on and in ascending order: the keys begin, ..., end - 1 that reach a query's threshold.

    Returns how many they are: [BM].
    """
    BM: tl.constexpr = query.shape[0]
    valid = query < m
    threshold = tl.load(thresholds + query, mask=valid, other=0.0, cache_modifier=".cg")[:, None]
    counts = tl.zeros((BM,), tl.int32)
    for start in range(begin, end, LOOKED_AT // BM):
        key = start + tl.arange(0, LOOKED_AT // BM)[None, :]
        there = valid[:, None] & (key < end)
        estimate = tl.load(estimates + query[:, None] * n + key, mask=there, other=float("-inf"))
        chosen = ((estimate >= threshold) & (estimate > float("-inf"))).to(tl.int32)
        place = query[:, None] * n + first + counts[:, None] + tl.cumsum(chosen, 1) - chosen
        tl.store(found + place, tl.broadcast_to(key.to(tl.int64), place.shape), mask=chosen > 0)
        counts += tl.sum(chosen, 1)
    tl.debug_barrier()
    return counts


@triton.jit
def pairs_of(begin, counts):
    """The rows of PAIRS entries from `begin` on, where each row has so many, and their places in them."""
    pair = begin + tl.arange(0, PAIRS)
    ends = tl.cumsum(counts, 0)
    behind = ends[None, :] <= pair[:, None]
    return tl.sum(behind.to(tl.int32), 1), pair - tl.max(tl.where(behind, ends[None, :], 0), 1)


@triton.jit
def score(query, counts, keys, units, found, first, n, d, key_stride, NORMALIZED: tl.constexpr):
    """Replaces each key that was found by its canonical score and itself, packed."""
    total = tl.sum(counts, 0)
    group = tl.min(query, 0)
    for begin in range(0, total, PAIRS):
        row, at = pairs_of(begin, counts)
        there = row < counts.shape[0]
        place = found + (group + row) * n + first + at
        key = tl.load(place, mask=there, other=0)
        rows = (keys + key * key_stride)[:, None]
        norms = None if NORMALIZED else norms_of(rows, there[:, None], d)
        product = canonical_dot((units + (group + row) * d)[:, None], rows, norms, there[:, None], d)
        tl.store(place, packed(product.to(tl.float32) + 0.0, key), mask=there)


@triton.jit
def rank(query, counts, found, known, scores, ids, first, n, k, splits, per_split, SPLITS: tl.constexpr):
    """Writes the block's pairs to their places among those of all splits."""
    total = tl.sum(counts, 0)
    group = tl.min(query, 0)
    split = tl.arange(0, SPLITS)[None, :]
    for begin in range(0, total, PAIRS):
        row, at = pairs_of(begin, counts)
        there = row < counts.shape[0]
        mine = tl.load(found + (group + row) * n + first + at, mask=there, other=NOTHING)
        others = tl.load(
            known + (group + row)[:, None] * splits + split,
            mask=there[:, None] & (split < splits), other=0, cache_modifier=".cg",
        )  # fmt: skip
        place = tl.zeros((PAIRS,), tl.int32)
        for e in range(tl.max(tl.max(others, 1), 0)):
            other = found + (group + row)[:, None] * n + split * per_split + e
            value = tl.load(other, mask=e < others, other=NOTHING, cache_modifier=".cg")
            place += tl.sum((value > mine[:, None]).to(tl.int32), 1)
        result = (group + row) * k + place
        wanted = there & (place < k)
        if scores is not None:
            ordered = (mine >> 32).to(tl.int32)
            bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
            tl.store(scores + result, bits.to(tl.float32, bitcast=True), mask=wanted)
        tl.store(ids + result, 0x7FFFFFFF - (mine & 0x7FFFFFFF), mask=wanted)


@triton.jit
def search(
    queries, keys, ranges, scores, ids, units, halves, estimates, maxima, thresholds, found, known, everybody,
    m, n, d, query_stride, key_stride, k, splits, per_split, error,
    NORMALIZED: tl.constexpr, BM: tl.constexpr, SLOTS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """What all blocks of a launch do. Without scores only the ids are stored."""
    block, blocks = tl.program_id(0), tl.num_programs(0)
    width = tl.cdiv(d, COLUMNS) * COLUMNS
    for each in range(block, m, blocks):
        prepare(each, queries, units, halves, d, query_stride, width)
    meet(everybody, blocks, block == 0)

    split, group = block % splits, block // splits
    query = group.to(tl.int64) * BM + tl.arange(0, BM)
    first = split * per_split
    last = tl.minimum(first + per_split, n)
    last = tl.where(group * BM < m, last, first)  # blocks that are left over have nothing
    low, high = sight(query, ranges, m, n)
    begin, end = first, last
    if ranges is not None:
        begin, end = narrowed(first, last, low, high)
    if first < last:
        scan(
            query, low, high, keys, halves, estimates, maxima, begin, end, split, splits, m, n, d, key_stride, width,
            NORMALIZED, SLOTS,
        )  # fmt: skip
    meet(everybody, blocks, block == 0)

    COUNT: tl.constexpr = SPLITS * SLOTS
    at = tl.arange(0, COUNT)
    for each in range(block, m, blocks):
        values = tl.load(
            maxima + each * splits * SLOTS + at, mask=at < splits * SLOTS, other=float("-inf"), cache_modifier=".cg"
        )
        tl.store(thresholds + each, kth_largest(values, k) - 2 * error)
    meet(everybody, blocks, block == 0)

    counts = suspects(query, estimates, thresholds, found, first, begin, end, m, n)
    score(query, counts, keys, units, found, first, n, d, key_stride, NORMALIZED)
    tl.store(known + query * splits + split, counts, mask=query < m)
    meet(everybody, blocks, block == 0)

    rank(query, counts, found, known, scores, ids, first, n, k, splits, per_split, SPLITS)
    at, place = tl.arange(0, SPLITS), tl.arange(0, MOST_RESULTS)
    for each in range(block, m, blocks):
        count = tl.load(known + each * splits + at, mask=at < splits, other=0, cache_modifier=".cg")
        empty = (place >= tl.sum(count, 0)) & (place < k)
        if scores is not None:
            tl.store(scores + each * k + place, float("-inf"), mask=empty)
        tl.store(ids + each * k + place, -1, mask=empty)


@triton.jit(do_not_specialize=["m", "n", "k", "splits", "per_split"])
def cosine_topk_kernel(
    queries, keys, ranges, scores, ids, units, halves, estimates, maxima, thresholds, found, known, everybody,
    m, n, d, query_stride, key_stride, k, splits, per_split, error,
    NORMALIZED: tl.constexpr, BM: tl.constexpr, SLOTS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """See above."""
    search(
        queries, keys, ranges, scores, ids, units, halves, estimates, maxima, thresholds, found, known, everybody,
        m, n, d, query_stride, key_stride, k, splits, per_split, error, NORMALIZED, BM, SLOTS, SPLITS,
    )  # fmt: skip


def error_bound(d: int) -> float:
    """How far an estimate can be from the canonical score of its key.

    A unit row x in float16 is off by at most 2^-11 |x| + 2^-25 sqrt(d), of both. A tensor core adds n products with
    an error of at most n 2^-22 / (1 - n 2^-22) of the norms' product. The rest covers the norms, which may be a little
    above 1, and the rounding of scores and thresholds.
    """
    n = -(-d // COLUMNS.value) * COLUMNS.value
    return 1.01 * (2 * (2**-11 + 2**-25 * math.sqrt(d)) + n / (2**22 - n)) + 2**-21


class Tiling(NamedTuple):
    """How queries and keys are cut: a block has a group of queries and a slice of the keys."""

    together: int  # queries of a group
    groups: int
    splits: int  # of the keys
    per_split: int
    slots: int  # sets of a slice's keys whose best estimates are known
    room: int  # for numbers of slices

    @property
    def blocks(self) -> int:
        """Of the launch."""
        return self.groups * self.splits

    @property
    def sizes(self) -> tuple[int, int]:
        """Arguments of the kernel."""
        return self.splits, self.per_split

    @property
    def shapes(self) -> tuple[int, int, int]:
        """And the last ones."""
        return self.together, self.slots, self.room


def queries_of_launch(n: int) -> int:
    """How many queries at most share a launch."""
    return max(1, min(QUERIES * max(1, multiprocessors() // SPLITS), MOST_ESTIMATES // n))


def tiling(m: int, n: int, k: int) -> Tiling:
    """One block a multiprocessor at most, so that all are resident. Four times as many sets as results: the k-th best
    of their best keys is not far from the k-th best of all. What code is compiled for is the same for nearly as many
    groups."""
    together = min(QUERIES, max(16, triton.next_power_of_2(m)))
    groups = -(-m // together)
    most = triton.next_power_of_2(groups)
    slots = triton.next_power_of_2(-(-4 * min(k, n) // _splits(most, n)))
    splits = _splits(groups, n)
    room = triton.next_power_of_2(_splits(most // 2 + 1, n))
    return Tiling(together, groups, splits, _per_split(groups, n), min(KEYS.value, slots), room)


def _per_split(groups: int, n: int) -> int:
    """Keys of a slice where so many groups of queries share the device."""
    return max(16, -(-n // max(1, multiprocessors() // groups)))


def _splits(groups: int, n: int) -> int:
    return -(-n // _per_split(groups, n))


def scratch_of(t: Tiling, m: int, n: int, d: int) -> tuple[int, ...]:
    """float32 of units, halves, estimates, maxima, thresholds, found and known."""
    width = -(-d // COLUMNS.value) * COLUMNS.value
    return m * d, m * width // 2, m * n, m * t.splits * t.slots, m, 2 * m * n, m * t.splits


def typed(scratch: list[Tensor]) -> tuple[Tensor, ...]:
    """The same as the kernel takes it."""
    units, halves, estimates, maxima, thresholds, found, known = scratch
    found = found.view(torch.int64)
    return units, halves.view(torch.float16), estimates, maxima, thresholds, found, known.view(torch.int32)


def takes(n: int, d: int, k: int) -> bool:
    """Whether the kernel searches for so many results."""
    return 0 < k <= MOST_RESULTS.value and 0 < n <= MOST_ESTIMATES and d <= MOST_COLUMNS


def cosine_topk(
    queries: Tensor,
    keys: Tensor,
    k: int,
    normalized: bool = False,
    ranges: Tensor | None = None,
    packed: tuple[Tensor, Tensor, Tensor] | None = None,
    *,
    out: tuple[Tensor, Tensor] | None = None,
    workspace: Workspace | None = None,
) -> tuple[Tensor, Tensor]:
    """The canonical top-k of `reference.cosine_topk`.

    One launch for up to 2^24 pairs of query and key, and 64 queries for every 8 multiprocessors. For more
    than 256 results a query the definition runs instead. Nothing waits for the device: ranges are clipped to the keys.

    Args:
        queries: [M, d], any float dtype but float64.
        keys: [N, d], likewise.
        k: keys to return for each query; may exceed N.
        normalized: the keys are unit rows already.
        ranges: int64 [M, 2], the keys start, ..., stop - 1 that each query sees; None: all.
        packed: not read; the keys are.
        out: scores float32 [M, k] and ids int64 [M, k], contiguous; None: new tensors.
        workspace: None: that of the current stream.
    """
    (m, d), n = queries.shape, len(keys)
    if keys.dtype == torch.float64 or not takes(n, d, k):
        results = reference.cosine_topk(queries, keys, k, normalized, ranges)
        return results if out is None else (out[0].copy_(results[0]), out[1].copy_(results[1]))
    ranges = None if ranges is None else ranges.contiguous()
    if out is None:
        out = queries.new_empty((m, k), dtype=torch.float32), queries.new_empty((m, k), dtype=torch.int64)
    queries, keys = last_contiguous(queries), last_contiguous(keys)
    most = queries_of_launch(n)
    for first in range(0, m, most):
        some = slice(first, first + most)
        few, own = queries[some], None if ranges is None else ranges[some]
        launch = launch_of(SearchOperands(few, keys, k, normalized, own))
        assert launch is not None
        launch(few, own, *(o[some] for o in out), workspace=workspace)
    return out


def launch_of(o: SearchOperands) -> Launch | None:
    """What `cosine_topk` launches for such operands, M >= 1, whose rows are contiguous; None: not just one kernel.

    It is given queries, ranges, scores and ids.
    """
    queries, keys, k, normalized, ranges, _ = o
    (m, d), n = queries.shape, len(keys)
    if keys.dtype == torch.float64 or not takes(n, d, k) or m > queries_of_launch(n):
        return None
    t, keys = tiling(m, n, k), last_contiguous(keys)
    scratch = scratch_of(t, m, n, d)
    arguments = (
        GIVEN, keys, given(ranges), GIVEN, GIVEN, *(SCRATCH for _ in scratch), EVERYBODYS,
        m, n, d, queries.stride(0), keys.stride(0), k, *t.sizes, error_bound(d), normalized, *t.shapes,
    )  # fmt: skip
    return Launch(
        cosine_topk_kernel, t.blocks, arguments, scratch, lambda scratch: typed([*scratch]),
        num_warps=WARPS, **options(cooperative=True),
    )  # fmt: skip
