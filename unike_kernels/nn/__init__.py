"""Drop-in modules, one per thing replaced."""

from __future__ import annotations

from ._drop_in import original, residual_of, residual_position
from .context import ModelContext, Pass, PromptState, Selection, Version
from .dense import Dense
from .edit_store import EditStore
from .memory_attention import MemoryAttention, MemoryTables, shift_tokens
from .patched_ffn import PassThrough, PatchedFFN
from .trace import LayerTrace, Trace

__all__ = [
    "Dense",
    "EditStore",
    "LayerTrace",
    "MemoryAttention",
    "MemoryTables",
    "ModelContext",
    "Pass",
    "PassThrough",
    "PatchedFFN",
    "PromptState",
    "Selection",
    "Trace",
    "Version",
    "original",
    "residual_of",
    "residual_position",
    "shift_tokens",
]
