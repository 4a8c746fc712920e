"""Making memories and edits: extraction, disentangling, training (paper, section 3.3 and Appendix C)."""

from __future__ import annotations

from .build_memory import MemoryResult, build_memory, extend_memory
from .encoders import Disentangled, EncoderTraining, disentangle
from .extract import Hidden, extract
from .samples import Sample, Triplet, encode
from .settings import EditResult, EditTraining
from .trainer import train_edit, train_edits

__all__ = [
    "Disentangled",
    "EditResult",
    "EditTraining",
    "EncoderTraining",
    "Hidden",
    "MemoryResult",
    "Sample",
    "Triplet",
    "build_memory",
    "disentangle",
    "encode",
    "extend_memory",
    "extract",
    "train_edit",
    "train_edits",
]
