"""Text and images to model inputs, in the manner of Hugging Face's processors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import BatchFeature, PreTrainedTokenizerFast

IMAGE_TOKEN = "<image>"
NUM_IMAGE_TOKENS = 4


class WorldProcessor:
    """Tokenizes text and prepares images for the models of a world, whose images have `image_shape`.

    Where images are given, the image placeholder tokens are put in front of each text; one text for each image.
    A text and the same text with ' answer' appended share their tokens: the first is a prefix of the second.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, image_shape: tuple[int, ...]) -> None:
        self.tokenizer = tokenizer
        self.image_shape = image_shape

    def __call__(
        self,
        text: str | Sequence[str],
        images: Tensor | Sequence[Tensor] | None = None,
        padding: bool | str = False,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """Input ids and attention mask [B, T], and pixel values [B, 3, H, W] float32 in -1..1 if `images` are given.

        `images`: one float tensor of the world's shape, [H, W] or [3, H, W], in 0..1 for each text, or all stacked.
        """
        from transformers import BatchFeature

        texts = [text] if isinstance(text, str) else list(text)
        features: dict[str, Any] = {}
        if images is not None:
            features["pixel_values"] = self._pixel_values(images, len(texts))
            texts = [" ".join([IMAGE_TOKEN] * NUM_IMAGE_TOKENS + [line]) for line in texts]
        features |= self.tokenizer(texts, padding=padding, return_tensors=return_tensors)
        return BatchFeature(features)

    def decode(self, token_ids: Any, skip_special_tokens: bool = False) -> str:
        """The text of one sequence of token ids [T]."""
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False) -> list[str]:
        """The texts of token ids [B, T]."""
        return [self.decode(sequence, skip_special_tokens=skip_special_tokens) for sequence in sequences]

    def _pixel_values(self, images: Tensor | Sequence[Tensor], count: int) -> Tensor:
        images = [images] if isinstance(images, Tensor) and images.ndim == len(self.image_shape) else list(images)
        if len(images) != count:
            raise ValueError(f"{count} texts but {len(images)} images: give one image for each text")
        for number, image in enumerate(images):
            if not isinstance(image, Tensor) or tuple(image.shape) != self.image_shape:
                found = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
                raise ValueError(f"image {number} must be a tensor of shape {self.image_shape}, not {found}")
            if not image.is_floating_point():
                raise ValueError(f"image {number} must be a float tensor with values in 0..1, not {image.dtype}")
            # Written so that NaN fails too.
            if not bool(((image >= 0) & (image <= 1)).all()):
                raise ValueError(f"image {number} has values outside 0..1")
        stacked = torch.stack(images).float() * 2 - 1
        return stacked if stacked.ndim == 4 else stacked.unsqueeze(1).repeat(1, 3, 1, 1)
