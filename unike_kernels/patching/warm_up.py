"""Having everything compiled before the first request comes."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from torch import nn

from ..ops import _check, _workspace
from .session import require_state


def warm_up(model: nn.Module, tokens: Iterable[int] = (1, 8, 64, 512)) -> float:
    """Have Triton compile now what the layers of a patched model will launch; a kernel takes it 0.4 to 7 seconds.

    Each patched layer computes with zeros, on its device, for each number of tokens: the neurons of the edits that are
    installed, in one row and in as many rows, and the memory. The model itself does not run, and nothing of it changes.
    What is compiled is kept in TRITON_CACHE_DIR, by default ~/.triton/cache, where other processes find it. On a CPU,
    where nothing is compiled, the tables are laid out, which the first request would wait for.

    CUDA graphs can be captured only of code that is loaded: call this, or make such a pass, before.

    Args:
        model: a patched model.
        tokens: of a pass, all of its rows together: those that will come. Near ones share their code, but not all do:
            `range(1, 513)` leaves nothing to be compiled for any of them.

    Returns:
        The seconds that it took: next to none where nothing was left to do.

    Raises:
        PatchError: the model is not patched.
        ValueError: `tokens` are no integers of at least 1.
    """
    state, counts = require_state(model), _check.counts("tokens", tokens)
    start, devices = time.perf_counter(), set[torch.device | None]()
    for i in sorted({*state.ffns, *state.attentions}):
        parameters = state.decoder.layers[i].module.parameters()
        wide = (p.dtype for p in parameters if p.is_floating_point() and p.element_size() > 1)
        dtype = next(wide, torch.float32)  # that of a norm, where the weights are quantised
        records = state.attentions.get(i), state.ffns.get(i)
        devices |= {r.warm_up(count, dtype) for r in records if r is not None for count in counts}
    for device in filter(None, devices):
        _workspace.stock(device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return time.perf_counter() - start
