"""Tiny random models of many families, and where in them the decoder's layers, attention and FFN stand.

d = 64, 4 layers (T5: 3 and 4), 4 heads, 48 words. The places are written down by hand, so that what the library finds
by structure can be compared with them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import transformers
from hooks_reference import Place
from torch import Tensor, nn
from transformers import AutoConfig

VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
V5 = VERSION >= (5, 0)


def skip_if_not_batched(kind: str) -> None:
    """In continuous batching: transformers 5.24's own OPT asks the cache of that for a length that it does not know."""
    if not V5:
        pytest.skip("continuous batching of transformers 4.57 needs a GPU")
    if kind == "opt" and VERSION >= (5, 24):
        pytest.skip(f"transformers {transformers.__version__} cannot batch OPT continuously")


class Family(NamedTuple):
    """A tiny model of one architecture.

    Attributes:
        make: the model, randomly initialised.
        layers: path of the list of decoder layers.
        attention, ffn: children of a layer; where the FFN stands inline, its first and last module.
        act: the activation of the FFN.
        dense: whether the FFN is one, gated or plain.
        dtype: in which the model is compared with the hooks; some routers take no float64.
    """

    make: Callable[[], nn.Module]
    layers: str = "model.layers"
    attention: str = "self_attn"
    ffn: tuple[str, str] = ("mlp", "mlp")
    act: Callable[[Tensor], Tensor] = F.silu
    dense: bool = True
    dtype: torch.dtype = torch.float64


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


BASE = dict(
    vocab_size=48, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=96,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
GQA = BASE | dict(num_key_value_heads=2)
HEADS = GQA | dict(head_dim=16)
EXPERTS = GQA | dict(moe_intermediate_size=48, num_experts=4, num_experts_per_tok=2)
OPT = {k: v for k, v in BASE.items() if k != "intermediate_size"} | dict(
    ffn_dim=96, word_embed_proj_dim=64, dropout=0.0
)
GPT = dict(
    vocab_size=48, n_embd=64, n_layer=4, n_head=4, n_positions=64, n_inner=96, bos_token_id=1, eos_token_id=2,
    pad_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
)  # fmt: skip
FALCON = {k: v for k, v in BASE.items() if k not in ("intermediate_size", "max_position_embeddings")} | dict(
    ffn_hidden_size=96
)
BLOOM = dict(vocab_size=48, hidden_size=64, n_layer=4, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=0)
T5 = dict(
    vocab_size=48, d_model=64, d_kv=16, d_ff=96, num_layers=3, num_decoder_layers=4, num_heads=4, pad_token_id=0,
    eos_token_id=2, decoder_start_token_id=0, dropout_rate=0.0,
)  # fmt: skip
DEEPSEEK = BASE | dict(
    num_key_value_heads=4, moe_intermediate_size=48, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1,
    kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, first_k_dense_replace=2,
)  # fmt: skip
LLAMA4 = HEADS | dict(
    intermediate_size_mlp=96, num_local_experts=4, num_experts_per_tok=1, interleave_moe_layer_step=2,
    attention_chunk_size=32, moe_layers=None,
)  # fmt: skip


def of(config: str, model: str | None = None, **sizes: Any) -> Callable[[], nn.Module]:
    """A model of a config class; by default the causal one that belongs to it."""

    def make() -> nn.Module:
        name = model or config.replace("Config", "ForCausalLM")
        if not V5 and not hasattr(transformers, name):
            pytest.skip(f"transformers {transformers.__version__} has no {name}")
        model_class = getattr(transformers, name)
        return model_class(getattr(transformers, config)(**sizes))

    return make


SEES = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
)
QFORMER = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, encoder_hidden_size=32,
    cross_attention_frequency=1, vocab_size=48, max_position_embeddings=8, hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)  # fmt: skip
VIDEO = dict(image_token_id=3, video_token_id=4, vision_start_token_id=5, vision_end_token_id=6)


def mrope(*sections: int) -> dict[str, Any]:
    if V5:
        return {"rope_parameters": {"rope_type": "default", "mrope_section": list(sections), "rope_theta": 10000.0}}
    return {"rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": list(sections)}}


def seeing(name: str, vision: str | dict[str, Any], text: tuple[str, dict[str, Any]], **rest: Any) -> Family:
    """A multimodal model whose text model stands at model.language_model. vision, text: model type and sizes."""

    def make() -> nn.Module:
        kind, sizes = text
        parts = {
            "vision_config": AutoConfig.for_model(vision, **SEES) if isinstance(vision, str) else vision,
            "text_config": AutoConfig.for_model(kind, **sizes) if kind else sizes,
        }
        config = getattr(transformers, f"{name}Config")(**parts, **rest)
        return getattr(transformers, f"{name}ForConditionalGeneration")(config)

    return Family(make, "model.language_model.layers")


def blip(name: str, kind: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        text = AutoConfig.for_model(kind, **(OPT if kind == "opt" else GQA)).to_dict()  # 4.57 takes no object
        vision = SEES | dict(num_hidden_layers=1)
        config = getattr(transformers, f"{name}Config")(
            vision_config=vision, qformer_config=QFORMER, text_config=text, num_query_tokens=4, image_token_index=3
        )
        return getattr(transformers, f"{name}ForConditionalGeneration")(config)

    return make


INLINE = dict(ffn=("fc1", "fc2"), act=F.relu)
PLAIN = dict(act=gelu_tanh)
EXPERT = dict(dense=False, dtype=torch.float32)
ZOO: dict[str, Family] = {
    "opt": Family(of("OPTConfig", **OPT), "model.decoder.layers", **INLINE),
    "opt, norms behind": Family(
        of("OPTConfig", **OPT, do_layer_norm_before=False), "model.decoder.layers", **INLINE
    ),
    "gpt2": Family(of("GPT2Config", "GPT2LMHeadModel", **GPT), "transformer.h", "attn", **PLAIN),
    "gptj": Family(of("GPTJConfig", **GPT, rotary_dim=8), "transformer.h", "attn", **PLAIN),
    "gpt_neox": Family(of("GPTNeoXConfig", **BASE), "gpt_neox.layers", "attention", act=F.gelu),
    "falcon": Family(of("FalconConfig", **FALCON), "transformer.h", "self_attention", act=F.gelu),
    "falcon, new": Family(
        of("FalconConfig", **FALCON, new_decoder_architecture=True, num_kv_heads=2), "transformer.h", "self_attention",
        act=F.gelu,
    ),
    "bloom": Family(of("BloomConfig", **BLOOM), "transformer.h", "self_attention", **PLAIN),
    "llama": Family(of("LlamaConfig", **GQA)),
    "llama, biases": Family(of("LlamaConfig", **GQA, mlp_bias=True, attention_bias=True)),
    "mistral": Family(of("MistralConfig", **GQA)),
    "qwen2": Family(of("Qwen2Config", **GQA)),
    "qwen3": Family(of("Qwen3Config", **HEADS)),
    "gemma": Family(of("GemmaConfig", **HEADS), **PLAIN),
    "gemma2": Family(of("Gemma2Config", **HEADS), **PLAIN),
    "gemma3_text": Family(of("Gemma3TextConfig", "Gemma3ForCausalLM", **HEADS), **PLAIN),
    "olmo2": Family(of("Olmo2Config", **GQA)),
    "cohere": Family(of("CohereConfig", **GQA)),
    "phi": Family(of("PhiConfig", **BASE), **PLAIN),
    "phi3": Family(of("Phi3Config", **GQA)),
    "glm4": Family(of("Glm4Config", **HEADS)),
    "starcoder2": Family(of("Starcoder2Config", **GQA), **PLAIN),
    "stablelm": Family(of("StableLmConfig", **GQA)),
    "granite": Family(of("GraniteConfig", **GQA)),
    "smollm3": Family(of("SmolLM3Config", **GQA)),
    "mixtral": Family(
        of("MixtralConfig", **GQA, num_local_experts=4, num_experts_per_tok=2), **EXPERT,
        **({} if V5 else dict(ffn=("block_sparse_moe", "block_sparse_moe"))),
    ),
    "qwen2_moe": Family(
        of("Qwen2MoeConfig", **EXPERTS, shared_expert_intermediate_size=48, decoder_sparse_step=1), **EXPERT
    ),
    "qwen3_moe": Family(of("Qwen3MoeConfig", **EXPERTS, head_dim=16, decoder_sparse_step=1), **EXPERT),
    "deepseek_v3": Family(of("DeepseekV3Config", **DEEPSEEK), **EXPERT),
    "gpt_oss": Family(of("GptOssConfig", **HEADS, num_local_experts=4, num_experts_per_tok=2), **EXPERT),
    "llama4_text": Family(
        of("Llama4TextConfig", "Llama4ForCausalLM", **LLAMA4), ffn=("feed_forward", "feed_forward"), **EXPERT
    ),
    "t5": Family(
        of("T5Config", "T5ForConditionalGeneration", **T5), "decoder.block", "layer.0.SelfAttention",
        ("layer.2.DenseReluDense",) * 2, F.relu,
    ),
    "t5, gated": Family(
        of("T5Config", "T5ForConditionalGeneration", **T5, feed_forward_proj="gated-gelu"), "decoder.block",
        "layer.0.SelfAttention", ("layer.2.DenseReluDense",) * 2, gelu_tanh,
    ),
    "blip-2, opt": Family(blip("Blip2", "opt"), "language_model.model.decoder.layers", **INLINE),
    "blip-2, llama": Family(blip("Blip2", "llama"), "language_model.model.layers"),
    "instructblip": Family(blip("InstructBlip", "llama"), "language_model.model.layers"),
    "llava": seeing("Llava", "clip_vision_model", ("llama", GQA), image_token_index=3),
    "llava_next": seeing(
        "LlavaNext", "clip_vision_model", ("llama", GQA), image_token_index=3, image_grid_pinpoints=[[16, 16]]
    ),
    "llava_onevision": seeing(
        "LlavaOnevision", "siglip_vision_model", ("qwen2", GQA), image_token_index=3, video_token_index=4,
        image_grid_pinpoints=[[16, 16]],
    ),
    "internvl": seeing(
        "InternVL", SEES | dict(image_size=[16, 16], patch_size=[8, 8]), ("qwen2", GQA), image_token_id=3
    ),
    "qwen2_vl": seeing(
        "Qwen2VL", dict(depth=2, embed_dim=32, num_heads=2, hidden_size=64, patch_size=8, mlp_ratio=2),
        ("", GQA | mrope(2, 3, 3)), **VIDEO,
    ),
    "qwen2_5_vl": seeing(
        "Qwen2_5_VL",
        dict(
            depth=2, hidden_size=32, num_heads=2, out_hidden_size=64, intermediate_size=48, patch_size=8,
            fullatt_block_indexes=[1],
        ),
        ("", GQA | mrope(2, 3, 3)), **VIDEO,
    ),
    "qwen3_vl": seeing(
        "Qwen3VL",
        dict(
            depth=2, hidden_size=32, num_heads=2, out_hidden_size=64, intermediate_size=48, patch_size=8,
            deepstack_visual_indexes=[0], num_position_embeddings=16,
        ),
        ("", HEADS | mrope(4, 2, 2)), **VIDEO,
    ),
    "gemma3": seeing(
        "Gemma3", SEES, ("", HEADS), mm_tokens_per_image=4, image_token_index=3, boi_token_index=5, eoi_token_index=6
    )._replace(**PLAIN),
    "paligemma": seeing(
        "PaliGemma", "siglip_vision_model", ("gemma", HEADS), projection_dim=64, hidden_size=64, image_token_index=3
    )._replace(**PLAIN),
    "idefics3": seeing("Idefics3", SEES, ("llama", GQA), image_token_id=3, scale_factor=2, pad_token_id=0)._replace(
        layers="model.text_model.layers"
    ),
    "smolvlm": seeing("SmolVLM", SEES, ("llama", GQA), image_token_id=3, scale_factor=2, pad_token_id=0)._replace(
        layers="model.text_model.layers"
    ),
    "mistral3": seeing("Mistral3", "pixtral", ("mistral", GQA), image_token_index=3),
    "aya_vision": seeing("AyaVision", "siglip_vision_model", ("cohere", GQA), image_token_index=3),
}  # fmt: skip


def model_of(family: Family, dtype: torch.dtype | None = None) -> nn.Module:
    """In eval mode, with weights larger than at a usual initialisation, so that a change anywhere shows."""
    torch.manual_seed(0)
    model = family.make()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * (0.1 if p.dim() == 1 else max(p[0].numel(), 1) ** -0.5))
    return model.eval().to(dtype or family.dtype)


def places(model: nn.Module, family: Family) -> list[Place]:
    """Of each decoder layer."""
    layers = model.get_submodule(family.layers)
    first, last = family.ffn
    return [
        Place(layer.get_submodule(family.attention), layer.get_submodule(first), layer.get_submodule(last), family.act)
        for layer in layers
    ]


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Of text alone, [B, T, words]."""
    if hasattr(model, "qformer"):
        model = model.language_model  # these want an image with every call
    encoded = {"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {"use_cache": False}
    return model(input_ids=ids, **encoded).logits
