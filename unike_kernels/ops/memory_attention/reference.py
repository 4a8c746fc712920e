"""Retrieval, latent attention, gate and blend as one operator in plain torch: the composition, and the definition."""

from __future__ import annotations

from torch import Tensor

from ..cosine_topk.reference import cosine_topk
from ..latent_attention.reference import Blend, SemanticEncoder, latent_attention


def memory_attention(
    hidden: Tensor,
    index: Tensor,
    k: int,
    bounds: Tensor | None,
    queries: Tensor,
    inputs: Tensor,
    keys: Tensor,
    values: Tensor,
    encoder: SemanticEncoder,
    alpha: Tensor | None,
    anchor: Tensor | None,
    blend: Blend,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [M, d], alpha [M] and ids [M, k]; `index` holds the normalised retrieval keys [N, d]."""
    _, ids = cosine_topk(hidden.detach(), index, k, normalized=True, bounds=bounds)
    out, gate = latent_attention(queries, inputs, keys, values, ids, encoder, alpha, anchor, blend)
    return out, gate, ids
