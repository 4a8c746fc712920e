"""Retrieval, latent attention, gate and blend as one operator in plain torch: the composition, and the definition."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..cosine_topk.reference import cosine_topk
from ..latent_attention.reference import Blend, SemanticEncoder, latent_attention


class MemoryOperands(NamedTuple):
    """What `memory_attention` is called with, here and in every kernel."""

    hidden: Tensor  # [M, d], what retrieves
    retrieval_keys: Tensor  # [N, d], normalised
    k: int
    ranges: Tensor | None  # int64 [M, 2], the entries that each token may retrieve
    queries: Tensor  # [M, H, c], and so on: see `LatentOperands`
    inputs: Tensor
    keys: Tensor
    values: Tensor
    encoder: SemanticEncoder
    alpha: Tensor | None
    anchor: Tensor | None
    blend: Blend
    packed: tuple[Tensor, Tensor, Tensor] | None = None  # `PackedKeys` of the index, for kernels that scan them
    projected: Tensor | None = None

    @property
    def like(self) -> Tensor:
        """Its device and dtype choose the backend."""
        return self.hidden if self.hidden.dtype == torch.float64 else self.inputs


def memory_attention(
    hidden: Tensor,
    index: Tensor,
    k: int,
    ranges: Tensor | None,
    queries: Tensor,
    inputs: Tensor,
    keys: Tensor,
    values: Tensor,
    encoder: SemanticEncoder,
    alpha: Tensor | None,
    anchor: Tensor | None,
    blend: Blend,
    packed: tuple[Tensor, Tensor, Tensor] | None = None,
    projected: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [M, d], alpha [M] and ids [M, k]; the arguments are those of `MemoryOperands`."""
    _, ids = cosine_topk(hidden.detach(), index, k, normalized=True, ranges=ranges)
    out, gate = latent_attention(queries, inputs, keys, values, ids, encoder, alpha, anchor, blend)
    return out, gate, ids
