"""Argument checks shared by the operators. Each message names the argument, what was expected and what came."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from . import _library

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def shape_of(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')}[{', '.join(map(str, t.shape))}]"


def floating(name: str, t: Tensor, dims: Sequence[int | None]) -> None:
    """`t` is a floating tensor of this shape; None stands for any size."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
    if t.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {shape_of(t)}")
    sized(name, t, dims)


def rows(name: str, t: Tensor) -> None:
    """`t` is a floating tensor [*, d] with d >= 1."""
    floating(name, t, (None, None))
    if t.shape[1] < 1:
        raise ValueError(f"{name}: expected at least one column, got {shape_of(t)}")


def finite(t: Tensor) -> bool:
    """Whether a floating tensor holds no NaN or infinity: 20 times as fast as `t.isfinite().all()` on a CPU."""
    if not t.numel():
        return True
    least, most = t.detach().aminmax()
    return bool((least - least == 0) & (most - most == 0))


def unwrapped(name: str, t: Tensor) -> None:
    """`t` is not what a transformation of `torch.func` makes of a tensor."""
    if _library.wrapped(t):
        raise TypeError(
            f"{name}: an index searches outside of torch.func alone; ops.cosine_topk works inside of it, too"
        )


def instance(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected {kind.__name__}, got {type(value).__name__}")


def integer(name: str, t: Tensor, dims: Sequence[int | None]) -> None:
    """`t` is an int64 tensor of this shape."""
    if not isinstance(t, Tensor) or t.dtype != torch.int64:
        got = shape_of(t) if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"{name}: expected an int64 tensor, got {got}")
    sized(name, t, dims)


def sized(name: str, t: Tensor, dims: Sequence[int | None]) -> None:
    shape = t.shape
    if len(shape) == len(dims):
        for have, want in zip(shape, dims, strict=True):  # a loop, not all(...): this runs dozens of times a token
            if want is not None and have != want:
                break
        else:
            return
    wanted = ", ".join("*" if n is None else str(n) for n in dims)
    raise ValueError(f"{name}: expected shape [{wanted}], got {shape_of(t)}")


def same_device(first: str, t: Tensor, **others: Tensor | None) -> None:
    for name, other in others.items():
        if other is not None and other.device != t.device:
            raise ValueError(f"{name}: expected device {t.device} (as {first}), got {other.device}")


def one_of(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}; got {value!r}")


def frozen(**tensors: Tensor | None) -> None:
    """The operator gives these no gradient, so asking for one is a mistake of the caller's."""
    if torch.is_grad_enabled():
        for name, t in tensors.items():
            if t is not None and t.requires_grad:
                raise ValueError(f"{name}: requires_grad is set, but this operator treats it as a constant; detach it")


def ids(name: str, values: object) -> Tensor:
    """Integers, in whatever they come, as an int64 tensor [n] on the CPU; neither floats nor a mask are ids."""
    found = values if isinstance(values, Tensor) else torch.as_tensor(values, dtype=None, device="cpu")
    if found.numel() and (found.dtype == torch.bool or found.is_floating_point() or found.is_complex()):
        hint = f"; of a mask take {name}.nonzero()" if found.dtype == torch.bool else ""
        raise TypeError(f"{name}: expected integers, got {shape_of(found)}{hint}")
    return found.detach().to("cpu", torch.int64).reshape(-1)


def count(name: str, value: object) -> int:
    """An integer of at least 1, of Python or of another library; neither a float nor a truth value is one."""
    if type(value) is int:  # which tracing knows, too
        number = value
    else:
        try:
            number = 0 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            number = 0
    if number < 1:
        raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
    return number


def counts(name: str, values: Iterable[object]) -> list[int]:
    """Integers of at least 1, of Python, of another library or of a tensor."""
    values = values.tolist() if isinstance(values, Tensor) else list(values)
    try:
        return [count(name, value) for value in values]
    except ValueError:
        raise ValueError(f"{name}: expected integers of at least 1, got {values}") from None
