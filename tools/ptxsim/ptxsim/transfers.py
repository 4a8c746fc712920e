"""Loads, stores, atomics, asynchronous copies and fences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .errors import OutOfBoundsError, UnsupportedInstructionError
from .floats import decode, encode
from .memory import EACH_BYTE, IN_FLIGHT, LOCAL_WINDOW, SHARED_WINDOW, GenericMemory, rows
from .parser import Address, Immediate, Instruction, Operand, Register, Symbol
from .registers import NUMPY, UNSIGNED, WIDTHS, Mask, Modifiers, Step, items, per_lane, reader, writer
from .table import implements

SPACES: dict[str, Callable] = {
    "global": lambda group: group.launch_memory,
    "const": lambda group: group.launch_memory,
    "shared": lambda group: group.block.shared,
    "shared::cta": lambda group: group.block.shared,
    "local": lambda group: group.local,
}
_GENERIC = GenericMemory()
STRONG = ("volatile", "relaxed", "acquire", "release", "acq_rel")
SCOPES = ("cta", "gpu", "sys")
CACHE_HINTS = ("ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "L1::no_allocate", "L1::evict_first", "L1::evict_last")
CACHE_HINTS += ("L1::evict_normal", "L1::evict_unchanged", "L2::64B", "L2::128B", "L2::256B", "weak", "L2::cache_hint")


def space_of(modifiers: Modifiers) -> Callable:
    """The state space that an access names; without one, each lane's address tells."""
    name = modifiers.one_of(*SPACES)
    return SPACES[name] if name else lambda group: _GENERIC


def address_of(operand: Operand) -> Callable:
    """The addresses of all lanes."""
    if not isinstance(operand, Address):
        raise UnsupportedInstructionError(f"operand {operand} as an address")
    base = reader(operand.base, "b64") if isinstance(operand.base, Symbol | Immediate) else None
    if base is None:
        base = reader(operand.base, f"u{8 * operand.base.width}")
    offset = operand.offset
    if isinstance(operand.base, Register) and operand.base.width == 4:  # wraps around at 32 bits
        return lambda group: (base(group) + np.uint32(offset % (1 << 32))).astype(np.int64)
    return lambda group: per_lane(group, base(group).astype(np.int64) + offset)


@implements("ld")
def load(instruction: Instruction) -> Step:
    """From memory into one register or several; parameters are constants of the launch."""
    modifiers = Modifiers(instruction)
    kind = modifiers.type()
    if modifiers.flag("param"):
        modifiers.ignore("v2", "v4")
        modifiers.done()
        return _load_parameter(instruction, kind)
    strength = modifiers.one_of(*STRONG)
    modifiers.ignore(*CACHE_HINTS, *SCOPES, "v2", "v4", "v8")
    space = space_of(modifiers)
    modifiers.done()
    destinations = items(instruction.operands[0])
    writes = [writer(item, kind) for item in destinations]
    address = address_of(instruction.operands[1])
    width, count, dtype = WIDTHS[kind], len(destinations), NUMPY[kind]

    def step(group, mask: Mask) -> None:
        lanes = group.selected(mask)
        addresses = address(group)[lanes]
        memory = space(group)
        if strength:
            synchronise(group, memory, lanes, addresses, width * count, read=strength)
        data = memory.load(group, lanes, addresses, width, count, atomic=strength is not None)
        for i, write in enumerate(writes):
            column = np.ascontiguousarray(data[:, i])
            if mask is not None:
                full = np.zeros(group.size, column.dtype)
                full[lanes] = column
                column = full
            write(group, mask, column.view(dtype))

    return step


def _load_parameter(instruction: Instruction, kind: str) -> Step:
    address = instruction.operands[1]
    if not isinstance(address, Address) or not isinstance(address.base, Symbol):
        raise UnsupportedInstructionError(f"computed address of a parameter: {instruction.text}")
    name, offset = address.base.name, address.offset
    destinations = items(instruction.operands[0])
    writes = [writer(item, kind) for item in destinations]
    width, dtype = WIDTHS[kind], NUMPY[kind]

    def step(group, mask: Mask) -> None:
        data = group.block.run.parameters.get(name)
        if data is None or offset + width * len(writes) > len(data):
            raise OutOfBoundsError(group.where(0, f"parameter {name} + {offset}"))
        for i, write in enumerate(writes):
            write(group, mask, np.frombuffer(data, dtype, 1, offset + i * width).repeat(group.size))

    return step


@implements("st")
def store(instruction: Instruction) -> Step:
    """From registers into memory."""
    modifiers = Modifiers(instruction)
    kind = modifiers.type()
    strength = modifiers.one_of(*STRONG)
    modifiers.ignore(*CACHE_HINTS, *SCOPES, "v2", "v4", "v8")
    space = space_of(modifiers)
    modifiers.done()
    address = address_of(instruction.operands[0])
    raw = f"b{8 * WIDTHS[kind]}"
    reads = [reader(item, raw) for item in items(instruction.operands[1])]
    width = WIDTHS[kind]

    def step(group, mask: Mask) -> None:
        lanes = group.selected(mask)
        addresses = address(group)[lanes]
        columns = [per_lane(group, read(group))[lanes] for read in reads]
        values = np.stack(columns, axis=1) if len(columns) > 1 else columns[0][:, None]
        memory = space(group)
        if strength:
            synchronise(group, memory, lanes, addresses, width * values.shape[1], write=strength)
        memory.store(group, lanes, addresses, values, atomic=bool(strength))

    return step


WORD = 4  # bytes, for each of which what was published is kept


def synchronise(group, memory, lanes, addresses, size, read: str | None = None, write: str | None = None) -> None:
    """Tell the clocks about a strong access, as far as it is one of global memory."""
    if memory is _GENERIC:
        for space, at, _ in _GENERIC.parts(group, addresses):
            synchronise(group, space, lanes[at], addresses[at], size, read, write)
        return
    if memory is not group.launch_memory:
        return
    clocks = memory.clocks
    words = np.unique(np.stack([group.global_warps(lanes), addresses // WORD, (addresses + size - 1) // WORD]), axis=1)
    for warp, first, last in words.T.tolist():
        for word in range(first, last + 1):
            if read:
                clocks.strong_read(warp, word, acquire=read in ("acquire", "acq_rel"))
            if write:
                clocks.strong_write(warp, word, release=write in ("release", "acq_rel"))


def _increment(old: np.ndarray, limit: np.ndarray) -> np.ndarray:
    return np.where(old >= limit, old.dtype.type(0), old + old.dtype.type(1))


def _decrement(old: np.ndarray, limit: np.ndarray) -> np.ndarray:
    return np.where((old == 0) | (old > limit), limit, old - old.dtype.type(1))


ATOMIC: dict[str, Callable] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, new: new,
    "inc": _increment,
    "dec": _decrement,
}


@implements("atom", "red")
def atomic(instruction: Instruction) -> Step:
    """Lanes that meet at one address go one after another, in the order of their numbers."""
    modifiers = Modifiers(instruction)
    kind = modifiers.type()
    operation = modifiers.one_of(*ATOMIC, "cas")
    strength = modifiers.one_of(*STRONG) or "relaxed"
    modifiers.ignore(*SCOPES, "noftz", "v2", "v4", "v8", "L2::cache_hint")
    space = space_of(modifiers)
    modifiers.done()
    if operation is None:
        raise UnsupportedInstructionError(f"operation of: {instruction.text}")
    operands = list(instruction.operands)
    destinations = items(operands.pop(0)) if instruction.opcode == "atom" else ()
    address = address_of(operands.pop(0))
    raw = f"b{8 * WIDTHS[kind]}"
    inputs = [[reader(item, raw) for item in items(operand)] for operand in operands]
    writes = [writer(item, raw) for item in destinations]
    width, count = WIDTHS[kind], len(inputs[0])
    update = _compare_and_swap if operation == "cas" else _update(kind, operation)

    def step(group, mask: Mask) -> None:
        lanes = group.selected(mask)
        addresses = address(group)[lanes]
        values = [np.stack([per_lane(group, read(group))[lanes] for read in reads], axis=1) for reads in inputs]
        memory = space(group)
        synchronise(group, memory, lanes, addresses, width * count, strength, strength)
        result = np.zeros((group.size, count), UNSIGNED[width])
        for turn in _turns(addresses):
            old = memory.load(group, lanes[turn], addresses[turn], width, count, atomic=True)
            new = update(old, *(value[turn] for value in values))
            memory.store(group, lanes[turn], addresses[turn], new, atomic=True)
            result[lanes[turn]] = old
        for i, write in enumerate(writes):
            write(group, mask, np.ascontiguousarray(result[:, i]))

    return step


def _compare_and_swap(old: np.ndarray, expected: np.ndarray, new: np.ndarray) -> np.ndarray:
    return np.where(old == expected, new, old)


def _update(kind: str, operation: str) -> Callable:
    compute = ATOMIC[operation]
    element = kind.removesuffix("x2")
    if element in ("f16", "bf16"):
        half = np.uint16

        def update(old: np.ndarray, value: np.ndarray) -> np.ndarray:
            a, b = (decode(np.ascontiguousarray(x).view(half), element) for x in (old, value))
            return encode(compute(a, b), element).view(old.dtype)

        return update
    dtype = NUMPY[kind]
    return lambda old, value: compute(old.view(dtype), value.view(dtype)).view(value.dtype)


def _turns(addresses: np.ndarray) -> list[np.ndarray]:
    """Positions in turns, such that within a turn all addresses differ."""
    order = np.argsort(addresses, kind="stable")
    ordered = addresses[order]
    first = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    if len(first) == len(addresses):
        return [np.arange(len(addresses))]
    rank = np.empty(len(addresses), np.int64)
    rank[order] = np.arange(len(addresses)) - np.repeat(first, np.diff([*first, len(addresses)]))
    return [np.flatnonzero(rank == turn) for turn in range(int(rank.max()) + 1)]


@implements("membar", "fence")
def fence(instruction: Instruction) -> Step:
    """Orders global accesses of the warp, from device scope on; within a block barriers do."""
    modifiers = Modifiers(instruction)
    modifiers.ignore("sc", "acq_rel", "acquire", "release")
    scope = modifiers.one_of("gl", "gpu", "sys", "cta")
    modifiers.done()
    if scope == "cta":
        return _nothing

    def step(group, mask: Mask) -> None:
        offset = group.global_warps(np.array([0]))[0]
        for warp in group.active_warps(mask).tolist():
            group.launch_memory.clocks.fence(int(offset) + warp)

    return step


def _nothing(group, mask: Mask) -> None:
    """Hints, and waits that end at once."""


@implements("prefetch", "prefetchu", "nanosleep", "griddepcontrol", "createpolicy", "pmevent")
def hint(instruction: Instruction) -> Step:
    """Without an effect here."""
    return _nothing


@implements("cvta")
def to_address_space(instruction: Instruction) -> Step:
    """Between generic addresses and those of a space."""
    modifiers = Modifiers(instruction)
    kind = modifiers.type()
    into = modifiers.flag("to")
    space = modifiers.one_of("global", "shared", "local", "const", "shared::cta")
    modifiers.done()
    base = {"shared": SHARED_WINDOW, "shared::cta": SHARED_WINDOW, "local": LOCAL_WINDOW}.get(space, 0)
    offset = NUMPY[kind].type((-base if into else base) % (1 << 64) if WIDTHS[kind] == 8 else 0)
    read, write = reader(instruction.operands[1], kind), writer(instruction.operands[0], kind)
    return lambda group, mask: write(group, mask, read(group) + offset)


@implements("isspacep")
def is_in_space(instruction: Instruction) -> Step:
    """Whether a generic address lies in a space."""
    modifiers = Modifiers(instruction)
    space = modifiers.one_of("global", "shared", "local", "shared::cta")
    modifiers.done()
    low, high = {
        "global": (0, SHARED_WINDOW),
        "shared": (SHARED_WINDOW, LOCAL_WINDOW),
        "shared::cta": (SHARED_WINDOW, LOCAL_WINDOW),
        "local": (LOCAL_WINDOW, 1 << 62),
    }[space]
    read, write = reader(instruction.operands[1], "s64"), writer(instruction.operands[0], "pred")
    return lambda group, mask: write(group, mask, (read(group) >= low) & (read(group) < high))


@dataclass
class Copy:
    """A cp.async on its way: what each lane copies, and the number of the group that it belongs to."""

    lanes: np.ndarray
    targets: np.ndarray
    origins: np.ndarray
    sizes: np.ndarray  # bytes that are read; the rest up to `width` is filled with zeros
    width: int
    number: np.ndarray


@implements("cp")
def asynchronous_copy(instruction: Instruction) -> Step:
    """cp.async: the bytes are read, and land, only at the wait."""
    modifiers = Modifiers(instruction)
    if not modifiers.flag("async"):
        raise UnsupportedInstructionError(instruction.text)
    if modifiers.flag("commit_group"):
        modifiers.done()
        return _commit
    if modifiers.flag("wait_all"):
        modifiers.done()
        return _wait_all
    if modifiers.flag("wait_group"):
        modifiers.done()
        left = int(instruction.operands[0].value)
        return lambda group, mask: _wait(group, mask, left)
    modifiers.ignore("ca", "cg", "L2::64B", "L2::128B", "L2::256B", "L2::cache_hint")
    if not (modifiers.one_of("shared", "shared::cta") and modifiers.flag("global")):
        raise UnsupportedInstructionError(instruction.text)
    modifiers.done()
    target, origin = (address_of(operand) for operand in instruction.operands[:2])
    width = int(instruction.operands[2].value)
    size = reader(instruction.operands[3], "u32") if len(instruction.operands) > 3 else None

    def step(group, mask: Mask) -> None:
        lanes = group.selected(mask)
        sizes = np.full(len(lanes), width)
        if size is not None:
            sizes = per_lane(group, size(group))[lanes].astype(np.int64)
        copy = Copy(lanes, target(group)[lanes], origin(group)[lanes], sizes, width, group.committed[lanes])
        shared = group.block.shared
        shared.check(group, lanes, copy.targets, width)
        shared.check_landed(group, lanes, copy.targets, *_elements(width))
        shared.claim(group, lanes, copy.targets, *_elements(width))
        _mark(shared, copy, IN_FLIGHT)
        whole = sizes == width
        if whole.any():
            group.launch_memory.check(group, lanes[whole], copy.origins[whole], width)
        group.copies.append(copy)

    return step


def _elements(width: int) -> tuple[int, int]:
    return (8, 2) if width == 16 else (width, 1)


def _mark(shared, copy: Copy, state: int) -> None:
    element, count = _elements(copy.width)
    rows(shared.state, element, count)[copy.targets // copy.width] = EACH_BYTE[element] * state


def _read_origins(group, copy: Copy) -> np.ndarray:
    """The data of each lane, zeros where it asks for less than the whole."""
    element, count = _elements(copy.width)
    data = np.zeros((len(copy.lanes), count), UNSIGNED[element])
    whole = np.flatnonzero(copy.sizes == copy.width)
    if len(whole):
        data[whole] = group.launch_memory.load(group, copy.lanes[whole], copy.origins[whole], element, count)
    for i in np.flatnonzero((copy.sizes > 0) & (copy.sizes < copy.width)):
        at = np.array([i])
        each = data[i : i + 1].view(np.uint8)[0]
        for byte in range(int(copy.sizes[i])):
            each[byte] = group.launch_memory.load(group, copy.lanes[at], copy.origins[at] + byte, 1, 1)[0, 0]
    return data


def _commit(group, mask: Mask) -> None:
    group.committed = group.committed + (1 if mask is None else mask)


def _wait_all(group, mask: Mask) -> None:
    _commit(group, mask)
    _wait(group, mask, 0)


def _wait(group, mask: Mask, left: int) -> None:
    """Let land what these lanes issued, except for their `left` latest groups."""
    remaining = []
    for copy in group.copies:
        due = copy.number < group.committed[copy.lanes] - left
        if mask is not None:
            due &= mask[copy.lanes]
        if due.any():
            _land(group, copy if due.all() else _part(copy, due))
        if not due.all():
            remaining.append(_part(copy, ~due))
    group.copies = remaining


def _part(copy: Copy, chosen: np.ndarray) -> Copy:
    return Copy(
        copy.lanes[chosen],
        copy.targets[chosen],
        copy.origins[chosen],
        copy.sizes[chosen],
        copy.width,
        copy.number[chosen],
    )


def _land(group, copy: Copy) -> None:
    shared = group.block.shared
    _mark(shared, copy, 0)
    shared.store(group, copy.lanes, copy.targets, _read_origins(group, copy))
