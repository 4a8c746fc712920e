"""Models by name: a folder, the Hugging Face hub, or one that a package brings by an entry point of "unike.models"."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import torch
from torch import nn

NAMES = (
    "a folder, a name on the Hugging Face hub, or a model that a package brings (unike-eval: digits-opt, "
    "digits-llama, easyvqa-opt, easyvqa-llama)"
)


def skeleton(name: str) -> nn.Module:
    """The model without weights. Raises FileNotFoundError for a name of none."""
    if (brought := _brought(name)) is not None:
        return brought[0]
    import transformers

    config = _config(name)
    kinds = [getattr(transformers, kind, None) for kind in config.architectures or ()]
    with torch.device("meta"):
        if kinds and kinds[0] is not None:
            return kinds[0](config)
        return transformers.AutoModelForCausalLM.from_config(config)


def load(name: str, device: str | None) -> tuple[nn.Module, Any]:
    """The model in eval mode, in its own dtype, and its processor, or its tokenizer where it has none.

    Args:
        name: see `NAMES`.
        device: None: a GPU, if there is one.

    Raises:
        FileNotFoundError: there is no such model, or it has no tokenizer.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if (brought := _brought(name)) is not None:
        return brought[0].to(device), brought[1]
    import transformers

    kind = next(iter(_config(name).architectures or ()), "AutoModelForCausalLM")
    model = getattr(transformers, kind, transformers.AutoModelForCausalLM).from_pretrained(name, dtype="auto")
    try:
        processor = transformers.AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"{name}: neither a processor nor a tokenizer is there: {error}") from error
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval().to(device), processor


def _brought(name: str) -> tuple[nn.Module, Any] | None:
    for entry in metadata.entry_points(group="unike.models", name=name):
        found: tuple[nn.Module, Any] = entry.load()(name)
        return found
    return None


def _config(name: str) -> Any:
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(name)
    except OSError as error:
        raise FileNotFoundError(
            f"{name}: neither a folder with a config.json nor a model of the hub: {error}"
        ) from error
