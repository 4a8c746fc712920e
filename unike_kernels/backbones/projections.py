"""The attention's own projections of what it is asked (Eq. 8)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedModelError


def project_queries(attention: Any, hidden: Tensor) -> Tensor:
    """W_q h + b_q, per head and without positions (Eq. 8). [M, d] -> [M, H, c]."""
    heads = _heads(attention)
    return attention.q_proj(hidden).unflatten(-1, (heads, -1))


def project_memory(attention: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Keys W_k h [N, H, c] and values W_v W_o h [N, H, d] of entries [N, d] (Eq. 8); b_o is spread over the heads."""
    heads = _heads(attention)
    output = _output(attention)
    width = output.weight.shape[1] // heads
    keys, values = (proj(hidden).unflatten(-1, (-1, width)) for proj in (attention.k_proj, attention.v_proj))
    groups = heads // keys.shape[1]
    keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    per_head = output.weight.unflatten(1, (heads, width))
    values = torch.einsum("nhc,dhc->nhd", values, per_head)
    return keys, values if output.bias is None else values + output.bias / heads


def _output(attention: Any) -> Any:
    output = getattr(attention, "o_proj", None) or getattr(attention, "out_proj", None)
    if output is None or not all(hasattr(attention, name) for name in ("q_proj", "k_proj", "v_proj")):
        raise UnsupportedModelError(
            f"{type(attention).__name__}: Config(values='projected') looked for q_proj, k_proj, v_proj and o_proj or "
            f"out_proj; found {[name for name, _ in attention.named_children()]}"
        )
    return output


def _heads(attention: Any) -> int:
    _output(attention)
    heads = getattr(getattr(attention, "config", None), "num_attention_heads", None)
    return int(attention.num_heads if heads is None else heads)


def score_scale(attention: Any) -> float:
    """1 / sqrt(head width): the scale of the module's own attention."""
    return float((_output(attention).weight.shape[1] // _heads(attention)) ** -0.5)
