"""`unike tune`: the fastest tile sizes of each Triton kernel on this GPU, found one size after the other."""

from __future__ import annotations

import functools
import importlib
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unike_kernels.ops import _tiles

from .cases import attention, ffn
from .harness import device
from .harness.case import Run

_ROUNDS = 15


@dataclass(frozen=True)
class Tunable:
    """A kernel and the launches that count.

    Attributes:
        op: its name in the cache.
        module: where its `Tiles` and `CANDIDATES` are, below unike_kernels.ops.
        runs: of several shapes, each checked before it is timed.
    """

    op: str
    module: str
    runs: Callable[[], Sequence[Run]]


@dataclass(frozen=True)
class Tuned:
    """What was found for a kernel: its sizes, and the seconds of its launches with the default ones and with these."""

    op: str
    sizes: Any
    before: float
    after: float


def _ffn_runs(prepare: Callable[[ffn.Layer], Run]) -> list[Run]:
    shapes = ((4096, 1, 1), (4096, 16, 1), (4096, 64, 64), (576, 1, 1))
    return [prepare(ffn.Layer(*shape, "cuda")) for shape in shapes]


def _attention_runs() -> list[Run]:
    shapes = ((attention.N, 4096, 1), (attention.N, 4096, 16), (attention.N, 576, 1))
    return [attention.fused(attention.Layer(*shape, attention.K, "cuda")) for shape in shapes]


TUNABLES = (
    Tunable("patched_ffn", "patched_ffn.triton_fused", functools.partial(_ffn_runs, ffn.fused)),
    Tunable("add_extra_neurons", "patched_ffn.triton", functools.partial(_ffn_runs, ffn.beside)),
    Tunable("latent_attention", "latent_attention.triton", _attention_runs),
)


def seconds(run: Run) -> float:
    """Of a call on the GPU: the median of some rounds."""
    timer, call = device.timer("cuda"), device.replay(run.call) or run.call
    return statistics.median(timer(call, 1) for _ in range(_ROUNDS))


def tune(tunables: Sequence[Tunable], timed: Callable[[Run], float] = seconds) -> Iterator[Tuned]:
    """Try each candidate of each size, the others as they are the best so far; what fails or is wrong is left out.

    Args:
        tunables: some of `TUNABLES`.
        timed: seconds of a call.

    Yields:
        What was found for each.

    Raises:
        AssertionError: a result is wrong with the default sizes.
    """
    for each in tunables:
        module = importlib.import_module(f"unike_kernels.ops.{each.module}")
        runs = each.runs()
        best = module.Tiles()
        before = shortest = _cost(each.op, best, runs, timed)
        for name, candidates in module.CANDIDATES.items():
            for value in candidates:
                sizes = best._replace(**{name: value})
                if sizes == best:
                    continue
                try:
                    cost = _cost(each.op, sizes, runs, timed)
                except Exception:  # does not compile, does not fit, or is wrong: no candidate
                    continue
                if cost < shortest:
                    best, shortest = sizes, cost
        yield Tuned(each.op, best, before, shortest)


def _cost(op: str, sizes: Any, runs: Sequence[Run], timed: Callable[[Run], float]) -> float:
    """The geometric mean of the seconds of the runs, each of which is checked first."""
    with _tiles.forced(op, sizes):
        logs = []
        for run in runs:
            run.check(run.call())
            logs.append(math.log(timed(run)))
    return math.exp(statistics.fmean(logs))


def merged(found: Sequence[Tuned], name: str) -> Mapping[str, Any]:
    """The cache with what was found on the GPU of this name."""
    cache = _tiles.read()
    own = cache.get(name, {}) | {each.op: each.sizes._asdict() for each in found}
    return cache | {name: own}
