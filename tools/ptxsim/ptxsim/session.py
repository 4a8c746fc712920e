"""The front door: buffers that live across launches, and launches of kernels of a PTX file.

session = Session("random:3")
out = session.empty((4, 4), np.float32)
session.launch(load(ptx_text)["kernel"], grid=(4,), threads=(128,), arguments=[x, out, np.int32(4)])
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from .counters import Launch
from .errors import SimulationError
from .machine import LaunchRun, Program
from .memory import Buffer, GlobalMemory, Window
from .order import Clocks
from .parser import Kernel, Module, parse
from .program import build
from .schedules import schedule


class Extent(NamedTuple):
    """The bytes that an argument spans, those of the memory it lies in, and what keeps that memory alive."""

    low: int
    high: int
    memory_low: int
    memory_high: int
    owner: object


def extent_of(argument: Any) -> Extent | None:
    """The extent of a numpy array or of a tensor of torch; None for a scalar."""
    if isinstance(argument, np.ndarray):
        whole = argument
        while isinstance(whole.base, np.ndarray):
            whole = whole.base
        return Extent(*_span(argument), *_span(whole), whole)
    if hasattr(argument, "untyped_storage"):
        storage = argument.untyped_storage()
        low = argument.data_ptr()
        last = sum((size - 1) * stride for size, stride in zip(argument.shape, argument.stride(), strict=True))
        high = low + (last + 1) * argument.element_size() if argument.numel() else low
        return Extent(low, high, storage.data_ptr(), storage.data_ptr() + storage.nbytes(), storage)
    return None


def _span(array: np.ndarray) -> tuple[int, int]:
    low = array.ctypes.data
    last = sum((size - 1) * stride for size, stride in zip(array.shape, array.strides, strict=True))
    return low, low + last + array.itemsize if array.size else low


def _by_value(argument: Any, size: int) -> bytes:
    """The bytes of a numpy scalar, of a structure given as bytes, or of a null pointer."""
    if argument is None:
        return bytes(size)
    return argument.tobytes() if isinstance(argument, np.generic) else bytes(memoryview(argument))


class LoadedKernel:
    """A kernel of a loaded file."""

    def __init__(self, module: Module, kernel: Kernel, variables: dict[str, np.ndarray]):
        self.module, self.kernel, self.variables = module, kernel, variables
        self.cubin: bytes | None = None  # the binary, where whoever loaded the file has one

    @functools.cached_property
    def program(self) -> Program:
        """The code, decoded for a launch."""
        addresses = {name: array.ctypes.data for name, array in self.variables.items()}
        return build(self.module, self.kernel, addresses)


class LoadedModule:
    """The kernels of a PTX file, and its variables, which keep their values between launches."""

    def __init__(self, text: str):
        self._module = parse(text)
        self.variables = {
            v.name: np.frombuffer(bytearray(v.initial.ljust(v.size, b"\0")), np.uint8)
            for v in self._module.variables
            if v.space in ("global", "const")
        }
        self._kernels: dict[str, LoadedKernel] = {}

    @property
    def names(self) -> list[str]:
        """The entries of the file."""
        return list(self._module.kernels)

    def __getitem__(self, name: str) -> LoadedKernel:
        if name not in self._kernels:
            self._kernels[name] = LoadedKernel(self._module, self._module.kernels[name], self.variables)
        return self._kernels[name]


def load(text: str) -> LoadedModule:
    """Read the PTX in `text`."""
    return LoadedModule(text)


class Session:
    """Memory that is tracked, the schedule of launches, and what they counted."""

    def __init__(self, schedule: str = "lockstep", resident: int | None = None):
        self.schedule = schedule
        self.resident = resident  # blocks that fit on the device at once; None: all
        self.launches: list[Launch] = []
        self._buffers: dict[int, Buffer] = {}
        self._exposed: list[tuple[str, Any]] = []

    def empty(self, shape: Sequence[int] | int, dtype: Any) -> np.ndarray:
        """An array that nobody has written: it holds a pattern, and a kernel that reads it is stopped."""
        array = np.empty(shape, dtype)
        self.poison(array)
        return array

    def poison(self, argument: Any) -> None:
        """The same for the whole memory of a tensor or array that exists."""
        extent = extent_of(argument)
        if extent is not None and extent.memory_high > extent.memory_low:
            self._buffer(extent).poison()

    def forget(self) -> None:
        """Hold no memory any more; whatever is in it counts as written."""
        self._buffers.clear()

    def expose(self, name: str, argument: Any) -> None:
        """Allow launches to reach memory whose address no argument holds."""
        self._exposed.append((name, argument))

    @contextmanager
    def counting(self) -> Iterator[list[Launch]]:
        """The launches made inside the block."""
        first, found = len(self.launches), []
        yield found
        found += self.launches[first:]

    def _buffer(self, extent: Extent) -> Buffer:
        buffer = self._buffers.get(extent.memory_low)
        if buffer is None or buffer.high < extent.memory_high:
            buffer = Buffer(extent.memory_low, extent.memory_high, written=True, keep=extent.owner)
            self._buffers[extent.memory_low] = buffer
        return buffer

    def launch(
        self,
        kernel: LoadedKernel,
        grid: Sequence[int],
        threads: Sequence[int],
        arguments: Sequence[Any],
        names: Sequence[str] | None = None,
        shared: int = 0,
    ) -> Launch:
        """Run a kernel. Arrays and tensors are passed as pointers, numpy scalars and bytes by value.

        Raises:
            SimulationError: a defect of the kernel or of the launch.
        """
        code = kernel.kernel
        grid, threads = (tuple(int(n) for n in (*size, 1, 1)[:3]) for size in (grid, threads))
        if len(arguments) != len(code.parameters):
            raise SimulationError(f"{code.name} has {len(code.parameters)} parameters, {len(arguments)} are given")
        if code.required_threads not in (None, int(np.prod(threads))):
            raise SimulationError(f"{code.name} needs {code.required_threads} threads, {threads} are given")
        names = names or [parameter.name for parameter in code.parameters]
        parameters, windows = {}, []
        for name, parameter, argument in zip(names, code.parameters, arguments, strict=True):
            extent = extent_of(argument)
            if extent is None:
                value = _by_value(argument, parameter.size)
            else:
                value = extent.low.to_bytes(8, "little")
                windows.append((name, extent))
            if len(value) != parameter.size:
                raise SimulationError(f"{code.name}: {name} has {parameter.size} bytes, {len(value)} are given")
            parameters[parameter.name] = value
        for name, reachable in [*self._exposed, *kernel.variables.items()]:
            windows.append((name, extent_of(reachable)))
        spans = [Window(name, self._buffer(e), e.low, e.high) for name, e in windows if e.high > e.low]
        for window in spans:
            window.buffer.start_launch()
        count = int(np.prod(grid))
        launch = Launch(code.name, grid, int(np.prod(threads)))
        if count and launch.threads:
            clocks = Clocks(count, -(-launch.threads // 32))
            memory = GlobalMemory(list(spans), clocks)
            order = schedule(self.schedule)
            LaunchRun(kernel.program, launch, memory, clocks, parameters, threads, shared, order, self.resident).run()
        for window in spans:
            if window.loads.requests:
                launch.loads[window.name] = window.loads
            if window.stores.requests:
                launch.stores[window.name] = window.stores
        self.launches.append(launch)
        return launch
