"""How the decoder of a model, its layers, their attention and their FFNs are found."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import UnsupportedModelError
from ..nn import Dense, original
from ..ops.patched_ffn.reference import FFNWeights
from .ffn import _computes, _configured, _functions, _is_plain, _matrices, match_activation

_INLINE = ("fc1", "activation_fn", "fc2")


_FEED_FORWARD = ("mlp", "feed_forward", "block_sparse_moe", "moe", "ffn", "DenseReluDense")


class Site(NamedTuple):
    """A place in a model where a module stands.

    Attributes:
        parent: its holder.
        name: of the child.
    """

    parent: nn.Module
    name: str

    @property
    def module(self) -> nn.Module:
        """What stands there, or what stood there before it was patched."""
        return original(getattr(self.parent, self.name))

    def put(self, module: nn.Module) -> None:
        """Let another module stand there."""
        self.parent._modules[self.name] = module


@dataclass(frozen=True)
class Layer:
    """One decoder layer and what is patched in it.

    Attributes:
        index: in the decoder.
        module: the layer.
        attention: its self-attention.
        ffn: its FFN: one module, or three that stand inline.
        config: of the decoder.
    """

    index: int
    module: nn.Module
    attention: Site
    ffn: tuple[Site, ...]
    config: Any

    @property
    def where(self) -> str:
        """For messages."""
        return f"layer {self.index} ({type(self.module).__name__})"

    @functools.cached_property
    def activation(self) -> str:
        """Of the FFN. Raises UnsupportedModelError for one that no kernel knows."""
        functions = [f for site in self.ffn for f in _functions(site.module)]
        known = (match_activation(f, self.where) for f in functions)
        return next(known, None) or match_activation(_configured(self.config, self.where), self.where)

    @functools.cached_property
    def dense(self) -> Dense | None:
        """The matrices of an FFN that computes just what they say, gated or plain; None for any other.

        The probe reads them once, in their own dtype.
        """
        modules = [site.module for site in self.ffn]
        if any(hasattr(part, "_hf_hook") for module in modules for part in module.modules()):
            return None  # they may be elsewhere
        matrices = [m for module in modules for m in _matrices(module)]
        if len(matrices) not in (2, 3) or not all(map(_is_plain, matrices)):
            return None
        readings = (Dense(tuple(matrices), gate_first) for gate_first in (True, False))
        return next((r for r in readings if _computes(modules, r.weights(), self.activation)), None)

    def weights(self) -> FFNWeights:
        """The base FFN's weights, as `ops.patched_ffn` takes them. Raises UnsupportedModelError if it is not dense."""
        if self.dense is None:
            found = [type(site.module).__name__ for site in self.ffn]
            raise UnsupportedModelError(
                f"{self.where}: looked for an FFN of two or three plain matrices; found {', '.join(found)}, which "
                f"computes something else or holds other weights"
            )
        return self.dense.weights()

    @property
    def gated(self) -> bool | None:
        """Whether the FFN is gated; None where it is not dense."""
        return None if self.dense is None else self.dense.weights().w_up is not None


@dataclass(frozen=True)
class Decoder:
    """The text decoder of a model.

    Attributes:
        module: the submodule that is called with the embedded sequence.
        path: its name in the model.
        layers: its layers.
        hidden_size: d.
    """

    module: nn.Module
    path: str
    layers: tuple[Layer, ...]
    hidden_size: int

    def select(self, indices: Sequence[int] | None, count: int = 4) -> list[int]:
        """Validated layer indices, ascending; None: the last `count` (the paper's four)."""
        total = len(self.layers)
        if indices is None:
            return list(range(max(total - count, 0), total))
        bad = [i for i in indices if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < total]
        if bad or not indices:
            raise ValueError(f"layers: expected indices in 0..{total - 1}, got {list(indices)}")
        return sorted(set(indices))


def find_decoder(model: nn.Module) -> Decoder:
    """The decoder of a Hugging Face model, alone or inside a multimodal or an encoder-decoder model.

    Raises:
        UnsupportedModelError: the structure is another one; the message says what was looked for and found.
    """
    config: Any = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or not hasattr(config, "get_text_config"):
        raise UnsupportedModelError(f"model: expected a Hugging Face PreTrainedModel, got {type(model).__name__}")
    text: Any = config.get_text_config(decoder=True)
    total = getattr(text, "num_hidden_layers", None)
    found = []
    for path, module in model.named_modules():
        own = getattr(module, "config", None)
        if own is None or getattr(own, "model_type", None) != text.model_type:
            continue
        wanted = getattr(own, "num_hidden_layers", total)
        lists = [child for child in module.children() if isinstance(child, nn.ModuleList) and len(child) == wanted]
        if len(lists) == 1:
            found.append((path, module, lists[0]))
    # Experts inside a layer may be as many as there are layers.
    found = [f for f in found if not any(f is not o and f"{f[0]}.".startswith(f"{o[0]}.") for o in found)]
    if len(found) > 1:  # an encoder has a list of its own
        found = [each for each in found if getattr(each[1].config, "is_decoder", False)] or found
    if len(found) != 1:
        raise UnsupportedModelError(
            f"{type(model).__name__}: looked for one submodule with model_type {text.model_type!r} and a list of "
            f"{total} decoder layers; found {[path or '(the model itself)' for path, _, _ in found] or 'none'}"
        )
    path, module, layers = found[0]
    inspected = tuple(_inspect(i, layer, text) for i, layer in enumerate(layers))
    return Decoder(module, path, inspected, text.hidden_size)


def _inspect(index: int, layer: nn.Module, config: Any) -> Layer:
    holders = [layer, *(part for child in layer.children() if isinstance(child, nn.ModuleList) for part in child)]
    sites = [Site(holder, name) for holder in holders for name, _ in holder.named_children()]
    attention = [site for site in sites if _is_attention(site)]
    ffn = [site for site in sites if site.name in _FEED_FORWARD and any(_matrices(site.module, deep=True))]
    inline = [Site(layer, name) for name in _INLINE if name in layer._modules]
    if len(attention) == 1 and (len(ffn) == 1 or len(inline) == len(_INLINE)):
        return Layer(index, layer, attention[0], tuple(ffn or inline), config)
    inside = {site.name: [name for name, _ in site.module.named_children()] for site in sites}
    raise UnsupportedModelError(
        f"layer {index} ({type(layer).__name__}): looked for one self-attention, and for one FFN called "
        f"{', '.join(_FEED_FORWARD)} or {', '.join(_INLINE)} in the layer; found {inside}"
    )


def _is_attention(site: Site) -> bool:
    kind = type(site.module).__name__
    names = (site.name, kind)
    return "Attention" in kind and not any(
        word in name.lower() for name in names for word in ("cross", "encdec", "norm")
    )


def device_of(module: nn.Module) -> torch.device:
    """Where the module computes: where its first parameter is, or is brought to for each call (offloaded)."""
    for m in module.modules():
        offloaded = getattr(getattr(m, "_hf_hook", None), "execution_device", None)
        if offloaded is not None:
            return torch.device(offloaded)
    return next(module.parameters()).device


def image_token_id(model: nn.Module) -> int:
    """The id of the image placeholder. Raises UnsupportedModelError for a model without one."""
    config: Any = getattr(model, "config", None)
    for name in ("image_token_id", "image_token_index"):
        value = getattr(config, name, None)
        if value is not None:
            return int(value)
    raise UnsupportedModelError(
        f"{type(model).__name__}: Config(tokens='text') needs an image_token_id in the model's config; it has none"
    )
