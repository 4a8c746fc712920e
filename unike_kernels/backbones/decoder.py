"""How the decoder of a model, its layers, their attention and their FFNs are found."""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from ..errors import UnsupportedModelError
from ..nn import Dense, base_class
from ..ops import ACTIVATIONS
from ..ops.patched_ffn.reference import FFNWeights
from .ffn import _computes, _configured, _functions, _is_plain, _matrices, match_activation

_INLINE = ("fc1", "activation_fn", "fc2")


_FEED_FORWARD = ("mlp", "feed_forward", "block_sparse_moe", "moe", "ffn", "DenseReluDense")
_FEED_FORWARD_KINDS = ("mlp", "moe", "feedforward")  # how the name of a class ends, where none is called so

Part = Literal["attention", "ffn"]


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
        """What stands there."""
        found: nn.Module = getattr(self.parent, self.name)
        return found

    def put(self, module: nn.Module) -> None:
        """Let another module stand there."""
        self.parent._modules[self.name] = module


@dataclass(frozen=True)
class Layer:
    """One decoder layer and what is patched in it, looked for when it is asked for: a layer need not have everything.

    Attributes:
        index: in the decoder.
        module: the layer.
        config: of the decoder.
    """

    index: int
    module: nn.Module
    config: Any

    @property
    def where(self) -> str:
        """For messages."""
        return f"layer {self.index} ({type(self.module).__name__})"

    @functools.cached_property
    def attention(self) -> Site:
        """Its self-attention, which a memory needs. Raises UnsupportedModelError where there is none, or several."""
        found = [site for site in self._sites if _is_attention(site)]
        if len(found) != 1:
            raise self._lacking("one self-attention")
        return found[0]

    @functools.cached_property
    def ffn(self) -> tuple[Site, ...]:
        """Its FFN, which an edit needs: one module, or three that stand inline.

        Raises UnsupportedModelError where there is none, or several.
        """
        # Of any shape: an engine packs matrices.
        weighty = [site for site in self._sites if any(True for _ in site.module.parameters())]
        found = [site for site in weighty if site.name in _FEED_FORWARD]
        inline = [Site(self.module, name) for name in _INLINE if name in self.module._modules]
        if not found and len(inline) < len(_INLINE):
            found = [s for s in weighty if base_class(s.module).__name__.lower().endswith(_FEED_FORWARD_KINDS)]
        if len(found) != 1 and (found or len(inline) < len(_INLINE)):
            names, kinds = ", ".join(_FEED_FORWARD), ", ".join(_FEED_FORWARD_KINDS)
            raise self._lacking(f"one FFN called {names}, of a class named ...{kinds}, or {', '.join(_INLINE)}")
        return tuple(found or inline)

    def has(self, part: str) -> bool:
        """Whether it has an "attention", or an "ffn"."""
        try:
            getattr(self, part)
        except UnsupportedModelError:
            return False
        return True

    @functools.cached_property
    def _sites(self) -> list[Site]:
        """The layer's children, and those of its lists of sublayers (T5)."""
        lists = [child for child in self.module.children() if isinstance(child, nn.ModuleList)]
        holders = [self.module, *(part for each in lists for part in each)]
        return [Site(holder, name) for holder in holders for name, _ in holder.named_children()]

    def _lacking(self, wanted: str) -> UnsupportedModelError:
        inside = {site.name: [name for name, _ in site.module.named_children()] for site in self._sites}
        return UnsupportedModelError(f"{self.where}: looked for {wanted}; found {inside}")

    @functools.cached_property
    def activation(self) -> str:
        """Of the FFN. Raises UnsupportedModelError for one that no kernel knows."""
        functions = [f for site in self.ffn for f in _functions(site.module)]
        known = (match_activation(f, self.where) for f in functions)
        if found := next(known, None):
            return found
        try:
            return match_activation(_configured(self.config, self.where), self.where)
        except UnsupportedModelError:  # it may be written into the FFN's forward: then what that computes tells
            if told := next((name for name in ACTIVATIONS if self._reading(name)), None):
                return told
            raise

    @functools.cached_property
    def dense(self) -> Dense | None:
        """The matrices of an FFN that computes just what they say, gated or plain; None for any other.

        The probe reads them once, in their own dtype.
        """
        return self._reading(self.activation)

    def _reading(self, activation: str) -> Dense | None:
        """How the matrices are read, if the FFN computes what they say with this activation."""
        modules = [site.module for site in self.ffn]
        if any(hasattr(part, "_hf_hook") for module in modules for part in module.modules()):
            return None  # they may be elsewhere
        matrices = [m for module in modules for m in _matrices(module)]
        if len(matrices) not in (2, 3) or not all(map(_is_plain, matrices)):
            return None
        readings = (Dense(tuple(matrices), gate_first) for gate_first in (True, False))
        return next((r for r in readings if _computes(modules, r.weights(), activation)), None)

    def weights(self) -> FFNWeights:
        """The base FFN's weights, as `ops.patched_ffn` takes them. Raises UnsupportedModelError if it is not dense."""
        if self.dense is None:
            found = [base_class(site.module).__name__ for site in self.ffn]
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

    def select(self, indices: Sequence[int] | None, count: int = 4, *, need: Sequence[Part] = ("ffn",)) -> list[int]:
        """Validated layer indices, ascending; None: the last `count` (the paper's four) of those that are suitable.

        Args:
            indices: layers.
            count: how many, where none are given.
            need: what a suitable layer has.

        Raises:
            ValueError: an index outside the decoder.
            UnsupportedModelError: a layer lacks what is needed, or all do; the message says what was looked for.
        """
        total = len(self.layers)
        if indices is None:
            suitable = [layer.index for layer in self.layers if all(layer.has(part) for part in need)]
            chosen = suitable[-count:] or [0]
        else:
            chosen = [_index(i) for i in indices]
            if not chosen or not all(0 <= i < total for i in chosen):
                raise ValueError(f"layers: expected indices in 0..{total - 1}, got {list(indices)}")
        for i in chosen:
            for part in need:
                getattr(self.layers[i], part)  # raises where there is none
        return sorted(set(chosen))


def _index(value: object) -> int:
    """An integer of Python or of another library; -1 for anything else."""
    try:
        return -1 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return -1


def find_decoder(model: nn.Module, text: Any = None) -> Decoder:
    """The decoder of a Hugging Face model, alone or inside a multimodal or an encoder-decoder model.

    Args:
        model: the model; or an engine's, whose modules stand as Hugging Face's do and may be of other classes.
        text: the text config, as an engine has it; None: that of the model's own config.

    Raises:
        UnsupportedModelError: the structure is another one; the message says what was looked for and found.
    """
    given = text
    if text is None:
        config: Any = getattr(model, "config", None)
        if not isinstance(model, nn.Module) or not hasattr(config, "get_text_config"):
            raise UnsupportedModelError(f"model: expected a Hugging Face PreTrainedModel, got {type(model).__name__}")
        text = config.get_text_config(decoder=True)
    total = getattr(text, "num_hidden_layers", None)
    found = []
    for path, module in model.named_modules():
        own = getattr(module, "config", given)  # an engine's modules need not keep theirs
        if getattr(own, "model_type", None) != text.model_type:
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
    first: dict[nn.Module, int] = {}
    for i, layer in enumerate(layers):
        if first.setdefault(layer, i) != i:
            raise UnsupportedModelError(
                f"layer {i} ({type(layer).__name__}): expected a module of its own, found the one of layer "
                f"{first[layer]}; what is done to one would be done to both"
            )
    inspected = tuple(Layer(i, layer, text) for i, layer in enumerate(layers))
    return Decoder(module, path, inspected, text.hidden_size)


def configured_activation(text: Any) -> str:
    """The name of the activation that a model's text config gives its FFNs, where the model is not at hand.

    Raises UnsupportedModelError for none.
    """
    where = type(text).__name__
    try:
        return match_activation(_configured(text, where), where)
    except UnsupportedModelError:  # it may be written into the model: one without weights shows it
        from transformers import AutoModel

        try:
            with torch.device("meta"):
                model = AutoModel.from_config(text)
            layers = find_decoder(model).layers
        except Exception as error:
            raise UnsupportedModelError(f"{where}: it names no activation, and no model is made of it") from error
        return next(layer for layer in layers if layer.has("ffn")).activation


def _is_attention(site: Site) -> bool:
    kind = base_class(site.module).__name__
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


_PLACEHOLDER = re.compile(r"(image|video|audio|speech|vision|media)_(token|pad)_(id|index)")


def placeholder_ids(model: nn.Module) -> frozenset[int]:
    """The ids of the tokens that stand for parts of an image, a video or a sound; none for a model of text alone."""
    config: Any = getattr(model, "config", None)
    named = {name: getattr(config, name, None) for name in dir(config) if _PLACEHOLDER.fullmatch(name)}
    return frozenset(value for value in named.values() if isinstance(value, int) and value >= 0)


def required_placeholder_ids(model: nn.Module) -> frozenset[int]:
    """`placeholder_ids`. Raises UnsupportedModelError for a model without any."""
    if found := placeholder_ids(model):
        return found
    raise UnsupportedModelError(
        f"{type(model).__name__}: Config(tokens='text') needs an image_token_id or the like (video_token_id, "
        "audio_token_id, ..._token_index) in the model's config; it has none"
    )


def takers_of_ids(model: nn.Module, decoder: Decoder) -> list[nn.Module]:
    """The modules from the model down to its decoder, which one after the other are given the tokens' ids.

    Below the first one that is given them, ids may have been replaced: some models embed a placeholder that is no word
    of the vocabulary as word 0.
    """
    names = decoder.path.split(".") if decoder.path else []
    return [model.get_submodule(".".join(names[:depth])) for depth in range(len(names))]


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside of what torch.compile, (Distributed)DataParallel and PEFT wrap around it; itself without any."""
    while True:
        if "_orig_mod" in model._modules:  # torch.compile
            inner = model._modules["_orig_mod"]
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        elif callable(getattr(model, "get_base_model", None)) and hasattr(model, "peft_config"):
            inner = model.get_base_model()  # type: ignore[operator]
        else:
            return model
        assert isinstance(inner, nn.Module)
        model = inner
