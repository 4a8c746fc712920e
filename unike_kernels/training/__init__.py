"""Making memories and edits: extraction, disentangling, training (paper, section 3.3 and Appendix C)."""

from __future__ import annotations

from .build_memory import MemoryResult, build_memory, extend_memory
from .encoders import Disentangled, EncoderTraining, disentangle
from .extract import Hidden, extract
from .objectives import predicted
from .samples import Sample, Triplet, encode
from .scope import Fact, ScopeResult, ScopeTraining, build_scope, extend_scope, prompt_keys, with_entries
from .settings import EditResult, EditTraining
from .trainer import train_edit, train_edits

__all__ = [
    "Disentangled",
    "EditResult",
    "EditTraining",
    "EncoderTraining",
    "Fact",
    "Hidden",
    "MemoryResult",
    "Sample",
    "ScopeResult",
    "ScopeTraining",
    "Triplet",
    "build_memory",
    "build_scope",
    "disentangle",
    "encode",
    "extend_memory",
    "extend_scope",
    "extract",
    "predicted",
    "prompt_keys",
    "train_edit",
    "train_edits",
    "with_entries",
]
