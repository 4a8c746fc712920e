"""`Pictures`: small pictures of what a memory's entries are about, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import files

SIDE = 48  # pixels


@dataclass(frozen=True, eq=False)
class Pictures:
    """The pictures of N entries, each kept once.

    Attributes:
        pixels: uint8 [P, 48, 48, 3], red, green and blue.
        of: int64 [N], the number of each entry's picture, -1 for none.

    Raises:
        ValueError: other dtypes or shapes, or a number that no picture has.
    """

    pixels: Tensor
    of: Tensor

    def __post_init__(self) -> None:
        shape = tuple(self.pixels.shape)
        if self.pixels.dtype != torch.uint8 or len(shape) != 4 or shape[1:] != (SIDE, SIDE, 3):
            raise ValueError(
                f"Pictures.pixels: expected uint8 [*, {SIDE}, {SIDE}, 3], got {self.pixels.dtype} {list(shape)}"
            )
        if self.of.dtype != torch.int64 or self.of.dim() != 1:
            raise ValueError(f"Pictures.of: expected int64 [*], got {self.of.dtype} {list(self.of.shape)}")
        if len(self.of) and not -1 <= int(self.of.min()) <= int(self.of.max()) < len(self.pixels):
            raise ValueError(f"Pictures.of: expected numbers from -1 to {len(self.pixels) - 1}, got others")

    def __len__(self) -> int:
        return len(self.of)

    def __getitem__(self, entry: int) -> Tensor | None:
        """uint8 [48, 48, 3], an entry's picture; None: it has none."""
        number = int(self.of[entry])
        return None if number < 0 else self.pixels[number]

    def part(self, entries: slice) -> Pictures:
        """Those of some entries."""
        return Pictures(self.pixels, self.of[entries])

    @classmethod
    def made(cls, images: Sequence[Any], counts: Sequence[int]) -> Pictures | None:
        """Of so many entries for each image; None where none of them can be drawn.

        Args:
            images: pictures of PIL, arrays or tensors [H, W], [H, W, C] or [C, H, W] with 1, 3 or 4 channels, of bytes
                or of numbers from 0 to 1; others, and None, are entries without a picture.
            counts: the entries of each.
        """
        known: dict[bytes, int] = {}
        pixels: list[Tensor] = []
        of: list[int] = []
        for image, count in zip(images, counts, strict=True):
            small = _small(image)
            number = -1 if small is None else known.setdefault(small.numpy().tobytes(), len(known))
            if small is not None and number == len(pixels):
                pixels.append(small)
            of += [number] * count
        return cls(torch.stack(pixels), torch.tensor(of, dtype=torch.int64, device="cpu")) if pixels else None

    @classmethod
    def joined(cls, parts: Sequence[tuple[Pictures | None, int]]) -> Pictures | None:
        """Those of entries behind one another, given as pictures, or None, and their number."""
        if all(each is None for each, _ in parts):
            return None
        pixels, of, start = [], [], 0
        for each, count in parts:
            if each is None:
                of.append(torch.full((count,), -1, dtype=torch.int64, device="cpu"))
                continue
            of.append(torch.where(each.of < 0, each.of, each.of + start))
            pixels.append(each.pixels)
            start += len(each.pixels)
        return cls(torch.cat(pixels), torch.cat(of))

    def tensors(self) -> dict[str, Tensor]:
        """As a file has them."""
        return {"pictures": self.pixels, "picture_of": self.of}

    @classmethod
    def read(cls, reader: files.Reader) -> Pictures | None:
        """Of a file that may have some. Raises ArtifactError for what are none."""
        told: Mapping[str, torch.dtype] = {"pictures": torch.uint8, "picture_of": torch.int64}
        if not any(map(reader.has, told)):
            return None
        found: Pictures = reader.build(cls, *(reader.integers(name, dtype) for name, dtype in told.items()))
        return found


def _small(image: Any) -> Tensor | None:
    """uint8 [48, 48, 3], the image as large as fits, on white; None: it is none that can be drawn."""
    if hasattr(image, "convert"):  # of PIL
        width, height = image.size
        image = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8).view(height, width, 3)
    try:
        x = torch.as_tensor(image, dtype=None, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError):
        return None
    x = x[..., None] if x.dim() == 2 else x
    if x.dim() == 3 and x.shape[-1] not in (1, 3, 4) and x.shape[0] in (1, 3, 4):
        x = x.permute(1, 2, 0)
    if x.dim() != 3 or x.shape[-1] not in (1, 3, 4) or not x.numel():
        return None
    x = x[..., :3].expand(-1, -1, 3).permute(2, 0, 1)[None]
    x = x.float() * 255 if x.is_floating_point() else x.float()
    scale = SIDE / max(x.shape[2:])
    size = [max(round(side * scale), 1) for side in x.shape[2:]]
    x = torch.nn.functional.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)
    top, left = ((SIDE - side) // 2 for side in size)
    drawn = torch.full((SIDE, SIDE, 3), 255, dtype=torch.uint8, device="cpu")
    drawn[top : top + size[0], left : left + size[1]] = x[0].nan_to_num().clamp(0, 255).round().byte().permute(1, 2, 0)
    return drawn
