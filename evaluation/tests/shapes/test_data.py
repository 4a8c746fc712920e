"""The images and what they show."""

import sys

import pytest
import torch
from unike_eval.toy import shapes
from unike_eval.toy.shapes.data import _sorts, _split

# What a shape of each color is drawn in.
RGB = {
    "black": (0, 0, 0), "blue": (0, 0, 255), "brown": (165, 42, 42), "gray": (128, 128, 128),
    "green": (0, 255, 0), "red": (255, 0, 0), "teal": (0, 128, 128), "yellow": (255, 255, 0),
}  # fmt: skip


@pytest.mark.parametrize(("split", "count"), [("train", 3578), ("test", 888)])
def test_images_show_what_they_are_said_to(split, count):
    pixels, labels = shapes.images(split)
    assert (pixels.shape, pixels.dtype, labels.dtype) == ((count, 3, 64, 64), torch.float32, torch.int64)
    for number, sort in enumerate(shapes.SORTS):
        color, shape = sort.split()
        shown = pixels[labels == number]
        wanted = torch.tensor(RGB[color]).view(3, 1, 1) / 255
        drawn = (shown == wanted).all(1)  # [N, 64, 64]
        rows, columns = drawn.any(2), drawn.any(1)
        assert bool(rows.any(1).all())
        # The share of the box around the shape that it fills: all, pi / 4, or half of it.
        filled = (drawn.sum((1, 2)) / (rows.sum(1) * columns.sum(1))).mean()
        assert {"rectangle": 0.95, "circle": 0.72, "triangle": 0.4}[shape] < filled
        assert filled < {"rectangle": 1.01, "circle": 0.85, "triangle": 0.62}[shape]


def test_what_questions_leave_open_is_left_out():
    texts = ["is there a teal shape?", "what shape is present?", "is there not a red shape?", "is no circle present?"]
    assert _sorts(texts, ["yes", "circle", "no", "no"], [1, 1, 2, 2]) == {1: "teal circle", 2: "red circle"}
    assert _sorts(texts[1:], ["circle", "yes", "no"], [1, 1, 1]) == {}


def test_unknown_split():
    with pytest.raises(ValueError, match="split: expected 'train' or 'test', got 'valid'"):
        shapes.images("valid")


def test_the_package_that_is_needed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    _split.cache_clear()
    with pytest.raises(ImportError, match=r"pip install easy-vqa pillow"):
        shapes.images("test")
