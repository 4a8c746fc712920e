"""The FFN with extra key-value neurons, steered by beta * zeta' (paper, Eq. 3 and 6)."""

from __future__ import annotations

from .api import FUSED_TOKENS, PreparedNeurons, add_extra_neurons, fused_ffn, fuses, patched_ffn
from .reference import ACTIVATIONS, EditPool, FFNWeights

__all__ = [
    "ACTIVATIONS",
    "FUSED_TOKENS",
    "EditPool",
    "FFNWeights",
    "PreparedNeurons",
    "add_extra_neurons",
    "fused_ffn",
    "fuses",
    "patched_ffn",
]
