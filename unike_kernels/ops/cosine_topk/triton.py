"""Exact cosine top-k on a GPU in one launch: score, selection and the merge of the blocks' selections.

Work. A block owns a slice of the keys and up to 8 queries, 4 where k is 33 to 64. It normalises its queries into
scratch, scores one tile of keys after another and keeps its best, packed as (score, id) in one integer, so that their
order is one comparison. The last block of a group of queries to finish merges the lists of all. Every score is the
canonical one: 16 interleaved float64 sums, folded in halves. The products of two float32 are exact in float64, so a
fused multiply-add rounds as the definition does. No score leaves its block but those of its list.

Bound. The keys are read once for a block's queries: 4 N d bytes, 15,000 keys of d = 4096 are 246 MB, 73 us of an
H100's memory at 3.35 TB/s. A query costs N d float64 multiply-adds, 61 million or 4 us of its 34 Tflop/s, and 64
queries 230 us: from 20 queries on arithmetic is the limit. A GPU with 1/64 of its speed in float64 (sm_86, sm_89,
sm_120) is bound by it from the second query on: correct there, not fast. Tiles are untuned.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import Workspace, last_contiguous, multiprocessors, options, workspace_of
from . import reference

LANES = tl.constexpr(reference.LANES)
NOTHING = tl.constexpr(-(2**63))  # below every (score, id)
QUERIES = 8  # of a block
PAIRS = 256  # of a query and a key in a tile: 16 float64 sums a thread
SMALLEST_TILE = 32  # keys
MOST_RESULTS = 256  # of a query
WARPS = 8
LISTS = 8  # merged at a time


@triton.jit
def halved(sums):
    """[A, B, L] -> [A, B, L / 2], the first half plus the second."""
    a: tl.constexpr = sums.shape[0]
    b: tl.constexpr = sums.shape[1]
    width: tl.constexpr = sums.shape[2] // 2
    low, high = tl.split(tl.permute(tl.reshape(sums, (a, b, 2, width)), (0, 1, 3, 2)))
    return low + high


@triton.jit
def folded(sums):
    """[A, B, 16] float64 -> [A, B]."""
    a: tl.constexpr = sums.shape[0]
    b: tl.constexpr = sums.shape[1]
    return tl.reshape(halved(halved(halved(halved(sums)))), (a, b))


@triton.jit
def norms(rows, valid, d):
    """Canonical float64 norms of the rows at pointers [A, B, 1]: 1 for a zero row, NaN for one that is not finite."""
    lane = tl.arange(0, LANES)[None, None, :]
    squares = tl.zeros((rows.shape[0], rows.shape[1], LANES), tl.float64)
    for c in range(0, d, LANES):
        x = tl.load(rows + (c + lane), mask=valid & (c + lane < d), other=0.0).to(tl.float64)
        squares = tl.fma(x, x, squares)
    total = folded(squares)
    norm = tl.where(total == 0, 1.0, tl.sqrt(total))
    return tl.where(total < float("inf"), norm, float("nan"))[:, :, None]


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
def better(best, others):
    """The best of two lists of one length."""
    size: tl.constexpr = best.shape[1]
    return tl.topk(tl.reshape(tl.join(best, others), (best.shape[0], 2 * size)), size)


@triton.jit
def search(
    block, queries, keys, ranges, scores, ids, units, lists, counters, m, n, d, query_stride, key_stride, k, splits,
    per_split, NORMALIZED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, LISTS: tl.constexpr,
):  # fmt: skip
    """What a block does of the search. Without scores only the ids are stored."""
    group, split = block // splits, block % splits
    lane = tl.arange(0, LANES)[None, None, :]
    query = group.to(tl.int64) * BM + tl.arange(0, BM)
    valid = (query < m)[:, None, None]

    # The unit queries, for this block alone.
    given = queries + query[:, None, None] * query_stride
    mine = units + (block.to(tl.int64) * BM + tl.arange(0, BM))[:, None, None] * d
    length = norms(given, valid, d)
    for c in range(0, d, LANES):
        inside = valid & (c + lane < d)
        x = tl.load(given + (c + lane), mask=inside, other=0.0)
        tl.store(mine + (c + lane), unit(x, length), mask=inside)
    finite = tl.reshape(length == length, (BM, 1)) & (query < m)[:, None]
    tl.debug_barrier()

    low = tl.zeros((BM, 1), tl.int64)
    high = low + n
    if ranges is not None:
        low = tl.load(ranges + 2 * query, mask=query < m, other=0).to(tl.int64)[:, None]
        high = tl.load(ranges + 2 * query + 1, mask=query < m, other=0).to(tl.int64)[:, None]
    best = tl.full((BM, BN), NOTHING, tl.int64)
    for first in range(split * per_split, tl.minimum((split + 1) * per_split, n), BN):
        key_ids = first + tl.arange(0, BN)
        there = (key_ids < n)[None, :, None]
        rows = keys + key_ids.to(tl.int64)[None, :, None] * key_stride
        if not NORMALIZED:
            norm = norms(rows, there, d)
        sums = tl.zeros((BM, BN, LANES), tl.float64)
        for c in range(0, d, LANES):
            column = c + lane < d
            key = tl.load(rows + (c + lane), mask=there & column, other=0.0)
            key = key.to(tl.float32) if NORMALIZED else unit(key, norm)
            q = tl.load(mine + (c + lane), mask=valid & column, other=0.0)
            sums = tl.fma(q.to(tl.float64), key.to(tl.float64), sums)
        position = key_ids[None, :]
        allowed = finite & (position >= low) & (position < high) & (position < n)
        tile = tl.where(allowed, packed(folded(sums).to(tl.float32) + 0.0, position), NOTHING)
        if tl.max(tl.where(tl.max(tile, 1) > tl.min(best, 1), 1, 0), 0) > 0:
            best = better(best, tile)

    place = tl.arange(0, BN)[None, :]
    last = splits == 1
    if splits > 1:
        slot = lists + (group.to(tl.int64) * splits * BM + tl.arange(0, BM)[:, None]) * BN
        tl.store(slot + split * BM * BN + place, best)
        tl.debug_barrier()
        before = tl.atomic_add(counters + group, 1, sem="acq_rel")
        last = (before & 0x7FFFFFFF) == splits - 1  # the top bit is that of meetings
        if last:
            best = tl.full((BM, BN), NOTHING, tl.int64)
            at = tl.arange(0, LISTS * BN)[None, :]
            for start in range(0, splits, LISTS):
                list_id = start + at // BN
                several = tl.load(  # past L1
                    slot + list_id * (BM * BN) + at % BN, mask=list_id < splits, other=NOTHING, cache_modifier=".cg"
                )
                best = better(best, tl.topk(several, BN))
            tl.store(counters + group, before - (splits - 1))
    if last:
        best = tl.sort(best, descending=True)
        ordered = (best >> 32).to(tl.int32)
        score = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        nothing = best == NOTHING
        wanted = (query < m)[:, None] & (place < k)
        results = query[:, None] * k + place
        if scores is not None:
            tl.store(scores + results, tl.where(nothing, float("-inf"), score), mask=wanted)
        tl.store(ids + results, tl.where(nothing, -1, 0x7FFFFFFF - (best & 0x7FFFFFFF)), mask=wanted)


@triton.jit(do_not_specialize=["m", "n", "k", "splits", "per_split"])
def cosine_topk_kernel(
    queries, keys, ranges, scores, ids, units, lists, counters, m, n, d, query_stride, key_stride, k, splits, per_split,
    NORMALIZED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, LISTS: tl.constexpr,
):  # fmt: skip
    """See above."""
    search(
        tl.program_id(0), queries, keys, ranges, scores, ids, units, lists, counters, m, n, d, query_stride, key_stride,
        k, splits, per_split, NORMALIZED, BM, BN, LISTS,
    )  # fmt: skip


class Tiling(NamedTuple):
    """How queries and keys are cut."""

    together: int  # queries of a group
    tile: int  # keys that are scored at a time, and entries of a list
    groups: int
    splits: int  # of the keys
    per_split: int

    def scratch(self, d: int) -> tuple[int, int]:
        """float32 for the unit queries of each block, and for its list."""
        rows = self.groups * self.splits * self.together
        return rows * d, 2 * rows * self.tile


def tiling(m: int, n: int, k: int) -> Tiling:
    """One block a multiprocessor in all, at most, as long as there are no more groups."""
    tile = max(SMALLEST_TILE, triton.next_power_of_2(k))
    together = min(QUERIES, triton.next_power_of_2(m), PAIRS // tile)
    groups = triton.cdiv(m, together)
    wanted = max(1, multiprocessors() // groups)
    per_split = triton.cdiv(triton.cdiv(n, tile), wanted) * tile
    return Tiling(together, tile, groups, triton.cdiv(n, per_split), per_split)


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
    """The canonical top-k of `reference.cosine_topk` in one launch.

    For more than 256 results a query the definition runs instead. Ranges are read back to be checked; without them
    nothing waits for the device.

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
    if k > MOST_RESULTS or keys.dtype == torch.float64 or n >= 2**31 or n == 0:
        results = reference.cosine_topk(queries, keys, k, normalized, ranges)
        return results if out is None else (out[0].copy_(results[0]), out[1].copy_(results[1]))
    if ranges is not None:
        reference._check_ranges(ranges, n)
        ranges = ranges.contiguous()
    if out is None:
        out = queries.new_empty((m, k), dtype=torch.float32), queries.new_empty((m, k), dtype=torch.int64)
    if m == 0:
        return out
    queries, keys = last_contiguous(queries), last_contiguous(keys)
    t = tiling(m, n, k)
    workspace = workspace or workspace_of(queries.device)
    units, lists = workspace.floats(*t.scratch(d))
    cosine_topk_kernel[(t.groups * t.splits,)](
        queries, keys, ranges, *out, units, lists.view(torch.int64), workspace.counters, m, n, d,
        queries.stride(0), keys.stride(0), k, t.splits, t.per_split,
        normalized, t.together, t.tile, LISTS, num_warps=WARPS, **options(cooperative=False),
    )  # fmt: skip
    return out
