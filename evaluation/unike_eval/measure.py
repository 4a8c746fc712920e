"""Measuring an editing system on the requests of a suite."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .editors.base import Editor
from .metrics import METRICS, PROTOCOLS, Observation, in_groups, observe_case, score
from .suite import Request

TOGETHER = 8  # one-step edits that a system may make at once

Observed = Mapping[str, list[Observation]]


@dataclass(frozen=True)
class Measured:
    """One request after its edit.

    Attributes:
        id: of the request.
        scores: protocol -> metric -> share in 0..1.
        seconds: that the edit took; of one that was made together with others, its share.
    """

    id: str
    scores: dict[str, dict[str, float]]
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """A mean over requests, and the half-width of its 95% confidence interval (normal, from the standard error)."""

    mean: float
    half_width: float
    count: int

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} ± {100 * self.half_width:.1f}"


def estimate(values: Sequence[float]) -> Estimate:
    """Of one value or more; a single one has no interval (infinite)."""
    if not values:
        raise ValueError("values: expected at least one, got none")
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return Estimate(statistics.fmean(values), 1.96 * error, len(values))


def figures(rows: Sequence[Measured], protocol: str) -> dict[str, Estimate]:
    """Metric, and "mean" of the metrics of a request but for portability -> its estimate over requests."""
    scores = [r.scores[protocol] for r in rows]
    found = {m: estimate(values) for m in METRICS if (values := [s[m] for s in scores if m in s])}
    means = [statistics.fmean(value for m, value in s.items() if m != "portability") for s in scores]
    return found | {"mean": estimate(means)}


def before(model: nn.Module, processor: Any, requests: Sequence[Request]) -> dict[str, Observed]:
    """Request id -> what the model says before any edit."""
    return {r.id: observe_case(model, processor, r.case) for r in requests}


def measure(
    editor: Editor, requests: Sequence[Request], unedited: Mapping[str, Observed], *, steps: int = 1
) -> Iterator[Measured]:
    """Edit and measure, `steps` requests after one another; then all edits are taken back.

    Args:
        editor: fitted.
        requests: in this order; a last sequence that is shorter than `steps` is left out.
        unedited: see `before`.
        steps: of a sequence: all of its edits are in force when its requests are measured. Samples about a fact that
            another one of them has edited are left out.
    """
    foreseen = 0.0  # seconds of each edit that were spent beforehand

    def edit(number: int) -> float:
        nonlocal foreseen
        if number % TOGETHER == 0 and (steps == 1 or editor.independent):
            batch = requests[number : number + TOGETHER]
            began = time.perf_counter()
            editor.prepare([request.case.request for request in batch])
            foreseen = (time.perf_counter() - began) / len(batch)
        return foreseen + _edit(editor, requests[number])

    for start in range(0, len(requests) - steps + 1, steps):
        sequence = requests[start : start + steps]
        try:
            seconds = [edit(number) for number in range(start, start + steps)]
            edited = [request.id for request in sequence]
            for request, took in zip(sequence, seconds, strict=True):
                groups, before = request.case.groups(), unedited[request.id]
                kept = {name: places for name, places in request.apart(edited).items() if places}
                after = in_groups(editor.observe, {name: [groups[name][i] for i in at] for name, at in kept.items()})
                said = {name: [before[name][i] for i in at] for name, at in kept.items()}
                scores = {protocol: score(said, after, protocol) for protocol in PROTOCOLS}
                yield Measured(request.id, scores, took)
        finally:
            editor.reset()


def _edit(editor: Editor, request: Request) -> float:
    start = time.perf_counter()
    editor.edit(request.case.request)
    return time.perf_counter() - start
