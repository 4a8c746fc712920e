"""Making memories and edits: extraction, disentangling, training (paper, section 3.3 and Appendix C)."""

from __future__ import annotations

from .edit import EditResult, EditTraining, train_edit, train_edits
from .encoders import Disentangled, EncoderTraining, disentangle
from .extract import Hidden, extract
from .memory import MemoryResult, build_memory
from .samples import Sample, Triplet, encode

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
    "extract",
    "train_edit",
    "train_edits",
]
