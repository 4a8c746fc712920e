"""Who may do what with edits and tenants: a hook of the operator's own, which a server asks before it does anything."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal


@dataclass(frozen=True)
class Access:
    """What a client asks for.

    Attributes:
        action: "use" edits or a tenant's entries in a request, "list" an edit as a model, "load" or "unload" an edit.
        edits: ids of the edits.
        tenant: whose entries of the memory are asked for; None: of none in particular.
        headers: of the HTTP request, by lower-case names; empty where there is none, as in offline use.
    """

    action: Literal["use", "list", "load", "unload"]
    edits: tuple[str, ...]
    tenant: str | None
    headers: Mapping[str, str]


Authorize = Callable[[Access], None]  # raises PermissionError, with a message for the client

_NONE: Mapping[str, str] = MappingProxyType({})
headers: ContextVar[Mapping[str, str]] = ContextVar("headers", default=_NONE)  # of the HTTP request that is handled


def anybody(access: Access) -> None:
    """The hook of a server that has none: everything is allowed."""


def load_hook(name: str) -> Authorize:
    """The hook "package.module:function".

    Raises ValueError for another form, or where there is no such function.
    """
    module, colon, function = name.partition(":")
    hook: Any = None
    try:
        hook = getattr(importlib.import_module(module), function) if colon else None
    except (ImportError, AttributeError) as error:
        raise ValueError(f"authorize: {name!r} cannot be imported: {error}") from error
    if not callable(hook):
        raise ValueError(f"authorize: expected 'package.module:function', got {name!r}")
    found: Authorize = hook
    return found
