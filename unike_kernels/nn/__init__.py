"""What patched modules compute, one file per thing that is patched."""

from __future__ import annotations

from ._drop_in import (
    DropIn,
    adoption,
    base_class,
    first_argument,
    put_back,
    record_of,
    release,
    residual_of,
    residual_position,
    unpatched,
)
from .context import ModelContext
from .dense import Dense
from .layer_edits import LayerEdits
from .memory_attention import MemoryAttention, MemoryShift, MemoryTables, memory_shift, shift_tokens
from .passes import Generation, Pass, PromptState, Selection, Version
from .patched_ffn import ExtraNeurons, PatchedFFN, extra_neurons
from .routing import Route, Router
from .shared_memory import Ranks, SharedMemory
from .trace import LayerTrace, Trace

__all__ = [
    "Dense",
    "DropIn",
    "ExtraNeurons",
    "Generation",
    "LayerEdits",
    "LayerTrace",
    "MemoryAttention",
    "MemoryShift",
    "MemoryTables",
    "ModelContext",
    "Pass",
    "PatchedFFN",
    "PromptState",
    "Ranks",
    "Route",
    "Router",
    "Selection",
    "SharedMemory",
    "Trace",
    "Version",
    "adoption",
    "base_class",
    "extra_neurons",
    "first_argument",
    "memory_shift",
    "put_back",
    "record_of",
    "release",
    "residual_of",
    "residual_position",
    "shift_tokens",
    "unpatched",
]
