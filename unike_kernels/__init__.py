"""Fused kernels for UniKE: fast, exact, reversible knowledge editing of multimodal language models.

    import unike_kernels as uk

    uk.patch(model, edits=[uk.Edit.load("edit.safetensors")], memory=uk.MemoryBank.load("memory.safetensors"))
    model.generate(...)
    uk.unpatch(model)
"""

from __future__ import annotations

from . import nn, ops
from ._version import __version__
from .config import Config
from .edits import Edit, EditLayer
from .errors import ArtifactError, BackendUnavailableError, MismatchError, PatchError, UnsupportedModelError
from .memory import MemoryBank, MemoryLayer
from .ops import backend
from .patching import PatchReport, is_patched, patch, patched, rows, unpatch

__all__ = [
    "ArtifactError",
    "BackendUnavailableError",
    "Config",
    "Edit",
    "EditLayer",
    "MemoryBank",
    "MemoryLayer",
    "MismatchError",
    "PatchError",
    "PatchReport",
    "UnsupportedModelError",
    "__version__",
    "backend",
    "is_patched",
    "nn",
    "ops",
    "patch",
    "patched",
    "rows",
    "unpatch",
]
