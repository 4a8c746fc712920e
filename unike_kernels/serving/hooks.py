"""Handing what a layer's FFN and its attention compute to a function that changes it in place."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .. import backbones
from ..errors import UnsupportedModelError
from ..nn import residual_of, residual_position

Change = Callable[[Tensor, Tensor], None]  # (input, output), both [..., d]: changes the output


def hook_ffn(layer: backbones.Layer, change: Change) -> list[RemovableHandle]:
    """Let `change` add to the output of a layer's FFN. Raises UnsupportedModelError where there is none."""
    first, last = layer.ffn[0].module, layer.ffn[-1].module
    find = _finder(first)
    given: list[Tensor] = []

    def entered(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.append(find(args, kwargs))

    def left(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        change(*_pair(layer, module, given.pop(), output))

    return [first.register_forward_pre_hook(entered, with_kwargs=True), last.register_forward_hook(left)]


def hook_attention(
    layer: backbones.Layer, change: Change, *, summed: Callable[[Tensor], Tensor] | None = None, share: float = 1.0
) -> list[RemovableHandle]:
    """Let `change` replace the output of a layer's attention. Raises UnsupportedModelError where there is none.

    The output that it is given is the attention's whole one: with a bias that an engine leaves for its caller to add,
    without a residual.

    Args:
        layer: of the decoder.
        change: see `Change`.
        summed: where a rank's attention gives a part of the output, which the layer sums later: the sum over the ranks,
            a new tensor, which each of them must ask for. None: it gives all of it.
        share: of what `change` adds to that sum, how much this rank's part takes; those of all ranks are 1 together.
            Where it is 0 for one, a compiler sees that its sum is for nothing, leaves it out, and the others wait.
    """
    attention = layer.attention.module
    find, residual_at = _finder(attention), residual_position(attention)
    if summed is not None and residual_at is not None:
        raise UnsupportedModelError(f"{layer.where}: its attention is not summed over the ranks, and has a residual")

    def left(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hidden, out = _pair(layer, module, find(args, kwargs), output)
        residual = residual_of(residual_at, args, kwargs)
        bias = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        whole = out if summed is None else summed(out)
        if residual is not None:
            bare = out - residual.reshape(out.shape)
        elif isinstance(bias, Tensor) and bias.dim() == 1:
            bare = whole + bias
        elif summed is not None:
            bare = whole
        else:
            change(hidden, out)
            return
        changed = bare.clone()
        change(hidden, changed)
        out.add_(changed - bare, alpha=share)  # a token that is not shifted gets no difference

    return [attention.register_forward_hook(left, with_kwargs=True)]


def _finder(module: nn.Module) -> Callable[[tuple[Any, ...], dict[str, Any]], Tensor]:
    """Finds a call's input: what the module's forward calls hidden_states, or else its first argument."""
    names = list(inspect.signature(module.forward).parameters)
    position = names.index("hidden_states") if "hidden_states" in names else 0
    name = names[position]
    return lambda args, kwargs: args[position] if position < len(args) else kwargs[name]


def _pair(layer: backbones.Layer, module: nn.Module, hidden: Tensor, output: Any) -> tuple[Tensor, Tensor]:
    """Input and output of a module, which may be the first of several. No views of them: compiled code would have to
    carry from piece to piece that what changes the view has changed the output."""
    out = output[0] if isinstance(output, tuple) else output
    if not isinstance(out, Tensor) or out.numel() != hidden.numel():
        raise UnsupportedModelError(
            f"{layer.where}: expected its {type(module).__name__} to return a tensor as large as its input, "
            f"{list(hidden.shape)}, alone or as the first of several; it returned {type(out).__name__}"
        )
    return hidden, out
