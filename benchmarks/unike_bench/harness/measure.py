"""Measuring a case: every output is checked, what is right is timed, and the times become rows."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from . import device
from .case import Case, Role, Run, Shape
from .roofline import Bound
from .timing import Spread, interleave, ratio

_MOST_REACHED = 1.05  # of a GPU's bound: its memory is measured by a copy, and reads can be a little faster


@dataclass(frozen=True)
class Row:
    """One system in one case.

    Attributes:
        op, case, title, shape: of the case; `case` is its name.
        system, role: see `System`.
        seconds: of a call, one for each round; empty where the check failed.
        speedup: how many times faster ours is, over the rounds. A row of ours: than the fastest peer; another row:
            ours, the first, than it. None where there is no peer, or either of the two failed.
        against: the other one of the two.
        over: how many times as long as the base, over the rounds.
        added: seconds more than the base, the median over the rounds.
        read: seconds that reading what it must read takes.
        bound: the same, or what its multiply-adds take if that is longer.
        reached: the bound's share of the time, or of the time that is added to the base.
        recall: of a retrieval by others.
        host: on a GPU, seconds until a call returns to Python.
        graph: on a GPU, whether a CUDA graph of the call was timed, not the call itself.
        failure: why there are no times.
    """

    op: str
    case: str
    title: str
    shape: Shape
    system: str
    role: Role
    seconds: tuple[float, ...] = ()
    speedup: Spread | None = None
    against: str | None = None
    over: Spread | None = None
    added: float | None = None
    read: float | None = None
    bound: float | None = None
    reached: float | None = None
    recall: float | None = None
    host: float | None = None
    graph: bool | None = None
    failure: str | None = None

    @property
    def name(self) -> str:
        """Of the case and the system."""
        return f"{self.case}-{self.system}"

    @property
    def median(self) -> float:
        """Seconds of a call."""
        return statistics.median(self.seconds)


@torch.no_grad()
def measure(
    case: Case, *, rounds: int | None = None, seconds: float = 6.0, clock: Callable[[], float] = time.perf_counter
) -> list[Row]:
    """Measure a case: a row for each of its systems. Its data is freed afterwards.

    Args:
        case: what to measure.
        rounds: see `interleave`; None: as many as fit into `seconds`.
        seconds: for all rounds of all systems together.
        clock: of the CPU; see `interleave`.
    """
    gc.collect()  # what the case before left in cycles
    rows = {name: Row(case.op, case.name, case.title, case.shape, name, s.role) for name, s in case.systems.items()}
    runs: dict[str, Run] = {}
    calls: dict[str, Callable[[], object]] = {}
    first: dict[str, float] = {}
    try:
        data = case.data()
    except Exception as error:  # what is wrong with one case or system must not cost the others
        return [replace(row, failure=_message(error)) for row in rows.values()]
    for name, system in case.systems.items():
        try:
            run = system.prepare(data)
            start = clock()
            output = run.call()
            first[name] = clock() - start
            rows[name] = replace(rows[name], recall=run.check(output))
            calls[name], rows[name] = _on_device(case, run, rows[name])
            runs[name] = run
        except Exception as error:
            rows[name] = replace(rows[name], failure=_message(error))
    probes = {
        _probe(name, what): probe
        for name, run in runs.items()
        if run.bound
        for what, probe in run.bound.probes().items()
    }
    timer = None if case.device == "cpu" else device.timer(case.device)
    times = interleave(calls | probes, first, rounds=rounds, seconds=seconds, clock=clock, timer=timer)
    for name, run in runs.items():
        row = replace(rows[name], seconds=tuple(times[name]))
        rows[name] = _bounded(_compared(row, case, times), run.bound, times)
        if case.device != "cpu" and (rows[name].reached or 0.0) > _MOST_REACHED:
            rows[name] = replace(row, seconds=(), failure=f"faster than its bound: {rows[name].reached:.0%} of it")
    return list(rows.values())


def _on_device(case: Case, run: Run, row: Row) -> tuple[Callable[[], object], Row]:
    """What is timed of a run whose output was right, and its row: on a GPU the replay of a CUDA graph, where that is
    right too, beside what the call itself takes on the host.

    Raises:
        AssertionError: a replay of ours is wrong, or cannot be.
    """
    if case.device == "cpu":
        return run.call, row
    row, replay = replace(row, host=device.host_seconds(run.call), graph=False), None
    if case.captured:
        replay = device.replay(run.call)
        if replay is None and row.role == "ours":
            raise AssertionError("it cannot be captured into a CUDA graph")
    if replay is not None:
        try:
            run.check(replay())
        except Exception as error:
            if row.role == "ours":
                raise AssertionError(f"the replay of its CUDA graph is wrong: {error}") from error
            replay = None  # of streams of its own, say: the call itself is timed
    return replay or run.call, replace(row, graph=replay is not None)


def _message(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _probe(system: str, what: str) -> str:
    return f"{what} of {system}"


def _compared(row: Row, case: Case, times: Mapping[str, list[float]]) -> Row:
    """The row with what others say about it."""
    roles = {name: system.role for name, system in case.systems.items() if name in times}
    peers, bases = ([name for name, role in roles.items() if role == wanted] for wanted in ("peer", "base"))
    if bases and row.role != "base":
        base = times[bases[0]]
        row = replace(row, over=ratio(row.seconds, base), added=statistics.median(_differences(row.seconds, base)))
    if row.role == "ours":
        against = min(peers, key=lambda name: statistics.median(times[name]), default=None)
        speedup = ratio(times[against], row.seconds) if against else None
    else:
        first = next(iter(case.systems))
        against = first if first in times else None
        speedup = ratio(row.seconds, times[against]) if against else None
    return replace(row, speedup=speedup, against=against)


def _bounded(row: Row, bound: Bound | None, times: Mapping[str, list[float]]) -> Row:
    """The row with its bound."""
    if bound is None:
        return row
    probed = {what: statistics.median(times[_probe(row.system, what)]) for what in bound.probes()}
    read, multiplying = bound.seconds(probed)
    limit = max(read, multiplying)
    row = replace(row, read=read, bound=limit)
    if bound.over is None:
        spent = row.median
    elif bound.over in times:
        spent = statistics.median(_differences(row.seconds, times[bound.over]))
    else:
        return row
    return replace(row, reached=limit / spent) if spent > 0 else row  # what is added can be lost in the noise


def _differences(times: Sequence[float], others: Sequence[float]) -> list[float]:
    return [t - o for t, o in zip(times, others, strict=True)]
