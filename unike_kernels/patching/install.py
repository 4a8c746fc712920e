"""`patch` and its inverse: install edits and a memory in a model, in place, and take them out again bit for bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from dataclasses import replace as with_changes
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from .. import backbones
from ..artifacts.edit import Edit
from ..artifacts.memory import MemoryBank
from ..artifacts.scope import own_keys
from ..config import Config
from ..errors import PatchError
from ..nn import (
    Dense,
    DropIn,
    ExtraNeurons,
    LayerEdits,
    MemoryAttention,
    MemoryTables,
    ModelContext,
    PatchedFFN,
    Router,
    base_class,
    extra_neurons,
    memory_shift,
    release,
)
from ..ops.prompt_encoder import Vocabulary
from ..retrieval import ApproximateIndex, Index, Retriever
from .compatibility import check_artifacts
from .session import (
    HOOKS,
    AllOrNothing,
    DecoderEndHook,
    DecoderHook,
    EmbeddedHook,
    EmbeddingHook,
    Installed,
    MaskHook,
    PatchedState,
    Place,
    Places,
    PromptHook,
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
        scope: where edits act, see `Config.scope`.
        replaced: with scope="memory", edits whose fact a newer one is about, too -> the newer one, which wins.
        facts: with scope="memory", other facts that the memory knows.
    """

    model: str
    decoder: str
    layers: tuple[tuple[int, str, str, int, int], ...]
    edits: tuple[str, ...]
    memory: str | None
    nbytes: int
    scope: str = "all"
    replaced: Mapping[str, str] = field(default_factory=dict)
    facts: int = 0

    def __str__(self) -> str:
        lines = [
            f"{self.model}: patched {len(self.layers)} layers of {self.decoder or 'the model'}",
            f"  edits: {', '.join(self.edits) or 'none'}; memory: {self.memory or 'none'}; {self.nbytes:,} bytes",
            "  layer  FFN                       attention       neurons  entries",
        ]
        if self.scope == "memory":
            replaced = [f"  {new!r} takes the place of {old!r}: one fact" for old, new in self.replaced.items()]
            lines[2:2] = [f"  scope: an edit acts where its entry wins against {self.facts:,} other facts", *replaced]
        lines += [f"  {i:5d}  {ffn:24s}  {attn:14s}  {n:7d}  {m:7d}" for i, ffn, attn, n, m in self.layers]
        return "\n".join(lines)


def is_patched(model: nn.Module) -> bool:
    """Whether `patch` is in force on this model."""
    return state_of(model) is not None


def patched_ffns(model: nn.Module) -> dict[int, ExtraNeurons]:
    """The extra neurons of each patched layer's FFN. Raises PatchError if the model is not patched."""
    return dict(require_state(model).ffns)


def patch(
    model: nn.Module,
    edits: Sequence[Edit] = (),
    memory: MemoryBank | None = None,
    *,
    layers: Sequence[int] | None = None,
    config: Config | None = None,
    scope: Literal["all", "memory"] | None = None,
    default: Literal["all", "none"] = "all",
    base: Literal["vendor", "fused"] = "vendor",
    retriever: Callable[[Tensor], Retriever] | None = None,
    replace: bool = False,
    override: bool = False,
) -> PatchReport:
    """Let a Hugging Face model compute with these edits and this memory, in place.

    Without edits and memory the model's output does not change by a bit. If anything is wrong, or interrupts it, the
    model is left as it was.

    Its modules stay the objects that they are, of a subclass of their class: adapters, offloading, other kernels,
    quantised or new children, attributes and casts, before or afterwards, do what they do to any model. Hooks of a
    patched module run around all of it: they see, and may replace, the output with edits and memory. Where another
    module comes to stand in the place of a patched one, the next pass is an error, unless it calls that one and only
    adds to it (LoRA on the parts of an FFN that stands inline in its layer).

    Args:
        model: a PreTrainedModel whose decoder has an FFN in the layers that are edited and attention in those of the
            memory, alone or in a multimodal model. It may be wrapped, by torch.compile, DataParallel or PEFT, and may
            be wrapped and unwrapped later; all functions of this package look inside.
        edits: each adds its neurons to the layers that it names; ids must be distinct. Their tensors are copied; those
            of an edit that asks for gradients are used as they are in every pass, for those who train them by hand (but
            see `training.train_edit`).
        memory: shifts the attention output of the layers that it names.
        layers: patched too, though no edit or memory names them; None: where nothing names any, the last four that
            have an FFN.
        config: the semantics; None: the memory's, else the edits', else the defaults.
        scope: where an edit acts, instead of what the config says (see `Config.scope`).
        default: what a pass outside of every `rows` block uses: "all" edits and the memory, or "none". With "all", such
            a pass is an error while another logical call has a block open that gives some row less.
        base: who computes the FFNs themselves. "vendor": their own modules, so that rows without edits keep their bits
            on every device. "fused": on a GPU, for up to 64 tokens and plain weights that lie row by row, the launch
            that computes the extra neurons; such rows are then rounded as that kernel rounds, edits or not.
        retriever: makes the index of a layer's retrieval keys [N, d], which the memory is then searched with, such as
            `lambda keys: uk.ShardedIndex(uk.CosineIndex(my_part_of(keys)))`; None: an exact one, or what the memory's
            `search` says.
        replace: patch anew a model that is patched already, instead of an error.
        override: accept edits and memories that were not made for each other, this config or this model.

    Returns:
        A report that prints as a table.

    Raises:
        PatchError: the model is patched already; two edits have one id; a module that would be patched stands in
            several places.
        MismatchError: an edit, the memory, the config and the model do not belong together.
        UnsupportedModelError: the structure of the model is not known.
        ValueError: an unknown layer, default or base.
    """
    if default not in ("all", "none"):
        raise ValueError(f"default: expected 'all' or 'none', got {default!r}")
    if base not in ("vendor", "fused"):
        raise ValueError(f"base: expected 'vendor' or 'fused', got {base!r}")
    model = backbones.unwrap(model)
    if state_of(model) is not None and not replace:
        raise PatchError(f"{type(model).__name__} is patched already: unpatch it first, or pass replace=True")
    if state_of(model) is None and any(isinstance(m, DropIn) for m in model.modules()):
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
    chosen = chosen if scope is None else with_changes(chosen, scope=scope)
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
            layer.index: make_tables(
                memory, layer.index, chosen, backbones.device_of(layer.attention.module), retriever
            )
            for layer in with_attention
        }
        router = make_router(memory, chosen, named)
    context = ModelContext(Installed(stores, tables, router, named, memory), default, chosen)
    places = Places(decoder.module, _places(model, decoder, chosen_layers), {})
    by_text = memory is not None and chosen.tokens == "text"
    placeholders = backbones.required_placeholder_ids(model) if by_text else None
    state = PatchedState(context, decoder, chosen, places, places.ffns, {}, retriever)
    dense = {i: decoder.layers[i].dense if base == "fused" else None for i in stores}
    with AllOrNothing(model):
        if state_of(model) is not None:
            _remove(model)
        for layer in chosen_layers:
            if layer.index in tables:
                state.attentions[layer.index] = memory_shift(_attention(layer, chosen, context))
            if layer.index in stores:
                state.ffns[layer.index] = extra_neurons(_ffn(layer, dense[layer.index], context))
        above = backbones.takers_of_ids(model, decoder)
        if chosen.needs_prompt_ends and not getattr(model.config, "is_encoder_decoder", False):
            for module in above:
                module.register_forward_pre_hook(MaskHook(context), with_kwargs=True)
        decoder.module.register_forward_pre_hook(DecoderHook(context, places, placeholders), with_kwargs=True)
        set_prompt_hooks(model, decoder, context, router)
        decoder.module.register_forward_hook(DecoderEndHook(context), with_kwargs=True, always_call=True)
        if placeholders is not None:
            embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
            embedding.register_forward_pre_hook(EmbeddingHook(context, placeholders), with_kwargs=True)
            for module in above:
                hook = EmbeddingHook(context, placeholders, first=True)
                module.register_forward_pre_hook(hook, with_kwargs=True)
        set_state(model, state)
    log_event("patch", state)
    return _report(model, decoder, state)


def unpatch(model: M) -> M:
    """Take edits and memory out; the model computes what it computed before `patch`, bit for bit.

    What was done to it meanwhile stays; modules that were patched and then replaced are given back as well. Raises
    PatchError if the model is not patched. Returns the model.
    """
    state = require_state(model, changed=True)
    with AllOrNothing(model):
        _remove(model)
        set_state(model, None)
    log_event("unpatch", state)
    return model


def _remove(model: nn.Module) -> None:
    """Take out what `patch` put in."""
    state, tree = require_state(model, changed=True), list(model.modules())
    for module in {*(place.module for place in state.places.each), *tree}:  # and copies that others have made
        release(module)
    for module in {state.decoder.module, *tree}:
        _remove_hooks(module, HOOKS)
    release_checkpoints(model)


@contextmanager
def patched(model: nn.Module, *args: Any, **kwargs: Any) -> Iterator[PatchReport]:
    """`patch` for the length of a `with` block.

    Args:
        model: see `patch`.
        *args: of `patch`.
        **kwargs: of `patch`.

    Raises as `patch` does.
    """
    report = patch(model, *args, **kwargs)
    try:
        yield report
    finally:
        unpatch(model)


def _store(layer: backbones.Layer, edits: dict[str, Edit]) -> LayerEdits:
    """The neurons of these edits in one layer, where its FFN computes."""
    own = {name: edit.layers[layer.index] for name, edit in edits.items() if layer.index in edit.layers}
    store, device = LayerEdits(), backbones.device_of(layer.ffn[0].module)
    store.set(own, device)
    store.spare()
    return store


def _places(model: nn.Module, decoder: backbones.Decoder, layers: Sequence[backbones.Layer]) -> list[Place]:
    """Where the modules of these layers stand that are to be patched.

    Raises PatchError for a module that stands in several places: what is done to it would be done in all of them.
    """
    paths = {module: tuple(path.split(".")) if path else () for path, module in decoder.module.named_modules()}
    holders = Counter(child for module in model.modules() for child in module._modules.values())
    found = []
    for layer in layers:
        parts = [(layer.attention, False)] if layer.has("attention") else []
        if layer.has("ffn"):
            parts += [(site, 0 < i < len(layer.ffn) - 1) for i, site in enumerate(layer.ffn)]
        if not parts:
            layer.ffn  # noqa: B018 (raises)
        for site, between in parts:
            if holders[site.module] > 1 and not between:
                raise PatchError(
                    f"{layer.where}: its {site.name} ({base_class(site.module).__name__}) stands in "
                    f"{holders[site.module]} places of the model, and would be patched in all of them"
                )
            path = (*paths[site.parent], site.name)
            found.append(Place(layer.index, site.parent, site.name, site.module, path, between))
    return found


def _ffn(layer: backbones.Layer, dense: Dense | None, context: ModelContext) -> nn.Module:
    parts = [site.module for site in layer.ffn]
    return PatchedFFN.from_module(*parts, activation=layer.activation, dense=dense, context=context, layer=layer.index)


def _attention(layer: backbones.Layer, config: Config, context: ModelContext) -> nn.Module:
    project = backbones.project_queries if config.values == "projected" else None
    return MemoryAttention.from_module(
        layer.attention.module, config, context=context, layer=layer.index, project=project
    )


def make_tables(
    memory: MemoryBank | None,
    layer: int,
    config: Config,
    device: torch.device,
    retriever: Callable[[Tensor], Retriever] | None = None,
    entries: range | None = None,
) -> MemoryTables | None:
    """The tables of one layer of a memory.

    Args:
        memory: or None.
        layer: index in the decoder.
        config: the switches in force.
        device: where the layer's attention computes.
        retriever: see `patch`; None: what the memory's `search` says.
        entries: of the memory, which the tables have; None: all.

    Returns:
        None where there is no memory, or it has nothing for this layer.

    Raises:
        ValueError: the retriever does not have as many keys as it was given, or has ids of the caller's own.
    """
    if memory is None or layer not in memory.layers:
        return None
    m, part = memory.layers[layer], slice(None) if entries is None else slice(entries.start, entries.stop)
    index, keys, values = m.index[part], m.keys[part], None if m.values is None else m.values[part]
    found = None
    if retriever is not None:
        found = retriever(index.to(device))
        if len(found) != len(index):
            raise ValueError(f"retriever: expected an index of the {len(index)} keys it was given, got {len(found)}")
        if isinstance(found, Index) and not found.counted:
            raise ValueError("retriever: expected an index whose ids are the positions of keys, got one with others")
    elif memory.search is not None:
        found = ApproximateIndex(index.to(device), memory.search)
    cosine, texts = config.scale == "cosine", None if memory.texts is None else memory.texts[part]
    pictures = None if memory.pictures is None else memory.pictures.part(part)
    tables = MemoryTables(
        index, keys, values, m.encoder, memory.id, found, cosine=cosine, texts=texts, pictures=pictures
    )
    return tables.to(device)


def make_router(memory: MemoryBank | None, config: Config, edits: Mapping[str, Edit]) -> Router | None:
    """What decides which of these edits act in a row, with the memory's scope; None where nothing does."""
    if memory is None or memory.scope is None or config.scope != "memory":
        return None
    of = memory.scope
    key = of.needing_key()
    read = of.encoder if key is None else partial(own_keys, key, width=of.width)
    assert read is not None
    told = of.entries, of.facts, of.threshold, of.same_fact, of.own, of.names
    router = Router(of.id, read, Vocabulary(of.pieces), of.layers, *told)
    return router.with_edits({name: entries_of(edit) for name, edit in edits.items()})


def entries_of(edit: Edit) -> Tensor:
    """Of an edit that has some, as `check_artifacts` has made sure."""
    assert edit.entries is not None
    return edit.entries


def set_prompt_hooks(
    model: nn.Module, decoder: backbones.Decoder, context: ModelContext, router: Router | None
) -> None:
    """Let the router see what comes to its layers, and none that was there before."""
    embedding: Any = getattr(model, "get_input_embeddings", lambda: None)()
    for module in [embedding, *(layer.module for layer in decoder.layers)]:
        if module is not None:
            _remove_hooks(module, (PromptHook, EmbeddedHook))
    if router is not None:
        embedding.register_forward_hook(EmbeddedHook(context), with_kwargs=True)
        for i in router.places:
            hook = PromptHook(context, i)
            decoder.layers[i].module.register_forward_pre_hook(hook, with_kwargs=True)


def _remove_hooks(module: nn.Module, kinds: tuple[type, ...]) -> None:
    for key in [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, kinds)]:
        del module._forward_pre_hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)
    for key in [key for key, hook in module._forward_hooks.items() if isinstance(hook, kinds)]:
        del module._forward_hooks[key]
        module._forward_hooks_with_kwargs.pop(key, None)
        module._forward_hooks_always_called.pop(key, None)


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
    router = state.installed.router
    return PatchReport(
        type(model).__name__,
        decoder.path,
        tuple(rows),
        tuple(state.edits),
        memory,
        nbytes,
        state.config.scope,
        router.replaced if router else {},
        state.memory.scope.count if router and state.memory and state.memory.scope else 0,
    )
