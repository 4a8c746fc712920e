"""One block of a launch, walked through its binary: which instructions each warp executes, and what it asks memory for.

Addresses, trip counts and conditions are computed (scalars.py), floats are not. A condition that hangs on one, or on
what other blocks do, is guessed and counted: an instruction is executed, and a branch leaves the loop that it is in, or
steps over the rare case of a division, or else goes straight ahead. So a wait ends at once. Memory is read as it is
before the launch and written nowhere, but that blocks come in order: what one adds to a counter first comes behind what
those before it have added. Shared memory keeps what is known.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from .errors import OutOfBoundsError, SimulationError
from .sass import Code, SassInstruction
from .scalars import LANES, Value, effect, predicate, registers, spread, word

MOST = 3_000_000  # instructions of a warp: beyond, something is wrong
PARAMETERS = {80: 0x160, 86: 0x160, 89: 0x160, 90: 0x210, 100: 0x380, 120: 0x380}  # where they begin in c[0x0]
SECTOR, LINE = 32, 128
PLAIN, L1, L2, DRAM = range(4)  # where an access is served


class Window(NamedTuple):
    """The bytes of an argument; `scratch` is what the blocks of the launch themselves write, and lies in L2."""

    name: str
    low: int
    data: np.ndarray
    scratch: bool


@dataclass
class Site:
    """A launch, and where it is on the device."""

    code: Code
    grid: tuple[int, int, int]
    block: tuple[int, int, int]  # threads
    parameters: bytes
    windows: list[Window]
    shared: int = 0  # bytes of a block, the dynamic ones
    passing: int = 0  # lanes for which a ballot finds a condition on floats to hold; 0: nobody knows
    turns: Mapping[str, int] = field(default_factory=dict)  # of loops whose end is guessed, by source line
    words: dict[int, int] = field(default_factory=dict)

    @property
    def threads(self) -> int:
        """Of a block."""
        return math.prod(self.block)

    def constant(self, place: int) -> int | None:
        """A word of c[0x0]; None where it is of no interest."""
        if not self.words:
            first = PARAMETERS[self.code.arch]
            padded = self.parameters + bytes(-len(self.parameters) % 4)
            self.words = {first + n: int.from_bytes(padded[n : n + 4], "little") for n in range(0, len(padded), 4)}
            sizes = 0x360 if self.code.arch >= 100 else 0
            for n, value in enumerate(self.block):
                self.words[sizes + 4 * n] = value
            for n, value in enumerate(self.grid):
                self.words[sizes + (0x10 if self.code.arch >= 100 else 0xC) + 4 * n] = value
        return self.words.get(place)


class Access(NamedTuple):
    """What one memory instruction of a warp asked for."""

    name: str
    bytes: int
    sectors: int
    level: int


@dataclass
class Walked:
    """A block: for each warp the places of its instructions in order, skipped ones as ~place, and its accesses."""

    traces: list[list[int]]
    accesses: list[dict[int, Access]]  # by position in the trace
    guesses: Counter[str]  # of conditions, by source line
    touched: dict[str, int]  # bytes of the lines of each argument that it touched

    def asked(self) -> Counter[str]:
        """Bytes of all sectors that were asked for, by argument."""
        total: Counter[str] = Counter()
        for accesses in self.accesses:
            for access in accesses.values():
                total[access.name] += SECTOR * access.sectors
        return total


class _Load:
    """What a load brings, read when an integer instruction wants it."""

    def __init__(self, window: Window, addresses: Value, size: int, active: np.ndarray | None, old: Value):
        self.window, self.addresses, self.size = window, addresses, size
        self.active, self.old = active, old  # the other lanes keep what they have

    def word(self) -> Value:
        places = np.asarray(self.addresses - self.window.low)
        total = np.zeros(places.shape, np.int64)
        for n in range(min(self.size, 4)):
            at = np.minimum(places + n, len(self.window.data) - 1)
            total |= self.window.data[at].astype(np.int64) << 8 * n
        value = total if total.shape else int(total)
        old = self.old.word() if isinstance(self.old, _Load) else self.old
        return value if self.active is None or old is None else np.where(self.active, value, old)


class Warp:
    """Registers, and where its lanes are: those with the lowest place go first."""

    def __init__(self, block: _Block, number: int):
        self.block, self.number = block, number
        self.registers: dict[str, Any] = {}
        self.place = 0
        self.mask: np.ndarray | None = None  # None: all lanes
        self.live = LANES + 32 * number < block.site.threads
        if not self.live.all():
            self.mask = self.live
        self.waiting: list[tuple[int, np.ndarray]] = []  # lanes that are elsewhere
        self.parked: dict[str, np.ndarray] = {}  # those that wait for the others, and for which
        self.together: dict[str, np.ndarray] = {}
        self.done = False
        self.trace: list[int] = []
        self.accesses: dict[int, Access] = {}
        self._seen: Counter[int] = Counter()  # strong accesses, by place
        self.turns: Counter[int] = Counter()  # of loops whose end is guessed, by the place of their branch

    def get(self, name: str) -> Value:
        """The value of a register or a predicate. What nobody has written holds something, of which nobody cares."""
        value = self.registers.get(name, False if "P" in name else 0)
        if isinstance(value, _Load):
            value = self.registers[name] = value.word()
        return value

    def constant(self, place: int) -> int | None:
        """A word of c[0x0]."""
        return self.block.site.constant(place)

    def lanes(self) -> np.ndarray:
        """Which lanes execute."""
        return np.ones(32, bool) if self.mask is None else self.mask

    def special(self, name: str) -> Value:
        """A special register."""
        x, y, _ = self.block.site.grid
        index = self.block.index
        place = {"SR_CTAID.X": index % x, "SR_CTAID.Y": index // x % y, "SR_CTAID.Z": index // (x * y)}
        wide, high, _ = self.block.site.block
        thread = LANES + 32 * self.number
        lane = {
            "SR_TID.X": thread % wide, "SR_TID.Y": thread // wide % high, "SR_TID.Z": thread // (wide * high),
            "SR_LANEID": LANES, "SR_LTMASK": (1 << LANES) - 1, "SR_EQMASK": 1 << LANES,
            "SR_LEMASK": (2 << LANES) - 1, "SR_GTMASK": (1 << 32) - (2 << LANES), "SR_CgaCtaId": 0,
        }  # fmt: skip
        return place.get(name, lane.get(name))

    def put(self, name: str, value: Value, active: np.ndarray | None) -> None:
        """Write a register or a predicate in the active lanes."""
        if active is not None and value is not None and name[0] != "U" and not isinstance(value, _Load):
            old = self.registers.get(name)
            if old is not None and not isinstance(old, _Load):
                value = np.where(active, value, old)
        self.registers[name] = value

    def run(self) -> None:
        """Up to the next barrier of the block, or to the end."""
        code, steps = self.block.site.code.code, self.block.steps
        while not self.done:
            if self.waiting:
                self._meet()
            place = self.place
            step = steps[place]
            if step is None:
                step = steps[place] = _step(code[place], place, code)
            if step(self):
                return
            if len(self.trace) > MOST:
                raise SimulationError(f"{self.block.site.code.kernel}: no end in sight near {code[place].source}")

    def _meet(self) -> None:
        """The lanes that are furthest back go on; those that are at the same place go together."""
        everybody = [(self.place, self.lanes()), *self.waiting]
        place = min(at for at, _ in everybody)
        self.mask = np.logical_or.reduce([mask for at, mask in everybody if at == place])
        self.waiting = [(at, mask) for at, mask in everybody if at != place]
        self.place = place
        if self.mask.all():
            self.mask = None

    def part(self, target: int, taken: Value) -> None:
        """Lanes for which `taken` holds go to `target`, the others go on."""
        here = self.lanes()
        going = spread(taken) & here
        if going.all() or (going == here).all():
            self.place = target
        elif not going.any():
            self.place += 1
        else:
            self.waiting.append((target, going))
            self.mask = here & ~going
            self.place += 1

    def rejoin(self, name: str) -> None:
        """Wait for the lanes that are to go on together from here."""
        here = self.parked.get(name, False) | self.lanes()
        missing = self.together.get(name, here) & ~here & self.live
        if missing.any() and self.waiting:
            self.parked[name] = here
            self._next()
            return
        self.parked.pop(name, None)
        self.mask = None if here.all() else here
        self.place += 1

    def _next(self) -> None:
        (self.place, self.mask), *self.waiting = sorted(self.waiting, key=lambda each: each[0])

    def leave(self, gone: np.ndarray) -> None:
        """These lanes end."""
        rest = self.lanes() & ~gone
        self.live = self.live & ~gone
        if rest.any():
            self.mask = rest
            self.place += 1
        elif self.waiting:
            self._next()
        else:
            self.done = True


class _Block:
    def __init__(self, site: Site, index: int, steps: list):
        self.site, self.index, self.steps = site, index, steps
        self.guesses: Counter[str] = Counter()
        self.shared: dict[int, int] = {}  # known words
        self.changed: set[int] = set()  # addresses that it has changed by atomics
        lines = {window.name: len(window.data) // LINE + 2 for window in site.windows}
        self.touched = {name: np.zeros(n, bool) for name, n in lines.items()}
        self.fetched = {name: np.zeros(n, bool) for name, n in lines.items()}  # into L2, and not yet read

    def window(self, here: Value, size: int, where: str) -> Window | None:
        """The argument that holds these addresses; None where they are of what was guessed, and wrong."""
        low, high = (here, here + size) if isinstance(here, int) else (int(here.min()), int(here.max()) + size)
        windows = self.site.windows
        for n, window in enumerate(windows):
            if window.low <= low and high <= window.low + len(window.data):
                if n:
                    windows.insert(0, windows.pop(n))
                return window
        if self.guesses:
            return None
        raise OutOfBoundsError(f"{self.site.code.kernel} at {where}: {high - low} bytes at {low:#x}")


def walk(site: Site, block: int = 0, steps: list | None = None) -> Walked:
    """All warps of one block.

    Raises:
        SimulationError: an address outside of all arguments, or no end.
    """
    state = _Block(site, block, steps if steps is not None else [None] * len(site.code.code))
    warps = [Warp(state, n) for n in range(-(-site.threads // 32))]
    with np.errstate(all="ignore"):
        while not all(warp.done for warp in warps):
            for warp in warps:
                warp.run()
    touched = {name: LINE * int(lines.sum()) for name, lines in state.touched.items()}
    return Walked([warp.trace for warp in warps], [warp.accesses for warp in warps], state.guesses, touched)


def _step(i: SassInstruction, place: int, code: list[SassInstruction]):
    """Executes an instruction; whether the warp waits at a barrier of its block."""
    guard = predicate(("!" if i.negated else "") + i.guard) if i.guard and i.guard not in ("PT", "UPT") else None
    never = i.guard in ("PT", "UPT") and i.negated
    if i.opcode in _CONTROL:
        act = _branch(i, place, code)
    elif i.opcode in _TOGETHER:
        act = _together(i)
    else:
        fetches = i.opcode == "CCTL" and "PF2" in i.modifiers
        act = _prefetch(i) if fetches else _memory(i, place) if i.opcode in _MEMORY else _compute(i)
    stops = i.opcode == "BAR" and not i.operands[0].startswith("R")

    def step(warp: Warp) -> bool:
        holds: Value = not never
        if guard is not None:
            holds = guard(warp)
        if holds is False or (isinstance(holds, np.ndarray) and not (holds & warp.lanes()).any()):
            warp.trace.append(~place)
            warp.place += 1
            return False
        warp.trace.append(place)
        act(warp, holds)
        return stops

    return step


def _active(warp: Warp, holds: Value) -> np.ndarray | None:
    if isinstance(holds, np.ndarray):
        return holds & warp.lanes()
    return warp.mask


def _compute(i: SassInstruction):
    compute = effect(i)

    def act(warp: Warp, holds: Value) -> None:
        warp.place += 1
        active = _active(warp, holds)
        for name, value in compute(warp):
            if name[-1] not in "ZT":
                warp.put(name, None if holds is None else value, active)

    return act


_CONTROL = {"BRA", "EXIT", "RET", "CALL", "JMP", "BRX"}
_TOGETHER = {"BSSY", "BSYNC", "BREAK"}


def _together(i: SassInstruction):
    """Lanes that part between BSSY and BSYNC wait for each other there, but for those that BREAK away."""
    name = i.operands[-1] if i.opcode == "BREAK" else i.operands[0]

    def act(warp: Warp, holds: Value) -> None:
        if i.opcode == "BSYNC":
            warp.rejoin(name)
            return
        warp.place += 1
        if i.opcode == "BSSY":
            warp.together[name] = warp.lanes()
        elif name in warp.together and holds is not None:
            warp.together[name] = warp.together[name] & ~(spread(holds) & warp.lanes())

    return act


def _branch(i: SassInstruction, place: int, code: list[SassInstruction]):
    if i.opcode == "EXIT":

        def leave(warp: Warp, holds: Value) -> None:
            if holds is None:
                warp.block.guesses[i.source] += 1
                warp.place += 1
            else:
                warp.leave(spread(holds) & warp.lanes())

        return leave
    if i.opcode == "RET":
        where = word(i.operands[0])

        def back(warp: Warp, holds: Value) -> None:
            address = where(warp)
            warp.place = int(address if isinstance(address, int) else address[warp.lanes().argmax()]) // 16

        return back
    if i.target is None:
        raise SimulationError(f"a branch to a computed place at {i.source}")
    target = i.target
    if "DIV" in i.modifiers:  # only where lanes that should be together have parted
        return _compute_nothing
    condition = [each for each in i.operands if each.lstrip("!")[0] in "PU" and each.lstrip("!")[:2] != "UR"]
    also = predicate(condition[0]) if condition else None
    skipped = code[place + 1 : target]
    leaves_loop = any(o.opcode == "BRA" and o.target is not None and o.target <= place for o in skipped)
    guess = leaves_loop or any(o.opcode == "CALL" for o in skipped)  # the rare case of a division

    def go(warp: Warp, holds: Value) -> None:
        taken = holds
        if also is not None and taken is not None:
            second = also(warp)
            taken = second if taken is True else None if second is None else taken & second
        if taken is None:
            warp.block.guesses[i.source] += 1
            taken = guess
            if target <= place or leaves_loop:
                warp.turns[place] += 1
                if warp.turns[place] < warp.block.site.turns.get(i.source, 1):
                    taken = not guess
                else:
                    warp.turns[place] = 0
        if taken is True:
            warp.place = target
        elif taken is False:
            warp.place += 1
        else:
            warp.part(target, taken)

    return go


def _compute_nothing(warp: Warp, holds: Value) -> None:
    warp.place += 1


def _prefetch(i: SassInstruction):
    """What is fetched into L2 ahead of its time is taken to have come when it is wanted."""
    address = _address(next(each for each in i.operands if "[" in each), is_global=True)

    def act(warp: Warp, holds: Value) -> None:
        warp.place += 1
        at, active = address(warp), _active(warp, holds)
        if at is None or holds is None or (active is not None and not active.any()):
            return
        here = at if active is None or isinstance(at, int) else at[active]
        window = warp.block.window(here, 1, i.source)
        if window is not None:
            warp.block.touched[window.name][(here - window.low) // LINE] = True
            warp.block.fetched[window.name][(here - window.low) // LINE] = True

    return act


_GLOBAL = {"LDG", "LD", "LDGSTS", "STG", "ST", "ATOMG", "ATOM", "RED"}
_MEMORY = _GLOBAL | {"LDS", "STS", "LDL", "ATOMS"}


def _address(operand: str, is_global: bool = False):
    """The reader of `[R2.64+UR4+0x10]`, with or without a descriptor; None where a part is not known."""
    inside = operand[operand.rindex("[") + 1 : operand.rindex("]")]
    parts = [part for part in inside.replace("+-", "+~").split("+") if part]
    reads, offset = [], 0
    for part in parts:
        if part.lstrip("~").startswith("0x"):
            offset += -int(part[1:], 16) if part[0] == "~" else int(part, 16)
            continue
        name, _, kind = part.partition(".")
        low = word(name)
        high = word(name, offset=1) if kind.startswith("64") or (is_global and not kind) else None
        reads.append((low, high))

    def read(warp: Warp) -> Value:
        total: Value = offset
        for low, high in reads:
            value = low(warp)
            if value is None:
                return None
            if high is not None:
                top = high(warp)
                if top is None:
                    return None
                value = (top << 32) | value
            total = total + value
        return total

    return read


def _memory(i: SassInstruction, place: int):
    spots = [each for each in i.operands if "[" in each and not each.startswith("c[")]
    names = registers(i.operands[0], max(i.width // 4, 1))
    if i.opcode in ("LDS", "LDL"):
        return _load_shared(_address(spots[0]), names) if i.opcode == "LDS" else _forgetting(names)
    if i.opcode == "STS":
        return _store_shared(_address(spots[0]), registers(i.operands[1], max(i.width // 4, 1)))
    if i.opcode == "ATOMS":
        return _forgetting(registers(i.operands[0] if i.operands[0][0] == "R" else i.operands[1], 1))
    return _access(i, place, spots)


def _forgetting(names: list[str]):
    def act(warp: Warp, holds: Value) -> None:
        warp.place += 1
        for name in names:
            warp.registers[name] = None

    return act


def _load_shared(address, names: list[str]):
    def act(warp: Warp, holds: Value) -> None:
        warp.place += 1
        at, active, shared = address(warp), _active(warp, holds), warp.block.shared
        for n, name in enumerate(names):
            value: Value = None
            if isinstance(at, int):
                value = shared.get(at + 4 * n)
            elif at is not None:
                found = [shared.get(a + 4 * n) for a in at.tolist()]
                here = warp.lanes() if active is None else active
                if all(v is not None for v, wanted in zip(found, here, strict=True) if wanted):
                    value = np.array([v or 0 for v in found])
            warp.put(name, value, active)

    return act


def _store_shared(address, names: list[str]):
    def act(warp: Warp, holds: Value) -> None:
        warp.place += 1
        at, active, shared = address(warp), _active(warp, holds), warp.block.shared
        if at is None:
            shared.clear()
            return
        here = warp.lanes() if active is None else active
        for n, name in enumerate(names or ["RZ"]):
            value = 0 if not names else warp.get(name)
            for lane in np.flatnonzero(here).tolist():
                where = (at if isinstance(at, int) else int(at[lane])) + 4 * n
                if value is None or holds is None:
                    shared.pop(where, None)
                else:
                    shared[where] = value if isinstance(value, int) else int(value[lane])

    return act


def _access(i: SassInstruction, place: int, spots: list[str]):
    """Of global memory."""
    address = _address(spots[-1], is_global=True)
    loads, copies = i.opcode in ("LDG", "LD"), i.opcode == "LDGSTS"
    atomic = i.opcode in ("ATOMG", "ATOM")
    strong = atomic or (loads and "STRONG" in i.modifiers)
    past_l1 = bool({"STRONG", "BYPASS", "NA"} & set(i.modifiers)) or not (loads or copies)
    first = next((o for o in i.operands if o[0] == "R"), "RZ") if atomic else i.operands[0]
    names = registers(first, max(i.width // 4, 1))
    also = predicate(i.operands[-1]) if copies and i.operands[-1].lstrip("!")[0] == "P" else None
    size = i.width
    adds = atomic and "ADD" in i.modifiers and size == 4
    addend = word(i.operands[-1]) if adds else None

    def act(warp: Warp, holds: Value) -> None:
        warp.place += 1
        if also is not None:
            more = also(warp)
            if more is False or (isinstance(more, np.ndarray) and not (more & warp.lanes()).any()):
                return  # zeros are written, nothing is read
            if isinstance(more, np.ndarray):
                holds = holds & more if holds is not None else more
        at, active = address(warp), _active(warp, holds)
        if active is not None and not active.any():
            return
        here = at if active is None or at is None or isinstance(at, int) else at[active]
        if holds is None:
            warp.block.guesses[i.source] += 1
        window = None if at is None else warp.block.window(here, size, i.source)
        if window is None:
            lanes = 32 if active is None else int(active.sum())
            access = Access("?", size * lanes, max(size * lanes // SECTOR, 1), DRAM)
        else:
            access = _count(warp.block, window, here, size, active, past_l1)
        warp.accesses[len(warp.trace) - 1] = access
        if loads or atomic:
            known = window is not None and holds is not None
            if atomic and known:
                known = int(np.min(here)) not in warp.block.changed
                warp.block.changed.add(int(np.min(here)))
            elif strong:
                known = known and not warp._seen[place]
                warp._seen[place] += 1
            if known and active is not None and not isinstance(at, int):
                at = np.where(active, at, here[0])
            own = addend(warp) if adds else None
            before = 0 if own is None else warp.block.index * own  # what the blocks before this one have added
            for n, name in enumerate(names):
                old = warp.registers.get(name, 0)
                found = _Load(window, at + 4 * n, size, active, old) if known else None
                warp.registers[name] = found.word() + before if found and adds else found

    return act


def _count(block: _Block, window: Window, here: Value, size: int, active, past_l1: bool) -> Access:
    if isinstance(here, int):
        lines = np.array([(here - window.low) // LINE])
        lanes, sectors = (32 if active is None else int(active.sum())), 1
    else:
        offsets = here - window.low  # on a device, an argument begins with a line
        units = np.sort(offsets // SECTOR)
        lanes, sectors = len(here), 1 + int(np.count_nonzero(units[1:] != units[:-1]))
        lines = offsets // LINE
    touched, fetched = block.touched[window.name], block.fetched[window.name]
    if touched[lines].all():
        level = L2 if past_l1 or fetched[lines].any() else L1
        fetched[lines] = False
    else:
        touched[lines] = True
        level = L2 if window.scratch else DRAM
    return Access(window.name, size * lanes, sectors, level)
