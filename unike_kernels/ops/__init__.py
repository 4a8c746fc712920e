"""The operators: one folder each, with its definition (`reference.py`), its kernels, and its torch.library entry."""

from __future__ import annotations

from ._backend import available, backend, operators
from .cosine_topk import PackedKeys, cosine_topk, normalize_rows, pack_keys
from .latent_attention import SemanticEncoder, latent_attention, project_values
from .memory_attention import memory_attention
from .patched_ffn import ACTIVATIONS, EditPool, FFNWeights, patched_ffn

__all__ = [
    "ACTIVATIONS",
    "EditPool",
    "FFNWeights",
    "PackedKeys",
    "SemanticEncoder",
    "available",
    "backend",
    "cosine_topk",
    "latent_attention",
    "memory_attention",
    "normalize_rows",
    "operators",
    "pack_keys",
    "patched_ffn",
    "project_values",
]
