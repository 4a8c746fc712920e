"""Tiny chat models: a tokenizer of bytes with a chat template, and processors of LLaVA and Qwen2-VL made of it."""

from __future__ import annotations

from typing import Any

import torch
from backbones.zoo import VIDEO, Family, model_of, mrope, of, seeing
from torch import nn

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAVA = (  # llava-hf/llava-1.5-7b-hf's
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
QWEN = (  # Qwen/Qwen2-VL's, without videos and numbers of images
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}"
    "{{ content['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = [
    "<pad>", "</s>", "<|im_start|>", "<image>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_end|>",
    "<|image_pad|>",
]  # fmt: skip


def tokenizer(template: str | None = CHATML, *, bos: bool = False) -> Any:
    """Of bytes, behind the special tokens; with `bos` it puts "</s>" in front of all texts."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    pieces = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(BPE({piece: i for i, piece in enumerate(pieces)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if bos:
        made.post_processor = TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", bos_token="</s>", padding_side="left",
        additional_special_tokens=SPECIAL[2:], chat_template=template,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


SIZES = dict(
    vocab_size=len(SPECIAL) + 256, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=96,
    num_key_value_heads=2, max_position_embeddings=1024, pad_token_id=0, bos_token_id=1,
    eos_token_id=[1, SPECIAL.index("<|im_end|>")],
)  # fmt: skip


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A random one for this tokenizer, with 4 layers, d = 64; both </s> and <|im_end|> end what it says."""
    return model_of(Family(of("LlamaConfig", **SIZES)), dtype)


def llava() -> tuple[nn.Module, Any]:
    """A tiny LLaVA and its processor, whose tokenizer puts "</s>" in front."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    made = seeing("Llava", "clip_vision_model", ("llama", SIZES), image_token_index=SPECIAL.index("<image>"))
    sees = CLIPImageProcessor(size={"height": 16, "width": 16}, crop_size={"height": 16, "width": 16})
    return model_of(made, torch.float32), LlavaProcessor(
        sees, tokenizer(None, bos=True), patch_size=8, vision_feature_select_strategy="default", chat_template=LLAVA,
        num_additional_image_tokens=1,
    )  # fmt: skip


def qwen() -> tuple[nn.Module, Any]:
    """A tiny Qwen2-VL and its processor, which knows no videos: for these it would need torchvision."""
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor

    class Blind:
        model_input_names = ()

    class Processor(Qwen2VLProcessor):
        tokenizer_class = "AutoTokenizer"  # transformers 4 wants Qwen's own otherwise

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor":
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

    names = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    ids = {f"{name}_token_id": SPECIAL.index(token) for name, token in names.items()}
    vision = dict(depth=2, embed_dim=32, num_heads=2, hidden_size=64, patch_size=8, mlp_ratio=2)
    made = seeing("Qwen2VL", vision, ("", SIZES | mrope(2, 3, 3)), **VIDEO | ids)
    sees = Qwen2VLImageProcessor(patch_size=8, min_pixels=256, max_pixels=256, temporal_patch_size=2, merge_size=2)
    return model_of(made, torch.float32), Processor(sees, tokenizer(None), Blind(), chat_template=QWEN)
