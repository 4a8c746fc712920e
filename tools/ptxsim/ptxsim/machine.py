"""Blocks, groups of warps that execute together, and the launch that runs them to the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .control import BasicBlock
from .counters import Launch
from .errors import DeadlockError, DivergentBarrierError, UnsupportedInstructionError
from .memory import GlobalMemory, LocalMemory, SharedMemory
from .order import Clocks
from .parser import Instruction, Kernel
from .registers import UNSIGNED, Mask, Step
from .schedules import Lockstep

WARP = 32
PARKED = 1 << 20  # added to the place of lanes that wait at a barrier or have to let others run
DONE = 1 << 30
IDLE_ROUNDS = 2000  # rounds in which everybody spins and nothing in memory changes
SPIN = 10_000  # nanoseconds that such a round takes, so that a wait with a limit ends long before


@dataclass
class DecodedBlock:
    """A basic block as closures; `end` moves the lanes on."""

    steps: list[tuple[Instruction, Step]]
    end: tuple[Instruction | None, Step]
    code: BasicBlock


@dataclass
class Program:
    """A kernel, decoded for launches with a given layout of memory."""

    kernel: Kernel
    blocks: list[DecodedBlock]
    symbols: dict[str, int]  # addresses of variables
    static_shared: int
    local_size: int


class Group:
    """Warps of one block that execute together; `at` is the basic block that each lane will execute next."""

    def __init__(self, block: Block, first_warp: int, warps: int):
        self.block, self.launch_memory = block, block.run.memory
        self.program, self.launch = block.run.program, block.run.launch
        self.size = warps * WARP
        self.warps = np.arange(first_warp, first_warp + warps)
        self.lanes = np.arange(self.size)
        self.thread = self.lanes + first_warp * WARP
        stamp = (self.thread // WARP + 1).astype(np.uint8)  # who touched shared memory, for elements of each width
        self.stamps = {width: stamp.repeat(width).view(UNSIGNED[width]) for width in (1, 2, 4, 8)}
        self.at = np.where(self.thread < block.run.launch.threads, 0, DONE).astype(np.int64)
        self.spun = False  # it waits for what others write
        self._deferred = np.zeros(self.size, np.int64)
        self._site: Instruction | None = None
        unknown = {w: np.full(self.size, 0xCD, np.uint8).repeat(w).view(UNSIGNED[w]) for w in (1, 2, 4, 8)}
        unknown[0] = np.zeros(self.size, bool)
        self.registers = [unknown[width] for width in self.program.kernel.widths]
        self.carry = np.zeros(self.size, bool)  # the condition code of add.cc and its like
        self.local = LocalMemory(self.program.local_size, self.size)
        # cp.async: groups committed so far by each lane, and the copies that have not landed
        self.committed = np.zeros(self.size, np.int64)
        self.copies: list = []  # of transfers.Copy

    @property
    def ready(self) -> bool:
        """Whether any lane can go on."""
        return int(self.at.min()) < PARKED

    def symbol(self, name: str) -> np.ndarray:
        """A special register, or the address of a variable."""
        if name in _LANE_REGISTERS:
            return _LANE_REGISTERS[name](self)
        if name.startswith("%"):
            return np.full(self.size, self.block.special(name))
        if name not in self.program.symbols:
            raise UnsupportedInstructionError(self.where(0, f"symbol {name}"))
        return np.full(self.size, self.program.symbols[name], np.uint64)

    def global_warps(self, lanes: np.ndarray) -> np.ndarray:
        """The warp of each lane, numbered over the whole grid."""
        return self.thread[lanes] // WARP + self.block.index * self.block.run.clocks.warps

    def where(self, lane: int, what: str) -> str:
        """`what` with the thread and the instruction that is being executed."""
        site = self._site
        source = f" ({site.source})" if site and site.source else ""
        text = f"`{site.text}`{source}" if site else "start"
        return f"{what}; block {self.block.position}, thread {int(self.thread[lane])}, at {text}"

    def active_warps(self, mask: Mask) -> np.ndarray:
        """Numbers within the group of the warps with a lane in the mask."""
        return self.lanes[: self.size // WARP] if mask is None else np.unique(np.flatnonzero(mask) // WARP)

    def selected(self, mask: Mask) -> np.ndarray:
        """Positions of the lanes in the mask."""
        return self.lanes if mask is None else np.flatnonzero(mask)

    def go(self, mask: Mask, place: int | np.ndarray) -> None:
        """Send lanes to a basic block."""
        self.at = np.where(True if mask is None else mask, place, self.at)

    def let_others_run(self, lanes: np.ndarray) -> None:
        """Hold the warps of these lanes back until the others of the group cannot go on."""
        self._deferred.reshape(-1, WARP)[np.unique(lanes // WARP)] = PARKED

    def run(self) -> None:
        """Execute until every lane waits or is done."""
        self.spun = False
        blocks, counts = self.program.blocks, self.block.executed
        while True:
            effective = self.at + self._deferred
            place = int(effective.min())
            if place >= PARKED:
                self.spun = self.ready
                self._deferred[:] = 0
                return
            here = effective == place
            if here.all():
                mask, warps = None, self.size // WARP
            else:
                mask, warps = here, int(here.reshape(-1, WARP).any(axis=1).sum())
            counts[place] += warps
            block = blocks[place]
            for self._site, step in block.steps:
                step(self, mask)
            self._site, end = block.end
            end(self, mask)


_LANE_REGISTERS: dict[str, Callable[[Group], np.ndarray]] = {
    "%laneid": lambda group: group.thread % WARP,
    "%warpid": lambda group: group.thread // WARP,
    "%tid.x": lambda group: group.thread % group.block.run.threads[0],
    "%tid.y": lambda group: group.thread // group.block.run.threads[0] % group.block.run.threads[1],
    "%tid.z": lambda group: group.thread // (group.block.run.threads[0] * group.block.run.threads[1]),
    "%lanemask_eq": lambda group: 1 << group.thread % WARP,
    "%lanemask_lt": lambda group: (1 << group.thread % WARP) - 1,
    "%lanemask_le": lambda group: (2 << group.thread % WARP) - 1,
    "%lanemask_gt": lambda group: 0xFFFFFFFF ^ ((2 << group.thread % WARP) - 1),
    "%lanemask_ge": lambda group: 0xFFFFFFFF ^ ((1 << group.thread % WARP) - 1),
}


class Block:
    """A thread block: its shared memory, its groups, and who waits at which barrier."""

    def __init__(self, run: LaunchRun, index: int):
        self.run, self.index = run, index
        x, y, _ = run.launch.grid
        self.position = (index % x, index // x % y, index // (x * y))
        self.shared = SharedMemory(run.shared_size)
        self.executed = np.zeros(len(run.program.blocks), np.int64)
        self.bytes = 0
        warps = run.clocks.warps
        together = warps if run.schedule.warps_together else 1
        self.groups = [Group(self, first, together) for first in range(0, warps, together)]
        self._waiting: dict[int, tuple[Instruction, int | None]] = {}
        self._barrier_of = np.full(warps, -1)

    def special(self, name: str) -> int:
        """A special register that all threads of the block share."""
        stem, _, axis = name[1:].partition(".")
        values = {"ctaid": self.position, "nctaid": self.run.launch.grid, "ntid": self.run.threads}
        if stem in values and axis in ("x", "y", "z"):
            return values[stem]["xyz".index(axis)]
        if stem in ("clock", "clock64"):
            return int(self.executed.sum())
        if stem == "globaltimer":  # nanoseconds
            return int(self.executed.sum()) + SPIN * self.run.spins
        alone = {
            "smid": self.index % 108,
            "nsmid": 108,
            "nwarpid": len(self._barrier_of),
            "dynamic_smem_size": self.run.dynamic_shared,
            "total_smem_size": self.run.shared_size,
        }
        if stem not in alone:
            raise UnsupportedInstructionError(f"special register {name}")
        return alone[stem]

    @property
    def done(self) -> bool:
        """Whether every thread has left."""
        return all(int(group.at.min()) == DONE for group in self.groups)

    def arrive(self, group: Group, mask: Mask, barrier: int, threads: int | None, site: Instruction) -> None:
        """Lanes that are at a barrier wait for the others; `threads` is the number to wait for, None for all."""
        live = (group.at < DONE).reshape(-1, WARP)
        here = (np.ones(group.size, bool) if mask is None else mask).reshape(-1, WARP)
        torn = here.any(axis=1) & (here != live).any(axis=1)
        if torn.any():
            lane = int(np.flatnonzero((here != live)[int(np.flatnonzero(torn)[0])])[0]) + WARP * int(torn.argmax())
            raise DivergentBarrierError(group.where(lane, "this thread's warp is at a barrier without it"))
        known = self._waiting.setdefault(barrier, (site, threads))
        if known[1] != threads or (threads is None and known[0] is not site):
            what = f"warps wait at different barriers: another is at `{known[0].text}` ({known[0].source})"
            raise DivergentBarrierError(group.where(int(here.reshape(-1).argmax()), what))
        group.at = np.where(here.reshape(-1), group.at + PARKED, group.at)
        self._barrier_of[group.warps[here.any(axis=1)]] = barrier
        self.release(barrier)

    def release(self, barrier: int) -> None:
        """Let the waiting warps go on if all have come."""
        threads = self._waiting[barrier][1]
        waiting = np.flatnonzero(self._barrier_of == barrier)
        if threads is None:
            live = [int(w) for g in self.groups for w in g.warps[(g.at < DONE).reshape(-1, WARP).any(axis=1)]]
            complete = len(waiting) == len(live)
        else:
            complete = len(waiting) * WARP >= threads
        if not complete:
            return
        del self._waiting[barrier]
        self._barrier_of[waiting] = -1
        everybody = len(waiting) == len(self._barrier_of) or threads is None
        self.shared.barrier(None if everybody else waiting)
        self.run.clocks.barrier((waiting + self.index * len(self._barrier_of)).tolist())
        for group in self.groups:
            freed = np.isin(group.thread // WARP, waiting) & (group.at < DONE)
            group.at = np.where(freed, group.at - PARKED, group.at)

    def leave(self, group: Group, mask: Mask) -> None:
        """These lanes end; a barrier may have waited for nobody else."""
        group.go(mask, DONE)
        for barrier in list(self._waiting):
            self.release(barrier)


class LaunchRun:
    """One launch: blocks start in the schedule's order; when all that run only wait, another one joins them."""

    def __init__(
        self,
        program: Program,
        launch: Launch,
        memory: GlobalMemory,
        clocks: Clocks,
        parameters: dict[str, bytes],
        threads: tuple[int, int, int],
        dynamic_shared: int,
        schedule: Lockstep,
        resident: int | None,
    ):
        self.program, self.launch, self.memory, self.clocks = program, launch, memory, clocks
        self.parameters, self.threads, self.schedule = parameters, threads, schedule
        self.dynamic_shared = dynamic_shared
        self.shared_size = program.static_shared + dynamic_shared
        self.resident = resident
        self.spins = 0  # rounds in which everybody spins

    def run(self) -> None:
        """Run all blocks to their end.

        Raises:
            SimulationError: a defect of the kernel.
        """
        waiting = list(self.schedule.blocks(int(np.prod(self.launch.grid))))[::-1]
        totals = np.zeros(len(self.program.blocks), np.int64)
        live: list[Block] = []
        idle, changes = 0, 0
        with np.errstate(all="ignore"):
            while live or waiting:
                groups = [group for block in live for group in block.groups if group.ready]
                eager = [group for group in groups if not group.spun]
                room = self.resident is None or len(live) < self.resident
                if waiting and room and (not eager or len(live) < self.schedule.window):
                    live.append(Block(self, waiting.pop()))
                    continue
                if not eager:
                    self.spins += 1
                    idle = idle + 1 if self.memory.changes == changes else 0
                    changes = self.memory.changes
                    if not groups or idle > IDLE_ROUNDS:
                        raise DeadlockError(self._stuck(live, len(waiting)))
                    for group in groups:
                        group.spun = False
                    continue
                group = self.schedule.pick(eager)
                group.run()
                if group.block.done:
                    live.remove(group.block)
                    self._add(group.block, totals)
        for block, times in zip(self.program.blocks, totals.tolist(), strict=True):
            for opcode, count in Counter(instruction.opcode for instruction in block.code.code).items():
                self.launch.instructions[opcode] += count * times

    def _add(self, block: Block, totals: np.ndarray) -> None:
        totals += block.executed
        lengths = [len(decoded.code.code) for decoded in self.program.blocks]
        self.launch.largest_block_bytes = max(self.launch.largest_block_bytes, block.bytes)
        self.launch.largest_block_instructions = max(
            self.launch.largest_block_instructions, int(block.executed @ lengths)
        )

    def _stuck(self, live: list[Block], unstarted: int) -> str:
        lines = [f"{self.launch.kernel}: no warp can go on; {unstarted} blocks have not started"]
        for group in [group for block in live for group in block.groups][:8]:
            at = group.at[group.at < DONE]
            if len(at):
                state = "waits at a barrier" if at.min() >= PARKED else "spins"
                place = self.program.blocks[int(at.min()) % PARKED].code.code[0]
                lines.append(
                    f"  block {group.block.position} warps {group.warps.tolist()} {state} near `{place.text}` "
                    f"({place.source})"
                )
        return "\n".join(lines)
