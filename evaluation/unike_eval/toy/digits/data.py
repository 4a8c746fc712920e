"""The images: scikit-learn's handwritten digits, in a fixed split."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Literal

import torch
from torch import Tensor

IMAGE_SIZE = 16


@functools.cache
def _splits() -> dict[str, tuple[Tensor, Tensor]]:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError("the digit images need scikit-learn: pip install scikit-learn") from error

    pixels, labels = load_digits(return_X_y=True)
    pixels = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16
    pixels = torch.nn.functional.interpolate(pixels, size=IMAGE_SIZE, mode="bilinear", align_corners=False)[:, 0]
    train, test = train_test_split(range(len(labels)), test_size=360, stratify=labels, random_state=0)
    targets = torch.from_numpy(labels).long()
    return {"train": (pixels[train], targets[train]), "test": (pixels[test], targets[test])}


def images(split: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
    """The digits of `split`: pixels in 0..1, float32 [N, 16, 16], and labels, int64 [N]; N = 1437 or 360.

    The split is stratified and never changes. The tensors are copies.
    """
    splits = _splits()
    if split not in splits:
        raise ValueError(f"split must be 'train' or 'test', not {split!r}")
    pixels, labels = splits[split]
    return pixels.clone(), labels.clone()


def showing(split: Literal["train", "validation", "test"]) -> dict[Hashable, list[Tensor]]:
    """The images of each digit, float32 [16, 16]; for "validation", twelve of each are taken from the test images."""
    pixels, labels = images("train" if split == "train" else "test")
    parts = {"train": slice(None), "validation": slice(0, 12), "test": slice(12, None)}
    return {digit: list(pixels[labels == digit])[parts[split]] for digit in range(10)}
