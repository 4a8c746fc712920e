"""The torch.library namespace `unike`, and one call that registers an operator completely."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_lib = torch.library.Library("unike", "DEF")


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
    _lib.impl(name, _contiguous(run), "CompositeExplicitAutograd")
    torch.library.register_fake(f"unike::{name}", _contiguous(fake), lib=_lib)
    if backward is not None:
        torch.library.register_autograd(f"unike::{name}", backward, setup_context=setup_context, lib=_lib)
