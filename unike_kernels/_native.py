"""The only importer of the compiled extension, and what its callers share: checks and addresses of torch tensors."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

try:
    import unike_kernels._C as _C
except ImportError as error:
    _C = None
    _REASON = f"the compiled extension unike_kernels._C cannot be imported: {error}"
    warnings.warn(
        f"{_REASON}. Everything runs in plain torch, with the same results, slowly. The extension is compiled when the "
        "package is installed, unless UNIKE_NATIVE=0 or there is no C++ compiler: install GCC 11, clang 14 or later, "
        "then the package anew (pip install --force-reinstall --no-deps --no-cache-dir)",
        RuntimeWarning,
        stacklevel=2,
    )
else:
    _REASON = ""

DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # unike_dtype


def available() -> bool:
    """Whether the compiled extension can be used."""
    return _C is not None


def reason() -> str:
    """Why the compiled extension cannot be used; empty if it can."""
    return _REASON


def core() -> Any:
    """The extension. Raises RuntimeError without it."""
    if _C is None:
        raise RuntimeError(_REASON)
    return _C


def isa() -> str:
    """The instruction set of the kernels in use, one of `isas()`.

    It is what the environment variable UNIKE_ISA named when it was first needed, else the best; "invalid UNIKE_ISA"
    where that names none of them, and then the kernels raise ValueError.

    Raises:
        RuntimeError: without the compiled extension.
    """
    return str(core().cpu_isa())


def isas() -> list[str]:
    """The instruction sets that this CPU has and the kernels are compiled for, from "baseline" to the best.

    Raises:
        RuntimeError: without the compiled extension.
    """
    found: list[str] = core().available_isas()
    return found


def set_isa(name: str | None) -> None:
    """Use other kernels in the whole process: for tests and measurements.

    Args:
        name: one of `isas()`; None: what UNIKE_ISA says, or the best.

    Raises:
        ValueError: for another name.
        RuntimeError: without the compiled extension.
    """
    core().set_isa(name)


def read(*tables: Tensor) -> None:
    """Read these tensors from end to end with all threads: what any kernel that needs them takes at least.

    Args:
        tables: on the CPU, contiguous.
    """
    for t in tables:
        if t.device.type != "cpu" or not t.is_contiguous():
            raise ValueError(f"tables must be contiguous and on the CPU, got {describe(t)}")
        core().read(t.data_ptr(), t.nbytes, torch.get_num_threads())


def multiply_add(dtype: torch.dtype, rounds: int) -> float:
    """Multiply-adds of registers on all threads, `rounds` times some instructions each; returns how many that were.

    Args:
        dtype: of the keys, as a scan reads them: float32, float16, bfloat16 or int8.
        rounds: how often.
    """
    scan = [torch.float32, torch.float16, torch.bfloat16, torch.int8].index(dtype)  # unike_scan
    return float(core().multiply_add(scan, rounds, torch.get_num_threads()))


def native_dtype(x: Tensor) -> Tensor:
    """float32 and bfloat16 as they are, other dtypes as float32."""
    return x if x.dtype in DTYPES else x.float()


def allocate(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor for the core to write, whatever torch's default dtype and device are."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def aligned(t: Tensor) -> Tensor:
    """In memory as it reads: contiguous, each element at a multiple of its size, no negation that torch has put off."""
    t = t.resolve_neg().contiguous()
    return t if _pointer(t) % t.element_size() == 0 else t.clone()


def address(t: Tensor | None) -> int:
    """0 for None."""
    return 0 if t is None else t.data_ptr()


class Anchor:
    """Tells whether a tensor is still where it was, and with it those that were laid out beside it.

    torch moves the memory of tensors that are sent to another process, all that are sent together.
    """

    def __init__(self, t: Tensor | None) -> None:
        assert t is not None
        self._tensor, self._at = t, t.data_ptr()

    def moved(self) -> bool:
        """Then the core knows addresses of nothing: lay the tensors out again."""
        return self._tensor.data_ptr() != self._at


def table(x: Tensor, name: str, dtypes: tuple[torch.dtype, ...] = tuple(DTYPES)) -> Tensor:
    """`x` with contiguous rows at any stride, as the core reads it.

    Args:
        x: [N, d] on the CPU, d >= 1.
        name: what messages call it.
        dtypes: that it may have.

    Raises:
        ValueError: another shape, dtype or device.
    """
    if x.ndim != 2 or x.dtype not in dtypes or x.device.type != "cpu":
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} must be {wanted} [N, d] on the CPU, got {describe(x)}")
    if x.shape[1] == 0:
        raise ValueError(f"{name} must have at least one column")
    x = x.resolve_neg()
    return x if x.stride(1) == 1 and _pointer(x) % x.element_size() == 0 else aligned(x)


def _pointer(t: Tensor) -> int:
    try:
        return t.data_ptr()
    except RuntimeError as error:
        raise RuntimeError(
            "a kernel was given a tensor that has no memory, as torch.func wraps them: call the operators of "
            "unike_kernels.ops inside of a transformation, and what prepares their tables outside of it"
        ) from error


def rows(x: Tensor) -> tuple[int, int, int]:
    """unike_rows of a table."""
    return x.data_ptr(), DTYPES[x.dtype], x.stride(0)


def describe(x: Tensor) -> str:
    """For messages."""
    return f"{x.dtype} {list(x.shape)} on {x.device}"
