"""Who owns the memory that launches need beside their operands.

Outside of CUDA graphs a stream has its own, which grows with what its launches need and is never the memory of somebody
else's pool. A launch that is captured has memory of its own: graphs are replayed in any order and at the same time.
The counters by which blocks meet are zero, or what a launch leaves for the next one, whenever a graph is replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

COUNTERS = 1024  # as many as any kernel has
SPARE = 512  # for so many launches in graphs, 2 MB

# Counters for launches in graphs: those that nobody has yet, and all others, as nobody tells when a graph ends.
_spare: dict[torch.device, list[Tensor]] = {}
_given_away: list[Tensor] = []


def capturing(device: torch.device) -> bool:
    """Whether what is launched on the current stream of `device` goes into a CUDA graph instead."""
    if device.type != "cuda":
        return False
    if device.index in (None, torch.cuda.current_device()):
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def kept(device: torch.device, make: Callable[[], Tensor]) -> Tensor:
    """What `make` allocates for the current stream of `device`, for longer than the caller's memory pool may be.

    torch routes what a thread allocates to a pool while it warms up a CUDA graph, and takes what stays there for a
    leak: so another thread asks for it.
    """
    if device.type != "cuda":
        return make()
    stream = torch.cuda.current_stream(device)

    def on_stream() -> Tensor:
        with torch.cuda.stream(stream):
            return make()

    with ThreadPoolExecutor(1) as other:
        return other.submit(on_stream).result()


def stock(device: torch.device) -> None:
    """Have spare counters for launches in CUDA graphs, so that these need not zero theirs; not within a capture."""
    spare = _spare.setdefault(device, [])
    if missing := SPARE - len(spare):
        spare += kept(device, lambda: _zeros(device, missing)).unbind()
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # whatever stream a graph will be replayed on


def counters(device: torch.device) -> Tensor:
    """int32 [COUNTERS], zeros that nobody else has. In a capture these are spare ones; where there are none, a node of
    the graph zeroes them, which takes a microsecond or two."""
    if not capturing(device):
        return kept(device, lambda: _zeros(device, 1)[0])
    if spare := _spare.get(device):
        _given_away.append(spare.pop())
        return _given_away[-1]
    return _zeros(device, 1)[0]


def _zeros(device: torch.device, launches: int) -> Tensor:
    return torch.zeros(launches, COUNTERS, dtype=torch.int32, device=device)


def grown(size: int, before: int) -> int:
    """How much to allocate where `before` is not enough for `size`: sizes that rise little by little are few."""
    return max(size, before + before // 2)
