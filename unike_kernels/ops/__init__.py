"""The operators: one folder each, with its definition (`reference.py`), its kernels, and its torch.library entry."""

from __future__ import annotations

from ._backend import available, backend
from .cosine_topk import cosine_topk, normalize_rows
from .latent_attention import SemanticEncoder, latent_attention
from .memory_attention import memory_attention
from .patched_ffn import ACTIVATIONS, EditPool, FFNWeights, patched_ffn

__all__ = [
    "ACTIVATIONS",
    "EditPool",
    "FFNWeights",
    "SemanticEncoder",
    "available",
    "backend",
    "cosine_topk",
    "latent_attention",
    "memory_attention",
    "normalize_rows",
    "patched_ffn",
]
