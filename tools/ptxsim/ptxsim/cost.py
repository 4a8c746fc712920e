"""A cost model of a launch: what a kernel asks memory for, what waits for what, and how long that takes, without a GPU.

    with interpreting(Recorder(), arch=90) as recorder:
        my_operator(x)  # at its real shape: nothing is executed
    print(cost(recorder.recorded[0], H100))

A few blocks of the launch are walked through the binary (walk.py). The instructions of their warps are then replayed in
order against the waits that ptxas wrote into them (sass.py): once counting a load as one round and all else as nothing,
once with the cycles of the table below. README.md says what the model does not know.
"""

from __future__ import annotations

import ctypes
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from .counters import Launch
from .sass import NONE, Code, SassInstruction, read
from .session import Extent, LoadedKernel, Session, _by_value, extent_of
from .static import MULTIPROCESSOR, occupancy
from .walk import DRAM, L1, L2, PLAIN, SECTOR, Site, Walked, Window, walk


class Machine(NamedTuple):
    """A GPU. README.md names the sources.

    Attributes:
        arch: what is compiled for it.
        multiprocessors: of the whole device.
        clock: cycles a second.
        bandwidth: bytes a second of its memory, of the data sheet.
        reached: the share of it that a good copy reaches.
        l2: bytes a second from L2 to all multiprocessors.
        flops: a second, of dense bfloat16 products.
        doubles: instructions on float64 that a multiprocessor starts in a cycle, for all lanes of a warp.
        launch: seconds, from the end of the kernel before to the first instruction, and from the last one on.
    """

    name: str
    arch: int
    multiprocessors: int
    clock: float
    bandwidth: float
    reached: float
    l2: float
    flops: float
    doubles: float
    launch: float


A100 = Machine("A100", 80, 108, 1.41e9, 2.039e12, 0.90, 4.0e12, 312e12, 1, 2.5e-6)
H100 = Machine("H100", 90, 132, 1.755e9, 3.35e12, 0.92, 5.5e12, 989e12, 2, 2.5e-6)
B200 = Machine("B200", 100, 148, 1.85e9, 8.0e12, 0.92, 10.0e12, 2250e12, 2, 2.5e-6)
MACHINES = {machine.name: machine for machine in (A100, H100, B200)}

# Cycles from issue to result. Memory by where it is served; DRAM when nothing else runs, and at full bandwidth.
LATENCY = {L1: 35, L2: 280, DRAM: 700}
LOADED = 1230
ATOMIC, FENCE, BARRIER = 700, 500, 25
_CYCLES = {
    "LDS": 30, "LDSM": 33, "ATOMS": 60, "SHFL": 25, "MUFU": 22, "S2R": 25, "S2UR": 25, "LDC": 35, "LDCU": 35,
    "R2UR": 12, "F2F": 18, "F2I": 18, "I2F": 18, "F2FP": 6, "POPC": 18, "FLO": 18, "REDUX": 25, "VOTE": 12, "LDL": 35,
    "BREV": 18, "DFMA": 10, "DADD": 10, "DMUL": 10, "DSETP": 12, "DMMA": 35, "HMMA": 33, "IMMA": 33, "MATCH": 30,
    "LDTM": 40, "SYNCS": 25, "NANOSLEEP": 60,
}  # fmt: skip
SCHEDULERS = 4  # of a multiprocessor: each starts one instruction in a cycle
OPERANDS = 12  # cycles until an instruction has read its operands
TENSOR_START = 60  # cycles before and behind an asynchronous product


class Recorded(NamedTuple):
    """A launch that was not executed."""

    function: LoadedKernel
    grid: tuple[int, int, int]
    threads: tuple[int, int, int]
    arguments: list[tuple[str, int, int, Any]]  # name, bytes, alignment, value
    reachable: list[tuple[str, Extent]]
    shared: int


class Recorder(Session):
    """A session that keeps launches instead of executing them; memory that nobody has written is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded: list[Recorded] = []

    def poison(self, argument: Any) -> None:
        """A walk reads memory as it is before the launch."""
        extent = extent_of(argument)
        if extent is not None:
            _bytes_of(extent)[:] = 0

    def launch(
        self,
        kernel: LoadedKernel,
        grid: Sequence[int],
        threads: Sequence[int],
        arguments: Sequence[Any],
        names: Sequence[str] | None = None,
        shared: int = 0,
    ) -> Launch:
        """Keep it."""
        whole, block = (tuple(int(n) for n in (*size, 1, 1)[:3]) for size in (grid, threads))
        parameters = kernel.kernel.parameters
        named = [
            (name, p.size, p.align, value)
            for name, p, value in zip(names or [p.name for p in parameters], parameters, arguments, strict=True)
        ]
        spans = [(name, extent_of(value)) for name, value in [*((n, v) for n, _, _, v in named), *self._exposed]]
        reachable = [(name, extent) for name, extent in spans if extent is not None and extent.high > extent.low]
        self.recorded.append(Recorded(kernel, whole, block, named, reachable, shared))
        return Launch(kernel.kernel.name, whole, math.prod(block))


def site_of(
    launch: Recorded, scratch: Sequence[str] = (), passing: int = 0, turns: Mapping[str, int] | None = None
) -> Site:
    """The launch as the walk needs it; the others are those of `cost`."""
    data = b""
    for _, size, align, value in launch.arguments:
        data += bytes(-len(data) % align)
        extent = extent_of(value)
        data += _by_value(value, size) if extent is None else extent.low.to_bytes(8, "little")
    windows = [Window(name, extent.low, _bytes_of(extent), name in scratch) for name, extent in launch.reachable]
    code = read(launch.function.cubin, launch.function.kernel.name)
    return Site(code, launch.grid, launch.threads, data, windows, launch.shared, passing, turns or {})


def _bytes_of(extent: Extent) -> np.ndarray:
    return np.frombuffer((ctypes.c_uint8 * (extent.high - extent.low)).from_address(extent.low), np.uint8)


class Clock(NamedTuple):
    """What time is counted in: cycles, or rounds, in which a load takes one and all else nothing."""

    levels: dict[int, float]  # cycles of a load, by where it is served
    atomic: float
    fence: float
    barrier: float
    scale: float  # of stalls and other instructions


def cycles(dram: float = LATENCY[DRAM], l2: float = LATENCY[L2], l1: float = LATENCY[L1]) -> Clock:
    """At these latencies."""
    return Clock({PLAIN: 0, L1: l1, L2: l2, DRAM: dram}, ATOMIC, FENCE, BARRIER, 1.0)


ROUNDS = Clock({PLAIN: 0, L1: 0, L2: 1, DRAM: 1}, 1, 0, 0, 0.0)


@dataclass
class Replay:
    """The time of a block.

    Attributes:
        time: from its first instruction to its last.
        in_loop: time of all warps, by innermost loop; None: outside of all.
        flight: bytes times the time that they took, likewise; not those of which it is a guess that they are asked for.
    """

    time: float = 0.0
    in_loop: Counter = field(default_factory=Counter)
    flight: Counter = field(default_factory=Counter)


class _State:
    """A warp in a replay."""

    def __init__(self, warps: int) -> None:
        self.warps = warps  # for which it stands
        self.time = 0.0
        self.position = 0
        self.counters: list[list[float]] = [[] for _ in range(8)]
        self.copied = 0.0  # when the copies so far have landed
        self.products: list[float] = []  # asynchronous ones: when each group is done
        self.tensor = 0.0


def replay(code: Code, walked: Walked, clock: Clock) -> Replay:
    """All warps of a block, in order, each at its own pace from barrier to barrier; of those alike one stands in."""
    plans, loops = [_plan(i, clock) for i in code.code], innermost(code)
    alike: dict[tuple[int, ...], list[int]] = {}
    for n, trace in enumerate(walked.traces):
        alike.setdefault(tuple(trace), []).append(n)
    result = Replay()
    states = {numbers[0]: _State(len(numbers)) for numbers in alike.values()}
    running = list(states)
    while running:
        for n in running:
            _until_barrier(states[n], walked.traces[n], walked.accesses[n], plans, loops, clock, result)
        running = [n for n in running if states[n].position < len(walked.traces[n])]
        meeting = max((states[n].time for n in running), default=0.0)
        for n in running:
            states[n].time = meeting + clock.barrier
    result.time = max(state.time for state in states.values())
    return result


def innermost(code: Code) -> list[tuple[int, int] | None]:
    """The smallest loop around each instruction."""
    found: list[tuple[int, int] | None] = [None] * len(code.code)
    for head, last in sorted(code.loops(), key=lambda loop: loop[0] - loop[1]):
        found[head : last + 1] = [(head, last)] * (last + 1 - head)
    return found


class _Plan(NamedTuple):
    stall: float
    waits: tuple[int, ...]
    result: int
    operands: int
    cycles: float
    kind: str


def _plan(i: SassInstruction, clock: Clock) -> _Plan:
    taken, kind = _CYCLES.get(i.opcode, 6) * clock.scale, ""
    if i.opcode in ("LDG", "LD"):
        kind = "load"
    elif i.opcode in ("ATOMG", "ATOM"):
        taken, kind = clock.atomic, "atomic"
    elif i.opcode in ("LDGSTS", "LDGDEPBAR", "BAR"):
        kind = i.opcode
    elif i.opcode == "DEPBAR" or (i.opcode == "WARPGROUP" and "DEPBAR" in i.modifiers):
        kind, taken = i.opcode, int(i.operands[1], 16) if len(i.operands) > 1 else 0
    elif i.opcode == "MEMBAR":
        taken, kind = clock.fence if "GPU" in i.modifiers or "SYS" in i.modifiers else 0.0, "fence"
    elif i.opcode in ("HGMMA", "UTCHMMA"):
        kind, taken = "product", _flops(i) / 2 / 2048 * clock.scale  # a multiprocessor's products in a cycle
    elif i.opcode == "SYNCS":
        kind = "product awaited"
    stall = max(i.stall, 1) * clock.scale
    return _Plan(stall, i.waits, i.result, i.operands_read, taken, kind)


def _flops(i: SassInstruction) -> float:
    """Of one tensor core instruction, of bfloat16 or what takes as long."""
    shape = next((m for m in i.modifiers if re.match(r"\d", m)), "")
    if i.opcode == "HGMMA":
        rows, columns, inner = map(int, shape.split("x"))
        return 2.0 * rows * columns * inner
    if i.opcode == "UTCHMMA":
        return 2.0 * 128 * 32 * 16  # its shape is in a register: a guess
    known = {"16816": 4096.0, "1688": 2048.0, "16832": 8192.0}.get(shape, 0.0)
    return known * (2 if "TF32" in i.modifiers else 0.5 if i.opcode == "IMMA" else 1)


def _until_barrier(state, trace, accesses, plans, loops, clock, result) -> None:
    time, counters, position, last = state.time, state.counters, state.position, len(trace)
    levels, scale = clock.levels, clock.scale
    in_loop, flight = result.in_loop, result.flight
    while position < last:
        place = trace[position]
        start = time
        executed = place >= 0
        plan = plans[place if executed else ~place]
        for counter in plan.waits:
            for ready in counters[counter]:
                time = max(time, ready)
            counters[counter].clear()
        access = accesses.get(position)
        position += 1
        if not executed:
            time += scale
            in_loop[loops[~place]] += (time - start) * state.warps
            continue
        taken, kind = plan.cycles, plan.kind
        if access is not None:
            if kind in ("load", "LDGSTS"):
                taken = levels[access.level]
                if access.name != "?":
                    flight[loops[place]] += access.bytes * taken * state.warps
            if kind == "LDGSTS":
                state.copied = max(state.copied, time + taken)
        if kind == "LDGDEPBAR":
            taken = max(state.copied - time, 0.0)
        elif kind == "DEPBAR":
            pending = counters[0]
            due = len(pending) - int(taken)
            if due > 0:
                time = max(time, *pending[:due])
                del pending[:due]
        elif kind == "WARPGROUP":
            due = len(state.products) - int(taken)
            if due > 0:
                time = max(time, *state.products[:due])
                del state.products[:due]
        elif kind == "product":
            state.tensor = max(state.tensor, time) + taken
            state.products.append(state.tensor + TENSOR_START * scale)
        elif kind == "product awaited" and state.products:
            taken = max(state.products[-1] - time, taken)
            state.products.clear()
        elif kind == "fence":
            time += taken
        if plan.result != NONE:
            counters[plan.result].append(time + taken)
        if plan.operands != NONE:
            counters[plan.operands].append(time + OPERANDS * scale)
        time += plan.stall
        in_loop[loops[place]] += (time - start) * state.warps
        if kind == "BAR":
            break
    state.time, state.position = time, position


class Loop(NamedTuple):
    """A loop of the binary, in the block that takes longest; numbers are those of a turn of one warp.

    Attributes:
        source: lines of the program.
        turns: of its longest warp.
        cycles: as its loads are served.
        at_l2, at_dram: if all of them were served there.
        loads: from global memory; wide: of those, the ones of 16 bytes.
        products: tensor core instructions.
        share: of the block's time.
    """

    source: str
    turns: int
    cycles: float
    at_l2: float
    at_dram: float
    loads: float
    wide: float
    products: float
    share: float


@dataclass(frozen=True)
class Cost:
    """What a launch costs, by the model.

    Attributes:
        kernel, machine, grid, threads: what ran where.
        blocks: of a multiprocessor at a time.
        rounds: loads that the longest warp has to wait for one after the other, its meetings included.
        cycles: of its longest block alone.
        flight: bytes in flight on a multiprocessor, on average over the loop that asks for most.
        asked: bytes of the sectors that all blocks ask for, by argument.
        scratch: of those, what the blocks write and read themselves.
        dram: bytes that come from memory at least once.
        instructions: warp instructions of all blocks, by name.
        parts: seconds of each limit; the launch comes on top of the largest.
        seconds: in all.
        loops: those that matter, longest first.
        guesses: branches that the model could not decide, by source line.
    """

    kernel: str
    machine: Machine
    grid: tuple[int, int, int]
    threads: int
    blocks: int
    rounds: int
    cycles: float
    flight: float
    asked: dict[str, float]
    scratch: float
    dram: float
    instructions: dict[str, float]
    parts: dict[str, float]
    seconds: float
    loops: list[Loop]
    guesses: dict[str, int]

    def __str__(self) -> str:
        """A report of a screen."""
        parts = ", ".join(f"{name} {1e6 * value:.1f}" for name, value in self.parts.items())
        asked = ", ".join(f"{name} {value / 1e6:.3g}" for name, value in Counter(self.asked).most_common())
        counts = Counter(self.instructions)
        products = sum(n for name, n in counts.items() if is_product(name))
        wide = sum(n for name, n in counts.items() if is_wide_load(name))
        lines = [
            f"{self.kernel} on {self.machine.name}: {1e6 * self.seconds:.1f} us",
            f"  grid {self.grid}, {self.threads} threads, {self.blocks} blocks a multiprocessor",
            f"  us of each limit: {parts}",
            f"  rounds {self.rounds}, cycles {self.cycles:.0f}, in flight {self.flight / 1024:.1f} KB a multiprocessor",
            f"  MB from memory {self.dram / 1e6:.3g}; asked for {sum(self.asked.values()) / 1e6:.3g}: {asked}",
            f"  warp instructions {sum(counts.values()):.4g}, of tensor cores {products:.4g}, 16-byte loads {wide:.4g}",
            "  loop                      turns cycles   (L2   DRAM)  loads  wide   mma  share",
        ]
        for o in self.loops:
            numbers = f"{o.turns:5d} {o.cycles:6.0f} {o.at_l2:6.0f} {o.at_dram:6.0f} {o.loads:6.1f} {o.wide:5.1f}"
            lines.append(f"  {o.source:25} {numbers} {o.products:5.1f} {100 * o.share:5.0f}%")
        if self.guesses:
            lines.append(f"  guessed: {self.guesses}")
        return "\n".join(lines)


def is_product(name: str) -> bool:
    """Whether it is an instruction of the tensor cores."""
    return re.match(r"(H|I|D|Q|O)MMA|HGMMA|IGMMA|UTC\w*MMA", name) is not None


def is_wide_load(name: str) -> bool:
    """Whether it loads 16 bytes of global memory for each lane."""
    return name.startswith(("LDG.", "LDGSTS.")) and ".128" in name


def cost(
    launch: Recorded,
    machine: Machine,
    scratch: Sequence[str] = (),
    blocks: int = 3,
    passing: int = 0,
    turns: Mapping[str, int] | None = None,
) -> Cost:
    """The cost of a launch that was compiled for the machine's architecture.

    Args:
        launch: with memory of the real size, whose integers are as they would be.
        machine: where.
        scratch: the arguments that the blocks of the launch write and read themselves.
        blocks: how many to walk: the first, the last, and some in between that stand for equal parts of the others; 1:
            the first one stands for all.
        passing: lanes of a warp for which a ballot finds a condition on floats to hold; 0: that is guessed, too.
        turns: of loops whose end hangs on floats, by the source line of their branch, as guesses are listed; others end
            after one.
    """
    site = site_of(launch, scratch, passing, turns)
    weights = _sample(math.prod(site.grid), blocks)
    steps: list = [None] * len(site.code.code)
    walked = [walk(site, block, steps) for block in weights]
    return _cost(site, machine, walked, list(weights.values()))


def _sample(count: int, most: int) -> dict[int, float]:
    """Blocks, and for how many of `count` each stands."""
    if count <= most or most == 1:
        return dict.fromkeys(range(min(count, most)), count / min(count, most))
    between = max(most - 2, 1)
    part = (count - 2) / between
    return {0: 1.0, **{1 + int(part * (n + 0.5)): part for n in range(between)}, count - 1: 1.0}


def _cost(site: Site, machine: Machine, walked: list[Walked], weights: list[float]) -> Cost:
    code, count = site.code, math.prod(site.grid)
    limits = MULTIPROCESSOR[machine.arch]
    shared = site.shared + code.shared
    resident = round(occupancy(machine.arch, site.threads, code.registers, shared) * limits.threads / site.threads)
    fullest = min(resident, math.ceil(count / machine.multiprocessors))  # blocks of a multiprocessor at a time
    waves = math.ceil(count / (machine.multiprocessors * max(resident, 1)))

    asked: Counter = Counter()
    executed: Counter = Counter()
    for each, weight in zip(walked, weights, strict=True):
        for name, value in each.asked().items():
            asked[name] += weight * value
        for trace in each.traces:
            for place, times in Counter(trace).items():
                executed[place if place >= 0 else ~place] += weight * times
    own = {window.name for window in site.windows if window.scratch}
    sizes = {window.name: len(window.data) for window in site.windows}
    dram = sum(
        min(sum(w * each.touched[name] for each, w in zip(walked, weights, strict=True)), sizes[name])
        for name in sizes.keys() - own
    )
    unserved = sum(  # what L1 answers does not come from L2
        weight * SECTOR * access.sectors
        for each, weight in zip(walked, weights, strict=True)
        for accesses in each.accesses
        for access in accesses.values()
        if access.level != L1
    )
    instructions: Counter = Counter()
    flops = 0.0
    for place, times in executed.items():
        i = code.code[place]
        instructions[i.name] += times
        flops += times * _flops(i) / (4 if i.opcode == "HGMMA" else 1)
    doubles = sum(n for name, n in instructions.items() if re.match("D(FMA|ADD|MUL|SETP)", name))

    light = [replay(code, each, cycles()) for each in walked]
    longest = max(range(len(walked)), key=lambda n: light[n].time)
    heavy = replay(code, walked[longest], cycles(dram=LOADED))
    slots = count / machine.multiprocessors if count > machine.multiprocessors else 1.0
    per_block = sum(executed.values()) / count
    parts = {
        "waiting": waves * light[longest].time / machine.clock,
        "memory": dram / (machine.reached * machine.bandwidth),
        "L2": unserved / machine.l2,
        "issue": math.ceil(slots) * per_block / SCHEDULERS / machine.clock,
        "tensor cores": flops / machine.flops,
        "float64": math.ceil(slots) * doubles / count / machine.doubles / machine.clock,
    }
    # The busier the memory, the longer a load takes.
    slow, fast, seconds = waves * heavy.time / machine.clock, parts["waiting"], max(parts.values())
    for _ in range(20):
        busy = min(parts["memory"] / seconds, 1.0)
        seconds = (seconds + max(*parts.values(), fast + (slow - fast) * busy**2)) / 2
    parts["waiting"] = fast + (slow - fast) * min(parts["memory"] / seconds, 1.0) ** 2
    rounds = max(replay(code, each, ROUNDS).time for each in walked)
    return Cost(
        kernel=code.kernel, machine=machine, grid=site.grid, threads=site.threads, blocks=fullest,
        rounds=round(rounds), cycles=light[longest].time,
        flight=_in_flight(code, walked[longest], light[longest]) * fullest,
        asked=dict(asked), scratch=sum(asked[name] for name in own), dram=dram, instructions=dict(instructions),
        parts=parts, seconds=machine.launch + max(parts.values()),
        loops=_loops(code, walked[longest], light[longest]), guesses=dict(walked[longest].guesses),
    )  # fmt: skip


def _in_flight(code: Code, walked: Walked, light: Replay) -> float:
    """Bytes of a block, in the loop that asks for most."""
    asking = {loop: value for loop, value in light.flight.items() if light.in_loop[loop]}
    if not asking:
        return 0.0
    most = max(asking, key=lambda loop: asking[loop])
    return asking[most] / light.in_loop[most] * len(walked.traces)


def _loops(code: Code, walked: Walked, light: Replay) -> list[Loop]:
    """Those with at least a hundredth of the time."""
    near, far = (replay(code, walked, cycles(dram=n, l2=n)) for n in (LATENCY[L2], LATENCY[DRAM]))
    of, total, found = innermost(code), sum(light.in_loop.values()), []
    turns: Counter = Counter()  # of the longest warp
    all_turns: Counter = Counter()
    counts: dict[Any, Counter] = {}
    for trace in walked.traces:
        here: Counter = Counter(place if place >= 0 else ~place for place in trace)
        for place, times in here.items():
            loop = of[place]
            if loop is not None:
                counts.setdefault(loop, Counter())[code.code[place].name] += times
                if place == loop[1]:
                    turns[loop] = max(turns[loop], times)
                    all_turns[loop] += times
    for loop, time in light.in_loop.most_common():
        if loop is None or time < 0.01 * total or not all_turns[loop]:
            continue
        n, names = all_turns[loop], counts[loop]
        loads = sum(v for name, v in names.items() if name.split(".")[0] in ("LDG", "LD", "LDGSTS"))
        wide = sum(v for name, v in names.items() if is_wide_load(name))
        products = sum(v for name, v in names.items() if is_product(name))
        source = f"{code.code[loop[0]].source}-{code.code[loop[1]].source.rsplit(':', 1)[-1]}"
        found.append(
            Loop(
                source, turns[loop], time / n, near.in_loop[loop] / n, far.in_loop[loop] / n, loads / n, wide / n,
                products / n, time / total,
            )
        )  # fmt: skip
    return found
