"""A stand-in for CUDA graphs on the interpreter of tools/ptxsim.

As in a capture nothing is computed while it is recorded, and nothing may be allocated for longer than it, wait for the
device or come from the host. As in a replay the memory that was allocated meanwhile holds anything at first.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from ptxsim import Session
from ptxsim.session import extent_of
from ptxsim.triton_driver import InterpreterDriver
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from unike_kernels.ops import _workspace

_WAITING = {Tensor.tolist, Tensor.item, Tensor.numpy, Tensor.cpu, Tensor.__bool__, Tensor.__int__, Tensor.__float__}
_WAITING |= {Tensor.__index__, Tensor.nonzero, torch.nonzero, torch.equal, torch.allclose}
_FROM_HOST = {torch.tensor, torch.as_tensor, torch.from_numpy, torch.asarray}
_EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
STREAM = 70


def tensors(*what: Any) -> list[Tensor]:
    return [t for t in tree_leaves(what) if isinstance(t, Tensor)]


def _at(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


class Graph(TorchFunctionMode):
    """What `compute` launches, recorded on a stream.

    Attributes:
        result: what it returns; `replay` writes into it.
        operators: names of torch's operators that change something or make something, in their order.
        launches: the arguments of each launch by name.
    """

    def __init__(self, session: Session, compute: Callable[[], Any], stream: int = STREAM) -> None:
        super().__init__()
        self._session, self._execute = session, session.launch
        self._steps: list[Callable[[], Any]] = []
        self._own: dict[int, Tensor] = {}
        self.operators: list[str] = []
        self.launches: list[dict[str, Any]] = []
        with _capturing(session, stream, self._launch), self:
            self.result = compute()
        for t in self._own.values():
            session.poison(t)

    def _launch(self, kernel: Any, grid: Any, threads: Any, arguments: Any, names: Any = None, shared: int = 0) -> None:
        self.launches.append(dict(zip(names, arguments, strict=True)))
        self._steps.append(lambda: self._execute(kernel, grid, threads, arguments, names, shared))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        assert func not in _WAITING, f"{func} waits for the device"
        assert func not in _FROM_HOST, f"{func} copies from the host"
        changes = name == "__setitem__" or "out" in kwargs or (name.endswith("_") and not name.endswith("__"))
        if changes:
            self.operators.append(name)
            self._steps.append(lambda: func(*args, **kwargs))
            return kwargs["out"] if "out" in kwargs else args[0]
        out = func(*args, **kwargs)
        known = {_at(t) for t in tensors(args, kwargs)}
        made = [t for t in tensors(out) if _at(t) not in known]
        if made:
            self._own.update((_at(t), t) for t in made)
            if name not in _EMPTY:
                self.operators.append(name)
                self._steps.append(lambda: self._again(func, args, kwargs, out))
        return out

    @staticmethod
    def _again(func: Any, args: Any, kwargs: Any, out: Any) -> None:
        for old, new in zip(tensors(out), tensors(func(*args, **kwargs)), strict=True):
            if _at(old) != _at(new):
                old.copy_(new)

    def replay(self) -> Any:
        """Execute it, and return a copy of the result."""
        with torch.no_grad():
            for step in self._steps:
                step()
            return [t.clone() for t in tensors(self.result)]

    def memory(self, among: Callable[[str], bool] = lambda name: True) -> set[tuple[int, int]]:
        """(first, last) byte of the arguments of its launches whose names are chosen."""
        chosen = [extent_of(t) for launch in self.launches for name, t in launch.items() if among(name)]
        return {(e.low, e.high) for e in chosen if e is not None and e.high > e.low}

    def forget(self) -> list[StorageWeakRef]:
        """Nothing but the result is held any more: the rest of what was allocated."""
        results = {_at(t) for t in tensors(self.result)}
        left = [StorageWeakRef(t.untyped_storage()) for at, t in self._own.items() if at not in results]
        self._steps, self._own, self.launches = [], {}, []
        self._session.forget()
        gc.collect()
        return left


@contextmanager
def _capturing(session: Session, stream: int, launch: Callable[..., Any]) -> Iterator[None]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("an allocation that outlives the graph")

    with (
        torch.no_grad(),
        on_stream(stream),
        mock.patch.object(_workspace, "capturing", return_value=True),
        mock.patch.object(_workspace, "kept", refuse),
        mock.patch.object(_workspace, "stock", refuse),
        mock.patch.object(session, "launch", launch),
    ):
        yield


@contextmanager
def on_stream(stream: int) -> Iterator[None]:
    """Within the block this is the current one."""
    with mock.patch.object(InterpreterDriver, "get_current_stream", return_value=stream):
        yield


def overlaps(a: set[tuple[int, int]], b: set[tuple[int, int]]) -> bool:
    return any(low < other_high and other_low < high for low, high in a for other_low, other_high in b)
