"""Text and images to model inputs, in the manner of Hugging Face's processors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .data import IMAGE_SIZE

if TYPE_CHECKING:
    from transformers import BatchFeature, PreTrainedTokenizerFast

IMAGE_TOKEN = "<image>"
NUM_IMAGE_TOKENS = 4
WEIGHTS = Path(__file__).parent / "weights"


class DigitsProcessor:
    """Tokenizes text and prepares images for the digit models.

    Where images are given, the image placeholder tokens are put in front of each text; one text for each image.
    A text and the same text with ' answer' appended share their tokens: the first is a prefix of the second.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer

    def __call__(
        self,
        text: str | Sequence[str],
        images: Tensor | Sequence[Tensor] | None = None,
        padding: bool | str = False,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """Input ids and attention mask [B, T], and pixel values [B, 3, 16, 16] float32 in -1..1 if `images` are given.

        `images`: one float tensor [16, 16] in 0..1 for each text, or all of them stacked, [B, 16, 16].
        """
        from transformers import BatchFeature

        texts = [text] if isinstance(text, str) else list(text)
        features: dict[str, Any] = {}
        if images is not None:
            features["pixel_values"] = _pixel_values(images, len(texts))
            texts = [" ".join([IMAGE_TOKEN] * NUM_IMAGE_TOKENS + [line]) for line in texts]
        features |= self.tokenizer(texts, padding=padding, return_tensors=return_tensors)
        return BatchFeature(features)

    def decode(self, token_ids: Any, skip_special_tokens: bool = False) -> str:
        """The text of one sequence of token ids [T]."""
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False) -> list[str]:
        """The texts of token ids [B, T]."""
        return [self.decode(sequence, skip_special_tokens=skip_special_tokens) for sequence in sequences]


def _pixel_values(images: Tensor | Sequence[Tensor], count: int) -> Tensor:
    images = [images] if isinstance(images, Tensor) and images.ndim == 2 else list(images)
    if len(images) != count:
        raise ValueError(f"{count} texts but {len(images)} images: give one image for each text")
    for number, image in enumerate(images):
        if not isinstance(image, Tensor) or tuple(image.shape) != (IMAGE_SIZE, IMAGE_SIZE):
            found = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise ValueError(f"image {number} must be a tensor of shape ({IMAGE_SIZE}, {IMAGE_SIZE}), not {found}")
        if not image.is_floating_point():
            raise ValueError(f"image {number} must be a float tensor with values in 0..1, not {image.dtype}")
        # Written so that NaN fails too.
        if not bool(((image >= 0) & (image <= 1)).all()):
            raise ValueError(f"image {number} has values outside 0..1")
    return (torch.stack(images).float() * 2 - 1).unsqueeze(1).repeat(1, 3, 1, 1)


def load_processor(tokenizer_file: Path = WEIGHTS / "tokenizer.json") -> DigitsProcessor:
    """The processor that both digit models share; it pads on the left, as generation needs."""
    from transformers import PreTrainedTokenizerFast

    return DigitsProcessor(
        PreTrainedTokenizerFast(
            tokenizer_file=str(tokenizer_file),
            pad_token="<pad>",
            bos_token="</s>",
            eos_token="</s>",
            unk_token="<unk>",
            additional_special_tokens=[IMAGE_TOKEN],
            model_input_names=["input_ids", "attention_mask"],
            padding_side="left",
            clean_up_tokenization_spaces=False,
        )
    )
