"""Which base model an edit or memory was made for: a cheap fingerprint that survives a dtype cast or quantisation."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

_PARAMETERS = 12  # parameters sampled, spread over the model
_VECTORS = 4  # of one dimension, sampled besides
_VALUES = 8  # values sampled of each
_LARGEST = torch.finfo(torch.float32).max
_CAST = 0.02  # relative difference that a cast to 16 bits or a quantisation may cause

FIELDS = ("model_type", "hidden_size", "layers", "parameters", "samples")


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """The model's type and sizes, and a few sampled weights. Never reads more than about two hundred values.

    Weights that are not in memory (offloaded, on `meta`) or not floating (quantised) are left out of the samples, and
    so are embeddings and the output's matrix, whose shape changes with a token that is added to the vocabulary.
    """
    named = list(model.named_parameters())
    step = max(1, len(named) // _PARAMETERS)
    chosen = [name for name, _ in named[::step]]
    vectors = [name for name, p in named if p.dim() == 1]  # norms and biases, which a quantisation leaves as they are
    chosen += vectors[:: max(1, len(vectors) // _VECTORS)]
    return {**_sizes(model), "parameters": len(named), "samples": _samples(model, chosen)}


def _sizes(model: nn.Module) -> dict[str, Any]:
    """Type and sizes, as a fingerprint has them."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    return {
        "model_type": getattr(config, "model_type", type(model).__name__),
        "hidden_size": getattr(text, "hidden_size", None),
        "layers": getattr(text, "num_hidden_layers", None),
    }


def _samples(model: nn.Module, names: Iterable[str]) -> dict[str, list[float]]:
    """Values of the parameters of these names, as far as they can be read and are none of `_vocabulary`."""
    found = {}
    parameters, words = dict(model.named_parameters()), _vocabulary(model)
    for name in names:
        p = parameters.get(name)
        if p is not None and id(p) not in words and (values := _sample(p)) is not None:
            found[name] = values
    return found


def _vocabulary(model: nn.Module) -> set[int]:
    """The ids of the parameters of embeddings and of the output's matrix."""
    output: Any = getattr(model, "get_output_embeddings", lambda: None)()
    modules = [m for m in model.modules() if isinstance(m, nn.Embedding) or m is output]
    return {id(p) for m in modules for p in m.parameters()}


def agree(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two fingerprints are of one model, though they may have sampled other weights."""
    shared = one["samples"].keys() & other["samples"].keys()
    return all(one[f] == other[f] for f in FIELDS if f != "samples") and all(
        one["samples"][name] == other["samples"][name] for name in shared
    )


def _sample(p: Tensor) -> list[float] | None:
    plain = type(p) in (Tensor, nn.Parameter)  # a quantised weight may be a subclass that says it is floating
    if not plain or p.device.type == "meta" or not p.is_floating_point() or p.numel() == 0:
        return None
    where = torch.linspace(0, p.numel() - 1, _VALUES, dtype=torch.float64, device=p.device).long()
    index = torch.unravel_index(where, p.shape)
    return [float(v) for v in p.detach()[index].double().tolist()]


@dataclass(frozen=True)
class Identity:
    """Which model something is.

    Attributes:
        model_type, hidden_size, layers: as in a fingerprint.
        samples: names -> the values of those weights that can be read here; see `_sample`.
        passed_over: weights that are no part of it, such as those of embeddings.
    """

    model_type: str | None
    hidden_size: int | None
    layers: int | None
    samples: Callable[[Iterable[str]], dict[str, list[float]]]
    passed_over: frozenset[str] = frozenset()


def identity(model: nn.Module) -> Identity:
    """That of a model in memory."""
    words = _vocabulary(model)
    passed_over = frozenset(name for name, p in model.named_parameters() if id(p) in words)
    known: dict[tuple[str, ...], dict[str, list[float]]] = {}  # many artifacts were made for it, and ask for the same

    def samples(names: Iterable[str]) -> dict[str, list[float]]:
        asked = tuple(names)
        if asked not in known:
            known[asked] = _samples(model, asked)
        return known[asked]

    return Identity(**_sizes(model), samples=samples, passed_over=passed_over)


def samples_of_checkpoint(folder: str | os.PathLike[str], names: Iterable[str]) -> dict[str, list[float]]:
    """As `_samples`, from the safetensors files of a folder; without those that are not there under these names."""
    found: dict[str, list[float]] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            for name in set(names) & set(file.keys()):
                stored = file.get_slice(name)
                shape = stored.get_shape()
                if (count := math.prod(shape)) == 0 or not stored.get_dtype().startswith(("F", "BF")):
                    continue
                where = torch.linspace(0, count - 1, _VALUES, dtype=torch.float64, device="cpu").long()
                places = torch.stack(torch.unravel_index(where, tuple(shape)), 1).tolist()
                found[name] = [float(stored[tuple(slice(i, i + 1) for i in at)].double().item()) for at in places]
    return found


def compare(expected: dict[str, Any], model: nn.Module) -> tuple[str | None, str | None]:
    """`judge` for a model in memory."""
    return judge(expected, identity(model))


def judge(expected: dict[str, Any], here: Identity) -> tuple[str | None, str | None]:
    """(error, warning) of using an artifact made for `expected` on a model; both None where they agree exactly."""
    for name in ("model_type", "hidden_size", "layers"):
        if expected[name] != getattr(here, name):
            return f"it was made for {name} {expected[name]!r}, this model has {getattr(here, name)!r}", None
    # Older artifacts have samples of the vocabulary.
    wanted = {name: values for name, values in expected["samples"].items() if name not in here.passed_over}
    found = here.samples(wanted)
    if not found:
        return None, "no weight could be compared with the base model's (quantised, offloaded or renamed)"
    worst = 0.0
    for name, b in found.items():
        a = wanted[name]
        scale = max(math.sqrt(sum(v * v for v in a) / len(a)), 1e-12)
        worst = max(worst, max(abs(x - y) for x, y in zip(a, b, strict=True)) / scale)
    if worst > _CAST:
        return f"it was made for other weights: a sampled one differs by {worst:.3g} of its size", None
    if worst > 0 or len(found) < len(wanted):
        return None, f"the base model was cast or quantised since (sampled weights differ by up to {worst:.1g})"
    return None, None


def _is_weight(value: Any) -> bool:
    """A number that a weight can be: as a float32, of which squares can be summed."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def validate(value: Any) -> dict[str, Any]:
    """`value` as a fingerprint read from a file. Raises ValueError if it is none."""
    if not isinstance(value, dict) or set(value) != set(FIELDS):
        raise ValueError(f"base_model: expected the fields {', '.join(FIELDS)}, got {value!r:.80}")
    samples = value["samples"]
    numbers = isinstance(samples, dict) and all(
        isinstance(v, list) and len(v) == _VALUES and all(map(_is_weight, v)) for v in samples.values()
    )
    if not numbers:
        raise ValueError("base_model: expected 'samples' to map parameter names to finite numbers of float32")
    if not isinstance(value["model_type"], str):
        raise ValueError(f"base_model: expected 'model_type' to be a string, got {value['model_type']!r:.80}")
    for name in ("hidden_size", "layers", "parameters"):
        if not isinstance(value[name], int | None) or isinstance(value[name], bool):
            raise ValueError(f"base_model: expected {name!r} to be an integer, got {value[name]!r:.80}")
    return value
