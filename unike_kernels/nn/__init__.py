"""Drop-in modules, one per thing replaced."""

from __future__ import annotations

from ._drop_in import original
from .context import Context, PromptState
from .memory_attention import MemoryAttention, MemoryTables
from .patched_ffn import EditStore, PassThrough, PatchedFFN

__all__ = [
    "Context",
    "EditStore",
    "MemoryAttention",
    "MemoryTables",
    "PassThrough",
    "PatchedFFN",
    "PromptState",
    "original",
]
