"""mma.sync: products of small matrices spread over the registers of a warp.

Sums are formed in float64 and rounded once; tensor cores add in an order and with truncations of their own.
"""

from __future__ import annotations

import re

import numpy as np

from .errors import UnsupportedInstructionError
from .floats import decode, encode
from .parser import Instruction
from .registers import Mask, Modifiers, Step, items, per_lane, reader, writer
from .table import implements
from .warps import ALL_LANES, check_members

WARP = 32
BITS = {"f16": 16, "bf16": 16, "tf32": 32, "s8": 8, "u8": 8, "e4m3": 8, "e5m2": 8, "f32": 32, "s32": 32, "f64": 64}
SHAPES = {  # multiplicand type -> (m, n, k)
    "f16": {(16, 8, 8), (16, 8, 16)},
    "bf16": {(16, 8, 8), (16, 8, 16)},
    "tf32": {(16, 8, 4), (16, 8, 8)},
    "s8": {(16, 8, 16), (16, 8, 32)},
    "u8": {(16, 8, 16), (16, 8, 32)},
    "e4m3": {(16, 8, 32)},
    "e5m2": {(16, 8, 32)},
    "f64": {(8, 8, 4), (16, 8, 4), (16, 8, 8), (16, 8, 16)},
}


def fragment(rows: int, columns: int, bits: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Row and column of each element held as (register, lane, element in the register); rows are those of 8 x 4 lanes.

    Lanes 4 r ... 4 r + 3 hold row r of each 8-row tile; a register holds neighbours of a row. Registers go down the
    rows first, then along the columns.
    """
    per_register = max(32 // bits, 1)
    span = 4 * per_register  # columns that one register of all lanes covers
    lane = np.arange(WARP)
    down = rows // 8
    count = down * columns // span
    register = np.arange(count)
    row = (register % down * 8)[:, None, None] + (lane // 4)[None, :, None]
    first = (register // down * span)[:, None, None] + (lane % 4 * per_register)[None, :, None]
    column = first + np.arange(per_register)
    return np.broadcast_to(row, column.shape), column, count


def accumulator(rows: int, columns: int, bits: int) -> tuple[np.ndarray, np.ndarray, int]:
    """As `fragment`, for the sums: two neighbours of a row, in two registers, or in one for f16."""
    lane = np.arange(WARP)
    pairs = np.arange(rows // 8 * (columns // 8))
    row = (pairs % (rows // 8) * 8)[:, None, None] + (lane // 4)[None, :, None]
    column = (pairs // (rows // 8) * 8)[:, None, None] + (lane % 4 * 2)[None, :, None] + np.arange(2)
    row = np.broadcast_to(row, column.shape)
    if bits == 16:
        return row, column, len(pairs)
    row, column = (part.swapaxes(1, 2).reshape(-1, WARP, 1) for part in (row, column))
    return row, column, len(row)


@implements("mma")
def multiply(instruction: Instruction) -> Step:
    """D = A B + C."""
    modifiers = Modifiers(instruction)
    *_, d_type, a_type, b_type, c_type = instruction.modifiers
    for kind in (d_type, a_type, b_type, c_type):
        modifiers.left.remove(kind)
    shape = next((name for name in modifiers.left if re.fullmatch(r"m\d+n\d+k\d+", name)), "")
    modifiers.ignore(shape, "sync", "aligned", "row", "col")
    clamps = modifiers.flag("satfinite")
    modifiers.done()
    m, n, k = map(int, re.findall(r"\d+", shape))
    if (m, n, k) not in SHAPES.get(a_type, ()) or BITS[a_type] != BITS.get(b_type) or d_type != c_type:
        raise UnsupportedInstructionError(f"shape or types of: {instruction.text}")
    if d_type not in ("f16", "f32", "s32", "f64"):
        raise UnsupportedInstructionError(f"accumulator of: {instruction.text}")
    # B is held like A transposed: columns of B are the rows of its fragment.
    layouts = (fragment(m, k, BITS[a_type]), fragment(n, k, BITS[b_type]), accumulator(m, n, BITS[c_type]))
    sizes = ((m, k), (n, k), (m, n))
    kinds = (a_type, b_type, c_type)
    raw = "b64" if a_type == "f64" else "b32"
    reads = []
    for operand, layout in zip(instruction.operands[1:], layouts, strict=True):
        if len(items(operand)) != layout[2]:
            raise UnsupportedInstructionError(f"{len(items(operand))} registers, not {layout[2]}: {instruction.text}")
        reads.append([reader(item, raw) for item in items(operand)])
    writes = [writer(item, raw) for item in items(instruction.operands[0])]
    # where[row, column] -> flat position among (register, lane, element), and back
    gathers = [_positions(layout, size) for layout, size in zip(layouts, sizes, strict=True)]
    scatter = layouts[2][0] * n + layouts[2][1]

    def step(group, mask: Mask) -> None:
        check_members(group, mask, ALL_LANES)
        a, b, c = (
            _numbers(_gather(group, registers, kind), kind)[:, gather]
            for registers, kind, gather in zip(reads, kinds, gathers, strict=True)
        )
        bits = _result(np.matmul(a, b.swapaxes(1, 2)) + c, d_type, clamps)
        spread = bits.reshape(len(bits), -1)[:, scatter]  # (warp, register, lane, element)
        words = np.ascontiguousarray(spread.swapaxes(0, 1)).view(np.uint64 if raw == "b64" else np.uint32)
        for register, write in zip(words, writes, strict=True):
            write(group, mask, register.reshape(-1))

    return step


def _positions(layout: tuple[np.ndarray, np.ndarray, int], size: tuple[int, int]) -> np.ndarray:
    row, column, _ = layout
    where = np.full(size, -1)
    where[row.reshape(-1), column.reshape(-1)] = np.arange(row.size)
    return where


def _gather(group, registers, kind: str) -> np.ndarray:
    """(warp, register x lane x element)"""
    words = np.stack([per_lane(group, read(group)) for read in registers]).reshape(len(registers), -1, WARP)
    words = np.ascontiguousarray(words.swapaxes(0, 1))
    return words.view(f"u{BITS[kind] // 8}").reshape(len(words), -1)


def _numbers(bits: np.ndarray, kind: str) -> np.ndarray:
    if kind in ("s8", "u8", "s32"):
        return bits.view({"s8": "i1", "u8": "u1", "s32": "i4"}[kind]).astype(np.float64)
    if kind == "tf32":
        bits = bits & np.uint32(0xFFFFE000)  # the hardware ignores the low bits
    return decode(bits, kind)


def _result(total: np.ndarray, kind: str, clamps: bool) -> np.ndarray:
    if kind == "f32":
        return total.astype(np.float32).view(np.uint32)
    if kind != "s32":
        return encode(np.ascontiguousarray(total), kind)
    whole = total.astype(np.int64)  # below 2^53, so exact
    return (np.clip(whole, -(2**31), 2**31 - 1) if clamps else whole).astype(np.int32).view(np.uint32)
