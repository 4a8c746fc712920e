"""Who owns the memory that launches need beside their operands.

Outside of CUDA graphs a stream has its own, which grows with what its launches need and is never the memory of somebody
else's pool. A launch that is captured has memory of its own: graphs are replayed in any order and at the same time.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


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


def grown(size: int, before: int) -> int:
    """How much to allocate where `before` is not enough for `size`: sizes that rise little by little are few."""
    return max(size, before + before // 2)
