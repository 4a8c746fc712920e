"""Integer arithmetic and logic, and moves."""

from __future__ import annotations

import numpy as np

from .errors import UnsupportedInstructionError
from .parser import Instruction, Vector
from .registers import NUMPY, UNSIGNED, WIDTHS, Mask, Modifiers, Step, items, per_lane, reader, sources, writer
from .table import implements

INTEGERS = {f"{kind}{bits}" for kind in "us" for bits in (8, 16, 32, 64)}


def elementwise(instruction: Instruction, kind: str, count: int, compute, result: str | None = None) -> Step:
    """destination = compute(sources), everything of type `kind` (the destination of `result`, if given)."""
    reads = sources(instruction, kind, count)
    write = writer(instruction.operands[0], result or kind)
    if count == 1:
        (one,) = reads
        return lambda group, mask: write(group, mask, compute(one(group)))
    if count == 2:
        one, two = reads
        return lambda group, mask: write(group, mask, compute(one(group), two(group)))
    return lambda group, mask: write(group, mask, compute(*(read(group) for read in reads)))


def wide_type(kind: str) -> np.dtype:
    """The type of a full product."""
    return np.dtype(f"{NUMPY[kind].kind}{2 * NUMPY[kind].itemsize}")


def high_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper half of the product, exact for 64 bits too."""
    bits = 8 * a.dtype.itemsize
    exact = a.astype(object) * b.astype(object)
    return ((exact >> bits) % (1 << bits)).astype(UNSIGNED[a.dtype.itemsize]).view(a.dtype)


def multiply(kind: str, part: str):
    """mul.lo, mul.hi or mul.wide."""
    if part == "lo":
        return np.multiply
    if part == "hi" and WIDTHS[kind] == 8:
        return high_product
    wide = wide_type(kind)
    if part == "wide":
        return lambda a, b: a.astype(wide) * b.astype(wide)
    shift = 8 * WIDTHS[kind]
    return lambda a, b: ((a.astype(wide) * b.astype(wide)) >> wide.type(shift)).astype(a.dtype)


def integer_mul(instruction: Instruction) -> Step:
    """mul, mad on integers."""
    if "cc" in instruction.modifiers:
        return with_carry(instruction)
    modifiers = Modifiers(instruction)
    kind = modifiers.type()
    part = modifiers.one_of("lo", "hi", "wide")
    modifiers.done()
    if part is None:
        raise UnsupportedInstructionError(f"neither .lo, .hi nor .wide: {instruction.text}")
    result = f"{kind[0]}{2 * int(kind[1:])}" if part == "wide" else kind
    product = multiply(kind, part)
    if instruction.opcode == "mul":
        return elementwise(instruction, kind, 2, product, result)
    a, b, c = instruction.operands[1:]
    read_a, read_b, read_c = reader(a, kind), reader(b, kind), reader(c, result)
    write = writer(instruction.operands[0], result)
    return lambda group, mask: write(group, mask, product(read_a(group), read_b(group)) + read_c(group))


@implements("addc", "subc", "madc")
def with_carry(instruction: Instruction) -> Step:
    """add, sub and mad that set the carry (.cc) or take it in (addc, subc, madc); of a difference, the borrow."""
    modifiers = Modifiers(instruction)
    kind = modifiers.type()
    part = modifiers.one_of("lo", "hi")
    sets, takes = modifiers.flag("cc"), instruction.opcode.endswith("c")
    modifiers.done()
    bits = 8 * WIDTHS[kind]
    reads = [reader(operand, kind) for operand in instruction.operands[1:]]
    write = writer(instruction.operands[0], kind)
    sign = -1 if instruction.opcode.startswith("sub") else 1
    width = UNSIGNED[WIDTHS[kind]]

    def step(group, mask: Mask) -> None:
        *factors, last = (per_lane(group, read(group)).astype(object) for read in reads)
        total = factors[0]
        if len(factors) == 2:
            total = factors[0] * factors[1]
            total = (total >> bits if part == "hi" else total) % (1 << bits)
        total = total % (1 << bits) + sign * (last % (1 << bits))
        if takes:
            total = total + sign * group.carry.astype(object)
        if sets:
            carry = ((total >> bits) & 1).astype(bool)
            group.carry = carry if mask is None else np.where(mask, carry, group.carry)
        write(group, mask, (total % (1 << bits)).astype(width).view(NUMPY[kind]))

    return step


def _quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Towards zero; all ones for a division by zero, as the hardware gives."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    floor = a // safe
    result = floor + ((floor < 0) & (floor * safe != a)) if a.dtype.kind == "i" else floor
    return np.where(b == 0, np.array(-1).astype(a.dtype), result).astype(a.dtype)


def _remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(b == 0, a, a - _quotient(a, b) * b)


INTEGER = {  # opcode -> operands, numpy
    "add": (2, np.add),
    "sub": (2, np.subtract),
    "div": (2, _quotient),
    "rem": (2, _remainder),
    "min": (2, np.minimum),
    "max": (2, np.maximum),
    "neg": (1, np.negative),
    "abs": (1, np.abs),
}


def integer_arithmetic(instruction: Instruction) -> Step:
    """The plain ones."""
    if "cc" in instruction.modifiers:
        return with_carry(instruction)
    modifiers = Modifiers(instruction)
    kind = modifiers.type()
    modifiers.done()
    count, compute = INTEGER[instruction.opcode]
    return elementwise(instruction, kind, count, compute)


implements("rem")(integer_arithmetic)


@implements("and", "or", "xor", "not", "cnot")
def logic(instruction: Instruction) -> Step:
    """Bitwise, on predicates too."""
    modifiers = Modifiers(instruction)
    kind = modifiers.type()
    modifiers.done()
    compute = {
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
        "not": np.invert,
        "cnot": lambda a: (a == 0).astype(a.dtype),
    }[instruction.opcode]
    return elementwise(instruction, kind, 1 if instruction.opcode.endswith("not") else 2, compute)


@implements("lop3")
def lop3(instruction: Instruction) -> Step:
    """Any function of three bits, given as its truth table."""
    modifiers = Modifiers(instruction)
    kind = modifiers.type()
    modifiers.done()
    truth = int(instruction.operands[4].value)
    reads = [reader(operand, kind) for operand in instruction.operands[1:4]]
    write = writer(instruction.operands[0], kind)

    def step(group, mask: Mask) -> None:
        values = [read(group) for read in reads]
        result = np.zeros(1, NUMPY[kind])
        for row in range(8):
            if truth >> row & 1:
                chosen = [v if row >> (2 - i) & 1 else ~v for i, v in enumerate(values)]
                result = result | (chosen[0] & chosen[1] & chosen[2])
        write(group, mask, result)

    return step


@implements("shl", "shr")
def shift(instruction: Instruction) -> Step:
    """Amounts beyond the width shift everything out."""
    modifiers = Modifiers(instruction)
    kind = modifiers.type()
    modifiers.done()
    bits = 8 * WIDTHS[kind]
    read, amount = reader(instruction.operands[1], kind), reader(instruction.operands[2], "u32")
    write = writer(instruction.operands[0], kind)
    signed = kind[0] == "s"
    left = instruction.opcode == "shl"

    def step(group, mask: Mask) -> None:
        value, by = read(group), amount(group)
        inside = np.minimum(by, bits - 1).astype(value.dtype)
        result = value << inside if left else value >> inside
        if not signed and (by >= bits).any():
            result = np.where(by >= bits, value.dtype.type(0), result)
        write(group, mask, result)

    return step


@implements("shf")
def funnel_shift(instruction: Instruction) -> Step:
    """Shift the 64 bits of two registers and keep one half."""
    modifiers = Modifiers(instruction)
    kind = modifiers.type()
    left = modifiers.one_of("l", "r") == "l"
    clamp = modifiers.one_of("clamp", "wrap") == "clamp"
    modifiers.done()
    reads = sources(instruction, kind, 3)
    write = writer(instruction.operands[0], kind)

    def step(group, mask: Mask) -> None:
        low, high, by = (read(group).astype(np.uint64) for read in reads)
        by = np.minimum(by, np.uint64(32)) if clamp else by & np.uint64(31)
        both = (high << np.uint64(32)) | low
        result = (both << by) >> np.uint64(32) if left else both >> by
        write(group, mask, result.astype(np.uint32))

    return step


@implements("bfe")
def bit_field_extract(instruction: Instruction) -> Step:
    """Bits [position, position + length), extended by the sign for .s types."""
    modifiers = Modifiers(instruction)
    kind = modifiers.type()
    modifiers.done()
    read = reader(instruction.operands[1], kind)
    position, length = (reader(operand, "u32") for operand in instruction.operands[2:])
    write = writer(instruction.operands[0], kind)
    bits, signed = 8 * WIDTHS[kind], kind[0] == "s"
    wide = np.dtype("i8") if signed else np.dtype("u8")

    def step(group, mask: Mask) -> None:
        value = read(group).astype(wide)
        start, count = position(group).astype(np.int64) & 255, length(group).astype(np.int64) & 255
        start = np.minimum(start, 64)
        count = np.minimum(count, np.where(start < bits, bits - start, 0 if not signed else bits))
        # To the top of 64 bits and back: the vacated places take the sign, or zeros.
        beyond = start >= bits
        top = np.clip(64 - np.minimum(start, bits - 1) - np.maximum(count, 1), 0, 63).astype(wide)
        back = np.clip(64 - np.maximum(count, 1), 0, 63).astype(wide)
        field = (value << top) >> back
        outside = np.where(value < 0, wide.type(-1), wide.type(0)) if signed else wide.type(0)
        field = np.where(count == 0, wide.type(0), np.where(beyond, outside, field))
        write(group, mask, field.astype(NUMPY[kind]))

    return step


@implements("bfi")
def bit_field_insert(instruction: Instruction) -> Step:
    """The low bits of a into b at a position."""
    modifiers = Modifiers(instruction)
    kind = modifiers.type()
    modifiers.done()
    read_a, read_b = reader(instruction.operands[1], kind), reader(instruction.operands[2], kind)
    position, length = (reader(operand, "u32") for operand in instruction.operands[3:])
    write = writer(instruction.operands[0], kind)
    bits = 8 * WIDTHS[kind]

    def step(group, mask: Mask) -> None:
        a, b = read_a(group).astype(object), read_b(group).astype(object)
        start, count = position(group).astype(object) & 255, length(group).astype(object) & 255
        field = (((1 << count) - 1) << start) & ((1 << bits) - 1)
        write(group, mask, ((b & ~field) | ((a << start) & field)).astype(NUMPY[kind]))

    return step


def _reverse(value: np.ndarray) -> np.ndarray:
    swapped = np.unpackbits(value.view(np.uint8).reshape(len(value), -1)[:, ::-1], axis=1)[:, ::-1]
    packed = np.packbits(swapped, axis=1)[:, ::-1]
    return np.ascontiguousarray(packed).view(value.dtype).reshape(-1)


def _popcount(value: np.ndarray) -> np.ndarray:
    return np.unpackbits(value.view(np.uint8).reshape(len(value), -1), axis=1).sum(axis=1).astype(np.uint32)


def _highest(value: np.ndarray) -> np.ndarray:
    """The position of the highest one, -1 if there is none."""
    bits = np.unpackbits(np.ascontiguousarray(value[:, None].view(np.uint8)[:, ::-1]), axis=1)
    return np.where(bits.any(axis=1), bits.shape[1] - 1 - bits.argmax(axis=1), -1)


@implements("popc", "clz", "brev", "bfind")
def bit_counts(instruction: Instruction) -> Step:
    """Counting and finding bits."""
    modifiers = Modifiers(instruction)
    kind = modifiers.type()
    amount = modifiers.flag("shiftamt")
    modifiers.done()
    bits = 8 * WIDTHS[kind]

    def find(value: np.ndarray) -> np.ndarray:
        value = np.where(value < 0, ~value, value) if kind[0] == "s" else value
        place = _highest(value.view(UNSIGNED[WIDTHS[kind]]))
        return np.where(place >= 0, bits - 1 - place if amount else place, -1).astype(np.int32).view(np.uint32)

    compute = {
        "popc": _popcount,
        "clz": lambda value: (bits - 1 - _highest(value)).astype(np.uint32),
        "brev": _reverse,
        "bfind": find,
    }[instruction.opcode]
    return elementwise(instruction, kind, 1, compute, kind if instruction.opcode == "brev" else "u32")


@implements("prmt")
def permute_bytes(instruction: Instruction) -> Step:
    """Four bytes out of eight; bit 3 of a selector takes the sign instead."""
    modifiers = Modifiers(instruction)
    modifiers.type()
    modifiers.done()
    reads = sources(instruction, "b32", 3)
    write = writer(instruction.operands[0], "b32")

    def step(group, mask: Mask) -> None:
        low, high, chosen = (per_lane(group, read(group)).astype(np.uint64) for read in reads)
        both = (high << np.uint64(32)) | low
        result = np.zeros(group.size, np.uint64)
        for i in range(4):
            selector = (chosen >> np.uint64(4 * i)) & np.uint64(15)
            byte = (both >> (np.uint64(8) * (selector & np.uint64(7)))) & np.uint64(255)
            byte = np.where(selector & np.uint64(8), np.where(byte & np.uint64(128), 255, 0).astype(np.uint64), byte)
            result |= byte << np.uint64(8 * i)
        write(group, mask, result.astype(np.uint32))

    return step


@implements("dp4a")
def dot_of_bytes(instruction: Instruction) -> Step:
    """c + the sum of four products of bytes."""
    modifiers = Modifiers(instruction)
    types = [modifiers.type(), modifiers.type()][::-1]
    modifiers.done()
    read_a, read_b, read_c = (reader(operand, "b32") for operand in instruction.operands[1:])
    write = writer(instruction.operands[0], "b32")
    a_type, b_type = (np.dtype("i1" if kind == "s32" else "u1") for kind in types)

    def step(group, mask: Mask) -> None:
        a = per_lane(group, read_a(group)).copy().view(a_type).reshape(-1, 4).astype(np.int64)
        b = per_lane(group, read_b(group)).copy().view(b_type).reshape(-1, 4).astype(np.int64)
        write(group, mask, ((a * b).sum(axis=1) + read_c(group)).astype(np.uint32))

    return step


@implements("mov")
def move(instruction: Instruction) -> Step:
    """Between registers, and between a register and the parts of one."""
    modifiers = Modifiers(instruction)
    kind = modifiers.type()
    modifiers.done()
    destination, source = instruction.operands
    if isinstance(source, Vector):
        part = f"b{8 * WIDTHS[kind] // len(source.items)}"
        reads = [reader(item, part) for item in source.items]
        write = writer(destination, kind)

        def pack(group, mask: Mask) -> None:
            parts = [per_lane(group, read(group)) for read in reads]
            write(group, mask, np.stack(parts, axis=1).view(UNSIGNED[WIDTHS[kind]]).reshape(-1))

        return pack
    if isinstance(destination, Vector):
        width = WIDTHS[kind] // len(destination.items)
        read = reader(source, kind)
        writes = [writer(item, f"b{8 * width}") for item in items(destination)]

        def unpack(group, mask: Mask) -> None:
            parts = per_lane(group, read(group)).copy().view(UNSIGNED[width]).reshape(group.size, -1)
            for i, write in enumerate(writes):
                write(group, mask, np.ascontiguousarray(parts[:, i]))

        return unpack
    return elementwise(instruction, kind, 1, lambda value: value)


@implements("selp")
def select(instruction: Instruction) -> Step:
    """a where the predicate holds, else b."""
    modifiers = Modifiers(instruction)
    kind = f"b{8 * WIDTHS[modifiers.type()]}"
    modifiers.done()
    a, b, p = instruction.operands[1:]
    read_a, read_b, read_p = reader(a, kind), reader(b, kind), reader(p, "pred")
    write = writer(instruction.operands[0], kind)
    return lambda group, mask: write(group, mask, np.where(read_p(group), read_a(group), read_b(group)))
