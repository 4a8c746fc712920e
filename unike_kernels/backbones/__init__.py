"""Finding the decoder layers, the attention and the FFN in a Hugging Face model, by structure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..nn import original
from ..ops import ACTIVATIONS
from ..ops.patched_ffn.reference import FFNWeights, activate

__all__ = ["Decoder", "Layer", "device_of", "find_decoder", "image_token_id"]

_ATTENTION = ("self_attn", "attn", "self_attention", "attention")
_INLINE = ("fc1", "activation_fn", "fc2")
_GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")


@dataclass(frozen=True)
class Layer:
    """One decoder layer and what is patched in it.

    Attributes:
        index: in the decoder.
        module: the layer.
        attention: name of its attention child.
        ffn: names of the children that form its FFN: one module, or three that stand inline.
        activation: of the FFN.
        gated: whether the FFN is gated.
    """

    index: int
    module: nn.Module
    attention: str
    ffn: tuple[str, ...]
    activation: str
    gated: bool

    def weights(self) -> FFNWeights:
        """The base FFN's weights, as `ops.patched_ffn` takes them."""
        parts: list[Any] = [original(getattr(self.module, name)) for name in self.ffn]
        if self.gated:
            mlp = parts[0]
            first, up, last = mlp.gate_proj, mlp.up_proj, mlp.down_proj
            return FFNWeights(first.weight, first.bias, up.weight, up.bias, last.weight, last.bias)
        first, _, last = parts
        return FFNWeights(first.weight, first.bias, None, None, last.weight, last.bias)


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
    """The decoder of a Hugging Face model: OPT and LLaMA-style models, alone or inside a multimodal model.

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
        lists = [child for child in module.children() if isinstance(child, nn.ModuleList) and len(child) == total]
        if len(lists) == 1:
            found.append((path, module, lists[0]))
    if len(found) != 1:
        raise UnsupportedModelError(
            f"{type(model).__name__}: looked for one submodule with model_type {text.model_type!r} and a list of "
            f"{total} decoder layers; found {[path or '(the model itself)' for path, _, _ in found] or 'none'}"
        )
    path, module, layers = found[0]
    inspected = tuple(_inspect(i, layer) for i, layer in enumerate(layers))
    return Decoder(module, path, inspected, text.hidden_size)


def _inspect(index: int, layer: nn.Module) -> Layer:
    children = {name: original(child) for name, child in layer.named_children()}
    attention = next((name for name in _ATTENTION if name in children), None)
    where = f"layer {index} ({type(layer).__name__})"
    if attention is None:
        raise UnsupportedModelError(f"{where}: looked for attention as one of {_ATTENTION}; found {list(children)}")
    if all(name in children for name in _INLINE):
        return Layer(index, layer, attention, _INLINE, match_activation(children["activation_fn"], where), False)
    mlp: Any = children.get("mlp")
    if mlp is not None and all(isinstance(getattr(mlp, name, None), nn.Module) for name in _GATED):
        return Layer(index, layer, attention, ("mlp",), match_activation(mlp.act_fn, where), True)
    inside = "" if mlp is None else f", with {[name for name, _ in mlp.named_children()]} in mlp"
    raise UnsupportedModelError(
        f"{where}: looked for an FFN as {', '.join(_INLINE)} in the layer or as mlp with {', '.join(_GATED)}; "
        f"found {list(children)}{inside}"
    )


@torch.no_grad()
def match_activation(function: Callable[[Tensor], Tensor], where: str) -> str:
    """The name of an activation, found by what it computes. Raises UnsupportedModelError for an unknown one."""
    probe = torch.linspace(-6, 6, 97)
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
