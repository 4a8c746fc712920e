"""Pictures on a terminal, in colours of 24 bits."""

from __future__ import annotations

import os
import shutil
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

_MOST = 32  # columns


def shows_pictures() -> bool:
    """Whether stdout is a terminal with colours, and letters for half a block."""
    plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    return sys.stdout.isatty() and not plain and (sys.stdout.encoding or "").lower() == "utf-8"


def blocks(image: Tensor, columns: int | None = None) -> str:
    """A picture in lines of half blocks: letters are twice as high as wide, so each has two pixels, one above another.

    Args:
        image: of numbers in 0..1, [H, W] or [3, H, W].
        columns: how many letters wide; None: 32, or what the terminal has.

    Raises:
        ValueError: an image of another shape, or less than one column.
    """
    if image.dim() not in (2, 3) or (image.dim() == 3 and image.shape[0] != 3) or 0 in image.shape:
        raise ValueError(f"image: expected a shape of [H, W] or [3, H, W], got {list(image.shape)}")
    columns = min(_MOST, shutil.get_terminal_size().columns) if columns is None else columns
    if columns < 1:
        raise ValueError(f"columns: expected at least 1, got {columns}")
    height, width = image.shape[-2:]
    size = (2 * max(1, round(columns * height / width / 2)), columns)
    pixels = image.detach().float().cpu().clamp(0, 1).expand(3, height, width)
    mode = "area" if columns < width else "nearest"
    shown = (F.interpolate(pixels[None], size=size, mode=mode)[0] * 255).round().to(torch.uint8)
    rows = shown.permute(1, 2, 0).tolist()
    return "\n".join(
        "".join(f"\x1b[38;2;{_rgb(top)};48;2;{_rgb(bottom)}m▀" for top, bottom in zip(*pair, strict=True)) + "\x1b[0m"
        for pair in zip(rows[::2], rows[1::2], strict=True)
    )


def _rgb(pixel: list[int]) -> str:
    return ";".join(map(str, pixel))
