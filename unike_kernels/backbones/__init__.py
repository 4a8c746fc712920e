"""Finding the decoder layers, the attention and the FFN in a Hugging Face model, by structure.

No model is known by name. A decoder is the submodule whose config is the text config and that holds the list of its
layers; a layer's attention is the child of a class called attention, its FFN the child that holds matrices and is
none, or three children that stand inline (OPT); where a layer holds a list of sublayers (T5), they are looked for
there. What an FFN computes is proved by computing it once from its matrices: gated, plain, or neither (a mixture of
experts, quantised or adapted weights), in which case the extra neurons stand beside it as they do anywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..nn import Dense, original, residual_position
from ..ops import ACTIVATIONS
from ..ops.patched_ffn.reference import FFNWeights, activate, ffn

__all__ = ["Decoder", "Layer", "Site", "device_of", "find_decoder", "image_token_id"]

_INLINE = ("fc1", "activation_fn", "fc2")
_FEED_FORWARD = ("mlp", "feed_forward", "block_sparse_moe", "moe", "ffn", "DenseReluDense")
_PROBES = 3  # tokens
_CLOSE = {torch.float32: 1e-4, torch.float64: 1e-8}  # of the largest output; halves: 0.05


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


def _is_plain(matrix: nn.Module) -> bool:
    """Whether it has a weight, perhaps a bias, and nothing else that could change what it computes."""
    from transformers.pytorch_utils import Conv1D

    parameters = dict(matrix.named_parameters())
    return (
        isinstance(matrix, nn.Linear | Conv1D)
        and parameters.keys() <= {"weight", "bias"}
        and all(type(p) is nn.Parameter and p.is_floating_point() for p in parameters.values())
    )


def _matrices(module: nn.Module, *, deep: bool = False) -> Iterator[nn.Module]:
    """The module itself, its children or all modules below it, as far as they hold a matrix."""
    for part in module.modules() if deep else (module, *module.children()):
        if any(p.dim() >= 2 for p in part.parameters(recurse=False)):
            yield part


@torch.no_grad()
def _computes(modules: Sequence[nn.Module], weights: FFNWeights, activation: str) -> bool:
    """Whether the modules, one after the other, are the FFN of these weights: for a few random tokens."""
    d, f = weights.w_in.shape[1], weights.w_in.shape[0]
    device, dtype = weights.w_in.device, weights.w_in.dtype
    if weights.w_out.shape != (d, f) or device.type == "meta":
        return False
    x = torch.randn(_PROBES, d, generator=torch.Generator("cpu").manual_seed(0), dtype=torch.float32, device="cpu").to(
        device, dtype
    )
    training = [part for module in modules for part in module.modules() if part.training]
    try:
        for part in training:  # dropout
            part.training = False
        out: Any = x
        for module in modules:
            rest = (torch.zeros_like(x),) if residual_position(module) is not None else ()
            out = module(out, *rest)
    finally:
        for part in training:
            part.training = True
    wanted = ffn(x, weights, activation)
    if not isinstance(out, Tensor) or out.shape != wanted.shape:
        return False
    return float((out - wanted).abs().max()) <= _CLOSE.get(dtype, 0.05) * float(wanted.abs().max())


def _functions(module: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """What in an FFN may be its activation: itself or a child without parameters, or a function that it keeps."""
    for name, part in [("", module), *module.named_children(), *vars(module).items()]:
        if callable(part) and ("act" in name.lower() or "gelu" in name.lower()):
            yield part
        elif name == "" and not any(True for _ in module.parameters()):
            yield module


def _configured(config: Any, where: str) -> Callable[[Tensor], Tensor]:
    """The activation that a config names: for experts that compute it inside."""
    from transformers.activations import ACT2FN

    for key in ("hidden_act", "hidden_activation", "activation_function"):
        name = getattr(config, key, None)
        if isinstance(name, str) and name in ACT2FN:
            function: Callable[[Tensor], Tensor] = ACT2FN[name]
            return function
    raise UnsupportedModelError(
        f"{where}: looked for its activation as a child or in the config as hidden_act, hidden_activation or "
        "activation_function; found none"
    )


def configured_activation(config: Any) -> str:
    """The name of the activation that a model's config gives its FFNs. Raises UnsupportedModelError for none."""
    where = type(config).__name__
    return match_activation(_configured(config, where), where)


@torch.no_grad()
def match_activation(function: Callable[[Tensor], Tensor], where: str) -> str:
    """The name of an activation, found by what it computes. Raises UnsupportedModelError for an unknown one."""
    probe = torch.linspace(-6, 6, 97, dtype=torch.float32, device="cpu")
    got = function(probe.clone())
    for name in ACTIVATIONS:
        if torch.allclose(got, activate(name, probe), atol=1e-6, rtol=1e-5):
            return name
    raise UnsupportedModelError(
        f"{where}: its activation {type(function).__name__} computes none of {', '.join(ACTIVATIONS)}"
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


def project_queries(attention: Any, hidden: Tensor) -> Tensor:
    """W_q h + b_q, per head and without positions (Eq. 8). [M, d] -> [M, H, c]."""
    heads = _heads(attention)
    return attention.q_proj(hidden).unflatten(-1, (heads, -1))


def project_memory(attention: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Keys W_k h [N, H, c] and values W_v W_o h [N, H, d] of entries [N, d] (Eq. 8); b_o is spread over the heads."""
    heads = _heads(attention)
    output = _output(attention)
    width = output.weight.shape[1] // heads
    keys, values = (proj(hidden).unflatten(-1, (-1, width)) for proj in (attention.k_proj, attention.v_proj))
    groups = heads // keys.shape[1]
    keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    per_head = output.weight.unflatten(1, (heads, width))
    values = torch.einsum("nhc,dhc->nhd", values, per_head)
    return keys, values if output.bias is None else values + output.bias / heads


def _output(attention: Any) -> Any:
    output = getattr(attention, "o_proj", None) or getattr(attention, "out_proj", None)
    if output is None or not all(hasattr(attention, name) for name in ("q_proj", "k_proj", "v_proj")):
        raise UnsupportedModelError(
            f"{type(attention).__name__}: Config(values='projected') looked for q_proj, k_proj, v_proj and o_proj or "
            f"out_proj; found {[name for name, _ in attention.named_children()]}"
        )
    return output


def _heads(attention: Any) -> int:
    _output(attention)
    heads = getattr(getattr(attention, "config", None), "num_attention_heads", None)
    return int(attention.num_heads if heads is None else heads)


def score_scale(attention: Any) -> float:
    """1 / sqrt(head width): the scale of the module's own attention."""
    return float((_output(attention).weight.shape[1] // _heads(attention)) ** -0.5)
