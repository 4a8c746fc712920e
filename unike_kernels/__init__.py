"""Fused kernels for UniKE: fast, exact, reversible knowledge editing of multimodal language models.

import unike_kernels as uk

uk.patch(model, edits=[uk.Edit.load("edit.safetensors")], memory=uk.MemoryBank.load("memory.safetensors"))
model.generate(...)
uk.unpatch(model)
"""

from __future__ import annotations

import importlib
from typing import Any

from . import nn, ops
from ._version import __version__
from .artifacts.edit import Edit, EditLayer
from .artifacts.memory import MemoryBank, MemoryLayer
from .config import Config
from .environment import show_config
from .errors import ArtifactError, BackendUnavailableError, MismatchError, PatchError, UnsupportedModelError
from .ops import backend
from .patching import (
    PatchReport,
    add_edit,
    explain,
    is_patched,
    patch,
    patched,
    remove_edit,
    rows,
    set_beta,
    swap_memory,
    unpatch,
)
from .patching.fold import fold
from .retrieval.approximate import Approximate, ApproximateIndex
from .retrieval.exact import CosineIndex
from .serving.bank import EditBank

_LAZY = ("editing", "evaluation", "digits", "easyvqa")  # they import more than inference needs
_LAZY_NAMES = {"ShardedIndex": "sharded"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f".{name}", __name__)
    if name in _LAZY_NAMES:
        return getattr(importlib.import_module(f".{_LAZY_NAMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Approximate",
    "ApproximateIndex",
    "ArtifactError",
    "BackendUnavailableError",
    "Config",
    "CosineIndex",
    "Edit",
    "EditBank",
    "EditLayer",
    "MemoryBank",
    "MemoryLayer",
    "MismatchError",
    "PatchError",
    "PatchReport",
    "UnsupportedModelError",
    "__version__",
    "add_edit",
    "backend",
    "explain",
    "fold",
    "is_patched",
    "nn",
    "ops",
    "patch",
    "patched",
    "remove_edit",
    "rows",
    "set_beta",
    "show_config",
    "swap_memory",
    "unpatch",
]
