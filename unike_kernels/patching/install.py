"""`patch` and its inverse: install edits and a memory in a model, in place, and take them out again bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from .. import backbones
from ..artifacts.edit import Edit
from ..artifacts.memory import MemoryBank
from ..config import Config
from ..errors import PatchError
from ..nn import EditStore, MemoryAttention, MemoryTables, ModelContext, PassThrough, PatchedFFN, original
from ..retrieval import ApproximateIndex, Retriever
from .compatibility import check_artifacts
from .session import (
    HOOKS,
    AllOrNothing,
    DecoderEndHook,
    DecoderHook,
    EmbeddingHook,
    Installed,
    PatchedState,
    log_event,
    outside_inference_mode,
    release_checkpoints,
    require_state,
    set_state,
    state_of,
)

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class PatchReport:
    """What `patch` did; prints as a table.

    Attributes:
        model: class name.
        decoder: path of the decoder in the model.
        layers: (index, FFN child, attention child, extra neurons, memory entries) of each patched layer; "none" for a
            child that the layer does not have.
        edits: ids.
        memory: id of the memory, or None.
        nbytes: bytes of the edits and of the memory's tables.
    """

    model: str
    decoder: str
    layers: tuple[tuple[int, str, str, int, int], ...]
    edits: tuple[str, ...]
    memory: str | None
    nbytes: int

    def __str__(self) -> str:
        lines = [
            f"{self.model}: patched {len(self.layers)} layers of {self.decoder or 'the model'}",
            f"  edits: {', '.join(self.edits) or 'none'}; memory: {self.memory or 'none'}; {self.nbytes:,} bytes",
            "  layer  FFN                       attention       neurons  entries",
        ]
        lines += [f"  {i:5d}  {ffn:24s}  {attn:14s}  {n:7d}  {m:7d}" for i, ffn, attn, n, m in self.layers]
        return "\n".join(lines)


def is_patched(model: nn.Module) -> bool:
    """Whether `patch` is in force on this model."""
    return state_of(model) is not None


def patched_ffns(model: nn.Module) -> dict[int, PatchedFFN]:
    """The patched FFN of each patched layer. Raises PatchError if the model is not patched."""
    return dict(require_state(model).ffns)


def patch(
    model: nn.Module,
    edits: Sequence[Edit] = (),
    memory: MemoryBank | None = None,
    *,
    layers: Sequence[int] | None = None,
    config: Config | None = None,
    default: Literal["all", "none"] = "all",
    retriever: Callable[[Tensor], Retriever] | None = None,
    replace: bool = False,
    override: bool = False,
) -> PatchReport:
    """Install the fused modules in a Hugging Face model, in place, with these edits and this memory.

    Without edits and memory the model's output does not change by a bit. If anything is wrong, or interrupts it, the
    model is left as it was.

    Args:
        model: a PreTrainedModel whose decoder has an FFN in the layers that are edited and attention in those of the
            memory, alone or in a multimodal model.
        edits: each adds its neurons to the layers that it names; ids must be distinct.
        memory: shifts the attention output of the layers that it names.
        layers: patched too, though no edit or memory names them; None: where nothing names any, the last four that
            have an FFN.
        config: the semantics; None: the memory's, else the edits', else the defaults.
        default: what a pass outside of every `rows` block uses: "all" edits and the memory, or "none". With "all", such
            a pass is an error while another logical call has a block open that gives some row less.
        retriever: makes the index of a layer's retrieval keys [N, d], which the memory is then searched with, such as
            `lambda keys: uk.ShardedIndex(uk.CosineIndex(my_part_of(keys)))`; None: an exact one, or what the memory's
            `search` says.
        replace: patch anew a model that is patched already, instead of an error.
        override: accept edits and memories that were not made for each other, this config or this model.

    Returns:
        A report that prints as a table.

    Raises:
        PatchError: the model is patched already; two edits have one id.
        MismatchError: an edit, the memory, the config and the model do not belong together.
        UnsupportedModelError: the structure of the model is not known.
        ValueError: an unknown layer or default.
    """
    if default not in ("all", "none"):
        raise ValueError(f"default: expected 'all' or 'none', got {default!r}")
    if state_of(model) is not None and not replace:
        raise PatchError(f"{type(model).__name__} is patched already: unpatch it first, or pass replace=True")
    if state_of(model) is None and any(original(m) is not m for m in model.modules()):
        raise PatchError(f"a part of {type(model).__name__} was patched on its own: unpatch that model object first")
    for edit in edits:
        if not isinstance(edit, Edit):
            raise TypeError(f"edits: expected a sequence of Edit, got {type(edit).__name__}")
    if memory is not None and not isinstance(memory, MemoryBank):
        raise TypeError(f"memory: expected a MemoryBank, got {type(memory).__name__}")
    named = {edit.id: edit for edit in edits}
    if len(named) != len(edits):
        raise PatchError(f"edits: expected distinct ids, got {[edit.id for edit in edits]}")

    decoder = backbones.find_decoder(model)
    chosen = config or (memory.config if memory else None) or (edits[0].config if edits else None) or Config()
    check_artifacts(model, decoder, list(edits), memory, chosen, override)
    edited, remembering = sorted({i for edit in edits for i in edit.layers}), sorted(memory.layers if memory else ())
    wanted = {*edited, *remembering}
    if edited:
        decoder.select(edited, need=("ffn",))
    if remembering:
        decoder.select(remembering, need=("attention",))
    explicit = (
        decoder.select(layers, need=("ffn",) if layers is None else ()) if layers is not None or not wanted else []
    )
    indices = decoder.select(sorted(wanted | set(explicit)), need=())
    chosen_layers = [decoder.layers[i] for i in indices]

    # Everything that can fail is built first; the model is touched only after that.
    with outside_inference_mode():
        stores = {layer.index: _store(layer, named) for layer in chosen_layers if layer.has("ffn")}
        with_attention = [layer for layer in chosen_layers if layer.has("attention")]
        tables = {
            layer.index: make_tables(memory, layer.index, backbones.device_of(layer.attention.module), retriever)
            for layer in with_attention
        }
    context = ModelContext(Installed(stores, tables, named, memory), default, in_model=True)
    plan = [_build(layer, chosen, context) for layer in chosen_layers]
    by_text = memory is not None and chosen.tokens == "text"
    placeholders = backbones.required_placeholder_ids(model) if by_text else None
    state = PatchedState(context, decoder, chosen, {}, {}, retriever)
    with AllOrNothing(model):
        if state_of(model) is not None:
            _remove(model)
        for i, (replacements, ffn, attention) in zip(indices, plan, strict=True):
            for site, module in replacements:
                site.put(module)
            if ffn is not None:
                state.ffns[i] = ffn
            if attention is not None:
                state.attentions[i] = attention
        decoder.module.register_forward_pre_hook(DecoderHook(context, placeholders), with_kwargs=True)
        decoder.module.register_forward_hook(DecoderEndHook(context), always_call=True)
        if placeholders is not None:
            embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
            embedding.register_forward_pre_hook(EmbeddingHook(context, placeholders), with_kwargs=True)
            for module in backbones.takers_of_ids(model, decoder):
                hook = EmbeddingHook(context, placeholders, first=True)
                module.register_forward_pre_hook(hook, with_kwargs=True)
        set_state(model, state)
    log_event("patch", state)
    return _report(model, decoder, state)


def unpatch(model: M) -> M:
    """Put the original module objects back; the model computes what it computed before `patch`, bit for bit.

    Raises PatchError if the model is not patched. Returns the model.
    """
    state = require_state(model)
    with AllOrNothing(model):
        _remove(model)
        set_state(model, None)
    log_event("unpatch", state)
    return model


def _remove(model: nn.Module) -> None:
    """Take out what `patch` put in."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = original(child)
        for key in [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, HOOKS)]:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
        for key in [key for key, hook in module._forward_hooks.items() if isinstance(hook, HOOKS)]:
            del module._forward_hooks[key]
            module._forward_hooks_always_called.pop(key, None)
    release_checkpoints(model)


@contextmanager
def patched(model: nn.Module, *args: Any, **kwargs: Any) -> Iterator[PatchReport]:
    """`patch(model, ...)` for the length of a `with` block."""
    report = patch(model, *args, **kwargs)
    try:
        yield report
    finally:
        unpatch(model)


def _store(layer: backbones.Layer, edits: dict[str, Edit]) -> EditStore:
    """The neurons of these edits in one layer, where its FFN computes."""
    own = {name: edit.layers[layer.index] for name, edit in edits.items() if layer.index in edit.layers}
    store, device = EditStore(), backbones.device_of(layer.ffn[0].module)
    store.set({name: neurons.to(device) for name, neurons in own.items()})
    if not any(t.requires_grad for neurons in own.values() for t in neurons.tensors().values()):
        store.spare()
    return store


def _build(
    layer: backbones.Layer, config: Config, context: ModelContext
) -> tuple[list[tuple[backbones.Site, nn.Module]], PatchedFFN | None, MemoryAttention | None]:
    """What will stand where in one layer, which may lack a part; nothing of the model is touched."""
    replacements: list[tuple[backbones.Site, nn.Module]] = []
    ffn = attention = None
    if layer.has("attention"):
        attention = _attention(layer, config, context)
        replacements.append((layer.attention, attention))
    if layer.has("ffn"):
        ffn, through = _ffn(layer, context)
        replacements += zip(layer.ffn, (ffn, *through), strict=True)
    if not replacements:
        layer.ffn  # noqa: B018 (raises)
    return replacements, ffn, attention


def _ffn(layer: backbones.Layer, context: ModelContext) -> tuple[PatchedFFN, list[PassThrough]]:
    ffn_parts = [site.module for site in layer.ffn]
    ffn = PatchedFFN.from_module(
        *ffn_parts, activation=layer.activation, dense=layer.dense, context=context, layer=layer.index
    )
    return ffn, [PassThrough.from_module(part) for part in ffn_parts[1:]]


def _attention(layer: backbones.Layer, config: Config, context: ModelContext) -> MemoryAttention:
    base_attention = layer.attention.module
    return MemoryAttention.from_module(
        base_attention,
        config,
        context=context,
        layer=layer.index,
        project=backbones.project_queries if config.values == "projected" else None,
    )


def make_tables(
    memory: MemoryBank | None,
    layer: int,
    device: torch.device,
    retriever: Callable[[Tensor], Retriever] | None = None,
) -> MemoryTables | None:
    """What a memory holds for a layer, on the device where its attention computes."""
    if memory is None or layer not in memory.layers:
        return None
    m = memory.layers[layer]
    found = None
    if retriever is not None:
        found = retriever(m.index.to(device))
        if len(found) != len(m.index):
            raise ValueError(f"retriever: expected an index of the {len(m.index)} keys it was given, got {len(found)}")
    elif memory.search is not None:
        found = ApproximateIndex(m.index.to(device), memory.search)
    return MemoryTables(m.index, m.keys, m.values, m.encoder, memory.id, found).to(device)


def _report(model: nn.Module, decoder: backbones.Decoder, state: PatchedState) -> PatchReport:
    rows = []
    nbytes = sum(edit.nbytes for edit in state.edits.values())
    for i in sorted({*state.ffns, *state.attentions}):
        ffn, attention, layer = state.ffns.get(i), state.attentions.get(i), decoder.layers[i]
        tables = None if attention is None else attention.memory
        neurons = 0 if ffn is None else ffn.edits.used[0]
        entries = 0 if tables is None else tables.entries
        names = " + ".join(site.name for site in layer.ffn) if ffn is not None else "none"
        rows.append((i, names, layer.attention.name if attention is not None else "none", neurons, entries))
        nbytes += sum(b.nbytes for b in (tables.buffers() if tables else ()))
    memory = state.memory.id if state.memory else None
    return PatchReport(type(model).__name__, decoder.path, tuple(rows), tuple(state.edits), memory, nbytes)
