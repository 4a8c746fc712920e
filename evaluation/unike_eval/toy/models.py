"""Loading shipped models and tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import Blip2ForConditionalGeneration, PreTrainedTokenizerFast

from .processor import IMAGE_TOKEN


def load_blip2(folder: Path, name: str) -> Blip2ForConditionalGeneration:
    """The model of `folder` / `name`, float32, in eval mode. Nothing is downloaded."""
    available = sorted(path.parent.name for path in folder.glob("*/model.safetensors"))
    if name not in available:
        raise ValueError(f"name: expected a decoder, one of {', '.join(available)}; got {name!r}")

    import torch
    from transformers import Blip2ForConditionalGeneration
    from transformers.utils import logging

    # transformers 5 shows a progress bar even for 2 MB.
    shows_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model: Blip2ForConditionalGeneration = Blip2ForConditionalGeneration.from_pretrained(
            folder / name, dtype=torch.float32, local_files_only=True
        )
    finally:
        if shows_progress:
            logging.enable_progress_bar()
    model.eval()
    return model


def load_tokenizer(file: Path) -> PreTrainedTokenizerFast:
    """A tokenizer of words; it pads on the left, as generation needs."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=str(file),
        pad_token="<pad>",
        bos_token="</s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=[IMAGE_TOKEN],
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
