"""The extra neurons of edited FFNs on a GPU: out = base + sum over a row's edits of o_e (V_e + beta_e zeta'_e).

Work. A tile of up to 16 tokens of one row, which share their list of edits, belongs to a team of blocks; each block
owns a slice of the columns. Each block multiplies its columns of x and of the keys; the team exchanges these partial
pre-activations through scratch; each block multiplies the activations with its columns of the values. So x, base and
the row's neurons are each read once per tile, and nothing of the size of the output is written but the output. The
order of every sum depends on the row's own list only.

Bound. T tokens of a row with n neurons move (3 T + 2 n + edits) d elements; 10 neurons, one token, d = 4096 and
bfloat16 are 190 KB, 0.06 us of an H100's memory. The launch and one meeting of the team, about 3 us, are what it costs.
More than 32 blocks would not help such a token: each adds to the partial sums that all of them read. Where there are
more tiles than blocks, a team is one block, and a prompt's tokens stream through at the speed of memory.

Memory. Scratch has a place for each neuron of the pool, not for each edit that is listed: a row that names an edit more
than once, which `ops.patched_ffn` refuses and no kernel can look for, gets it as often; so fused, and in gradients.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._tiles import tile_sizes
from .._triton import (
    COUNTERS,
    GIVEN,
    MOST_TEAMS,
    SCRATCH,
    Launch,
    Workspace,
    activate,
    dot,
    last_contiguous,
    meet,
    multiprocessors,
    options,
    sum_of_parts,
)
from .reference import EditPool, ExtraOperands

TOKENS = 16  # of a tile: the rows of an mma
NEURONS = 16  # of a step; most edits have no more
BLOCKS_PER_MULTIPROCESSOR = 2


class Tiles(NamedTuple):
    """What `unike tune` may change."""

    width: int = 256  # bytes of a row in a step
    slices: int = 32  # at most, of the columns


CANDIDATES = {"width": (64, 128, 256), "slices": (8, 16, 32, 64)}


@triton.jit
def tokens_of(tile, token_rows, row_indptr, per_row, tiles_per_row, m):
    """The tokens of a tile, which of them there are, and where the list of their row starts and ends."""
    first = tile // tiles_per_row
    row = first.to(tl.int64) if token_rows is None else tl.load(token_rows + tile)
    offset = tile % tiles_per_row * m.shape[0] + m
    rows = first.to(tl.int64) * per_row + offset
    return rows, offset < per_row, tl.load(row_indptr + row), tl.load(row_indptr + row + 1)


@triton.jit
def products(x, rows, valid, table, at, used, d, x_stride, low, high, WIDTH: tl.constexpr):
    """x table^T of these tokens and neurons over the columns low, ..., high - 1."""
    total = tl.zeros((rows.shape[0], at.shape[0]), tl.float32)
    for c in range(low, high, WIDTH):
        columns = c + tl.arange(0, WIDTH)
        inside = (columns < d)[None, :]
        left = tl.load(x + rows[:, None] * x_stride + columns[None, :], mask=valid[:, None] & inside, other=0.0)
        right = tl.load(table + at[:, None] * d + columns[None, :], mask=used[:, None] & inside, other=0.0)
        total = dot(left, right.T, total)
    return total


@triton.jit(do_not_specialize=["neurons", "per_row", "tiles_per_row", "tiles", "slices"])
def add_extra_neurons_kernel(
    x, base, out, keys, key_bias, up, up_bias, values, zeta, beta, indptr, row_indptr, row_edits, token_rows,
    scratch, counters, d, x_stride, base_stride, neurons, per_row, tiles_per_row, tiles, slices, slice_width,
    ACTIVATION: tl.constexpr, BM: tl.constexpr, NB: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """See above."""
    team, teams, part = tl.program_id(0) // slices, tl.num_programs(0) // slices, tl.program_id(0) % slices
    low, high = part * slice_width, tl.minimum((part + 1) * slice_width, d)
    m, n = tl.arange(0, BM), tl.arange(0, NB)
    # The parts of all the team's slices, and of the factors where there are any. Two halves, used in turn: nobody
    # writes to one before all have read it, as they have met in between.
    size = neurons.to(tl.int64) * BM
    turn = slices * (1 if up is None else 2) * size
    half = scratch + team * 2 * turn
    for tile in range(team, tiles, teams):
        rows, valid, start, end = tokens_of(tile, token_rows, row_indptr, per_row, tiles_per_row, m)
        for slot in range(start, end):
            edit = tl.load(row_edits + slot)
            last = tl.load(indptr + edit + 1)
            for first in range(tl.load(indptr + edit), last, NB):
                at = first + n
                used = at < last
                there = valid[:, None] & used[None, :]
                parts = half + part * size + m[:, None] * neurons + at[None, :]
                gate = products(x, rows, valid, keys, at, used, d, x_stride, low, high, WIDTH)
                tl.store(parts, gate, mask=there)
                if up is not None:
                    factor = products(x, rows, valid, up, at, used, d, x_stride, low, high, WIDTH)
                    tl.store(parts + slices * size, factor, mask=there)
        meet(counters + team, slices, part == 0)
        for c in range(low, high, WIDTH):
            columns = c + tl.arange(0, WIDTH)
            inside = columns < d
            total = tl.zeros((BM, WIDTH), tl.float32)
            for slot in range(start, end):
                edit = tl.load(row_edits + slot)
                last = tl.load(indptr + edit + 1)
                strength = tl.zeros((BM,), tl.float32)
                for first in range(tl.load(indptr + edit), last, NB):
                    at = first + n
                    used = at < last
                    there = valid[:, None] & used[None, :]
                    wanted = used[:, None] & inside[None, :]
                    value = tl.load(values + at[:, None] * d + columns[None, :], mask=wanted, other=0.0)
                    parts = half + m[:, None] * neurons + at[None, :]
                    bias = tl.load(key_bias + at, mask=used, other=0.0).to(tl.float32)
                    o = activate(sum_of_parts(parts, slices, size, there) + bias[None, :], ACTIVATION)
                    if up is not None:
                        bias = tl.load(up_bias + at, mask=used, other=0.0).to(tl.float32)
                        o *= sum_of_parts(parts + slices * size, slices, size, there) + bias[None, :]
                    o = tl.where(there, o, 0.0)
                    total = dot(o, value, total)
                    strength += tl.sum(o, 1)
                strength *= tl.load(beta + edit).to(tl.float32)
                along = tl.load(zeta + edit * d + columns, mask=inside, other=0.0).to(tl.float32)
                total += strength[:, None] * along[None, :]
            there = valid[:, None] & inside[None, :]
            given = tl.load(base + rows[:, None] * base_stride + columns[None, :], mask=there, other=0.0)
            result = (given.to(tl.float32) + total).to(given.dtype)
            result = tl.where(start < end, result, given)  # without an edit the very bits of the base
            tl.store(out + rows[:, None] * d + columns[None, :], result, mask=there)
        half += turn
        turn = -turn


class Tiling(NamedTuple):
    """How the tokens are cut into tiles, and the columns into slices. It depends on nothing that the pool holds."""

    per_row: int  # tokens of a row
    tokens: int  # of a tile: 1 or TOKENS
    tiles_per_row: int
    tiles: int
    slices: int  # blocks of a team
    slice_width: int  # columns
    teams: int


def tiling(m: int, d: int, pool: EditPool, width: int, most_slices: int) -> Tiling:
    """For m tokens; slices are whole steps of `width` columns. One team for each tile, as far as they fit at once."""
    per_row = 1 if pool.token_rows is not None else m // (len(pool.row_indptr) - 1)
    tokens = 1 if per_row == 1 else TOKENS
    tiles_per_row = triton.cdiv(per_row, tokens)
    tiles = m // per_row * tiles_per_row
    blocks = BLOCKS_PER_MULTIPROCESSOR * multiprocessors()
    slice_width = triton.cdiv(d, width * max(1, min(blocks // tiles, most_slices))) * width
    slices = triton.cdiv(d, slice_width)
    return Tiling(per_row, tokens, tiles_per_row, tiles, slices, slice_width, min(blocks // slices, MOST_TEAMS))


def add_extra_neurons(
    x: Tensor,
    base_out: Tensor,
    pool: EditPool,
    activation: str,
    *,
    out: Tensor | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """base_out + the extra neurons of each token, in one launch, [M, d].

    Args:
        x: [M, d], the FFN's input, of any float dtype but float64.
        base_out: [M, d], the FFN's output, likewise.
        pool: the extra neurons of all edits, and the edits of each row.
        activation: one of `ops.ACTIVATIONS`.
        out: [M, d] contiguous, of base_out's dtype, may be base_out; None: a new tensor.
        workspace: None: that of the current stream.
    """
    out = torch.empty_like(base_out, memory_format=torch.contiguous_format) if out is None else out
    if len(x) == 0:
        return out
    x, base_out = last_contiguous(x), last_contiguous(base_out)
    launch_of(ExtraOperands(x, base_out, pool, activation))(x, base_out, out, workspace=workspace)
    return out


def launch_of(o: ExtraOperands) -> Launch:
    """What `add_extra_neurons` launches for activations like these, M >= 1, whose rows are contiguous; it is given x,
    base_out and out."""
    x, base_out, pool, activation = o
    m, d = x.shape
    pool = EditPool(*(None if t is None else t.contiguous() for t in pool))  # type: ignore[arg-type]
    sizes = tile_sizes("add_extra_neurons", m, pool.keys.dtype, Tiles(), CANDIDATES)
    width = sizes.width // max(t.element_size() for t in (x, pool.keys, pool.values))
    t = tiling(m, d, pool, width, sizes.slices)
    teams, neurons = min(t.tiles, t.teams), pool.keys.shape[0]
    arguments = (
        GIVEN, GIVEN, GIVEN, *pool, SCRATCH, COUNTERS, d, x.stride(0), base_out.stride(0),
        neurons, t.per_row, t.tiles_per_row, t.tiles, t.slices, t.slice_width,
        activation, t.tokens, NEURONS, width,
    )  # fmt: skip
    parts = teams * t.slices * 2 * (1 if pool.up is None else 2) * t.tokens * neurons
    return Launch(add_extra_neurons_kernel, teams * t.slices, arguments, (parts,), **options(cooperative=True))
