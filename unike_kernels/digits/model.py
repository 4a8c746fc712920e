"""Loading the shipped models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .processor import WEIGHTS

if TYPE_CHECKING:
    from transformers import Blip2ForConditionalGeneration


def load_model(name: str = "opt") -> Blip2ForConditionalGeneration:
    """A BLIP-2 model of about 0.5 M parameters that answers questions about digits; float32, in eval mode.

    `name` is its decoder: "opt" or "llama". The files are part of this package: nothing is downloaded.
    """
    available = sorted(path.parent.name for path in WEIGHTS.glob("*/model.safetensors"))
    if name not in available:
        raise ValueError(f"no digit model is called {name!r}; there are {', '.join(available)}")

    import torch
    from transformers import Blip2ForConditionalGeneration
    from transformers.utils import logging

    # transformers 5 shows a progress bar even for 2 MB.
    shows_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model: Blip2ForConditionalGeneration = Blip2ForConditionalGeneration.from_pretrained(
            WEIGHTS / name, dtype=torch.float32, local_files_only=True
        )
    finally:
        if shows_progress:
            logging.enable_progress_bar()
    model.eval()
    return model
