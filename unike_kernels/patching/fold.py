"""`fold`: the neurons of edits as part of a plain model, which any engine loads that loads the base model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import backbones
from ..artifacts.compatibility import check_compatibility
from ..artifacts.edit import Edit, EditLayer
from ..errors import MismatchError, PatchError, UnsupportedModelError
from ..nn import Dense
from .compatibility import describe
from .install import is_patched

_SIZES = ("ffn_dim", "intermediate_size", "n_inner", "ffn_hidden_size", "d_ff")  # what configs call the FFN's width
_BIASES = ("mlp_bias",)  # and the switch of its biases, where there is one


@torch.no_grad()
def fold(model: nn.Module, edits: Edit | Sequence[Edit], *, override: bool = False) -> nn.Module:
    """A new model with a wider FFN that computes what `patch(model, edits)` does without a memory (Eq. 3 and 6).

    The width of a model's FFNs is one number, so every layer grows by as many neurons as the layer with the most extra
    ones has; the others get neurons that do nothing. beta * zeta' is added to the values, once and for all.
    `save_pretrained` of the result gives a plain checkpoint.

    Args:
        model: a Hugging Face model whose decoder has plain or gated FFNs of plain weights; not patched. It is left as
            it is. One that torch.compile, DataParallel or PEFT has wrapped is looked for inside.
        edits: one edit, or several in their order.
        override: fold edits, too, that were made for other weights or trained with a memory, which is left behind.

    Returns:
        A model of the same class, on the same device and of the same dtype, which the edits are cast to, with the
        generation config, modes and frozen parameters of the other. It shares no memory with it.

    Raises:
        PatchError: the model is patched, or has adapters that are not merged.
        UnsupportedModelError: an FFN is not dense, its width is not in the config, or the edits need biases that this
            architecture does not have.
        MismatchError: an edit is for another hidden size or activation, for layers that are not there, or relies on a
            memory, which a plain checkpoint cannot have.
    """
    model = backbones.unwrap(model)
    if is_patched(model):
        raise PatchError(f"{type(model).__name__} is patched: unpatch it first")
    if adapters := sum(hasattr(module, "base_layer") for module in model.modules()):
        raise PatchError(
            f"{type(model).__name__} has adapters in {adapters} modules: put them into its weights first, with "
            "merge_and_unload()"
        )
    chosen = [edits] if isinstance(edits, Edit) else list(edits)
    decoder = backbones.find_decoder(model)
    for edit in chosen:
        _check(edit, model, decoder, override)
    extra = [[e.layers[layer.index] for e in chosen if layer.index in e.layers] for layer in decoder.layers]
    more = max((sum(len(e.key_bias) for e in layers) for layers in extra), default=0)
    dense = [_dense(layer) for layer in decoder.layers]
    width, gated = dense[0].weights().w_in.shape[0], dense[0].weights().w_up is not None
    config = _widened(model, width, width + more, any(_needs_biases(e, gated) for layers in extra for e in layers))
    with torch.device("meta"):
        new = type(model)(config)
    names = {id(module): name for name, module in model.named_modules()}
    grown: dict[str, Tensor] = {}
    for layers, reading in zip(extra, dense, strict=True):
        grown.update(_grown(reading, layers, more, names))
    kept = {name: t for name, t in model.state_dict().items() if name not in grown}
    state = {**copy.deepcopy(kept), **grown}  # tied weights are copied as tied ones
    wanted = set(new.state_dict())
    if missing := sorted(name for name in state if name not in wanted):
        raise UnsupportedModelError(
            f"{type(model).__name__}: the edits need biases in its FFN, which this architecture does not have "
            f"(no {missing[0]}); only neurons without biases can be folded into it: train them with "
            f"EditTraining(bias=False){' and Config(neurons=' + repr('gated') + ')' if gated else ''}"
        )
    new.load_state_dict(state, strict=False, assign=True)
    for name, buffer in model.named_buffers():  # what is in no state_dict
        holder, _, own = name.rpartition(".")
        new.get_submodule(holder)._buffers[own] = buffer.clone()
    for name, module in model.named_modules():  # tables of positions that are no buffers
        tables = {key: t.clone() for key, t in vars(module).items() if isinstance(t, Tensor)}
        vars(new.get_submodule(name)).update(tables)
    for name, parameter in list(new.named_parameters()):
        if parameter.is_meta and name.endswith(".bias"):  # of FFNs without new neurons, which have biases now
            holder, _, own = name.rpartition(".")
            like = new.get_parameter(f"{holder}.weight")
            new.get_submodule(holder)._parameters[own] = nn.Parameter(like.new_zeros(parameter.shape, dtype=like.dtype))
    tie: Any = getattr(new, "tie_weights", None)
    if tie is not None:
        tie()
    if left := [name for name, t in new.state_dict().items() if t.is_meta]:
        raise UnsupportedModelError(f"{type(model).__name__}: nothing was found for {left}")
    _take_over(new, model)
    return new


def _take_over(new: nn.Module, model: nn.Module) -> None:
    """What a model has beside its config and its weights."""
    if hasattr(model, "generation_config"):
        vars(new)["generation_config"] = copy.deepcopy(model.generation_config)
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    for name, p in new.named_parameters(remove_duplicate=False):
        if name in frozen or not p.is_floating_point():
            p.requires_grad_(False)
    for name, module in model.named_modules():
        new.get_submodule(name).training = module.training


def _check(edit: Edit, model: nn.Module, decoder: backbones.Decoder, override: bool) -> None:
    if edit.memory_id is not None and not override:
        raise MismatchError(
            f"edit {edit.id!r}: it was trained with the memory {edit.memory_id}, which cannot be folded; pass "
            "override=True to fold its neurons alone"
        )
    check_compatibility(edit, describe(model, decoder), override=override)


def _dense(layer: backbones.Layer) -> Dense:
    layer.weights()  # says what is wrong
    assert layer.dense is not None
    return layer.dense


def _needs_biases(layer: EditLayer, gated: bool) -> bool:
    """Whether the neurons have biases; plain neurons of a gated FFN have the factor q 0 + 1."""
    factor = gated if layer.up_bias is None else bool(layer.up_bias.any())
    return factor or bool(layer.key_bias.any())


def _widened(model: nn.Module, width: int, new: int, biases: bool) -> Any:
    """The model's config with FFNs of the new width, and with biases where they are needed and can be had."""
    config = copy.deepcopy(model.config)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{type(model).__name__}: its encoder's FFNs have the same width in the config")
    text: Any = config.get_text_config(decoder=True)  # type: ignore[union-attr,operator]
    known = [name for name in _SIZES if hasattr(text, name) and getattr(text, name) in (width, None)]
    if not known:
        raise UnsupportedModelError(
            f"{type(model).__name__}: looked for the FFN's width {width} in its config as one of {', '.join(_SIZES)}; "
            f"found { {name: getattr(text, name) for name in _SIZES if hasattr(text, name)} }"
        )
    setattr(text, known[0], new)
    if hasattr(config, "quantization_config"):  # of the file that the weights came from; they are plain ones now
        del config.quantization_config
    for name in _BIASES:
        if biases and hasattr(text, name):
            setattr(text, name, True)
    return config


def _grown(reading: Dense, layers: Sequence[EditLayer], more: int, names: dict[int, str]) -> dict[str, Tensor]:
    """The matrices of an FFN with these neurons and as many idle ones as are left of `more`, by their names."""
    weights = reading.weights()
    like, (d, f) = weights.w_in, weights.w_out.shape
    gated = weights.w_up is not None

    def stack(parts: list[Tensor], shape: tuple[int, ...]) -> Tensor:
        idle = torch.zeros(more - sum(len(p) for p in parts), *shape, dtype=torch.float32, device="cpu")
        return torch.cat([*(p.detach().cpu().float() for p in parts), idle]).to(like)

    keys, key_bias = stack([e.keys for e in layers], (d,)), stack([e.key_bias for e in layers], ())
    values = stack([e.values + e.beta * e.zeta for e in layers], (d,))
    up = stack([torch.zeros_like(e.keys) if e.up is None else e.up for e in layers], (d,))
    up_bias = stack([torch.ones_like(e.key_bias) if e.up_bias is None else e.up_bias for e in layers], ())

    def bias(base: Tensor | None, own: Tensor) -> Tensor | None:
        if base is None and not own.any():
            return None
        return torch.cat([like.new_zeros(f, dtype=like.dtype) if base is None else base, own])

    inwards = [(torch.cat([weights.w_in, keys]), bias(weights.b_in, key_bias))]
    if gated and weights.w_up is not None:
        factor = (torch.cat([weights.w_up, up]), bias(weights.b_up, up_bias))
        if any(b is not None for _, b in (inwards[0], factor)):  # one switch for all of them
            inwards = [(w, like.new_zeros(f + more, dtype=like.dtype) if b is None else b) for w, b in inwards]
            factor = (factor[0], like.new_zeros(f + more, dtype=like.dtype) if factor[1] is None else factor[1])
        inwards.append(factor)
    elif any(e.up is not None for e in layers):
        raise UnsupportedModelError("gated neurons cannot be folded into an FFN that has no gate")
    outward = torch.cat([weights.w_out, values.T], 1)
    out_bias = None if weights.b_out is None else weights.b_out.clone()
    if gated and out_bias is None and inwards[0][1] is not None:
        out_bias = like.new_zeros(d, dtype=like.dtype)
    return reading.named([*inwards, (outward, out_bias)], names)
