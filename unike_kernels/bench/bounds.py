"""What this machine can do at most, measured beside the systems: bytes read, and multiply-adds made in registers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import _native

_ROUNDS = 1 << 18  # of a probe: some milliseconds


@dataclass(frozen=True)
class Bound:
    """What a system cannot do without.

    Attributes:
        reads: the tensors that it must read, once.
        multiply_adds: how many it must make, by the dtype of the factors.
        over: the system without what is measured; the bound is then on the time that is added to it.
    """

    reads: tuple[Tensor, ...]
    multiply_adds: Mapping[torch.dtype, float] = field(default_factory=dict)
    over: str | None = None

    def probes(self) -> dict[str, Callable[[], object]]:
        """What is timed beside the system, by name: "read", and for each dtype some multiply-adds."""
        probes: dict[str, Callable[[], object]] = {"read": functools.partial(_native.read, *self.reads)}
        return probes | {
            str(dtype): functools.partial(_native.multiply_add, dtype, _ROUNDS) for dtype in self.multiply_adds
        }

    def seconds(self, probed: Mapping[str, float]) -> tuple[float, float]:
        """How long reading takes, and how long the multiply-adds do, by the seconds that each probe took."""
        needed = self.multiply_adds.items()
        return probed["read"], sum(count * probed[str(dtype)] / _made(dtype) for dtype, count in needed)


@functools.cache
def _made(dtype: torch.dtype) -> float:
    """The multiply-adds of a probe."""
    return _native.multiply_add(dtype, _ROUNDS)
