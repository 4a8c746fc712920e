"""`patch` and its inverse: install edits and a memory in a model, in place, and take them out again bit for bit."""

from __future__ import annotations

import logging
import math
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from . import backbones
from .approximate import ApproximateIndex
from .config import Config
from .edits import Edit
from .errors import MismatchError, PatchError
from .fingerprint import compare
from .memory import MemoryBank
from .nn import (
    Context,
    EditStore,
    Explanation,
    MemoryAttention,
    MemoryTables,
    ModelContext,
    PassThrough,
    PatchedFFN,
    PromptState,
    Version,
    original,
)

_ATTRIBUTE = "_unike"
Running = Literal["keep", "switch"]
_log = logging.getLogger("unike_kernels")

M = TypeVar("M", bound=nn.Module)


@dataclass
class _Decode:
    """Forward pre-hook of the decoder: tells the patched modules about this pass. Picklable with the model."""

    context: ModelContext
    image_token: int | None  # given where image placeholders must be told from text

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.context.begin(kwargs.get("past_key_values"))
        context = self.context.now()
        ids = kwargs.get("input_ids", args[0] if args else None)
        source = ids if ids is not None else kwargs.get("inputs_embeds")
        if source is None:
            return
        if ids is not None and self.image_token is not None:
            context.text = ids != self.image_token
        elif self.image_token is not None and context.text is None:
            raise ValueError("inputs_embeds: Config(tokens='text') tells images from text by input_ids; give those")
        mask = kwargs.get("attention_mask")
        plain = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        past = 0
        if context.prompt is not None:
            if mask is not None and plain is None:
                raise ValueError(
                    "attention_mask: alpha='last', retrieval='sequence' and tokens='answer' find the prompt's end in a "
                    "mask [batch, tokens]; a prepared one (static cache) does not tell"
                )
            if kwargs.get("past_key_values") is not None:
                past = int(kwargs["past_key_values"].get_seq_length())
        context.enter(source.shape[0], source.shape[1], past, plain)
        context.text = None  # it was about this pass alone


@dataclass
class _Embed:
    """Forward pre-hook of the embedding: notes which tokens are text. Picklable with the model."""

    context: ModelContext
    image_token: int

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.context.now().text = args[0] != self.image_token if args[0].dim() == 2 else None


@dataclass(frozen=True, eq=False)
class _Block:
    """What a `rows` block selects."""

    rows: int | None = None
    prompt: PromptState | None = None
    edits: tuple[tuple[str, ...], ...] | None = None
    remembers: Tensor | None = None
    remembers_in: str | None = None

    def hold_in(self, context: Context) -> None:
        context.rows, context.prompt = self.rows, self.prompt
        context.edits, context.remembers = self.edits, self.remembers
        context.remembers_in = self.remembers_in


@dataclass
class _Patched:
    """What `patch` installed in a model, kept on it."""

    context: ModelContext
    decoder: backbones.Decoder
    config: Config
    edits: dict[str, Edit]
    memory: MemoryBank | None
    ffns: dict[int, PatchedFFN]
    attentions: dict[int, MemoryAttention]
    blocks: list[_Block] = field(default_factory=list)  # `rows` blocks that are open, in whatever thread
    lock: threading.RLock = field(default_factory=threading.RLock)  # of changes

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, lock=threading.RLock())


@dataclass(frozen=True)
class PatchReport:
    """What `patch` did; prints as a table.

    Attributes:
        model: class name.
        decoder: path of the decoder in the model.
        layers: (index, FFN child, attention child, extra neurons, memory entries) of each patched layer.
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


def _state(model: nn.Module) -> _Patched | None:
    return model.__dict__.get(_ATTRIBUTE)


def _require(model: nn.Module) -> _Patched:
    state = _state(model)
    if state is None:
        raise PatchError(f"{type(model).__name__} is not patched: call unike_kernels.patch(model, ...) first")
    return state


def is_patched(model: nn.Module) -> bool:
    """Whether `patch` is in force on this model."""
    return _state(model) is not None


def patched_ffns(model: nn.Module) -> dict[int, PatchedFFN]:
    """The patched FFN of each patched layer. Raises PatchError if the model is not patched."""
    return dict(_require(model).ffns)


def patch(
    model: nn.Module,
    edits: Sequence[Edit] = (),
    memory: MemoryBank | None = None,
    *,
    layers: Sequence[int] | None = None,
    config: Config | None = None,
    replace: bool = False,
    override: bool = False,
) -> PatchReport:
    """Install the fused modules in a Hugging Face model, in place, with these edits and this memory.

    Without edits and memory the model's output does not change by a bit. If anything is wrong, the model is left as
    it was.

    Args:
        model: a PreTrainedModel whose decoder has attention and an FFN in each layer, alone or in a multimodal model.
        edits: each adds its neurons to the layers that it names; ids must be distinct.
        memory: shifts the attention output of the layers that it names.
        layers: patched too, though no edit or memory names them; None: where nothing names any, the last four.
        config: the semantics; None: the memory's, else the edits', else the defaults.
        replace: patch anew a model that is patched already, instead of an error.
        override: accept edits and memories that were not made for each other, this config or this model.

    Returns:
        A report that prints as a table.

    Raises:
        PatchError: the model is patched already; two edits have one id.
        MismatchError: an edit, the memory, the config and the model do not belong together.
        UnsupportedModelError: the structure of the model is not known.
        ValueError: an unknown layer.
    """
    if _state(model) is not None and not replace:
        raise PatchError(f"{type(model).__name__} is patched already: unpatch it first, or pass replace=True")
    if _state(model) is None and any(original(m) is not m for m in model.modules()):
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
    check_belonging(model, decoder, list(edits), memory, chosen, override)
    wanted = {i for edit in edits for i in edit.layers} | set(memory.layers if memory else ())
    explicit = decoder.select(layers) if layers is not None or not wanted else []
    indices = decoder.select(sorted(wanted | set(explicit)))

    # Everything that can fail is built first; the model is touched only after that.
    context = ModelContext()
    plan = [_build(decoder.layers[i], named, memory, chosen, context) for i in indices]
    image_token = backbones.image_token_id(model) if memory is not None and chosen.tokens == "text" else None
    if _state(model) is not None:
        unpatch(model)
    state = _Patched(context, decoder, chosen, named, memory, {}, {})
    for i, (replacements, ffn, attention) in zip(indices, plan, strict=True):
        for site, module in replacements:
            site.put(module)
        state.ffns[i], state.attentions[i] = ffn, attention
    decoder.module.register_forward_pre_hook(_Decode(context, image_token), with_kwargs=True)
    if image_token is not None:
        model.get_input_embeddings().register_forward_pre_hook(_Embed(context, image_token))  # type: ignore[operator]
    _publish(state)
    model.__dict__[_ATTRIBUTE] = state
    _tell("patch", state)
    return _report(model, decoder, state)


def _tell(event: str, state: _Patched, **more: Any) -> None:
    """A record of level INFO for those who listen to the logger "unike_kernels"; its `unike` is a dict for machines."""
    memory = state.memory
    told = {"event": event, "edits": len(state.edits), "memory": memory.id if memory else None, **more}
    _log.info("%s", " ".join(f"{k}={v}" for k, v in told.items()), extra={"unike": told})


def _publish(state: _Patched, changed: Mapping[int, EditStore] | None = None) -> None:
    """Let new passes compute with what is installed now; `changed`: the only stores that are not published yet."""
    before = state.context.current
    if before is None or changed is None:
        edits = {i: ffn.edits.copied() for i, ffn in state.ffns.items()}
        for ffn in state.ffns.values():
            ffn.edits.direct = False
    else:
        edits = {**before.edits, **changed}
    for attention in state.attentions.values():
        attention.__dict__["published"] = attention.memory
    state.context.current = Version(edits, {i: a.memory for i, a in state.attentions.items()})


def unpatch(model: M) -> M:
    """Put the original module objects back; the model computes what it computed before `patch`, bit for bit.

    Raises PatchError if the model is not patched. Returns the model.
    """
    _require(model)
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = original(child)
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, _Decode | _Embed):
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
    _tell("unpatch", model.__dict__.pop(_ATTRIBUTE))
    return model


def add_edit(model: nn.Module, edit: Edit, *, override: bool = False, running: Running = "keep") -> None:
    """Add an edit to a patched model, in place, behind its other edits.

    A pass computes with what was installed when it began, in every layer. A generation that is running keeps that, as
    its key-value cache does, unless `running` is "switch": then its next pass computes with what is new.

    Args:
        model: a patched model; the edit's layers must be among those that were patched.
        edit: with an id that is not there yet.
        override: see `patch`.
        running: "keep" or "switch".

    Raises:
        PatchError: the model is not patched, at other layers, or has an edit of this id.
        MismatchError: see `patch`.
    """
    state = _require(model)
    _check_running(running)
    if not isinstance(edit, Edit):
        raise TypeError(f"edit: expected an Edit, got {type(edit).__name__}")
    with state.lock:
        if edit.id in state.edits:
            raise PatchError(f"edit: {edit.id!r} is installed already; remove it first")
        if missing := sorted(set(edit.layers) - set(state.ffns)):
            raise PatchError(f"edit {edit.id!r}: its layers {missing} are not patched; patch(model, layers=...) them")
        check_belonging(model, state.decoder, [edit], state.memory, state.config, override)
        stores = {}
        for i, layer in edit.layers.items():
            ffn = state.ffns[i]
            stores[i] = ffn.edits.with_edit(edit.id, layer.to(backbones.device_of(ffn.originals[0])))
        _install(state, {**state.edits, edit.id: edit}, stores, running)
        _tell("add_edit", state, edit=edit.id, layers=sorted(edit.layers), nbytes=edit.nbytes)


def remove_edit(model: nn.Module, id: str, *, running: Running = "keep") -> None:
    """Take an edit out of a patched model, in place. For `running` see `add_edit`.

    Raises PatchError if the model is not patched or has no edit of this id.
    """
    state = _require(model)
    _check_running(running)
    with state.lock:
        edit = _installed(state, id)
        stores = {i: state.ffns[i].edits.without(id) for i in edit.layers}
        _install(state, {name: e for name, e in state.edits.items() if name != id}, stores, running)
        _tell("remove_edit", state, edit=id)


def set_beta(model: nn.Module, id: str, beta: float, *, running: Running = "keep") -> None:
    """Give an installed edit another beta in all its layers: how strongly zeta' steers its values (Eq. 6).

    Raises PatchError if the model is not patched or has no edit of this id, ValueError for a beta that is not finite.
    """
    state = _require(model)
    _check_running(running)
    if not math.isfinite(beta):
        raise ValueError(f"beta: expected a finite number, got {beta!r}")
    with state.lock:
        edit = _installed(state, id)
        layers = {i: replace(layer, beta=torch.full_like(layer.beta, beta)) for i, layer in edit.layers.items()}
        stores = {i: state.ffns[i].edits.with_beta(id, beta) for i in edit.layers}
        _install(state, {**state.edits, id: replace(edit, layers=layers)}, stores, running)
        _tell("set_beta", state, edit=id, beta=beta)


def swap_memory(
    model: nn.Module, memory: MemoryBank | None, *, override: bool = False, running: Running = "keep"
) -> None:
    """Give a patched model another memory, or none. For `running` see `add_edit`, for `override` see `patch`.

    Raises:
        PatchError: the model is not patched, or not at the memory's layers.
        MismatchError: the memory is for another model or config, or an installed edit was trained with another one.
    """
    state = _require(model)
    _check_running(running)
    if memory is not None and not isinstance(memory, MemoryBank):
        raise TypeError(f"memory: expected a MemoryBank or None, got {type(memory).__name__}")
    with state.lock:
        layers = memory.layers if memory else {}
        if missing := sorted(set(layers) - set(state.attentions)):
            raise PatchError(f"memory: its layers {missing} are not patched; patch(model, layers=...) them")
        edits = list(state.edits.values())
        check_belonging(model, state.decoder, edits, memory, state.config, override)
        tables = {i: _tables(memory, i, attention.originals[0]) for i, attention in state.attentions.items()}
        for i, attention in state.attentions.items():
            attention.__dict__["published"] = tables[i]  # first: until it is there, passes read the one that is
            attention.memory = tables[i]
        state.memory = memory
        _install(state, state.edits, {}, running)
        _tell("swap_memory", state)


def _check_running(running: str) -> None:
    if running not in ("keep", "switch"):
        raise ValueError(f"running: expected 'keep' or 'switch', got {running!r}")


def _installed(state: _Patched, id: str) -> Edit:
    if id not in state.edits:
        raise PatchError(f"id: {id!r} is no edit of the model; it has {sorted(state.edits)}")
    return state.edits[id]


def _install(state: _Patched, edits: dict[str, Edit], stores: Mapping[int, EditStore], running: Running) -> None:
    """Publish these edits and stores at once."""
    for i, store in stores.items():
        state.ffns[i].edits.become(store)
    state.edits = edits
    _publish(state, None if any(ffn.edits.direct for ffn in state.ffns.values()) else stores)
    if running == "switch":
        state.context.forget_running()


@contextmanager
def patched(model: nn.Module, *args: Any, **kwargs: Any) -> Iterator[PatchReport]:
    """`patch(model, ...)` for the length of a `with` block."""
    report = patch(model, *args, **kwargs)
    try:
        yield report
    finally:
        unpatch(model)


@contextmanager
def rows(
    model: nn.Module,
    edits: Sequence[Sequence[str]] | None = None,
    *,
    memory: Sequence[bool | str] | None = None,
    prompt_lengths: Sequence[int] | None = None,
) -> Iterator[None]:
    """Inside the block, each row of a batch has its own edits.

    Rows are expanded for beams: R selections serve a batch of R * n rows, n in a run for each. As torch.no_grad, it
    holds for the thread that enters it.

    Args:
        model: a patched model.
        edits: for each row the ids of its edits, [] for none; None: every row uses all.
        memory: for each row whether it uses the memory, or the tenant whose entries alone it uses (see
            `MemoryBank.joined`); None: all rows use all entries.
        prompt_lengths: tokens of each row's prompt without padding (image placeholders count); needed by the configs
            alpha="last", retrieval="sequence" and tokens="answer".

    Raises:
        PatchError: the model is not patched, or an edit id is unknown.
        ValueError: the arguments disagree about the number of rows; the batch is not a multiple of it.
    """
    state = _require(model)
    given = {"edits": edits, "memory": memory, "prompt_lengths": prompt_lengths}
    counts = {name: len(value) for name, value in given.items() if value is not None}
    if len(set(counts.values())) > 1 or 0 in counts.values():
        raise ValueError(f"rows: expected one entry per row in each argument, got {counts}")
    if edits is not None:
        _check_rows(edits, state)
    if prompt_lengths is not None and any(
        isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in prompt_lengths
    ):
        raise ValueError(f"prompt_lengths: expected integers of at least 1, got {list(prompt_lengths)}")
    device, own = backbones.device_of(model), state.context.now()
    outer = chosen = _Block(own.rows, own.prompt, own.edits, own.remembers, own.remembers_in)
    if counts:
        chosen = replace(chosen, rows=next(iter(counts.values())))
    if prompt_lengths is not None and state.config.needs_prompt_lengths:
        lengths = torch.tensor(list(prompt_lengths), dtype=torch.int64, device=device)
        chosen = replace(chosen, prompt=PromptState(lengths, state.config))
    if edits is not None:
        chosen = replace(chosen, edits=tuple(map(tuple, edits)))
    if memory is not None:
        chosen = _remembering(chosen, memory, state.memory, device)
    chosen.hold_in(own)
    with state.lock:
        state.blocks.append(chosen)
        _trace(state)
    try:
        yield
    finally:
        outer.hold_in(own)
        with state.lock:
            state.blocks = [block for block in state.blocks if block is not chosen]
            _trace(state)


@contextmanager
def explain(model: nn.Module) -> Iterator[Explanation]:
    """Inside the block, each pass tells what its layers did: entries, scores, gates, neurons, and how long it took.

    It computes these things beside the output, which does not change. As torch.no_grad, it holds for the thread that
    enters it; passes that torch.compile has traced tell nothing.

    Raises PatchError if the model is not patched.
    """
    own = _require(model).context.now()
    outer, own.explanation = own.explanation, Explanation()
    try:
        yield own.explanation
    finally:
        own.explanation = outer


@contextmanager
def selecting(model: nn.Module, edits: Sequence[Sequence[str]]) -> Iterator[None]:
    """As `rows`, for edits that were put into the patched FFNs by hand: the ids are not looked up."""
    own = _require(model).context.now()
    outer = own.rows, own.edits
    own.rows, own.edits = len(edits), tuple(map(tuple, edits))
    try:
        yield
    finally:
        own.rows, own.edits = outer


def _remembering(block: _Block, rows: Sequence[bool | str], memory: MemoryBank | None, device: torch.device) -> _Block:
    named = {use for use in rows if isinstance(use, str)}
    tenants = memory.tenants if memory is not None else {}
    if unknown := sorted(named - set(tenants)):
        raise PatchError(f"memory: unknown tenants {unknown}; the memory has {sorted(tenants)}")
    ranges = [
        [tenants[use].start, tenants[use].stop] if isinstance(use, str) else [-1, -1] if use else [0, 0] for use in rows
    ]
    where = memory.id if memory is not None and named else None
    return replace(block, remembers=torch.tensor(ranges, dtype=torch.int64, device=device), remembers_in=where)


def _trace(state: _Patched) -> None:
    """What torch.compile traces knows no threads: it reads the context and the stores, which follow the last block."""
    block = state.blocks[-1] if state.blocks else _Block()
    block.hold_in(state.context)
    for ffn in state.ffns.values():
        ffn.edits.select(block.edits)


def _check_rows(edits: Sequence[Sequence[str]], state: _Patched) -> None:
    for r, row in enumerate(edits):
        if isinstance(row, str):
            raise TypeError(f"edits[{r}]: expected a list of edit ids, got the string {row!r}")
        unknown = [name for name in row if name not in state.edits]
        if unknown:
            raise PatchError(f"edits[{r}]: unknown edit ids {unknown}; the model has {sorted(state.edits)}")
        if len(set(row)) != len(row):
            raise ValueError(f"edits[{r}]: expected distinct ids, got {list(row)}")


def check_belonging(
    model: nn.Module,
    decoder: backbones.Decoder,
    edits: list[Edit],
    memory: MemoryBank | None,
    config: Config,
    override: bool,
) -> None:
    """Whether edits, memory, config and model fit. Shapes must; the rest may be overridden."""
    artifacts = [(f"edit {e.id!r}", e) for e in edits] + ([(f"memory {memory.id}", memory)] if memory else [])
    total = len(decoder.layers)
    for name, artifact in artifacts:
        if artifact.hidden_size != decoder.hidden_size:
            raise MismatchError(f"{name}: its hidden size is {artifact.hidden_size}, the model's {decoder.hidden_size}")
        beyond = [i for i in artifact.layers if i >= total]
        if beyond:
            raise MismatchError(f"{name}: it names the layers {beyond}, the model has {total}")
        problems = []
        error, warning = compare(artifact.base_model, model)
        if error:
            problems.append(error)
        if differing := config.differences(artifact.config):
            problems.append(f"its Config differs ({'; '.join(differing)})")
        if isinstance(artifact, Edit):
            activation = {decoder.layers[i].activation for i in artifact.layers}
            if activation != {artifact.activation}:
                raise MismatchError(
                    f"{name}: it is for {artifact.activation} FFNs, the model's are {sorted(activation)}"
                )
            if artifact.memory_id not in (memory.ids if memory else (None,)):
                problems.append(
                    f"it was trained with the memory {artifact.memory_id}, this one is {memory.id if memory else None}"
                )
        if problems and not override:
            raise MismatchError(f"{name}: {'; '.join(problems)}. Pass override=True to use it all the same.")
        if warning:
            warnings.warn(f"{name}: {warning}", stacklevel=3)


def _build(
    layer: backbones.Layer, edits: dict[str, Edit], memory: MemoryBank | None, config: Config, context: ModelContext
) -> tuple[list[tuple[backbones.Site, nn.Module]], PatchedFFN, MemoryAttention]:
    """What will stand where in one layer; nothing of the model is touched."""
    *ffn_parts, base_attention = [site.module for site in (*layer.ffn, layer.attention)]
    ffn = PatchedFFN.from_module(
        *ffn_parts, activation=layer.activation, dense=layer.dense, context=context, layer=layer.index
    )
    own = {name: edit.layers[layer.index] for name, edit in edits.items() if layer.index in edit.layers}
    ffn.edits.set({name: e.to(backbones.device_of(ffn_parts[0])) for name, e in own.items()})
    if not any(t.requires_grad for e in own.values() for t in e.tensors().values()):
        ffn.edits.spare()
    attention = MemoryAttention.from_module(
        base_attention,
        config,
        context=context,
        layer=layer.index,
        project=backbones.project_queries if config.values == "projected" else None,
    )
    attention.memory = _tables(memory, layer.index, base_attention)
    through = [PassThrough.from_module(part) for part in ffn_parts[1:]]
    return list(zip((layer.attention, *layer.ffn), (attention, ffn, *through), strict=True)), ffn, attention


def _tables(memory: MemoryBank | None, layer: int, attention: nn.Module) -> MemoryTables | None:
    """What a memory holds for a layer, where its attention computes."""
    if memory is None or layer not in memory.layers:
        return None
    m = memory.layers[layer]
    device = backbones.device_of(attention)
    found = None if memory.search is None else ApproximateIndex(m.index.to(device), memory.search)
    return MemoryTables(m.index, m.keys, m.values, m.encoder, memory.id, found).to(device)


def _report(model: nn.Module, decoder: backbones.Decoder, state: _Patched) -> PatchReport:
    rows = []
    nbytes = sum(edit.nbytes for edit in state.edits.values())
    for i, ffn in sorted(state.ffns.items()):
        tables = state.attentions[i].memory
        neurons = ffn.edits.used[0]
        entries = 0 if tables is None else tables.index.shape[0]
        names = decoder.layers[i]
        rows.append((i, " + ".join(site.name for site in names.ffn), names.attention.name, neurons, entries))
        nbytes += sum(b.nbytes for b in (tables.buffers() if tables else ()))
    memory = state.memory.id if state.memory else None
    return PatchReport(type(model).__name__, decoder.path, tuple(rows), tuple(state.edits), memory, nbytes)
