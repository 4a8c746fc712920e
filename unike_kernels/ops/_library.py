"""The torch.library namespace `unike`, and one call that registers an operator completely."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_lib = torch.library.Library("unike", "DEF")


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
    _lib.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"unike::{name}", fake, lib=_lib)
    if backward is not None:
        torch.library.register_autograd(f"unike::{name}", backward, setup_context=setup_context, lib=_lib)
