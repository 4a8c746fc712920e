"""What differs between devices when something is timed: the clock, CUDA graphs, the host's share, probes of bounds."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from . import timing

_COPIED = 2**28  # bytes of the copy that measures a GPU's memory
_SIDE = 4096  # of the matrices whose product measures its arithmetic
_CACHE = 4  # times what L2 holds: what is written between two calls
_HOST_CALLS = 25


def timer(device: str) -> timing.Timer:
    """How calls are timed: on the CPU by a clock, on a GPU by its own events, each call with an L2 that knows nothing
    of it, as the other layers of a model leave it."""
    return timing.mean_time if device == "cpu" else _timed_on_gpu


def _timed_on_gpu(run: Callable[[], object], repeats: int) -> float:
    spans = []
    for _ in range(repeats):
        _fill_l2()  # it takes longer than the host needs to launch a graph, so that no gap is timed
        spans.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
        spans[-1][0].record()
        run()
        spans[-1][1].record()
    torch.cuda.synchronize()
    return statistics.fmean(start.elapsed_time(end) for start, end in spans) / 1e3


def _fill_l2() -> None:
    _written(torch.cuda.current_device()).zero_()


@functools.cache
def _written(device: int) -> torch.Tensor:
    size = _CACHE * torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(max(size, 2**26), dtype=torch.uint8, device=f"cuda:{device}")


def replay(call: Callable[[], Any]) -> Callable[[], Any] | None:
    """The call as a CUDA graph, which returns what was captured; None: it cannot be captured, because it waits or has
    streams of its own. What the capture left behind is spoiled, so that a replay which computes nothing is seen."""
    try:
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = call()
    except Exception:  # of whatever kind the errors of others are
        torch.cuda.synchronize()
        return None
    for t in tree_leaves(output):
        if isinstance(t, torch.Tensor):
            t.fill_(float("nan") if t.is_floating_point() else -1)

    def run() -> Any:
        graph.replay()
        return output

    return run


def host_seconds(call: Callable[[], Any]) -> float:
    """Until a call returns, whatever the GPU still does: the median of some."""
    times = []
    for _ in range(_HOST_CALLS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(times)


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
    """A product by the vendor's library on a GPU, by tensor cores for every dtype; returns its multiply-adds."""
    a = _factors(dtype, device)
    if dtype == torch.int8:
        torch._int_mm(a, a.T)
    else:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        torch.mm(a, a)
        torch.set_float32_matmul_precision(before)
    return float(_SIDE) ** 3
