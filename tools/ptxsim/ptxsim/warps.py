"""Operations of a whole warp: shuffles, votes, reductions, and matrix loads and stores."""

from __future__ import annotations

import numpy as np

from .errors import MissingLanesError, UnsupportedInstructionError
from .parser import Instruction
from .reals import extremum
from .registers import NUMPY, Mask, Modifiers, Step, items, pair, per_lane, reader, writer
from .table import implements
from .transfers import address_of

WARP = 32
ALL_LANES = np.array([0xFFFFFFFF], np.uint32)
BITS = (np.uint32(1) << np.arange(WARP, dtype=np.uint32)).astype(np.uint32)


def as_bits(flags: np.ndarray) -> np.ndarray:
    """(warp, lane) of bool -> a word for each warp."""
    return (flags * BITS).sum(axis=1, dtype=np.uint32)


def active_lanes(group, mask: Mask) -> np.ndarray:
    """The mask as (warp, lane)."""
    return (np.ones(group.size, bool) if mask is None else mask).reshape(-1, WARP)


def check_members(group, mask: Mask, members: np.ndarray) -> np.ndarray:
    """All lanes that the operation names must be here, and only they; their words, one for each warp."""
    if mask is None and (members == ALL_LANES).all():
        return ALL_LANES.repeat(group.size // WARP)
    active = active_lanes(group, mask)
    words = per_lane(group, members).reshape(-1, WARP)
    named = words[np.arange(len(words)), active.argmax(axis=1)]
    gone = as_bits((group.at >= 1 << 30).reshape(-1, WARP))
    wrong = active.any(axis=1) & (as_bits(active) != named & ~gone)
    wrong |= (active & (words != named[:, None])).any(axis=1)
    if wrong.any():
        warp = int(np.flatnonzero(wrong)[0])
        lane = warp * WARP + int(active[warp].argmax())
        here = int(as_bits(active)[warp])
        raise MissingLanesError(group.where(lane, f"lanes {here:#010x} are here, {int(named[warp]):#010x} are named"))
    return named


def spread(values: np.ndarray) -> np.ndarray:
    """One value for each warp -> one for each lane."""
    return np.repeat(values, WARP)


@implements("shfl")
def shuffle(instruction: Instruction) -> Step:
    """Read a register of another lane."""
    modifiers = Modifiers(instruction)
    modifiers.type()
    mode = modifiers.one_of("up", "down", "bfly", "idx")
    if not modifiers.flag("sync") or mode is None:
        raise UnsupportedInstructionError(f"only shfl.sync: {instruction.text}")
    modifiers.done()
    source, lane, limit, members = (reader(operand, "b32") for operand in instruction.operands[1:])
    first, second = pair(instruction.operands[0])
    write, write_valid = writer(first, "b32"), writer(second, "pred")

    def step(group, mask: Mask) -> None:
        check_members(group, mask, members(group))
        own = group.lanes % WARP
        by = per_lane(group, lane(group)).astype(np.int64) & 31
        clamp = per_lane(group, limit(group)).astype(np.int64)
        segment = clamp >> 8 & 31
        last = (own & segment) | (clamp & 31 & ~segment)
        if mode == "up":
            other = own - by
            valid = other >= last
        elif mode == "down":
            other = own + by
            valid = other <= last
        elif mode == "bfly":
            other = own ^ by
            valid = other <= last
        else:
            other = (own & segment) | (by & ~segment)
            valid = other <= last
        other = np.where(valid, other, own)
        at = group.lanes - own + other
        if mask is not None and not mask[at][mask].all():
            wrong = int(np.flatnonzero(mask & ~mask[at])[0])
            raise MissingLanesError(group.where(wrong, f"reads lane {int(other[wrong])}, which takes no part"))
        write(group, mask, per_lane(group, source(group))[at])
        write_valid(group, mask, valid)

    return step


@implements("vote")
def vote(instruction: Instruction) -> Step:
    """What all lanes of the warp say about a predicate."""
    modifiers = Modifiers(instruction)
    modifiers.one_of("pred")
    mode = modifiers.one_of("all", "any", "uni", "ballot")
    kind = modifiers.type() if mode == "ballot" else "pred"
    if not modifiers.flag("sync"):
        raise UnsupportedInstructionError(f"only vote.sync: {instruction.text}")
    modifiers.done()
    says, members = reader(instruction.operands[1], "pred"), reader(instruction.operands[2], "b32")
    write = writer(instruction.operands[0], kind)

    def step(group, mask: Mask) -> None:
        check_members(group, mask, members(group))
        active = active_lanes(group, mask)
        yes = per_lane(group, says(group)).reshape(-1, WARP) & active
        no = active & ~yes
        result = {
            "all": ~no.any(axis=1),
            "any": yes.any(axis=1),
            "uni": ~(no.any(axis=1) & yes.any(axis=1)),
            "ballot": as_bits(yes),
        }[mode]
        write(group, mask, spread(result))

    return step


@implements("match")
def match(instruction: Instruction) -> Step:
    """Which lanes hold the same value."""
    modifiers = Modifiers(instruction)
    kind = modifiers.type()
    mode = modifiers.one_of("any", "all")
    if not modifiers.flag("sync"):
        raise UnsupportedInstructionError(instruction.text)
    modifiers.done()
    read, members = reader(instruction.operands[1], kind), reader(instruction.operands[2], "b32")
    first, second = pair(instruction.operands[0])
    write, write_all = writer(first, "b32"), writer(second, "pred")

    def step(group, mask: Mask) -> None:
        named = check_members(group, mask, members(group))
        active = active_lanes(group, mask)
        values = per_lane(group, read(group)).reshape(-1, WARP)
        same = (values[:, :, None] == values[:, None, :]) & active[:, None, :]
        found = (same * BITS).sum(axis=2, dtype=np.uint32).reshape(-1)
        if mode == "all":
            everybody = found == spread(as_bits(active))
            found = np.where(everybody, spread(named), np.uint32(0))
            write_all(group, mask, everybody)
        write(group, mask, found)

    return step


@implements("redux")
def reduce(instruction: Instruction) -> Step:
    """One value from those of all lanes."""
    modifiers = Modifiers(instruction)
    kind = modifiers.type()
    operation = modifiers.one_of("add", "min", "max", "and", "or", "xor")
    nan, absolute = modifiers.flag("NaN"), modifiers.flag("abs")
    if not modifiers.flag("sync") or operation is None:
        raise UnsupportedInstructionError(instruction.text)
    modifiers.done()
    read, members = reader(instruction.operands[1], kind), reader(instruction.operands[2], "b32")
    write = writer(instruction.operands[0], kind)
    combine = {
        "add": np.add,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
        "min": np.minimum,
        "max": np.maximum,
    }[operation]
    if kind == "f32":
        combine = extremum(operation == "max", nan)

    def step(group, mask: Mask) -> None:
        check_members(group, mask, members(group))
        active = active_lanes(group, mask)
        values = per_lane(group, read(group)).reshape(-1, WARP)
        values = np.abs(values) if absolute else values
        result = np.zeros(group.size, NUMPY[kind])
        for warp in np.flatnonzero(active.any(axis=1)):
            total = values[warp, active[warp]]
            while len(total) > 1:  # in pairs; the odd one out comes along
                half = len(total) // 2
                total = np.concatenate([combine(total[:half], total[half : 2 * half]), total[2 * half :]])
            result[warp * WARP : (warp + 1) * WARP] = total[0]
        write(group, mask, result)

    return step


@implements("activemask")
def active_mask(instruction: Instruction) -> Step:
    """The lanes that execute this instruction together."""
    modifiers = Modifiers(instruction)
    modifiers.type()
    modifiers.done()
    write = writer(instruction.operands[0], "b32")
    return lambda group, mask: write(group, mask, spread(as_bits(active_lanes(group, mask))))


@implements("elect")
def elect(instruction: Instruction) -> Step:
    """One lane of the warp: the first."""
    modifiers = Modifiers(instruction)
    modifiers.flag("sync")
    modifiers.done()
    members = reader(instruction.operands[1], "b32")
    first, second = pair(instruction.operands[0])
    write, write_elected = writer(first, "b32"), writer(second, "pred")

    def step(group, mask: Mask) -> None:
        check_members(group, mask, members(group))
        leader = active_lanes(group, mask).argmax(axis=1)
        write(group, mask, spread(leader).astype(np.uint32))
        write_elected(group, mask, spread(leader) == group.lanes % WARP)

    return step


def warp_barrier(instruction: Instruction) -> Step:
    """bar.warp.sync: the lanes must be here; what they wrote is visible to each other in any case."""
    members = reader(instruction.operands[0], "b32")

    def step(group, mask: Mask) -> None:
        check_members(group, mask, members(group))

    return step


@implements("ldmatrix", "stmatrix")
def matrix_transfer(instruction: Instruction) -> Step:
    """8x8 matrices of 16 bits between shared memory and fragments: lane 8 i + r points to row r of matrix i."""
    modifiers = Modifiers(instruction)
    kind = modifiers.type()
    count = {"x1": 1, "x2": 2, "x4": 4}[modifiers.one_of("x1", "x2", "x4")]
    transposed = modifiers.flag("trans")
    modifiers.ignore("sync", "aligned", "m8n8", "shared", "shared::cta")
    modifiers.done()
    loads = instruction.opcode == "ldmatrix"
    if kind != "b16":
        raise UnsupportedInstructionError(instruction.text)
    registers, place = instruction.operands if loads else instruction.operands[::-1]
    address = address_of(place)
    reads = [reader(item, "b32") for item in items(registers)]
    writes = [writer(item, "b32") for item in items(registers)] if loads else []

    def pointers(group, mask: Mask) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        check_members(group, mask, ALL_LANES)
        warps = group.active_warps(mask)
        lanes = (warps[:, None] * WARP + np.arange(8 * count)).reshape(-1)
        return warps, lanes, address(group)[lanes]

    def load(group, mask: Mask) -> None:
        warps, lanes, addresses = pointers(group, mask)
        data = group.block.shared.load(group, lanes, addresses, 8, 2)
        tiles = data.view(np.uint16).reshape(len(warps), count, 8, 8)
        if transposed:
            tiles = tiles.swapaxes(2, 3)
        words = np.ascontiguousarray(tiles).view(np.uint32).reshape(len(warps), count, WARP)
        for i, write in enumerate(writes):
            full = np.zeros((group.size // WARP, WARP), np.uint32)
            full[warps] = words[:, i]
            write(group, mask, full.reshape(-1))

    def store(group, mask: Mask) -> None:
        warps, lanes, addresses = pointers(group, mask)
        words = np.stack([read(group).reshape(-1, WARP)[warps] for read in reads], axis=1)
        tiles = words.view(np.uint16).reshape(len(warps), count, 8, 8)
        if transposed:
            tiles = tiles.swapaxes(2, 3)
        data = np.ascontiguousarray(tiles).view(np.uint64).reshape(-1, 2)
        group.block.shared.store(group, lanes, addresses, data)

    return load if loads else store


@implements("movmatrix")
def transpose_matrix(instruction: Instruction) -> Step:
    """An 8x8 matrix of 16 bits in fragments, transposed."""
    modifiers = Modifiers(instruction)
    modifiers.type()
    modifiers.ignore("sync", "aligned", "m8n8", "trans")
    modifiers.done()
    read, write = reader(instruction.operands[1], "b32"), writer(instruction.operands[0], "b32")

    def step(group, mask: Mask) -> None:
        check_members(group, mask, ALL_LANES)
        tiles = np.ascontiguousarray(read(group)).view(np.uint16).reshape(-1, 8, 8).swapaxes(1, 2)
        write(group, mask, np.ascontiguousarray(tiles).view(np.uint32).reshape(-1))

    return step
