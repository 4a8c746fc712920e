"""The operators that a model calls in an engine's worker, and the place in its layers where it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones import Part, find_decoder
from .hooks import hook_attention, hook_ffn
from .ragged import RaggedRuntime, RequestSlice
from .step_tables import StepTables

# Whose step this process computes, or what a whole graph of one reads while an engine tries the model out and
# captures it.
_step: RaggedRuntime | StepTables | None = None
_lib = torch.library.Library("unike_serving", "DEF")


def _ffn(x: Tensor, out: Tensor, layer: int) -> None:
    if _step is not None:
        _step.ffn(layer, x, out)


def _attention(x: Tensor, out: Tensor, layer: int) -> None:
    if _step is not None:
        _step.attention(layer, x, out)


def _nothing(x: Tensor, out: Tensor, layer: int) -> None:
    """What tracing sees."""


for _name, _run in (("ffn", _ffn), ("attention", _attention)):
    # No argument says which model it is: vLLM keeps compiled models on disk, for other processes.
    _lib.define(f"{_name}(Tensor x, Tensor(a!) out, int layer) -> ()")
    _lib.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"unike_serving::{_name}", _nothing, lib=_lib)
OPERATORS = ("unike_serving::ffn", "unike_serving::attention")


@contextmanager
def step(served: RaggedRuntime, shares: Sequence[RequestSlice]) -> Iterator[None]:
    """Inside, the operators compute for these requests; outside of any they leave what they get as it is."""
    served.begin(shares)
    try:
        with _computing(served):
            yield
    finally:
        served.end()


@contextmanager
def rehearsal(tables: StepTables) -> Iterator[None]:
    """Inside, the operators compute as graphs of whole steps do, for nobody."""
    tables.write((), (), None)
    with _computing(tables):
        yield


@contextmanager
def _computing(what: RaggedRuntime | StepTables) -> Iterator[None]:
    global _step
    _step = what
    try:
        yield
    finally:
        _step = None


def stage_of(model: nn.Module, text: Any) -> list[int]:
    """The decoder layers that this process has of an engine's model; other stages of a pipeline have the others."""
    layers = find_decoder(language_of(model), text).layers
    return [layer.index for layer in layers if type(layer.module).__name__ != "PPMissingLayer"]


def install(
    model: nn.Module,
    text: Any,
    served: RaggedRuntime,
    *,
    edits: bool,
    ranks: int = 1,
    rank: int = 0,
    summed: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Let the decoder layers of an engine's model call the operators.

    Where ranks share a layer's matrices, what they have computed is summed where its FFN and its attention end, mostly:
    each rank changes the sum, and they stay equal. Where the layer sums them itself (Falcon), an edit is added by the
    first rank alone, to its part; of an attention's output, which the memory shifts as a whole, the ranks compute the
    sum once more, and each adds its share of the shift.

    Args:
        model: as the engine loads it, with the layers of its stage.
        text: its text config.
        served: what its layers shall compute.
        edits: whether there will be any, for which the layers need FFNs.
        ranks: over which its matrices are spread.
        rank: the one of this process.
        summed: the sum of a tensor over them, a new one; needed where there are several.

    Raises:
        UnsupportedModelError: no such layers, or one that lacks a part, or that sums its attention itself with a
            residual in it.
    """
    decoder = find_decoder(language_of(model), text)
    places: dict[Part, list[int]] = {"ffn": served.bank.layers if edits else [], "attention": served.remembering}
    plan = [(decoder.layers[i], part) for part, at in places.items() if at for i in decoder.select(at, need=(part,))]
    for layer, part in plan:
        if part == "attention":
            apart = ranks > 1 and not _sums(layer.attention.module)
            total, share = (summed, 1 / ranks) if apart else (None, 1.0)
            hook_attention(layer, _caller(part, layer.index), summed=total, share=share)
        elif rank == 0 or _sums(layer.ffn[-1].module):
            hook_ffn(layer, _caller(part, layer.index))


def language_of(model: Any) -> Any:
    """The language model of one that sees images; another model as it is."""
    return model.get_language_model() if hasattr(model, "get_language_model") else model


def _sums(part: nn.Module) -> bool:
    """Whether what ranks have computed of it is summed where it ends."""
    return all(getattr(each, "reduce_results", True) for each in (part, *part.children()))


def _caller(name: str, index: int) -> Callable[[Tensor, Tensor], None]:
    run = getattr(torch.ops.unike_serving, name)
    return lambda x, out: run(x, out, index)
