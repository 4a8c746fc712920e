"""What the Triton kernels share: device functions, and what their launches need to know of the device.

Only the kernels import this, and they are imported when first called: `unike_kernels` itself never imports triton.
"""

from __future__ import annotations

import enum
import functools
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import target_info

from . import _workspace

# Of a workspace's counters, for meetings: one for each team of blocks, and one for all of them.
MOST_TEAMS = EVERYBODY = _workspace.COUNTERS - 1
ALIGNED = 64  # float32 of scratch


@triton.jit
def meet(counter, blocks, leader):
    """Waits until all `blocks` have come, one of them the `leader`; what each wrote before is seen by all behind it.

    They must be resident together. The leader's addend turns the top bit once all have come and leaves the others at 0,
    so that nothing has to be reset, neither between two meetings nor between two launches.
    """
    tl.debug_barrier()
    if blocks > 1:
        old = tl.atomic_add(counter, tl.where(leader, -2147483648 - (blocks - 1), 1), sem="acq_rel")
        while (tl.atomic_add(counter, 0, sem="acquire") ^ old) >= 0:
            pass


@triton.jit
def sum_of_parts(parts, slices, size, wanted):
    """The sum of all slices' parts, slice after slice. Past L1, which may hold those of an earlier tile."""
    total = tl.zeros(parts.shape, tl.float32)
    for s in range(slices):
        total += tl.load(parts + s * size, mask=wanted, other=0.0, cache_modifier=".cg")
    return total


@triton.jit
def dot(a, b, acc):
    """acc + a b with float32 sums; operands of one half dtype as they are, others as float32, exact to 21 bits."""
    if a.dtype == b.dtype and a.dtype.primitive_bitwidth == 16:
        return tl.dot(a, b, acc)
    elif target_info.is_cuda():
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="tf32x3")
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")


@triton.jit
def activate(x, NAME: tl.constexpr):
    """Act(x) of float32."""
    if NAME == "relu":
        return tl.maximum(x, 0.0)
    elif NAME == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":  # (1 + tanh u) / 2 = sigmoid(2 u)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif NAME == "relu2":
        r = tl.maximum(x, 0.0)
        return r * r
    else:
        return x * tl.sigmoid(x)


@triton.jit
def activate_slope(x, NAME: tl.constexpr):
    """Act'(x) of float32."""
    if NAME == "relu":
        return tl.where(x > 0, 1.0, 0.0)
    elif NAME == "gelu":
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif NAME == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        return s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif NAME == "relu2":
        return tl.where(x > 0, 2.0 * x, 0.0)
    else:
        s = tl.sigmoid(x)
        return s * (1.0 + x * (1.0 - s))


class Workspace:
    """Memory that kernels need beside their arguments: counters, which are zero between launches, and scratch.

    Launches that may run at the same time need one each; those of one stream share one, see `workspace_of`. Scratch
    grows where a launch needs more, so that the second of two equal launches allocates nothing. What it was before goes
    back to torch, which gives it to nobody but later work of the same stream.

    Attributes:
        counters: int32, zeros.
        filled: the arguments of launches that were made before, until their scratch is another.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.counters = _workspace.counters(self.device)
        self.filled: WeakKeyDictionary[Launch, list[Any]] = WeakKeyDictionary()
        self._scratch: Tensor | None = None

    def floats(self, *counts: int) -> list[Tensor]:
        """Scratch of so many float32 each, aligned as the kernels want it."""
        ends = [*itertools.accumulate((-(-count // ALIGNED) * ALIGNED for count in counts), initial=0)]
        before = 0 if self._scratch is None else self._scratch.numel()
        if self._scratch is None or before < ends[-1]:
            self.filled.clear()
            self._scratch = None  # first: the two of them need not fit
            self._scratch = self._floats(_workspace.grown(ends[-1], before))
        return [self._scratch[start : start + n] for start, n in zip(ends, counts, strict=False)]

    def _floats(self, count: int) -> Tensor:
        return _workspace.kept(self.device, lambda: torch.empty(count, dtype=torch.float32, device=self.device))


class _Captured(Workspace):
    """That of one launch in a CUDA graph: CUDA replays a graph only when it has ended, but another one meanwhile.

    Its scratch is the graph's own, as that of torch's operators is, and what the graph launches later uses it again.
    """

    def _floats(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.float32, device=self.device)


_workspaces: dict[tuple[torch.device, int], Workspace] = {}


def workspace_of(device: torch.device) -> Workspace:
    """The workspace of the current stream of `device`, the current one; of the next launch alone in a capture."""
    driver = triton.runtime.driver.active
    return _workspace_of(device, driver.get_current_stream(driver.get_current_device()))


def _workspace_of(device: torch.device, stream: int) -> Workspace:
    if _workspace.capturing(device):
        return _Captured(device)
    found = _workspaces.get((device, stream))
    if found is None:
        _workspace.stock(device)
        found = _workspaces[device, stream] = Workspace(device)
    return found


def device_of(t: Tensor) -> int | None:
    """The number of the GPU that it is on; None where one only stands for it."""
    return t.get_device() if t.is_cuda else None


@contextmanager
def on_device_of(t: Tensor) -> Iterator[None]:
    """Within the block the GPU that the tensor is on is the current one, on which Triton launches."""
    driver, device = triton.runtime.driver.active, device_of(t)
    before = driver.get_current_device()
    if device is None or device == before:
        yield
        return
    driver.set_current_device(device)
    try:
        yield
    finally:
        driver.set_current_device(before)


@functools.cache
def _properties(device: int) -> dict[str, int]:
    return dict(triton.runtime.driver.active.utils.get_device_properties(device))


def multiprocessors() -> int:
    """Of the current device."""
    return _multiprocessors(triton.runtime.driver.active.get_current_device())


def _multiprocessors(device: int) -> int:
    return _properties(device)["multiprocessor_count"]


def shared_memory() -> int:
    """Bytes that a block of the current device may have."""
    return _properties(triton.runtime.driver.active.get_current_device())["max_shared_mem"]


def options(*, cooperative: bool) -> dict[str, Any]:
    """Of a launch. A limit on registers that is none keeps ptxas from spilling for the sake of occupancy."""
    target = triton.runtime.driver.active.get_current_target()
    return {"launch_cooperative_grid": cooperative, **({"maxnreg": 255} if target.backend == "cuda" else {})}


class Place(enum.Enum):
    """In the arguments of a launch: a tensor of each call, and of the workspace scratch, counters, and that of all."""

    GIVEN = enum.auto()
    SCRATCH = enum.auto()
    COUNTERS = enum.auto()
    EVERYBODYS = enum.auto()


GIVEN, SCRATCH, COUNTERS, EVERYBODYS = Place
_UNALIGNED = 15  # of an address: Triton compiles other code for it


def given(t: Tensor | None) -> Place | None:
    """The place of an argument that may be missing."""
    return None if t is None else GIVEN


def launch(kernel: Any, blocks: int, *arguments: Any, **options: Any) -> Any:
    """`kernel[(blocks,)](*arguments, **options)`: launched, and the code that Triton has compiled for them.

    Raises:
        RuntimeError: a CUDA graph is captured, and the code is not there.
    """
    if not _workspace.capturing(next(t.device for t in arguments if isinstance(t, Tensor))):
        return kernel[blocks, 1, 1](*arguments, **options)
    with _compiling_nothing():
        compiled = kernel[blocks, 1, 1](*arguments, **options)
    if compiled is None:
        raise RuntimeError(
            f"{kernel.__name__}: no code is loaded for what it is given, nor can be while a CUDA graph is captured: "
            "call unike_kernels.warm_up(model, tokens=...) before, with the numbers of tokens that are captured, or "
            "make one such pass"
        )
    return compiled


_hooking = threading.Lock()


@contextmanager
def _compiling_nothing() -> Iterator[None]:
    """Within the block a launch of this thread whose code is not there does nothing, and returns None."""
    runtime, thread = triton.knobs.runtime, threading.get_ident()
    with _hooking:
        before = runtime.jit_cache_hook

        def hook(*args: Any, **kwargs: Any) -> bool | None:
            if threading.get_ident() == thread:
                return True
            return None if before is None else before(*args, **kwargs)

        runtime.jit_cache_hook = hook
        try:
            yield
        finally:
            runtime.jit_cache_hook = before


class Launch:
    """A kernel and its arguments, all but the tensors that change from call to call.

    What Triton's own launch does in each call is done in the first one: finding the compiled code by dtypes, alignments
    and values of all arguments, which takes as long as the kernel may.
    """

    def __init__(
        self,
        kernel: Any,
        blocks: int,
        arguments: Sequence[Any],
        scratch: Sequence[int] = (),
        typed: Callable[[list[Tensor]], Sequence[Tensor]] = list,
        **options: Any,
    ) -> None:
        """
        Args:
            kernel: a jitted function.
            blocks: of its grid.
            arguments: in the kernel's order.
            scratch: float32 of each SCRATCH.
            typed: these as the kernel takes them.
            **options: of the launch.
        """
        self._kernel, self._blocks, self._options = kernel, blocks, options
        self._arguments, self._scratch, self._typed = list(arguments), scratch, typed
        self._given = [i for i, each in enumerate(arguments) if each is GIVEN]
        self._compiled: dict[int, Any] = {}  # by device

    def __call__(self, *given: Tensor | None, workspace: Workspace | None = None) -> None:
        """Launch on the current stream.

        Args:
            given: of the shapes, strides and dtypes of the first call's; None: an argument that this kernel is without.
            workspace: None: see `workspace_of`.
        """
        driver = triton.runtime.driver.active
        device, tensors = driver.get_current_device(), [t for t in given if t is not None]
        if device_of(tensors[0]) not in (None, device):
            with on_device_of(tensors[0]):
                return self(*tensors, workspace=workspace)
        stream = driver.get_current_stream(device)
        workspace = workspace or _workspace_of(tensors[0].device, stream)
        filled = workspace.filled.get(self)
        if filled is None:
            filled = self._filled(workspace)
            workspace.filled[self] = filled
        arguments, addresses = filled.copy(), 0
        for i, t in zip(self._given, tensors, strict=True):
            arguments[i] = t
            addresses |= t.data_ptr()
        compiled, grid = self._compiled.get(device), (self._blocks, 1, 1)
        if addresses & _UNALIGNED:
            launch(self._kernel, self._blocks, *arguments, **self._options)
        elif compiled is None:
            self._compiled[device] = launch(self._kernel, self._blocks, *arguments, **self._options)
        else:
            runtime, told = triton.knobs.runtime, None
            hooks = runtime.launch_enter_hook, runtime.launch_exit_hook
            if getattr(hooks[0], "calls", hooks[0]) or getattr(hooks[1], "calls", hooks[1]):
                told = compiled.launch_metadata(grid, stream, *arguments)
            else:  # chains of no hooks
                hooks = None, None
            compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, told, *hooks, *arguments)

    def _filled(self, workspace: Workspace) -> list[Any]:
        scratch = iter(self._typed(workspace.floats(*self._scratch)))
        places = {COUNTERS: workspace.counters, EVERYBODYS: workspace.counters[EVERYBODY:]}
        filled = []
        for each in self._arguments:
            if isinstance(each, Place) and each is not GIVEN:
                each = next(scratch) if each is SCRATCH else places[each]
            filled.append(each)
        return filled


def last_contiguous(t: Tensor) -> Tensor:
    """`t` itself where its last dimension is contiguous, else a copy."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()
