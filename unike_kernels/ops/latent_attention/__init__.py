"""Attention over the retrieved memory, the alpha gate and the blend into the attention output (paper, Eq. 2, 7, 8)."""

from __future__ import annotations

from .api import blend_of, latent_attention, project_values
from .reference import SemanticEncoder

__all__ = ["SemanticEncoder", "blend_of", "latent_attention", "project_values"]
