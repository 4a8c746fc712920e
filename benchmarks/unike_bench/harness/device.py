"""What differs between devices when something is timed: the clock, how calls are repeated, and the probes of bounds."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

_COPIED = 2**28  # bytes of the copy that measures a GPU's memory
_SIDE = 4096  # of the matrices whose product measures its arithmetic
_REPEATS = 20  # of a call in a CUDA graph: what lies between two replays is shared by so many


def clock(device: str) -> Callable[[], float]:
    """Seconds since some moment, of what the device has finished: by its own events where it works on its own."""
    if device == "cpu":
        return time.perf_counter
    start = _event()

    def now() -> float:
        event = _event()
        event.synchronize()
        return float(start.elapsed_time(event)) / 1e3

    return now


def _event() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def repeated(call: Callable[[], Any], device: str) -> tuple[Callable[[], Any], int]:
    """What is timed instead of the call, and how many of it that is: a CUDA graph of several, or the call itself.

    What cannot be captured, because it allocates, waits or has streams of its own, is timed as it is.
    """
    if device == "cpu":
        return call, 1
    try:
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(_REPEATS):
                call()
    except RuntimeError:
        torch.cuda.synchronize()
        return call, 1
    return graph.replay, _REPEATS


def finished(call: Callable[[], Any], device: str) -> Callable[[], Any]:
    """The call, and a wait for what the device still works on: for a clock of the host."""
    if device == "cpu":
        return call

    def run() -> Any:
        output = call()
        torch.cuda.synchronize()
        return output

    return run


@functools.cache
def _buffers(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.empty(_COPIED, dtype=torch.uint8, device=device),
        torch.empty(_COPIED, dtype=torch.uint8, device=device),
    )


def copy(device: torch.device) -> int:
    """Copies some memory of a GPU; returns the bytes read and written."""
    source, target = _buffers(device)
    target.copy_(source)
    return 2 * _COPIED


@functools.cache
def _factors(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.zeros(_SIDE, _SIDE, dtype=dtype, device=device)


def multiply(dtype: torch.dtype, device: torch.device) -> float:
    """A product by the vendor's library on a GPU; returns its multiply-adds."""
    a = _factors(dtype, device)
    torch.mm(a, a)
    return float(_SIDE) ** 3
