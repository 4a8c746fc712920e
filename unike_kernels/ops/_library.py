"""The torch.library namespace `unike`: one call that registers an operator completely, and one that calls it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_lib = torch.library.Library("unike", "DEF")
_kernels: dict[str, Callable[..., Any]] = {}


def _contiguous(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` with contiguous results, so that the strides seen in tracing are those that come."""

    def wrapped(*args: Any) -> Any:
        result = run(*args)
        return result.contiguous() if isinstance(result, Tensor) else type(result)(t.contiguous() for t in result)

    return wrapped


def define(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Register `unike::<schema>`: its kernel for every device, its shapes for tracing and, if given, its gradient."""
    name = schema[: schema.index("(")]
    _lib.define(schema)
    _kernels[name] = _contiguous(run)
    _lib.impl(name, _kernels[name], "CompositeExplicitAutograd")
    torch.library.register_fake(f"unike::{name}", _contiguous(fake), lib=_lib)
    if backward is not None:
        torch.library.register_autograd(f"unike::{name}", backward, setup_context=setup_context, lib=_lib)


def direct(like: Tensor) -> bool:
    """Whether a kernel may be called past torch's dispatcher; `like` is one of the activations.

    The way through it takes longer than the kernel for one token. It is needed only where something on it has a part to
    play: gradients, tracing, a transformation, a mode or a tensor subclass.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and type(like) is Tensor
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
    )


def call(name: str, like: Tensor, *args: Any) -> Any:
    """`torch.ops.unike.<name>(*args)`, by the shortest way; `like` is one of its activations."""
    # The dispatcher computes what torch has put off.
    if direct(like) and not any(isinstance(t, Tensor) and t.is_neg() for t in args):
        return _kernels[name](*args)
    return getattr(torch.ops.unike, name)(*args)
