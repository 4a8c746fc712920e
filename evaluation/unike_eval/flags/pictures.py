"""Flags and things as several vendors draw them, from packages of npm; `python -m unike_eval.flags` installs these."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import torch
from PIL import Image
from torch import Tensor

Vendor = Literal["flag-icons", "openmoji", "noto", "twemoji"]
VENDORS: tuple[Vendor, ...] = get_args(Vendor)
HELD_OUT: Vendor = "twemoji"  # no training sees its drawings
TRAINED = tuple(vendor for vendor in VENDORS if vendor != HELD_OUT)
SIZE = 224

# Package, its version, and where a drawing lies in it: `iso` is a country's code, `code` an emoji's code points.
_PACKAGES: dict[Vendor, tuple[str, str, str]] = {
    "flag-icons": ("flag-icons", "7.5.0", "flags/4x3/{iso}.svg"),
    "openmoji": ("openmoji", "17.0.0", "color/svg/{CODE}.svg"),
    "noto": ("emoji-datasource-google", "16.0.0", "img/google/64/{code}.png"),
    "twemoji": ("@twemoji/svg", "15.0.0", "{code}.svg"),
}
_REGIONAL_A = 0x1F1E6  # the emoji of a flag is its country's code in regional indicator letters


class MissingPicturesError(FileNotFoundError):
    """The packages that hold the drawings, or what draws them, are not installed."""


def folder() -> Path:
    """Where npm has installed the drawings: $UNIKE_PICTURES, or a folder in the user's cache."""
    cached = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "unike-eval" / "pictures"
    return Path(os.environ.get("UNIKE_PICTURES", cached))


def fetch() -> None:
    """Install the drawings with npm, unless they are there; about 180 MB.

    Raises:
        MissingPicturesError: there is no npm, or it fails.
    """
    if not missing():
        return
    if (npm := shutil.which("npm")) is None:
        raise MissingPicturesError("the pictures of flags come from packages of npm, which is not installed")
    folder().mkdir(parents=True, exist_ok=True)
    wanted = [f"{package}@{version}" for package, version, _ in _PACKAGES.values()]
    command = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(folder()), *wanted]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or missing():
        raise MissingPicturesError(
            f"npm could not install {', '.join(wanted)} in {folder()}: {done.stderr.strip()[-500:]}"
        )


def missing() -> str:
    """Why there are no pictures, "" if there are."""
    absent = [package for package, _, _ in _PACKAGES.values() if not (folder() / "node_modules" / package).is_dir()]
    if absent:
        return f"no drawings of {', '.join(absent)} in {folder()}: python -m unike_eval.flags installs them"
    return ""


def flag(iso: str, vendor: Vendor) -> Tensor:
    """A country's flag as a vendor draws it, uint8 [3, 224, 224]; see `emoji`.

    Args:
        iso: the country's code of two letters.
        vendor: who draws it.
    """
    return emoji("".join(chr(_REGIONAL_A + ord(letter) - ord("A")) for letter in iso.upper()), vendor)


@cache
def emoji(text: str, vendor: Vendor) -> Tensor:
    """An emoji as a vendor draws it: without its margins, on white, stretched to a square; uint8 [3, 224, 224].

    Raises:
        MissingPicturesError: the vendor's package is not installed, or resvg_py.
        ValueError: an unknown vendor, or it draws no such emoji ("flag-icons" draws flags alone).
    """
    if vendor not in _PACKAGES:
        raise ValueError(f"vendor: expected one of {', '.join(VENDORS)}; got {vendor!r}")
    if why := missing():
        raise MissingPicturesError(why)
    package, _, place = _PACKAGES[vendor]
    code = "-".join(f"{ord(c):x}" for c in text)
    iso = "".join(chr(ord(c) - _REGIONAL_A + ord("a")) for c in text if _REGIONAL_A <= ord(c) < _REGIONAL_A + 26)
    file = folder() / "node_modules" / package / place.format(iso=iso or "none", code=code, CODE=code.upper())
    if not file.is_file():
        raise ValueError(f"text: expected an emoji that {vendor} draws, got {text!r}; there is no {file}")
    drawn = _drawn(file)
    box = drawn.getchannel("A").point(lambda alpha: 255 * (alpha > 128)).getbbox()
    square = drawn.crop(box).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    shown = Image.alpha_composite(Image.new("RGBA", square.size, "white"), square).convert("RGB")
    return torch.frombuffer(bytearray(shown.tobytes()), dtype=torch.uint8).view(SIZE, SIZE, 3).permute(2, 0, 1)


def _drawn(file: Path) -> Image.Image:
    if file.suffix == ".svg":
        try:
            import resvg_py
        except ImportError as error:
            raise MissingPicturesError("drawings need resvg-py: pip install 'unike-eval[flags]'") from error
        content = resvg_py.svg_to_bytes(svg_path=str(file), width=2 * SIZE, skip_system_fonts=True)
        return Image.open(io.BytesIO(bytes(content))).convert("RGBA")
    return Image.open(file).convert("RGBA")
