"""The patched FFN on a GPU in one launch, for batches of decode size: base weights and extra neurons (Eq. 1, 3 and 6).

Work. In a first phase each block owns a share of the f base neurons, and writes their activations of all tokens to
scratch; then the tokens' extra neurons are dealt out to the blocks, the last one first. All blocks meet. In a second
phase each block owns a share of the d columns of the output, sums over the base neurons, then over the extra ones of
each token, whose values have the rank-one term in them, and rounds once. So every weight is read once, a token's sum
has an order that does not depend on the others' edits, and no partial sum of the output leaves a block.

The alternative, a slice of f for each block and partial outputs in scratch, needs no meeting, but moves blocks M d
float32 twice: 276 MB at M = 64, d = 4096 and 132 blocks, as much as the weights. Activations take M f of the weights'
dtype, written once and read by all blocks from L2: 1.4 MB at M = 64, f = 11008. They are rounded to that dtype, as the
model's own are.

Tiles. A block takes its share in one pass wherever the sums fit its registers, gate and factor together: so it reads x
once in the first phase, and the activations once in the second. Weights flow through shared memory, as many steps ahead
as fit there. One block to a multiprocessor: two would each read x and the activations.

Bound. A gated FFN of d = 4096, f = 11008 in bfloat16 is 271 MB: 81 us of an H100's memory, whatever M is. Each block
asks L2 for its weights and for M (d + f) elements: at M = 64 that is as much again, and 100 us. The launch and the
meeting, about 3 us, are what fusion costs; the two launches that it saves, about 3 us each, and the side product's own
2 us, are what it gains. From about 300 tokens on an H100's tensor cores are the limit and a vendor's GEMM is at its
best; beyond 64 tokens (32 of float32) the base is torch's, and the extra neurons are one launch behind it. The default
tile sizes are untuned: see `unike tune`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._tiles import tile_sizes
from .._triton import (
    EVERYBODYS,
    GIVEN,
    SCRATCH,
    Launch,
    Workspace,
    activate,
    dot,
    last_contiguous,
    meet,
    multiprocessors,
    options,
    shared_memory,
)
from .api import one_launch
from .reference import EditPool, FFNWeights, FusedOperands, ffn
from .triton import add_extra_neurons

FEWEST_TOKENS = 16  # rows of an mma
FEWEST_COLUMNS = 16  # of an mma that are multiplied
UNIT = tl.constexpr(4)  # rows: shares are whole units, so that what a block loads and stores of a row is aligned
MOST_STAGES = 8
MOST_SUMS = 2048  # of tokens and columns, for which a block adds up extra neurons together
EXTRA = 8  # extra neurons that a block multiplies together
EXTRA_WIDTH = 512  # columns of a step over them
EXTRA_STAGES = tl.constexpr(4)
APART = tl.constexpr(16)  # blocks between the first ones of two edits of a list: most edits have no more neurons


class Tiles(NamedTuple):
    """What `unike tune` may change."""

    neurons: int = 128  # of a pass, or columns of the output, at most; half as many of float32
    width: int = 256  # columns of a step, at most; a quarter of float32
    stages: int = 4  # steps in shared memory, at least


CANDIDATES = {"neurons": (32, 64, 128), "width": (64, 128, 256), "stages": (3, 4, 6, 8)}


@triton.jit
def times_weights(
    x, x_stride, rows, valid, gate, up, n, used, width, NB: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr
):
    """x gate^T and x up^T (0 without) of these rows: [BM, width] and [NB, width] -> [BM, NB] each."""
    total = tl.zeros((rows.shape[0], NB), tl.float32)
    factor = tl.zeros((rows.shape[0], NB), tl.float32)
    for c in tl.range(0, width, WIDTH, num_stages=STAGES):
        columns = c + tl.arange(0, WIDTH)
        inside = (columns < width)[None, :]
        left = tl.load(x + rows[:, None] * x_stride + columns[None, :], mask=valid[:, None] & inside, other=0.0)
        place, there = n[:, None] * width + columns[None, :], used[:, None] & inside
        total = dot(left, tl.load(gate + place, mask=there, other=0.0).T, total)
        if up is not None:
            factor = dot(left, tl.load(up + place, mask=there, other=0.0).T, factor)
    return total, factor


@triton.jit
def lists_of(rows, valid, row_indptr, token_rows, per_row):
    """Where the list of each token's row starts and ends."""
    row = rows // per_row if token_rows is None else tl.load(token_rows + rows, mask=valid, other=0)
    start = tl.load(row_indptr + row, mask=valid, other=0)
    return start, tl.load(row_indptr + row + 1, mask=valid, other=0)


@triton.jit
def neurons_of(slot, end, row_edits, indptr):
    """The edit at this place of each token's list, and where its neurons start and end; none behind the list's end."""
    there = slot < end
    edit = tl.load(row_edits + slot, mask=there, other=0)
    return edit, tl.load(indptr + edit, mask=there, other=0), tl.load(indptr + edit + 1, mask=there, other=0)


@triton.jit
def neuron_products(x, x_stride, token, table, at, used, d, WIDTH: tl.constexpr):
    """The product of each of these tokens with a row of a table, one for one."""
    total = tl.zeros((token.shape[0], WIDTH), tl.float32)
    for c in tl.range(0, d, WIDTH, num_stages=EXTRA_STAGES):
        columns = c + tl.arange(0, WIDTH)
        there = used[:, None] & (columns < d)[None, :]
        left = tl.load(x + token[:, None] * x_stride + columns[None, :], mask=there, other=0.0)
        right = tl.load(table + at[:, None] * d + columns[None, :], mask=there, other=0.0)
        total += left.to(tl.float32) * right.to(tl.float32)
    return tl.sum(total, 1)


@triton.jit
def write_hidden(
    first, last, x, w_in, b_in, w_up, b_up, hidden, rows, valid, x_stride, d, f,
    ACTIVATION: tl.constexpr, BM: tl.constexpr, NEURONS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The activations of the base neurons first, ..., last - 1."""
    n = tl.arange(0, NEURONS)
    at = first + n
    used = at < last
    skip = first.to(tl.int64) * d
    gate, factor = times_weights(
        x, x_stride, rows, valid, w_in + skip, None if w_up is None else w_up + skip, n, used, d, NEURONS, WIDTH, STAGES
    )
    if b_in is not None:
        gate += tl.load(b_in + at, mask=used, other=0.0).to(tl.float32)[None, :]
    h = activate(gate, ACTIVATION)
    if w_up is not None:
        if b_up is not None:
            factor += tl.load(b_up + at, mask=used, other=0.0).to(tl.float32)[None, :]
        h *= factor
    place = hidden + rows[:, None] * f + at[None, :]
    tl.store(place, h.to(hidden.dtype.element_ty), mask=valid[:, None] & used[None, :])


@triton.jit
def write_columns(
    first, last, hidden, w_out, b_out, out, rows, valid, d, f,
    extra, values, zeta, beta, indptr, row_edits, start, end, neurons,
    BM: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """The columns first, ..., last - 1 of the output."""
    n = tl.arange(0, COLUMNS)
    at = first + n
    used = at < last
    total, _ = times_weights(
        hidden, f, rows, valid, w_out + first.to(tl.int64) * f, None, n, used, f, COLUMNS, WIDTH, STAGES
    )
    if b_out is not None:
        total += tl.load(b_out + at, mask=used, other=0.0).to(tl.float32)[None, :]
    added = tl.zeros((BM, TURN, COLUMNS), tl.float32)
    for slot in range(tl.max(end - start)):
        edit, low, behind = neurons_of(start + slot, end, row_edits, indptr)
        listed = start + slot < end
        strength = tl.load(beta + edit, mask=listed, other=0.0).to(tl.float32)
        place = zeta + edit[:, None] * d + at[None, :]
        along = tl.load(place, mask=listed[:, None] & used[None, :], other=0.0).to(tl.float32)
        along *= strength[:, None]
        for j in range(0, tl.max(behind - low), TURN):
            neuron = low[:, None, None] + (j + tl.arange(0, TURN))[None, :, None]
            there = neuron < behind[:, None, None]
            o = tl.load(extra + rows[:, None, None] * neurons + neuron, mask=there, other=0.0, cache_modifier=".cg")
            value = tl.load(values + neuron * d + at[None, None, :], mask=there & used[None, None, :], other=0.0)
            added += o * (value.to(tl.float32) + along[:, None, :])
    total += tl.sum(added, 1)
    place = out + rows[:, None] * d + at[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=valid[:, None] & used[None, :])


@triton.jit(do_not_specialize=["m", "neurons", "per_row", "f_share", "f_pass", "d_share", "d_pass"])
def patched_ffn_kernel(
    x, w_in, b_in, w_up, b_up, w_out, b_out, out,
    keys, key_bias, up, up_bias, values, zeta, beta, indptr, row_indptr, row_edits, token_rows,
    hidden, extra, everybody, m, d, f, x_stride, neurons, per_row, f_share, f_pass, d_share, d_pass,
    ACTIVATION: tl.constexpr, BM: tl.constexpr,
    ONE_PASS: tl.constexpr, NEURONS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
    ONE_OUT: tl.constexpr, COLUMNS: tl.constexpr, OUT_WIDTH: tl.constexpr, OUT_STAGES: tl.constexpr,
    TURN: tl.constexpr, EXTRA: tl.constexpr, EXTRA_WIDTH: tl.constexpr,
):  # fmt: skip
    """See above."""
    block, blocks = tl.program_id(0), tl.num_programs(0)
    rows = tl.arange(0, BM).to(tl.int64)
    valid = rows < m

    first, last = block * f_share * UNIT, tl.minimum((block + 1) * f_share * UNIT, f)
    base = (x, w_in, b_in, w_up, b_up, hidden, rows, valid, x_stride, d, f)
    # A loop of one pass would keep in registers what does not change from pass to pass.
    if ONE_PASS:
        write_hidden(first, last, *base, ACTIVATION, BM, NEURONS, WIDTH, STAGES)
    else:
        for n in range(first, last, f_pass * UNIT):
            write_hidden(n, tl.minimum(n + f_pass * UNIT, last), *base, ACTIVATION, BM, NEURONS, WIDTH, STAGES)

    start, end = lists_of(rows, valid, row_indptr, token_rows, per_row)
    for slot in range(tl.max(end - start).to(tl.int32)):
        _, low, behind = neurons_of(start + slot, end, row_edits, indptr)
        # The tokens' neurons in one row, of which turn, turn + blocks, ... are this block's. Every edit of a list
        # begins with other blocks; by its number, as Triton 3.7 forgets a number that one turn leaves to the next.
        turn = (blocks - 1 - block + APART * slot) % blocks
        count = (behind - low).to(tl.int32)
        upto = tl.cumsum(count, 0)
        total = tl.max(upto)
        for first in range(turn, total, EXTRA * blocks):
            item = first + blocks * tl.arange(0, EXTRA)
            token = tl.sum((upto[None, :] <= item[:, None]).to(tl.int32), 1).to(tl.int64)
            own = (rows[None, :] == token[:, None]).to(tl.int64)
            mine = item + tl.sum(own * (low - upto + count)[None, :], 1)
            used = item < total
            bias = tl.load(key_bias + mine, mask=used, other=0.0).to(tl.float32)
            o = activate(neuron_products(x, x_stride, token, keys, mine, used, d, EXTRA_WIDTH) + bias, ACTIVATION)
            if up is not None:
                bias = tl.load(up_bias + mine, mask=used, other=0.0).to(tl.float32)
                o *= neuron_products(x, x_stride, token, up, mine, used, d, EXTRA_WIDTH) + bias
            # An edit that a list names twice may come from two blocks, with the same bits.
            tl.store(extra + token * neurons + mine, o, mask=used)
    meet(everybody, blocks, block == 0)

    first, last = block * d_share * UNIT, tl.minimum((block + 1) * d_share * UNIT, d)
    edits = (extra, values, zeta, beta, indptr, row_edits, start, end, neurons)
    if ONE_OUT:
        write_columns(
            first, last, hidden, w_out, b_out, out, rows, valid, d, f, *edits, BM, COLUMNS, OUT_WIDTH, OUT_STAGES, TURN
        )
    else:
        for c in range(first, last, d_pass * UNIT):
            write_columns(
                c, tl.minimum(c + d_pass * UNIT, last), hidden, w_out, b_out, out, rows, valid, d, f, *edits,
                BM, COLUMNS, OUT_WIDTH, OUT_STAGES, TURN,
            )  # fmt: skip


class Passes(NamedTuple):
    """How a block goes through its share of a matrix's rows."""

    share: int  # units of rows that are a block's
    part: int  # of these, in a pass
    tile: int  # rows: the power of two that holds the pass
    width: int  # columns of a step
    stages: int  # steps in shared memory


def passes(count: int, blocks: int, most: int, tables: int, tokens: int, item: int, sizes: Tiles) -> Passes:
    """Of `tables` matrices together that have `count` rows of elements of `item` bytes; a pass has `most` at most."""
    share = -(-count // (UNIT.value * blocks))
    part = -(-share // -(-UNIT.value * share // most))
    tile = max(FEWEST_TOKENS, triton.next_power_of_2(UNIT.value * part))
    column = (tables * tile + tokens) * item
    fitting = triton.next_power_of_2(shared_memory() // (sizes.stages * column) + 1) // 2
    width = max(min(fitting, 4 * sizes.width // item**2), FEWEST_COLUMNS)
    return Passes(share, part, tile, width, min(shared_memory() // (column * width), MOST_STAGES))


def _vendor(
    x: Tensor, base: FFNWeights, pool: EditPool, activation: str, out: Tensor, workspace: Workspace | None
) -> Tensor:
    """The base by torch in x's dtype, the extra neurons in a launch behind it."""
    w = FFNWeights(*(None if t is None else t.to(x.dtype) for t in base))  # type: ignore[arg-type]
    return add_extra_neurons(x, ffn(x, w, activation), pool, activation, out=out, workspace=workspace)


def patched_ffn(
    x: Tensor,
    base: FFNWeights,
    pool: EditPool,
    activation: str,
    *,
    out: Tensor | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """FFN(x) + the extra neurons of each token, [M, d], in one launch for up to 64 tokens (32 in float32) where no
    weights would have to be copied.

    Args:
        x: [M, d], of any float dtype but float64.
        base: the FFN's weights, likewise.
        pool: the extra neurons of all edits, and the edits of each row.
        activation: one of `ops.ACTIVATIONS`.
        out: [M, d] contiguous, of x's dtype; None: a new tensor.
        workspace: None: that of the current stream.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    if not len(x):
        return out
    x = last_contiguous(x)
    launch = launch_of(FusedOperands(x, base, pool, activation))
    if launch is None:
        return _vendor(x, base, pool, activation, out, workspace)
    launch(x, out, workspace=workspace)
    return out


def launch_of(o: FusedOperands) -> Launch | None:
    """What `patched_ffn` launches for activations like these, M >= 1, whose rows are contiguous; it is given x and out.
    None: the base is the vendor's."""
    x, base, pool, activation = o
    if not one_launch(x, base):
        return None
    (m, d), f = x.shape, base.w_in.shape[0]
    pool = EditPool(*(None if t is None else t.contiguous() for t in pool))  # type: ignore[arg-type]
    blocks = multiprocessors()
    per_row = 1 if pool.token_rows is not None else m // (len(pool.row_indptr) - 1)
    neurons = pool.keys.shape[0]
    dtype = x.dtype if x.dtype == base.w_out.dtype else torch.float32
    sizes = tile_sizes("patched_ffn", m, base.w_in.dtype, Tiles(), CANDIDATES)
    rows = max(FEWEST_TOKENS, triton.next_power_of_2(m))
    item = max(t.element_size() for t in (x, *base) if t is not None)
    most = 2 * sizes.neurons // item
    into = passes(f, blocks, most, 1 if base.w_up is None else 2, rows, item, sizes)
    back = passes(d, blocks, min(most, MOST_SUMS // rows), 1, rows, item, sizes)
    arguments = (
        GIVEN, *base, GIVEN, *pool, SCRATCH, SCRATCH, EVERYBODYS,
        m, d, f, x.stride(0), neurons, per_row, into.share, into.part, back.share, back.part, activation, rows,
        into.part == into.share, into.tile, into.width, into.stages,
        back.part == back.share, back.tile, back.width, back.stages, MOST_SUMS // (rows * back.tile),
        EXTRA, EXTRA_WIDTH,
    )  # fmt: skip
    return Launch(
        patched_ffn_kernel, blocks, arguments, (m * f, m * neurons),
        lambda scratch: (scratch[0].view(dtype), scratch[1]),
        num_warps=8, **options(cooperative=True), enable_fp_fusion=False,
    )  # fmt: skip
