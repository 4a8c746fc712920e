"""A Triton driver whose device is the interpreter: `kernel[grid](cpu_tensors...)` compiles as usual and runs here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler import CompiledKernel

from .session import LoadedKernel, Session, load

# Shared memory that a block may have, in bytes, by architecture.
SHARED_LIMIT: dict[int | str, int] = {
    80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376, "gfx942": 65_536, "gfx950": 163_840,
}  # fmt: skip
MULTIPROCESSORS = 8
_SCALARS = {"fp16": "f2", "fp32": "f4", "f32": "f4", "fp64": "f8", "u1": "?"}


class InterpreterDriver(DriverBase):
    """What Triton asks a driver for. Every target is a device of its own: Triton caches kernels by device."""

    _devices: ClassVar[dict[GPUTarget, int]] = {}

    def __init__(self, session: Session, target: GPUTarget):
        self.session, self.target = session, target
        self._device = self._devices.setdefault(target, len(self._devices) + 1)
        properties = {
            "max_shared_mem": SHARED_LIMIT[target.arch],
            "multiprocessor_count": MULTIPROCESSORS,
            "warpSize": target.warp_size,
            "max_num_regs": 65_536,
            "sm_clock_rate": 1,
            "mem_clock_rate": 1,
            "mem_bus_width": 1,
        }
        self.utils = SimpleNamespace(get_device_properties=lambda device: properties)

    @classmethod
    def is_active(cls) -> bool:
        """Only where it is set by hand."""
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        """No launcher is compiled."""
        return ty

    def get_current_target(self) -> GPUTarget:
        """What kernels are compiled for."""
        return self.target

    def get_current_device(self) -> int:
        """A number that no other target has."""
        return self._device

    def set_current_device(self, device: int) -> None:
        """There is one."""

    def get_current_stream(self, device: int) -> int:
        """Launches are executed at once."""
        return 0

    def get_active_torch_device(self) -> Any:
        """Tensors of the CPU stand for those of the device."""
        import torch

        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        """Nothing to wait for."""
        return SimpleNamespace(synchronize=lambda: None, current_device=self.get_current_device)

    def get_benchmarker(self) -> Callable[..., list[float]]:
        """Autotuning takes the first configuration that runs: time is not modelled."""

        def benchmark(call: Callable[[], Any], *, quantiles: list[float], **_: Any) -> list[float]:
            call()
            return [0.0] * len(quantiles)

        return benchmark


def _init_handles(kernel: CompiledKernel) -> None:
    """Stands for CompiledKernel._init_handles: decode the PTX, and make `_run` a launch on the interpreter."""
    if kernel.module is not None:
        return
    metadata = kernel.metadata
    limit = SHARED_LIMIT[metadata.target.arch]
    if metadata.shared > limit:
        raise triton.OutOfResources(metadata.shared, limit, "shared memory")
    module = load(kernel.asm["ptx"])
    kernel.function = module[metadata.name]
    kernel.function.cubin = kernel.asm["cubin"]
    signature = [(index, kind) for index, kind in enumerate(kernel.src.signature.values()) if kind != "constexpr"]
    names = [kernel.src.fn.arg_names[index] for index, _ in signature]

    def run(x, y, z, stream, function: LoadedKernel, packed, launch_metadata, enter, leave, *arguments) -> None:
        session = triton.runtime.driver.active.session
        values = [_argument(arguments[index], kind) for index, kind in signature]
        scratch = [_scratch(metadata, which, x * y * z, session) for which in ("global", "profile")]
        if enter is not None:
            enter(launch_metadata)
        session.launch(
            function,
            (x, y, z),
            (metadata.num_warps * 32,),
            values + scratch,
            names=[*names, "global_scratch", "profile_scratch"],
            shared=metadata.shared,
        )
        if leave is not None:
            leave(launch_metadata)

    kernel.module, kernel._run = module, run


def _argument(value: Any, kind: str) -> Any:
    if kind.startswith("*"):
        return value
    if kind not in _SCALARS and kind[0] not in "iu":
        raise TypeError(f"an argument of Triton type {kind} is not supported")
    return np.dtype(_SCALARS.get(kind) or f"{kind[0]}{int(kind[1:]) // 8}").type(value)


def _scratch(metadata: Any, which: str, blocks: int, session: Session) -> np.ndarray | None:
    size = getattr(metadata, f"{which}_scratch_size", 0)
    return session.empty(size * blocks * metadata.num_ctas, np.uint8) if size else None


@contextmanager
def interpreting(session: Session, arch: int = 80) -> Iterator[Session]:
    """Launches of Triton kernels inside the block run in `session`, compiled for `sm_<arch>`."""
    with _active(InterpreterDriver(session, GPUTarget("cuda", arch, 32))):
        yield session


@contextmanager
def compiling(target: GPUTarget) -> Iterator[None]:
    """`kernel.warmup(...)` inside the block compiles for `target`, with the hints that a launch would give."""
    with _active(InterpreterDriver(Session(), target)):
        yield


@contextmanager
def _active(driver: InterpreterDriver) -> Iterator[None]:
    config = triton.runtime.driver
    before, handles = config._active, CompiledKernel._init_handles
    config.set_active(driver)
    CompiledKernel._init_handles = _init_handles
    try:
        yield
    finally:
        CompiledKernel._init_handles = handles
        config._active = before
