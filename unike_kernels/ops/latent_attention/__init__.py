"""Attention over the retrieved memory, the alpha gate and the blend into the attention output (paper, Eq. 2, 7, 8)."""

from __future__ import annotations

from .api import PreparedAttention, attend, blend_of, latent_attention, project_values
from .reference import LatentOperands, SemanticEncoder

__all__ = [
    "LatentOperands",
    "PreparedAttention",
    "SemanticEncoder",
    "attend",
    "blend_of",
    "latent_attention",
    "project_values",
]
