"""Interleaved timing: the systems run in turn, so that a drift of the machine meets all of them alike."""

from __future__ import annotations

import functools
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

FEWEST_ROUNDS = 3
_USUAL_ROUNDS = 25
_ROUND_SECONDS = 2e-3  # of one system at least: a shorter call is repeated
_WARM_CALLS, _WARM_SECONDS = 3, 0.1

Timer = Callable[[Callable[[], object], int], float]  # a call and how often -> seconds of one


class Spread(NamedTuple):
    """The quartiles of a sample."""

    low: float
    median: float
    high: float

    @property
    def iqr(self) -> float:
        """The interquartile range."""
        return self.high - self.low


def spread(values: Sequence[float]) -> Spread:
    """The quartiles of two values or more, interpolated between the nearest."""
    return Spread(*statistics.quantiles(values, n=4, method="inclusive"))


def percentiles(values: Sequence[float]) -> tuple[float, float]:
    """What 95% and what 99% of two values or more do not exceed, interpolated between the nearest."""
    hundredths = statistics.quantiles(values, n=100, method="inclusive")
    return hundredths[94], hundredths[98]


def ratio(times: Sequence[float], others: Sequence[float]) -> Spread:
    """The quartiles of time / other over the rounds in which both were measured."""
    return spread([t / o for t, o in zip(times, others, strict=True)])


def interleave(
    systems: Mapping[str, Callable[[], object]],
    first: Mapping[str, float] | None = None,
    *,
    rounds: int | None = None,
    seconds: float = 6.0,
    clock: Callable[[], float] = time.perf_counter,
    timer: Timer | None = None,
) -> dict[str, list[float]]:
    """Time the systems in turn, in an order that is drawn anew for each round, after a warm-up.

    Args:
        systems: name -> what is called.
        first: name -> seconds of a call that was made before; if it was a long one, it counts as the warm-up.
        rounds: how many, at least 3; None: up to 25, as many as fit into `seconds`, but 3 at least.
        seconds: for the rounds of all systems together.
        clock: seconds.
        timer: of calls; None: `mean_time` by this clock.

    Returns:
        name -> seconds of a call, one for each round.

    Raises:
        ValueError: too few rounds.
    """
    if rounds is not None and rounds < FEWEST_ROUNDS:
        raise ValueError(f"rounds: expected at least {FEWEST_ROUNDS}, got {rounds}")
    before, timer = first or {}, timer or functools.partial(mean_time, clock=clock)
    known = {name: before[name] for name in systems if before.get(name, 0.0) > _WARM_SECONDS}
    warm = known | {name: _warm(run, clock, timer) for name, run in systems.items() if name not in known}
    repeats = {name: max(1, math.ceil(_ROUND_SECONDS / took)) for name, took in warm.items()}
    times: dict[str, list[float]] = {name: [] for name in systems}
    order, generator, start = list(systems), random.Random(0), clock()
    for done in range(rounds or _USUAL_ROUNDS):
        if rounds is None and done >= FEWEST_ROUNDS and clock() - start > seconds:
            break
        generator.shuffle(order)  # nobody always finds the caches as the same neighbour left them
        for name in order:
            times[name].append(timer(systems[name], repeats[name]))
    return times


def _warm(run: Callable[[], object], clock: Callable[[], float], timer: Timer) -> float:
    """Seconds of a call, when code and data have been seen before."""
    start, took = clock(), 0.0
    for _ in range(_WARM_CALLS):
        took = timer(run, 1)
        if clock() - start > _WARM_SECONDS:
            break
    return max(took, 1e-9)


def mean_time(run: Callable[[], object], repeats: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of a call, the mean of `repeats`; a short call is first made once, uncounted, for the caches' sake."""
    if repeats > 1:
        run()
    start = clock()
    for _ in range(repeats):
        run()
    return (clock() - start) / repeats
