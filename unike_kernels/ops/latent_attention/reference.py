"""Attention over retrieved memory entries, gate and blend in plain torch: the definition (paper, Eq. 2, 7 and 8).

    h_know = sum over heads of softmax(scale * q K_ids^T) V_ids       each token over its own k entries; id -1 is masked
    alpha  = clamp(cos(Enc_sem(h_know), anchor), 0, 1)                anchor: h_input of the token, or of another one
    h_know = h_know * |h_input| / |h_know|                            norm="match", after alpha
    out    = (1 - alpha) h_input + alpha h_know                       convention="inclusion"
    out    = alpha h_input + (1 - alpha) h_know                       convention="eq7"

A token whose ids are all -1 keeps the bits of h_input and has alpha 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..patched_ffn.reference import activate, activate_slope

CONVENTIONS = ("inclusion", "eq7")
NORMS = ("match", "none")


class SemanticEncoder(NamedTuple):
    """Enc_sem: Linear - GELU - Linear."""

    w1: Tensor  # [r, d]
    b1: Tensor  # [r]
    w2: Tensor  # [d, r]
    b2: Tensor  # [d]


class Blend(NamedTuple):
    """The switches of the blend that are not tensors."""

    scale: float
    convention: str
    norm: str


class LatentOperands(NamedTuple):
    """What `latent_attention` is called with, here and in every kernel."""

    queries: Tensor  # [M, H, c]
    inputs: Tensor  # [M, d]
    keys: Tensor  # [N, H, c]
    values: Tensor  # [N, H, d]
    ids: Tensor  # int64 [R, k]; R rows share the M tokens evenly
    encoder: SemanticEncoder
    alpha: Tensor | None  # [1] or [M], a given gate instead of the computed one
    anchor: Tensor | None  # [R, d], compared with Enc_sem(h_know) instead of the inputs
    blend: Blend
    projected: Tensor | None = None  # [N, H, r], the values by w1, for kernels that save a product with them

    @property
    def like(self) -> Tensor:
        """Its device and dtype choose the backend."""
        return self.inputs


class LatentBackwardOperands(NamedTuple):
    """What `latent_attention_backward` is called with: two gradients, then `LatentOperands`."""

    grad: Tensor  # [M, d]
    grad_alpha: Tensor  # [M]
    queries: Tensor
    inputs: Tensor
    keys: Tensor
    values: Tensor
    ids: Tensor
    encoder: SemanticEncoder
    alpha: Tensor | None
    anchor: Tensor | None
    blend: Blend
    projected: Tensor | None = None

    @property
    def like(self) -> Tensor:
        """Its device and dtype choose the backend."""
        return self.inputs


class _Steps(NamedTuple):
    """What forward and backward both need, in the wide dtype."""

    q: Tensor  # [M, H, c]
    h: Tensor  # [M, d]
    anchor: Tensor  # [M, d]
    valid: Tensor  # [M, k]
    keys: Tensor  # [M, k, H, c]
    values: Tensor  # [M, k, H, d]
    p: Tensor  # [M, H, k]
    know: Tensor  # [M, d], before norm match
    cosine: Tensor  # [M], before the clamp; alpha itself where it was given
    alpha: Tensor  # [M]
    stretch: Tensor  # [M]: |h_input| / |h_know|, or 1


def _inverse(x: Tensor) -> Tensor:
    """1 / x, and 0 for 0."""
    return torch.where(x == 0, 0.0, 1 / torch.where(x == 0, 1.0, x))


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """cos(a, b) of the rows; 0 where either is zero."""
    return (a * b).sum(-1) * _inverse(a.norm(dim=-1)) * _inverse(b.norm(dim=-1))


def _per_token(rows: Tensor, tokens: int) -> Tensor:
    """Each row repeated for its equal run of the tokens. [R, ...] -> [tokens, ...]."""
    return rows.repeat_interleave(tokens // len(rows), 0) if len(rows) else rows


def encode(encoder: SemanticEncoder, x: Tensor) -> Tensor:
    """Enc_sem(x). [..., d] -> [..., d]."""
    hidden = activate("gelu", F.linear(x, encoder.w1, encoder.b1))
    return F.linear(hidden, encoder.w2, encoder.b2)


def _steps(
    queries: Tensor,
    inputs: Tensor,
    keys: Tensor,
    values: Tensor,
    ids: Tensor,
    encoder: SemanticEncoder,
    alpha: Tensor | None,
    anchor: Tensor | None,
    blend: Blend,
) -> _Steps:
    m = inputs.shape[0]
    wide = torch.promote_types(inputs.dtype, torch.float32)
    q, h = queries.to(wide), inputs.to(wide)
    valid = _per_token(ids, m) >= 0
    ids = _per_token(ids, m).clamp(min=0)
    h = torch.where(valid.any(-1, keepdim=True), h, 0.0)  # what an untouched token holds reaches no gradient
    a = h if anchor is None else _per_token(anchor.to(wide), m)
    if len(keys) == 0:
        k_rows = keys.new_zeros(m, ids.shape[1], *keys.shape[1:], dtype=wide)
        v_rows = values.new_zeros(m, ids.shape[1], *values.shape[1:], dtype=wide)
    else:
        k_rows, v_rows = keys[ids].to(wide), values[ids].to(wide)
    logits = blend.scale * torch.einsum("mhc,mkhc->mhk", q, k_rows)
    # Where all are masked, none is, so that no derivative is NaN on its way to where it does not matter.
    hidden = valid.any(-1, keepdim=True) & ~valid
    logits = logits.masked_fill(hidden.unsqueeze(1), float("-inf"))
    p = torch.where(valid.unsqueeze(1), logits.softmax(-1), 0.0)
    know = torch.einsum("mhk,mkhd->md", p, v_rows)
    if alpha is None:
        cosine = _cosine(encode(SemanticEncoder(*(t.to(wide) for t in encoder)), know), a)
        gate = cosine.clamp(0, 1)
    else:
        cosine = gate = alpha.to(wide).expand(m)
    stretch = h.norm(dim=-1) * _inverse(know.norm(dim=-1)) if blend.norm == "match" else torch.ones_like(gate)
    return _Steps(q, h, a, valid, k_rows, v_rows, p, know, cosine, gate, stretch)


def latent_attention(
    queries: Tensor,
    inputs: Tensor,
    keys: Tensor,
    values: Tensor,
    ids: Tensor,
    encoder: SemanticEncoder,
    alpha: Tensor | None,
    anchor: Tensor | None,
    blend: Blend,
    projected: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The shifted attention output [M, d] and alpha [M].

    The arguments are those of `LatentOperands`; the definition does not need projected values.
    """
    s = _steps(queries, inputs, keys, values, ids, encoder, alpha, anchor, blend)
    know = s.know * s.stretch.unsqueeze(-1)
    share = (s.alpha if blend.convention == "inclusion" else 1 - s.alpha).unsqueeze(-1)
    shifted = s.valid.any(-1)
    out = torch.where(shifted.unsqueeze(-1), ((1 - share) * s.h + share * know).to(inputs.dtype), inputs)
    return out, torch.where(shifted, s.alpha, 0.0)


def latent_attention_backward(
    grad: Tensor,
    grad_alpha: Tensor,
    queries: Tensor,
    inputs: Tensor,
    keys: Tensor,
    values: Tensor,
    ids: Tensor,
    encoder: SemanticEncoder,
    alpha: Tensor | None,
    anchor: Tensor | None,
    blend: Blend,
    projected: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients with respect to queries, inputs, a given alpha and a given anchor.

    The memory and Enc_sem are constants. The arguments are those of `LatentBackwardOperands`.
    """
    s = _steps(queries, inputs, keys, values, ids, encoder, alpha, anchor, blend)
    shifted = s.valid.any(-1, keepdim=True)
    g = torch.where(shifted, grad.to(s.h.dtype), 0.0)
    know = s.know * s.stretch.unsqueeze(-1)
    sign = 1.0 if blend.convention == "inclusion" else -1.0
    share = (s.alpha if blend.convention == "inclusion" else 1 - s.alpha).unsqueeze(-1)

    grad_h = torch.where(shifted, (1 - share) * g, grad.to(s.h.dtype))
    grad_know = share * g
    grad_gate = sign * (g * (know - s.h)).sum(-1) + torch.where(shifted.squeeze(-1), grad_alpha.to(g.dtype), 0.0)

    if blend.norm == "match":
        along = (grad_know * s.know).sum(-1, keepdim=True)
        inverse_know = _inverse(s.know.norm(dim=-1, keepdim=True))
        inverse_h = _inverse(s.h.norm(dim=-1, keepdim=True))
        stretch = s.stretch.unsqueeze(-1)
        grad_h = grad_h + along * inverse_know * inverse_h * s.h
        grad_know = stretch * (grad_know - along * inverse_know**2 * s.know)

    grad_anchor_rows = torch.zeros_like(s.h)
    if alpha is None:
        enc = SemanticEncoder(*(t.to(s.h.dtype) for t in encoder))
        hidden = F.linear(s.know, enc.w1, enc.b1)
        sem = F.linear(activate("gelu", hidden), enc.w2, enc.b2)
        grad_cosine = torch.where((s.cosine >= 0) & (s.cosine <= 1), grad_gate, 0.0).unsqueeze(-1)
        inverse_sem = _inverse(sem.norm(dim=-1, keepdim=True))
        inverse_anchor = _inverse(s.anchor.norm(dim=-1, keepdim=True))
        cosine = s.cosine.unsqueeze(-1)
        both = inverse_sem * inverse_anchor
        grad_sem = grad_cosine * (both * s.anchor - cosine * inverse_sem**2 * sem)
        grad_anchor_rows = grad_cosine * (both * sem - cosine * inverse_anchor**2 * s.anchor)
        grad_know = grad_know + (grad_sem @ enc.w2 * activate_slope("gelu", hidden)) @ enc.w1

    grad_p = torch.einsum("md,mkhd->mhk", grad_know, s.values)
    grad_logits = s.p * (grad_p - (s.p * grad_p).sum(-1, keepdim=True))
    grad_q = blend.scale * torch.einsum("mhk,mkhc->mhc", grad_logits, s.keys)

    grad_anchor = None
    if anchor is None:
        grad_h = grad_h + grad_anchor_rows
    else:
        rows, d = anchor.shape
        per_row = grad_anchor_rows.reshape(rows, len(s.h) // max(rows, 1), d).sum(1)
        grad_anchor = per_row.to(anchor.dtype)
    grad_given = None
    if alpha is not None:
        grad_given = (
            (grad_gate.sum().expand(1) if alpha.numel() == 1 else grad_gate).to(alpha.dtype).reshape(alpha.shape)
        )
    return grad_q.to(queries.dtype), grad_h.to(inputs.dtype), grad_given, grad_anchor
