"""What this machine can do at most, measured in the same run: bytes read, and multiply-adds made in registers."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import _native

_SAMPLES, _SAMPLE_SECONDS = 7, 0.02


@dataclass(frozen=True)
class Bound:
    """What a system cannot do without.

    Attributes:
        reads: the tensors that it must read, once.
        multiply_adds: how many it must make, by the dtype of the factors: float32, or int8 codes.
        over: the system without what is measured; the bound is then on the time that is added to it.
    """

    reads: tuple[Tensor, ...]
    multiply_adds: Mapping[torch.dtype, float] = field(default_factory=dict)
    over: str | None = None

    def read(self) -> None:
        """Read the tensors; timed beside the systems, this is the bound on bytes."""
        _native.read(*self.reads)

    def arithmetic(self) -> float:
        """Seconds that the multiply-adds take at least."""
        return sum(count / multiply_adds_per_second(dtype) for dtype, count in self.multiply_adds.items())


@functools.cache
def multiply_adds_per_second(dtype: torch.dtype) -> float:
    """Of all threads, for float32 or int8: the median of several measurements, taken once in a process."""

    def sample(rounds: int) -> tuple[float, float]:
        start = time.perf_counter()
        count = _native.multiply_add(dtype, rounds)
        return count, time.perf_counter() - start

    rounds = 1 << 12
    while sample(rounds)[1] < _SAMPLE_SECONDS:
        rounds *= 2
    return statistics.median(count / took for count, took in (sample(rounds) for _ in range(_SAMPLES)))
