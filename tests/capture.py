"""A stand-in for CUDA graphs: what a call computes is recorded, and computed again with other contents of its inputs.

As in a capture, nothing may wait for the device, and no shape may depend on what a tensor holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_WAITING = {Tensor.tolist, Tensor.item, Tensor.numpy, Tensor.cpu, Tensor.__bool__, Tensor.__int__, Tensor.__float__}
_WAITING |= {Tensor.__index__, Tensor.nonzero, torch.nonzero, torch.equal, torch.allclose}


class _NoWaiting(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in _WAITING, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


class Capture(TorchDispatchMode):
    """What `compute` gives, and again with what its inputs then hold.

    Attributes:
        result: what it gave; `replay` writes into it.
    """

    def __init__(self, compute: Callable[[], Any]) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []
        with torch.no_grad(), _NoWaiting(), self:
            self.result = compute()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute, and record."""
        name = func.name().split("::")[-1].split(".")[0]
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal"), name
        if name == "index":
            assert not any(i is not None and i.dtype == torch.bool for i in args[1]), "a shape that depends on values"
        out = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, out))
        return out

    @property
    def operators(self) -> list[str]:
        """The names of what was recorded."""
        return [func.name() for func, *_ in self._calls]

    @torch.no_grad()
    def replay(self) -> None:
        """Compute all of it again, in the same memory."""
        for func, args, kwargs, out in self._calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
