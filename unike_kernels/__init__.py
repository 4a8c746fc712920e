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
from .artifacts import Edit, EditLayer, MemoryBank, MemoryLayer, Scope
from .config import ANNConfig, Config
from .environment import show_config
from .errors import ArtifactError, BackendUnavailableError, MismatchError, PatchError, UnsupportedModelError
from .ops import backend
from .patching import (
    InstalledEdit,
    InstalledReport,
    PatchReport,
    add_edit,
    explain,
    fold,
    installed,
    is_patched,
    patch,
    patched,
    remove_edit,
    rows,
    set_beta,
    swap_memory,
    unpatch,
    warm_up,
)
from .retrieval import ApproximateIndex, CosineIndex
from .serving import EditBank

# What inference does not need is imported when it is asked for.
_LAZY: dict[str, str] = {"training": ".training", "editing": ".training", "ShardedIndex": ".retrieval.sharded"}
_UNIKE_EVAL = {"evaluation": "unike_eval", "digits": "unike_eval.toy.digits", "easyvqa": "unike_eval.toy.shapes"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        module = importlib.import_module(_LAZY[name], __name__)
        return getattr(module, name, module)
    if name in _UNIKE_EVAL:
        try:
            return importlib.import_module(_UNIKE_EVAL[name])
        except ModuleNotFoundError as error:
            if error.name != "unike_eval":
                raise
            message = f"unike_kernels.{name} is part of the package unike-eval: pip install unike-eval"
            raise ImportError(message) from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "ANNConfig",
    "ApproximateIndex",
    "ArtifactError",
    "BackendUnavailableError",
    "Config",
    "CosineIndex",
    "Edit",
    "EditBank",
    "EditLayer",
    "InstalledEdit",
    "InstalledReport",
    "MemoryBank",
    "MemoryLayer",
    "MismatchError",
    "PatchError",
    "PatchReport",
    "Scope",
    "UnsupportedModelError",
    "__version__",
    "add_edit",
    "backend",
    "explain",
    "fold",
    "installed",
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
    "warm_up",
]
