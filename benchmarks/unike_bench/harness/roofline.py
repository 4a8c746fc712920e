"""What this machine can do at most, measured beside the systems: bytes read, and multiply-adds made in registers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unike_kernels import _native

from . import device

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

    @property
    def _where(self) -> torch.device:
        return self.reads[0].device if self.reads else torch.device("cpu")

    def probes(self) -> dict[str, Callable[[], object]]:
        """What is timed beside the system, by name: "read", and for each dtype some multiply-adds."""
        where = self._where
        on_cpu: Callable[[], object] = functools.partial(_native.read, *self.reads)
        probes = {"read": functools.partial(device.copy, where) if where.type == "cuda" else on_cpu}
        return probes | {str(dtype): functools.partial(_multiply, dtype, where) for dtype in self.multiply_adds}

    def seconds(self, probed: Mapping[str, float]) -> tuple[float, float]:
        """How long reading takes, and how long the multiply-adds do, by the seconds that each probe took."""
        where = self._where
        read = probed["read"]
        if where.type == "cuda":  # there the probe copies some memory instead of reading these very tensors
            read *= sum(t.numel() * t.element_size() for t in self.reads) / device.copy(where)
        needed = self.multiply_adds.items()
        return read, sum(count * probed[str(dtype)] / _made(dtype, where) for dtype, count in needed)


def _multiply(dtype: torch.dtype, where: torch.device) -> float:
    """A probe; returns its multiply-adds."""
    return device.multiply(dtype, where) if where.type == "cuda" else _native.multiply_add(dtype, _ROUNDS)


_made = functools.cache(_multiply)
