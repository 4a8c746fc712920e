"""The gradients of the extra neurons on a GPU, for those of `add_extra_neurons`, in one launch.

With o = act(x K^T + b) (times x U^T + c), a token's gradient g gives g_o = g (V + beta zeta')^T, from there those of
pre-activation and factor, g_a and g_c, and
    to x: g_a K + g_c U       to K, U, V: g_a^T x, g_c^T x, o^T g       to the biases: sums of g_a and g_c over tokens
    to zeta': beta s, to beta: zeta' . s, with s the sum of V's gradient over the edit's neurons.
Work. First as in the forward pass: a team of blocks for each tile of tokens, partial products over the columns of a
block, a meeting, the gradient to x in the block's columns. One block of each team leaves o, g_a and g_c behind, three
numbers for each token and neuron. After a meeting of all blocks, each takes an edit and a few columns and goes through
the tokens in their order, as often as their lists name the edit: no atomics, the same sums in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import (
    EVERYBODY,
    Workspace,
    activate,
    activate_slope,
    dot,
    last_contiguous,
    launch,
    meet,
    options,
    sum_of_parts,
    workspace_of,
)
from .reference import EditPool, ExtraGradients
from .triton import NEURONS, TOKENS, products, tiling, tokens_of

WIDTH = 128  # bytes of a row in a step
MOST_SLICES = 32


@triton.jit
def steered_products(
    g, rows, valid, values, at, used, zeta, beta, edit, d, g_stride, low, high, WIDTH: tl.constexpr
):  # fmt: skip
    """g (V + beta zeta')^T of these tokens and neurons of an edit over the columns low, ..., high - 1."""
    total = tl.zeros((rows.shape[0], at.shape[0]), tl.float32)
    strength = tl.load(beta + edit).to(tl.float32)
    for c in range(low, high, WIDTH):
        columns = c + tl.arange(0, WIDTH)
        inside = columns < d
        there = valid[:, None] & inside[None, :]
        left = tl.load(g + rows[:, None] * g_stride + columns[None, :], mask=there, other=0.0).to(tl.float32)
        wanted = used[:, None] & inside[None, :]
        right = tl.load(values + at[:, None] * d + columns[None, :], mask=wanted, other=0.0).to(tl.float32)
        along = tl.load(zeta + edit * d + columns, mask=inside, other=0.0).to(tl.float32)
        total = dot(left, (right + strength * along[None, :]).T, total)
    return total


@triton.jit
def times_named(edit, rows, tokens, row_indptr, row_edits, token_rows, per_row):
    """How often the lists of these tokens name the edit."""
    valid = rows < tokens
    row = rows // per_row if token_rows is None else tl.load(token_rows + rows, mask=valid, other=0)
    slot = tl.load(row_indptr + row, mask=valid, other=0)
    end = tl.load(row_indptr + row + 1, mask=valid, other=0)
    times = tl.zeros(rows.shape, tl.float32)
    for _ in range(tl.max(end - slot)):
        times += tl.where(tl.load(row_edits + slot, mask=slot < end, other=-1) == edit, 1.0, 0.0)
        slot += 1
    return times


@triton.jit
def token_products(left, rows, times, x, columns, d, x_stride, total):
    """total + left^T x over these tokens; what is not named is not looked at."""
    there = (times > 0)[:, None] & (columns < d)[None, :]
    right = tl.load(x + rows[:, None] * x_stride + columns[None, :], mask=there, other=0.0)
    return dot(left.T, right.to(tl.float32), total)


@triton.jit
def store_as(pointers, values, mask):
    """Rounded to what the pointers point to."""
    tl.store(pointers, values.to(pointers.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["neurons", "edits", "tokens", "per_row", "tiles_per_row", "tiles", "slices"])
def add_extra_neurons_backward_kernel(
    g, x, keys, key_bias, up, up_bias, values, zeta, beta, indptr, row_indptr, row_edits, token_rows,
    to_x, to_keys, to_key_bias, to_up, to_up_bias, to_values, to_zeta, to_beta,
    scratch, left_behind, shares, counters, everybody, d, g_stride, x_stride,
    neurons, edits, tokens, per_row, tiles_per_row, tiles, slices, slice_width,
    ACTIVATION: tl.constexpr, BM: tl.constexpr, NB: tl.constexpr, BT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """See above."""
    block, blocks = tl.program_id(0), tl.num_programs(0)
    team, teams, part = block // slices, blocks // slices, block % slices
    low, high = part * slice_width, tl.minimum((part + 1) * slice_width, d)
    m, n = tl.arange(0, BM), tl.arange(0, NB)
    size = neurons.to(tl.int64) * BM
    turn = slices * (2 if up is None else 3) * size
    half = scratch + team * 2 * turn
    table = neurons.to(tl.int64) * tokens  # numbers of each kind that are left behind: o, g_a, g_c
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
                to_o = steered_products(
                    g, rows, valid, values, at, used, zeta, beta, edit, d, g_stride, low, high, WIDTH // 2
                )
                tl.store(parts + slices * size, to_o, mask=there)
                if up is not None:
                    factor = products(x, rows, valid, up, at, used, d, x_stride, low, high, WIDTH)
                    tl.store(parts + 2 * slices * size, factor, mask=there)
        meet(counters + team, slices, part == 0)
        for c in range(low, high, WIDTH):
            columns = c + tl.arange(0, WIDTH)
            inside = columns < d
            total = tl.zeros((BM, WIDTH), tl.float32)
            for slot in range(start, end):
                edit = tl.load(row_edits + slot)
                last = tl.load(indptr + edit + 1)
                for first in range(tl.load(indptr + edit), last, NB):
                    at = first + n
                    used = at < last
                    there = valid[:, None] & used[None, :]
                    wanted = used[:, None] & inside[None, :]
                    parts = half + m[:, None] * neurons + at[None, :]
                    bias = tl.load(key_bias + at, mask=used, other=0.0).to(tl.float32)
                    gate = sum_of_parts(parts, slices, size, there) + bias[None, :]
                    to_o = sum_of_parts(parts + slices * size, slices, size, there)
                    o = activate(gate, ACTIVATION)
                    to_gate = to_o * activate_slope(gate, ACTIVATION)
                    place = left_behind + rows[:, None] * neurons + at[None, :]
                    leave = there & (c == 0)
                    if up is not None:
                        bias = tl.load(up_bias + at, mask=used, other=0.0).to(tl.float32)
                        factor = sum_of_parts(parts + 2 * slices * size, slices, size, there) + bias[None, :]
                        to_factor = tl.where(there, to_o * o, 0.0)
                        to_gate, o = to_gate * factor, o * factor
                        tl.store(place + 2 * table, to_factor, mask=leave)
                        back = tl.load(up + at[:, None] * d + columns[None, :], mask=wanted, other=0.0)
                        total = dot(to_factor, back, total)
                    to_gate = tl.where(there, to_gate, 0.0)
                    tl.store(place, o, mask=leave)
                    tl.store(place + table, to_gate, mask=leave)
                    back = tl.load(keys + at[:, None] * d + columns[None, :], mask=wanted, other=0.0)
                    total = dot(to_gate, back, total)
            store_as(to_x + rows[:, None] * d + columns[None, :], total, valid[:, None] & inside[None, :])
        half += turn
        turn = -turn
    meet(counters + everybody, blocks, block == 0)
    chunks = tl.cdiv(d, WIDTH)
    for task in range(block, edits * chunks, blocks):
        edit = (task // chunks).to(tl.int64)
        columns = task % chunks * WIDTH + tl.arange(0, WIDTH)
        inside = columns < d
        last = tl.load(indptr + edit + 1)
        steered = tl.zeros((WIDTH,), tl.float32)
        for first in range(tl.load(indptr + edit), last, NB):
            at = first + n
            used = at < last
            sum_keys, sum_gate = tl.zeros((NB, WIDTH), tl.float32), tl.zeros((NB,), tl.float32)
            sum_up, sum_factor = tl.zeros((NB, WIDTH), tl.float32), tl.zeros((NB,), tl.float32)
            sum_values = tl.zeros((NB, WIDTH), tl.float32)
            for t in range(0, tokens, BT):
                rows = t + tl.arange(0, BT).to(tl.int64)
                times = times_named(edit, rows, tokens, row_indptr, row_edits, token_rows, per_row)
                wanted = (times > 0)[:, None] & used[None, :]
                place = left_behind + rows[:, None] * neurons + at[None, :]
                o = times[:, None] * tl.load(place, mask=wanted, other=0.0)
                sum_values = token_products(o, rows, times, g, columns, d, g_stride, sum_values)
                to_gate = times[:, None] * tl.load(place + table, mask=wanted, other=0.0)
                sum_keys = token_products(to_gate, rows, times, x, columns, d, x_stride, sum_keys)
                sum_gate += tl.sum(to_gate, 0)
                if up is not None:
                    to_factor = times[:, None] * tl.load(place + 2 * table, mask=wanted, other=0.0)
                    sum_up = token_products(to_factor, rows, times, x, columns, d, x_stride, sum_up)
                    sum_factor += tl.sum(to_factor, 0)
            place = at[:, None] * d + columns[None, :]
            wanted = used[:, None] & inside[None, :]
            first_columns = used & (task % chunks == 0)
            store_as(to_keys + place, sum_keys, wanted)
            store_as(to_key_bias + at, sum_gate, first_columns)
            store_as(to_values + place, sum_values, wanted)
            if up is not None:
                store_as(to_up + place, sum_up, wanted)
                store_as(to_up_bias + at, sum_factor, first_columns)
            steered += tl.sum(sum_values, 0)
        along = tl.load(zeta + edit * d + columns, mask=inside, other=0.0).to(tl.float32)
        store_as(to_zeta + edit * d + columns, tl.load(beta + edit).to(tl.float32) * steered, inside)
        tl.store(shares + task, tl.sum(along * steered))
    meet(counters + everybody, blocks, block == 0)
    for edit in range(block, edits, blocks):
        total = 0.0
        for chunk in range(chunks):
            total += tl.load(shares + edit * chunks + chunk)
        tl.store(to_beta + edit, total.to(to_beta.dtype.element_ty))


def add_extra_neurons_backward(
    grad: Tensor, x: Tensor, pool: EditPool, activation: str, *, workspace: Workspace | None = None
) -> ExtraGradients:
    """The gradients of `add_extra_neurons` except for base_out's, each in the dtype of what it belongs to.

    Args:
        grad: [M, d], of the output, of any float dtype but float64.
        x: [M, d], the FFN's input, likewise.
        pool: the extra neurons of all edits, and the edits of each row.
        activation: one of `ops.ACTIVATIONS`.
        workspace: None: that of the current stream.
    """
    m, d = x.shape
    given = (x, *pool[:7])
    new = torch.zeros_like if m == 0 else torch.empty_like
    grads = tuple(None if t is None else new(t, memory_format=torch.contiguous_format) for t in given)
    if m > 0:
        x, grad = last_contiguous(x), last_contiguous(grad)
        pool = EditPool(*(None if t is None else t.contiguous() for t in pool))  # type: ignore[arg-type]
        neurons, edits = pool.keys.shape[0], pool.zeta.shape[0]
        width = WIDTH // max(t.element_size() for t in (x, grad, pool.keys, pool.values))
        t = tiling(m, d, pool, width, MOST_SLICES)
        kinds = 2 if pool.up is None else 3
        workspace = workspace or workspace_of(x.device)
        parts, left_behind, shares = workspace.floats(
            t.teams * t.slices * 2 * kinds * t.tokens * neurons, kinds * m * neurons, edits * triton.cdiv(d, width)
        )
        launch(
            add_extra_neurons_backward_kernel, t.teams * t.slices,
            grad, x, *pool, *grads, parts, left_behind, shares, workspace.counters, EVERYBODY,
            d, grad.stride(0), x.stride(0), neurons, edits, m, t.per_row, t.tiles_per_row, t.tiles, t.slices,
            t.slice_width, activation, t.tokens, NEURONS, TOKENS, width, **options(cooperative=True),
        )  # fmt: skip
    return ExtraGradients(*grads)  # type: ignore[arg-type]
