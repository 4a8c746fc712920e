"""Which implementation runs an operator: the fastest one that the tensors' device and this machine allow.

`UNIKE_BACKEND=reference` in the environment or `with backend("reference"):` force one. A forced backend that is
missing is a `BackendUnavailableError`; it never falls back in silence. Derivatives that no backend has, which are all
but the first reverse one, are composed of torch's own operators instead; see `_library`.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from importlib import metadata, util
from typing import Any, NamedTuple, Protocol

import torch

from .. import _native
from ..errors import BackendUnavailableError
from . import _library, _tiles

BACKENDS = ("native", "cuda", "triton", "reference")  # in the order of preference
COMPOSED = "composed"  # of the fastest of other operators, where no kernel of its own does; it cannot be forced
_PREFERENCE = (*BACKENDS[:-1], COMPOSED, BACKENDS[-1])
TRITON = (3, 4)  # the oldest that has what the kernels use

_forced: ContextVar[str | None] = ContextVar("unike_backend", default=None)


class Operands(Protocol):
    """What an operator is called with: a NamedTuple, the same for the definition and for every kernel."""

    @property
    def like(self) -> torch.Tensor:
        """The activation whose device and dtype decide which backend runs."""

    def __iter__(self) -> Iterator[Any]: ...


class Implementation(NamedTuple):
    run: Callable[..., Any]  # takes the operands, in their order
    refuse: Callable[[Any], str | None]  # why it does not take these operands, or None
    missing: Callable[[], str | None]  # why it cannot run on this machine, or None
    launch_of: Callable[[Any], Any] | None = None  # operands -> what it launches for others of their form


_table: dict[str, dict[str, Implementation]] = {}


def register(
    op: str,
    backend: str,
    run: Callable[..., Any],
    *,
    refuse: Callable[[Any], str | None] = lambda _: None,
    missing: Callable[[], str | None] = lambda: None,
    launch_of: Callable[[Any], Any] | None = None,
) -> None:
    """Offer an implementation of an operator.

    Args:
        op: its name.
        backend: one of BACKENDS, or COMPOSED.
        run: takes the operands, in their order.
        refuse: operands -> why it does not take them, or None.
        missing: why it cannot run on this machine, or None.
        launch_of: see `Implementation`.
    """
    _table.setdefault(op, {})[backend] = Implementation(run, refuse, missing, launch_of)


def native_refuse(t: torch.Tensor) -> str | None:
    """Why the native CPU kernels cannot run on a tensor like `t`, or None."""
    if t.device.type != "cpu":
        return f"it runs on the CPU, the tensors are on {t.device}"
    return "it works in float32, the tensors are float64" if t.dtype == torch.float64 else None


def takes_native(*states: torch.Tensor) -> bool:
    """Whether the native kernels take these activations as they are, and nothing else is asked for."""
    return _forced.get() in (None, "native") and (
        os.environ.get("UNIKE_BACKEND", "") in ("", "native")
        and all(t.device.type == "cpu" and t.dtype in (torch.float32, torch.bfloat16) for t in states)
    )


def register_native(op: str, run: Callable[..., Any]) -> None:
    """Offer `run`, which calls the compiled extension, as the native backend of `op`."""
    missing = lambda: None if _native.available() else _native.reason()  # noqa: E731
    register(op, "native", run, refuse=lambda operands: native_refuse(operands.like), missing=missing)


@functools.cache
def _triton_problem() -> str | None:
    """What is wrong with the installed Triton, found without importing it."""
    if util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:  # builds for other hardware go by other names
        version = importlib.import_module("triton").__version__
    if tuple(int(part) for part in version.split(".")[:2]) < TRITON:
        return f"triton {version} is too old, {'.'.join(map(str, TRITON))} or later is needed"
    return None


def gpu_missing() -> str | None:
    """Why torch has no GPU to run on, and what to do; None: it has one."""
    if torch.cuda.is_available():
        return None
    built = f"there is no GPU: torch {torch.__version__}"
    if torch.version.cuda is None and torch.version.hip is None:
        return f"{built} is built for CPUs alone; install a build of it for CUDA or ROCm"
    try:
        torch.cuda.init()
    except RuntimeError as error:  # no driver, or one that is too old: torch says which it would take
        return f"{built} finds none: {error}"
    return f"{built} finds none"


def triton_missing() -> str | None:
    """Why Triton kernels cannot run on this machine, or None. Triton is imported only where there is a GPU."""
    if reason := _triton_problem():
        return reason
    if (reason := gpu_missing()) and "triton" not in sys.modules:
        return reason
    try:
        importlib.import_module("triton").runtime.driver.active.get_current_device()
    except RuntimeError:
        return reason or "Triton finds no GPU"
    return None


def triton_refuse(t: torch.Tensor) -> str | None:
    """Why the Triton kernels cannot run on a tensor like `t`, or None."""
    device = importlib.import_module("triton").runtime.driver.active.get_active_torch_device()
    if t.device.type != device.type:
        return f"it runs on {device.type}, the tensors are on {t.device}"
    return "it works in float32, the tensors are float64" if t.dtype == torch.float64 else None


def compiles(t: torch.Tensor) -> bool:
    """Whether operators on a tensor like `t` may have to be compiled first."""
    return forced_backend() in (None, "triton") and triton_missing() is None and triton_refuse(t) is None


def register_triton(op: str, module: str, refuse: Callable[[Any], str | None] = lambda _: None) -> None:
    """Offer a function of a module, which is imported when it is first called, as the Triton backend of `op`.

    Args:
        op: name of the operator, and of the function.
        module: its full name; it may import triton. It may have a function `launch_of`, see `launch_of`.
        refuse: see `register`; asked after the reasons that hold for every Triton kernel.
    """

    def run(*operands: Any) -> Any:
        with _on_device_of(operands):
            return getattr(importlib.import_module(module), op)(*operands)

    def refused(operands: Any) -> str | None:
        return triton_refuse(operands.like) or refuse(operands)

    def launch_of(operands: Any) -> Any:
        with _on_device_of(operands):
            return importlib.import_module(module).launch_of(operands)

    register(op, "triton", run, refuse=refused, missing=triton_missing, launch_of=launch_of)


def _on_device_of(operands: tuple[Any, ...]) -> AbstractContextManager[None]:
    """For launches; the operands of an operator are on one device."""
    shared: Any = importlib.import_module(f"{__package__}._triton")
    guard: AbstractContextManager[None] = shared.on_device_of(operands[0])
    return guard


def _check_name(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(sorted(BACKENDS))}; got {name!r}")
    return name


def forced_backend() -> str | None:
    """The backend forced by `backend(...)` or `UNIKE_BACKEND`, or None."""
    name = _forced.get()
    if name is not None:
        return name
    name = os.environ.get("UNIKE_BACKEND", "")
    return _check_name(name, "UNIKE_BACKEND") if name else None


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force the backend of every operator that is called inside the block.

    Args:
        name: "reference", "native", "triton" or "cuda".

    Raises:
        ValueError: `name` is none of these.
        BackendUnavailableError: from the operator, where it has no such backend or this machine cannot run it.
    """
    token = _forced.set(_check_name(name, "backend(name)"))
    try:
        yield
    finally:
        _forced.reset(token)


def operators() -> list[str]:
    """The names that `available` takes, without those of gradients."""
    return [op for op in _table if not op.endswith("_backward")]


def available(op: str) -> dict[str, str | None]:
    """For each backend of `op`: None if it can run on this machine, else the reason why not."""
    return {name: impl.missing() for name, impl in _table[op].items() if name in BACKENDS}


def takes(op: str, name: str, operands: Operands) -> bool:
    """Whether `op` has the backend `name`, which can run here and takes these operands."""
    impl = _table[op].get(name)
    return impl is not None and not impl.missing() and not impl.refuse(operands)


def call(op: str, operands: Operands) -> Any:
    """The operator by the forced backend, or by the first that takes the operands."""
    return dispatch(op, operands).run(*operands)


def launch_of(op: str, operands: Operands) -> Any | None:
    """What the backend that `call` chooses launches, to be called again and again with activations of the same form;
    None where it has no such thing."""
    chosen = dispatch(op, operands).launch_of
    return None if chosen is None else chosen(operands)


class Launches:
    """What a backend launches for activations of each form; kept, as looking it up takes longer than some kernels."""

    _MOST = 256

    def __init__(self, op: str, tables: Iterable[torch.Tensor | None]) -> None:
        """
        Args:
            op: name of the operator.
            tables: that stay from call to call. Where one has to be copied to be read, nothing is kept: later changes
                of it would not reach the copy.
        """
        self._op, self._known, self._keeps = op, dict[Any, Any](), _library.in_place(*tables)

    def of(self, form: tuple[Any, ...], operands: Callable[[], Operands]) -> Any | None:
        """See `launch_of`.

        Args:
            form: what the launch depends on: shapes, dtypes and switches.
            operands: makes an example of them.
        """
        if not self._keeps:
            return None
        key = form, forced_backend(), _tiles.changes()
        if key not in self._known:
            if len(self._known) >= self._MOST:
                self._known.clear()
            self._known[key] = launch_of(self._op, operands())
        return self._known[key]


def dispatch(op: str, operands: Operands) -> Implementation:
    """The implementation that `call` calls."""
    choices = _table[op]
    name = forced_backend()
    if name is not None:
        if name not in choices:
            raise BackendUnavailableError(f"{op} has no {name!r} backend; it has: {', '.join(choices)}")
        reason = choices[name].missing() or choices[name].refuse(operands)
        if reason:
            raise BackendUnavailableError(f"{op}: backend {name!r} cannot run here: {reason}")
        return choices[name]
    for name in _PREFERENCE:
        if takes(op, name, operands):
            return choices[name]
    raise BackendUnavailableError(f"{op}: no backend runs on device {operands.like.device}")
