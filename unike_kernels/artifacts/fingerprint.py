"""Which base model an edit or memory was made for: a cheap fingerprint that survives a dtype cast or quantisation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

_PARAMETERS = 12  # parameters sampled, spread over the model
_VALUES = 8  # values sampled of each
_CAST = 0.02  # relative difference that a cast to 16 bits or a quantisation may cause

FIELDS = ("model_type", "hidden_size", "layers", "parameters", "samples")


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """The model's type and sizes, and a few sampled weights. Never reads more than about a hundred values.

    Weights that are not in memory (offloaded, on `meta`) or not floating (quantised) are left out of the samples.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    named = list(model.named_parameters())
    step = max(1, len(named) // _PARAMETERS)
    samples = {name: values for name, p in named[::step] if (values := _sample(p)) is not None}
    return {
        "model_type": getattr(config, "model_type", type(model).__name__),
        "hidden_size": getattr(text, "hidden_size", None),
        "layers": getattr(text, "num_hidden_layers", None),
        "parameters": len(named),
        "samples": samples,
    }


def _sample(p: Tensor) -> list[float] | None:
    plain = type(p) in (Tensor, nn.Parameter)  # a quantised weight may be a subclass that says it is floating
    if not plain or p.device.type == "meta" or not p.is_floating_point() or p.numel() == 0:
        return None
    where = torch.linspace(0, p.numel() - 1, _VALUES, dtype=torch.float64, device=p.device).long()
    index = torch.unravel_index(where, p.shape)
    return [float(v) for v in p.detach()[index].double().tolist()]


def compare(expected: dict[str, Any], model: nn.Module) -> tuple[str | None, str | None]:
    """(error, warning) of using an artifact made for `expected` on `model`; both None where they agree exactly."""
    found = fingerprint(model)
    for name in ("model_type", "hidden_size", "layers"):
        if expected[name] != found[name]:
            return f"it was made for {name} {expected[name]!r}, this model has {found[name]!r}", None
    shared = [name for name in expected["samples"] if name in found["samples"]]
    if not shared:
        return None, "no weight could be compared with the base model's (quantised, offloaded or renamed)"
    worst = 0.0
    for name in shared:
        a, b = expected["samples"][name], found["samples"][name]
        scale = max(math.sqrt(sum(v * v for v in a) / len(a)), 1e-12)
        worst = max(worst, max(abs(x - y) for x, y in zip(a, b, strict=True)) / scale)
    if worst > _CAST:
        return f"it was made for other weights: a sampled one differs by {worst:.3g} of its size", None
    if worst > 0 or len(shared) < len(expected["samples"]):
        return None, f"the base model was cast or quantised since (sampled weights differ by up to {worst:.1g})"
    return None, None


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def validate(value: Any) -> dict[str, Any]:
    """`value` as a fingerprint read from a file. Raises ValueError if it is none."""
    if not isinstance(value, dict) or set(value) != set(FIELDS):
        raise ValueError(f"base_model: expected the fields {', '.join(FIELDS)}, got {value!r:.80}")
    samples = value["samples"]
    numbers = isinstance(samples, dict) and all(
        isinstance(v, list) and len(v) == _VALUES and all(_is_finite(x) for x in v) for v in samples.values()
    )
    if not numbers:
        raise ValueError("base_model: expected 'samples' to map parameter names to finite numbers")
    return value
