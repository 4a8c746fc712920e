"""Loading the shipped models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..models import load_blip2, load_tokenizer
from ..processor import WorldProcessor
from .data import IMAGE_SIZE

if TYPE_CHECKING:
    from transformers import Blip2ForConditionalGeneration

WEIGHTS = Path(__file__).parent / "weights"


def load_model(name: str = "opt") -> Blip2ForConditionalGeneration:
    """A BLIP-2 model of about 0.5 M parameters that answers questions about digits; float32, in eval mode.

    `name` is its decoder: "opt" or "llama". The files are part of this package: nothing is downloaded.
    """
    return load_blip2(WEIGHTS, name)


def load_processor(tokenizer_file: Path = WEIGHTS / "tokenizer.json") -> WorldProcessor:
    """The processor that both digit models share; images are float tensors [16, 16]."""
    return WorldProcessor(load_tokenizer(tokenizer_file), (IMAGE_SIZE, IMAGE_SIZE))
