"""Drop-in modules, one per thing replaced."""

from __future__ import annotations

from ._drop_in import original, residual_of, residual_position
from .context import Context, ModelContext, PromptState, Version
from .dense import Dense
from .edit_store import EditStore
from .explanation import Explanation, Told
from .memory_attention import MemoryAttention, MemoryTables, shift_tokens
from .patched_ffn import PassThrough, PatchedFFN

__all__ = [
    "Context",
    "Dense",
    "EditStore",
    "Explanation",
    "MemoryAttention",
    "MemoryTables",
    "ModelContext",
    "PassThrough",
    "PatchedFFN",
    "PromptState",
    "Told",
    "Version",
    "original",
    "residual_of",
    "residual_position",
    "shift_tokens",
]
