"""A LLaVA of EfficientNet-Lite0, the shipped projector and SmolLM2-135M-Instruct, with what both have learned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..models import smollm2
from .pictures import SIZE
from .projector import STAGES, TOKENS, Projector, load_projector

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

IMAGE = "<image>"


def load() -> tuple[nn.Module, Any]:
    """The model, float32 and in eval mode, and its processor, which pads on the left.

    A prompt has one "<image>" where the picture stands, anywhere in the text. Pictures are uint8 [3, 224, 224].

    Raises:
        ImportError: a package that holds weights is not installed.
        ValueError: what is shipped is no projector for this language model.
    """
    language_model: Any
    language_model, tokenizer = smollm2.load()
    return assemble(language_model, tokenizer, load_projector(language_model.model))


def assemble(
    language_model: Any, tokenizer: Any, projector: Projector
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A LLaVA of these parts, and its processor; the language model and the tokenizer learn the token "<image>"."""
    import transformers
    from tokenizers import AddedToken
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    from .tower import load_tower

    tower = load_tower()
    # The space in front belongs to it, as to a word.
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(IMAGE, lstrip=True, special=True)]})
    language_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():  # a token that is never said
        language_model.get_output_embeddings().weight[-1] = 0
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=language_model.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=list(STAGES),
        vision_feature_select_strategy="full",
    )
    with torch.device("meta"):  # all of its parts are there already
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower, model.model.multi_modal_projector = tower, projector
    model.model.language_model, model.lm_head = language_model.model, language_model.lm_head
    model.generation_config = language_model.generation_config
    # Of transformers 5 the one that needs no torchvision.
    images: Any = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    plain = dict.fromkeys(("do_resize", "do_center_crop", "do_convert_rgb"), False)
    pixels = images(**plain, image_mean=[127 / 255] * 3, image_std=[128 / 255] * 3)
    seen = {"patch_size": SIZE, "num_additional_image_tokens": TOKENS - 1, "vision_feature_select_strategy": "full"}
    return model.eval(), LlavaProcessor(pixels, tokenizer, **seen, chat_template=tokenizer.chat_template)
