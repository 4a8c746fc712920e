"""The images: those of easy-VQA of which its own questions tell color and shape."""

from __future__ import annotations

import functools
import re
from collections.abc import Hashable
from typing import Literal

import torch
from torch import Tensor

from .facts import COLORS, SHAPES, SORTS

IMAGE_SHAPE = (3, 64, 64)
_VALIDATION = 300  # of the test images


@functools.cache
def _split(split: str) -> tuple[Tensor, Tensor]:
    try:
        import easy_vqa
        import numpy as np
        from PIL import Image
    except ImportError as error:
        raise ImportError("the images of easy-VQA need a package: pip install easy-vqa pillow") from error

    read = {
        "train": (easy_vqa.get_train_questions, easy_vqa.get_train_image_paths),
        "test": (easy_vqa.get_test_questions, easy_vqa.get_test_image_paths),
    }
    questions, paths = (each() for each in read[split])
    known = _sorts(*questions)
    pixels = []
    for number in known:
        with Image.open(paths[number]) as image:
            pixels.append(torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1))
    return torch.stack(pixels), torch.tensor([SORTS.index(sort) for sort in known.values()])


def _sorts(questions: list[str], answers: list[str], numbers: list[int]) -> dict[int, str]:
    """Image number -> what it shows, as far as the questions about it leave one color and one shape."""
    left: dict[int, tuple[set[str], set[str]]] = {}
    for text, answer, number in zip(questions, answers, numbers, strict=True):
        for possible, words in zip(left.setdefault(number, (set(COLORS), set(SHAPES))), (COLORS, SHAPES), strict=True):
            named = {word for word in re.findall(r"\w+", text) if word in words}
            if answer in words:
                possible &= {answer}
            elif named and (answer == "no") != bool(re.search(r"\b(no|not)\b", text)) and answer in ("yes", "no"):
                possible -= named
            elif named:
                possible &= named
    return {
        number: f"{min(colors)} {min(shapes)}"
        for number, (colors, shapes) in sorted(left.items())
        if len(colors) == len(shapes) == 1
    }


def images(split: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
    """The images of `split`: pixels in 0..1, float32 [N, 3, 64, 64], and int64 [N], what they show, of `SORTS`.

    N is 3578 or 888: of the others the questions do not tell it.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
    pixels, labels = _split(split)
    return pixels.float() / 255, labels.clone()


def showing(split: Literal["train", "validation", "test"]) -> dict[Hashable, list[Tensor]]:
    """The images of each of `SORTS`, float32 [3, 64, 64]; those for "validation" are the first of the test images."""
    pixels, labels = images("train" if split == "train" else "test")
    part = {"train": slice(None), "validation": slice(0, _VALIDATION), "test": slice(_VALIDATION, None)}[split]
    pixels, labels = pixels[part], labels[part]
    return {sort: list(pixels[labels == number]) for number, sort in enumerate(SORTS)}
