"""The key of a prompt, by which the memory decides where an edit acts.

Two parts complement each other. Learned queries attend to the embeddings of the prompt's tokens, which tells what the
prompt is about: names are rare tokens. The states of the last token in later layers tell what is asked of it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class PromptEncoder(NamedTuple):
    """Enc_key, from the embeddings of a prompt's tokens and its last token's states to a unit vector.

    Attributes:
        mean, spread: [d], of the embeddings, which are brought to 0 and 1.
        queries: [H, d], which attend to the embeddings; H = 0: only the last token counts.
        means: [L, d], of the last token's states in each of L layers, which are centred.
        w1: [r, (H + L) d], of the first layer.
        b1: [r].
        w2: [c, r], of the second one.
        b2: [c].
    """

    mean: Tensor
    spread: Tensor
    queries: Tensor
    means: Tensor
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor


class Pooled(NamedTuple):
    """What the queries have seen of the tokens so far, as a softmax that further tokens can be added to.

    Attributes:
        top: [B, H], the largest logit.
        total: [B, H], of exp(logit - top).
        sum: [B, H, d], of the embeddings with these weights.
    """

    top: Tensor
    total: Tensor
    sum: Tensor


def pool_tokens(encoder: PromptEncoder, embeddings: Tensor, seen: Tensor, before: Pooled | None = None) -> Pooled:
    """What the queries see of the tokens.

    Args:
        encoder: Enc_key.
        embeddings: [B, T, d], any float dtype.
        seen: bool [B, T], the tokens of the prompt.
        before: of earlier tokens of the same prompts, or None.
    """
    x = (embeddings.float() - encoder.mean) / encoder.spread
    logits = (x @ encoder.queries.T / x.shape[-1] ** 0.5).masked_fill(~seen.unsqueeze(-1), float("-inf"))  # [B, T, H]
    top = logits.amax(1) if before is None else torch.maximum(logits.amax(1), before.top)
    top = top.clamp(min=torch.finfo(torch.float32).min)  # of a row without tokens
    weights = (logits - top.unsqueeze(1)).exp()
    total, summed = weights.sum(1), torch.einsum("bth,btd->bhd", weights, x)
    if before is not None:
        kept = (before.top - top).exp()
        total, summed = total + before.total * kept, summed + before.sum * kept.unsqueeze(-1)
    return Pooled(top, total, summed)


def prompt_features(encoder: PromptEncoder, pooled: Pooled | None, states: Tensor) -> Tensor:
    """What the network of Enc_key sees of prompts, float32 [B, (H + L) d].

    Args:
        encoder: Enc_key.
        pooled: see `pool_tokens`; None where there are no queries.
        states: [B, L, d], the last token's in each layer.
    """
    parts = [_sized(states.float() - encoder.means).flatten(1)]
    if pooled is not None:
        parts = [_sized(pooled.sum / pooled.total.clamp(min=1e-30).unsqueeze(-1)).flatten(1), *parts]
    return torch.cat(parts, -1)


def encode_prompts(encoder: PromptEncoder, features: Tensor) -> Tensor:
    """The keys [B, c] of prompts, unit vectors, from `prompt_features`."""
    hidden = F.gelu(F.linear(features, encoder.w1, encoder.b1))
    return F.normalize(F.linear(hidden, encoder.w2, encoder.b2), dim=-1)


def _sized(x: Tensor) -> Tensor:
    """Each vector [..., d] scaled to the norm sqrt(d)."""
    return F.normalize(x, dim=-1) * x.shape[-1] ** 0.5
