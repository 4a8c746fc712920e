"""Tiny random models whose layers are of several kinds, and which of them have an attention and an FFN."""

from __future__ import annotations

from typing import NamedTuple

import torch
from backbones.zoo import EXPERT, GQA, HEADS, V5, Family, gelu_tanh, of
from torch import Tensor


class Hybrid(NamedTuple):
    """A model with layers of several kinds.

    Attributes:
        family: the model, and what its layers' parts are called where they have them.
        attention, ffn: indices of the layers that have one.
    """

    family: Family
    attention: tuple[int, ...]
    ffn: tuple[int, ...]


def relu2(x: Tensor) -> Tensor:
    return x.relu().square()


EVERY = (0, 1, 2, 3)
LINEAR = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
DELTA = dict(
    linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
    linear_conv_kernel_dim=2, layer_types=LINEAR,
)  # fmt: skip
MAMBA = dict(mamba_d_state=8, mamba_d_conv=2, mamba_expand=2, mamba_n_heads=8, mamba_d_head=16, mamba_n_groups=1)
JAMBA = GQA | dict(
    attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, num_experts=1,
    num_experts_per_tok=1, mamba_d_state=8, mamba_d_conv=2, mamba_expand=2, mamba_dt_rank=4, use_mamba_kernels=False,
)  # fmt: skip
NEMOTRON_H = {k: v for k, v in HEADS.items() if k != "num_hidden_layers"} | dict(
    layers_block_type=["linear_attention", "mlp", "full_attention", "mlp"], mamba_num_heads=8, mamba_head_dim=16,
    ssm_state_size=8, n_groups=1, conv_kernel=2, chunk_size=4,
)  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 1e4}
MLLAMA = GQA | {"cross_attention_layers": [1, 3], "rope_parameters" if V5 else "rope_scaling": ROPE}


def mllama() -> torch.nn.Module:
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    vision = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, attention_heads=2, num_global_layers=1,
        image_size=16, patch_size=8, vision_output_dim=64, intermediate_layers_indices=[0],
        supported_aspect_ratios=[[1, 1]], max_num_tiles=1,
    )  # fmt: skip
    return MllamaForConditionalGeneration(MllamaConfig(vision_config=vision, text_config=MLLAMA, image_token_index=3))


EXACT = dict(dtype=torch.float32)
HYBRIDS: dict[str, Hybrid] = {
    "qwen3_next": Hybrid(
        Family(of("Qwen3NextConfig", **HEADS, **DELTA, num_experts=0), **EXACT), (1, 3), EVERY
    ),
    "qwen3_next, experts": Hybrid(
        Family(
            of(
                "Qwen3NextConfig", **HEADS, **DELTA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48,
                shared_expert_intermediate_size=48,
            ),
            **EXPERT,
        ),
        (1, 3), EVERY,
    ),
    "qwen3_5": Hybrid(Family(of("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", **HEADS, **DELTA), **EXACT), (1, 3), EVERY),
    "jamba": Hybrid(
        Family(of("JambaConfig", **JAMBA), ffn=("feed_forward", "feed_forward"), **EXACT), (1, 3), EVERY
    ),
    "lfm2": Hybrid(
        Family(
            of("Lfm2Config", **GQA, layer_types=["conv", "full_attention"] * 2, block_auto_adjust_ff_dim=False),
            ffn=("feed_forward", "feed_forward"), **EXACT,
        ),
        (1, 3), EVERY,
    ),
    "granitemoehybrid": Hybrid(
        Family(
            of(
                "GraniteMoeHybridConfig", **GQA, **MAMBA, num_local_experts=0, num_experts_per_tok=0,
                shared_intermediate_size=96, layer_types=LINEAR if V5 else ["mamba", "attention"] * 2,
            ),
            ffn=("shared_mlp", "shared_mlp"), **EXACT,
        ),
        (1, 3), EVERY,
    ),
    "bamba": Hybrid(
        Family(
            of("BambaConfig", **GQA, **MAMBA, attn_layer_indices=[1, 3]), ffn=("feed_forward", "feed_forward"), **EXACT
        ),
        (1, 3), EVERY,
    ),
    "nemotron_h": Hybrid(
        Family(of("NemotronHConfig", **NEMOTRON_H), attention="mixer", ffn=("mixer", "mixer"), act=relu2, **EXACT),
        (2,), (1, 3),
    ),
    "recurrent_gemma": Hybrid(
        Family(
            of(
                "RecurrentGemmaConfig", **HEADS, block_types=["recurrent", "attention"], lru_width=64,
                attention_window_size=16,
            ),
            attention="temporal_block", ffn=("mlp_block", "mlp_block"), act=gelu_tanh, **EXACT,
        ),
        (1, 3), EVERY,
    ),
    "olmo_hybrid": Hybrid(Family(of("OlmoHybridConfig", **GQA, **DELTA), **EXACT), (1, 3), EVERY),
    "mllama": Hybrid(Family(mllama, "model.language_model.layers", **EXACT), (0, 2), EVERY),
}  # fmt: skip
