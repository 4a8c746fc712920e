"""The patched FFN on a GPU in one launch, for batches of decode size: base weights and extra neurons (Eq. 1, 3 and 6).

Work. In a first phase each block owns a share of the f base neurons, and writes their activations of all tokens to
scratch; the extra neurons of the tokens go to the blocks from the last one backwards. All blocks meet. In a second
phase each block owns a share of the d columns of the output, sums over the base neurons, then over the extra ones of
each token in the order of its list, adds the rank-one term, and rounds once. So every weight is read once, a token's
sum has an order that does not depend on the others, and no partial sum of the output leaves a block.

The alternative, a slice of f for each block and partial outputs in scratch, needs no meeting, but moves blocks M d
float32 twice: 276 MB at M = 64, d = 4096 and 132 blocks, as much as the weights. Activations take M f of the weights'
dtype, written once and read by all blocks from L2: 1.4 MB at M = 64, f = 11008. They are rounded to that dtype, as the
model's own are.

Bound. A gated FFN of d = 4096, f = 11008 in bfloat16 is 271 MB: 81 us of an H100's memory, whatever M is up to 64. The
launch and the meeting, about 3 us, are what fusion costs; the two launches that it saves, about 3 us each, and the side
product's own 2 us, are what it gains. From about 300 tokens on an H100's tensor cores are the limit and a vendor's GEMM
is at its best; between 64 and there this kernel would need larger tiles for nothing, so beyond 64 tokens (32 of
float32) the base is torch's, and the extra neurons are one launch behind it. The
default tile sizes are untuned: see `unike tune`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._tiles import tile_sizes
from .._triton import EVERYBODY, Workspace, activate, dot, last_contiguous, meet, multiprocessors, options, workspace_of
from .reference import EditPool, FFNWeights, ffn
from .triton import add_extra_neurons

MOST_TOKENS = 64
MOST_WIDE_TOKENS = 32  # of float32: its dots split their operands in registers, which suffice for so many
FEWEST_TOKENS = 16  # rows of an mma
EXTRA_WIDTH = 128  # columns of a step over an extra neuron
GROUP = 16  # tokens whose extra neurons a block takes together


class Tiles(NamedTuple):
    """What `unike tune` may change."""

    neurons: int = 32  # of a step, or columns of the output
    width: int = 256  # bytes of a row in a step: 8 KB of weights, in flight twice
    stages: int = 3


CANDIDATES = {"neurons": (16, 32, 64), "width": (128, 256, 512), "stages": (2, 3, 4, 5)}


@triton.jit
def times_weights(x, x_stride, rows, valid, weights, at, used, width, total, WIDTH: tl.constexpr):
    """total + x weights^T of these rows: [BM, width] and [NB, width] -> [BM, NB]."""
    for c in range(0, width, WIDTH):
        columns = c + tl.arange(0, WIDTH)
        inside = (columns < width)[None, :]
        left = tl.load(x + rows[:, None] * x_stride + columns[None, :], mask=valid[:, None] & inside, other=0.0)
        right = tl.load(weights + at[:, None] * width + columns[None, :], mask=used[:, None] & inside, other=0.0)
        total = dot(left, right.T, total)
    return total


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
def neuron_products(x, x_stride, rows, table, at, used, d, WIDTH: tl.constexpr):
    """The product of each token with its own row of a table, [BM]."""
    total = tl.zeros(rows.shape, tl.float32)
    for c in range(0, d, WIDTH):
        columns = c + tl.arange(0, WIDTH)
        there = used[:, None] & (columns < d)[None, :]
        left = tl.load(x + rows[:, None] * x_stride + columns[None, :], mask=there, other=0.0).to(tl.float32)
        right = tl.load(table + at[:, None] * d + columns[None, :], mask=there, other=0.0).to(tl.float32)
        total += tl.sum(left * right, 1)
    return total


@triton.jit(do_not_specialize=["m", "neurons", "per_row", "f_share", "d_share"])
def patched_ffn_kernel(
    x, w_in, b_in, w_up, b_up, w_out, b_out, out,
    keys, key_bias, up, up_bias, values, zeta, beta, indptr, row_indptr, row_edits, token_rows,
    hidden, extra, everybody, m, d, f, x_stride, neurons, per_row, f_share, d_share,
    ACTIVATION: tl.constexpr, BM: tl.constexpr, NB: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr,
    EXTRA_WIDTH: tl.constexpr,
):  # fmt: skip
    """See above."""
    block, blocks = tl.program_id(0), tl.num_programs(0)
    rows = tl.arange(0, BM).to(tl.int64)
    valid = rows < m
    n = tl.arange(0, NB)

    last = tl.minimum((block + 1) * f_share, f)
    for first in range(block * f_share, last, NB):
        at = (first + n).to(tl.int64)
        used = at < last
        gate = times_weights(x, x_stride, rows, valid, w_in, at, used, d, tl.zeros((BM, NB), tl.float32), WIDTH)
        if b_in is not None:
            gate += tl.load(b_in + at, mask=used, other=0.0).to(tl.float32)[None, :]
        h = activate(gate, ACTIVATION)
        if w_up is not None:
            factor = times_weights(x, x_stride, rows, valid, w_up, at, used, d, tl.zeros((BM, NB), tl.float32), WIDTH)
            if b_up is not None:
                factor += tl.load(b_up + at, mask=used, other=0.0).to(tl.float32)[None, :]
            h *= factor
        place = hidden + rows[:, None] * f + at[None, :]
        tl.store(place, h.to(hidden.dtype.element_ty), mask=valid[:, None] & used[None, :])

    turn = blocks - 1 - block
    for low in range(0, m, GROUP):
        token = low + tl.arange(0, GROUP).to(tl.int64)
        start, end = lists_of(token, token < m, row_indptr, token_rows, per_row)
        for slot in range(tl.max(end - start)):
            _, at, behind = neurons_of(start + slot, end, row_edits, indptr)
            count = tl.max(behind - at).to(tl.int32)
            # Of these, the neurons turn, turn + blocks, ... are this block's.
            for j in range(turn, count, blocks):
                mine = at + j
                used = mine < behind
                bias = tl.load(key_bias + mine, mask=used, other=0.0).to(tl.float32)
                o = activate(neuron_products(x, x_stride, token, keys, mine, used, d, EXTRA_WIDTH) + bias, ACTIVATION)
                if up is not None:
                    bias = tl.load(up_bias + mine, mask=used, other=0.0).to(tl.float32)
                    o *= neuron_products(x, x_stride, token, up, mine, used, d, EXTRA_WIDTH) + bias
                # An edit that a list names twice may come from two blocks, with the same bits.
                tl.store(extra + token * neurons + mine, o, mask=used)
            turn = (turn - count % blocks + blocks) % blocks
    meet(everybody, blocks, block == 0)

    last = tl.minimum((block + 1) * d_share, d)
    for first in range(block * d_share, last, NB):
        at = (first + n).to(tl.int64)
        used = at < last
        total = times_weights(hidden, f, rows, valid, w_out, at, used, f, tl.zeros((BM, NB), tl.float32), WIDTH)
        if b_out is not None:
            total += tl.load(b_out + at, mask=used, other=0.0).to(tl.float32)[None, :]
        added = tl.zeros((BM, NB), tl.float32)  # apart: in the layout of these loads, not of the tensor cores' sums
        start, end = lists_of(rows, valid, row_indptr, token_rows, per_row)
        for slot in range(tl.max(end - start)):
            edit, neuron, behind = neurons_of(start + slot, end, row_edits, indptr)
            strength = tl.zeros((BM,), tl.float32)
            for j in range(tl.max(behind - neuron)):
                there = neuron + j < behind
                o = tl.load(extra + rows * neurons + neuron + j, mask=there, other=0.0, cache_modifier=".cg")
                wanted = there[:, None] & used[None, :]
                value = tl.load(values + (neuron + j)[:, None] * d + at[None, :], mask=wanted, other=0.0)
                added += o[:, None] * value.to(tl.float32)
                strength += o
            listed = start + slot < end
            strength *= tl.load(beta + edit, mask=listed, other=0.0).to(tl.float32)
            wanted = listed[:, None] & used[None, :]
            along = tl.load(zeta + edit[:, None] * d + at[None, :], mask=wanted, other=0.0).to(tl.float32)
            added += strength[:, None] * along
        total += added
        place = out + rows[:, None] * d + at[None, :]
        tl.store(place, total.to(out.dtype.element_ty), mask=valid[:, None] & used[None, :])


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
    """FFN(x) + the extra neurons of each token, [M, d], in one launch for up to 64 tokens (32 in float32).

    Args:
        x: [M, d], of any float dtype but float64.
        base: the FFN's weights, likewise.
        pool: the extra neurons of all edits, and the edits of each row.
        activation: one of `ops.ACTIVATIONS`.
        out: [M, d] contiguous, of x's dtype; None: a new tensor.
        workspace: None: that of the current stream.
    """
    (m, d), f = x.shape, base.w_in.shape[0]
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    if m == 0:
        return out
    narrow = x.dtype == base.w_in.dtype == base.w_out.dtype != torch.float32
    if m > (MOST_TOKENS if narrow else MOST_WIDE_TOKENS):
        return _vendor(x, base, pool, activation, out, workspace)
    x = last_contiguous(x)
    base = FFNWeights(*(None if t is None else t.contiguous() for t in base))  # type: ignore[arg-type]
    pool = EditPool(*(None if t is None else t.contiguous() for t in pool))  # type: ignore[arg-type]
    blocks = multiprocessors()
    per_row = 1 if pool.token_rows is not None else m // (len(pool.row_indptr) - 1)
    neurons = pool.keys.shape[0]
    dtype = x.dtype if x.dtype == base.w_out.dtype else torch.float32
    workspace = workspace or workspace_of(x.device)
    hidden, extra = workspace.floats(m * f, m * neurons)
    sizes = tile_sizes("patched_ffn", Tiles(), CANDIDATES)
    width = sizes.width // max(t.element_size() for t in (x, *base) if t is not None)
    rows = max(FEWEST_TOKENS, triton.next_power_of_2(m))
    patched_ffn_kernel[(blocks,)](
        x, *base, out, *pool, hidden.view(dtype), extra, workspace.counters[EVERYBODY:],
        m, d, f, x.stride(0), neurons, per_row, triton.cdiv(f, blocks), triton.cdiv(d, blocks),
        activation, rows, sizes.neurons, width, GROUP, EXTRA_WIDTH, num_warps=4 if rows == FEWEST_TOKENS else 8,
        num_stages=sizes.stages, **options(cooperative=True), enable_fp_fusion=False,
    )  # fmt: skip
    return out
