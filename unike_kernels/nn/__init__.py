"""Drop-in modules, one per thing replaced."""

from __future__ import annotations

from ._drop_in import original, residual_of, residual_position
from .context import Context, PromptState
from .memory_attention import MemoryAttention, MemoryTables
from .patched_ffn import Dense, EditStore, PassThrough, PatchedFFN

__all__ = [
    "Context",
    "Dense",
    "EditStore",
    "MemoryAttention",
    "MemoryTables",
    "PassThrough",
    "PatchedFFN",
    "PromptState",
    "original",
    "residual_of",
    "residual_position",
]
