"""`patch` and its inverse: install edits and a memory in a model, in place, and take them out again bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import backbones
from .config import Config
from .edits import Edit
from .errors import MismatchError, PatchError
from .fingerprint import compare
from .memory import MemoryBank
from .nn import Context, MemoryAttention, MemoryTables, PassThrough, PatchedFFN, PromptState, original

_ATTRIBUTE = "_unike"
M = TypeVar("M", bound=nn.Module)


@dataclass
class _Decode:
    """Forward pre-hook of the decoder: tells the patched modules about this pass. Picklable with the model."""

    context: Context
    image_token: int | None  # given where image placeholders must be told from text

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        source = ids if ids is not None else kwargs.get("inputs_embeds")
        if source is None:
            return
        if ids is not None and self.image_token is not None:
            self.context.text = ids != self.image_token
        elif self.image_token is not None and self.context.text is None:
            raise ValueError("inputs_embeds: Config(tokens='text') tells images from text by input_ids; give those")
        mask = kwargs.get("attention_mask")
        plain = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        past = 0
        if self.context.prompt is not None:
            if mask is not None and plain is None:
                raise ValueError(
                    "attention_mask: alpha='last' and retrieval='sequence' find the prompt's end in a mask "
                    "[batch, tokens]; a prepared one (static cache) does not tell"
                )
            if kwargs.get("past_key_values") is not None:
                past = int(kwargs["past_key_values"].get_seq_length())
        self.context.enter(source.shape[0], source.shape[1], past, plain)
        self.context.text = None  # it was about this pass alone


@dataclass
class _Embed:
    """Forward pre-hook of the embedding: notes which tokens are text. Picklable with the model."""

    context: Context
    image_token: int

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.context.text = args[0] != self.image_token if args[0].dim() == 2 else None


@dataclass
class _Patched:
    """What `patch` installed in a model, kept on it."""

    context: Context
    config: Config
    edits: dict[str, Edit]
    memory: MemoryBank | None
    ffns: dict[int, PatchedFFN]
    attentions: dict[int, MemoryAttention]


@dataclass(frozen=True)
class PatchReport:
    """What `patch` did; prints as a table.

    Attributes:
        model: class name.
        decoder: path of the decoder in the model.
        layers: (index, FFN child, attention child, extra neurons, memory entries) of each patched layer.
        edits: ids.
        memory: id of the memory, or None.
        nbytes: bytes that the edits and the memory add.
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
        model: a PreTrainedModel with an OPT or LLaMA-style decoder, alone or inside a multimodal model.
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
    _check_belonging(model, decoder, list(edits), memory, chosen, override)
    wanted = {i for edit in edits for i in edit.layers} | set(memory.layers if memory else ())
    explicit = decoder.select(layers) if layers is not None or not wanted else []
    indices = decoder.select(sorted(wanted | set(explicit)))

    # Everything that can fail is built first; the model is touched only after that.
    context = Context()
    plan = [_build(decoder.layers[i], named, memory, chosen, context) for i in indices]
    image_token = backbones.image_token_id(model) if memory is not None and chosen.tokens == "text" else None
    if _state(model) is not None:
        unpatch(model)
    state = _Patched(context, chosen, named, memory, {}, {})
    for i, (replacements, ffn, attention) in zip(indices, plan, strict=True):
        for site, module in replacements:
            site.put(module)
        state.ffns[i], state.attentions[i] = ffn, attention
    decoder.module.register_forward_pre_hook(_Decode(context, image_token), with_kwargs=True)
    if image_token is not None:
        model.get_input_embeddings().register_forward_pre_hook(_Embed(context, image_token))  # type: ignore[operator]
    model.__dict__[_ATTRIBUTE] = state
    return _report(model, decoder, state)


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
    del model.__dict__[_ATTRIBUTE]
    return model


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
    memory: Sequence[bool] | None = None,
    prompt_lengths: Sequence[int] | None = None,
) -> Iterator[None]:
    """Inside the block, each row of a batch has its own edits.

    Rows are expanded for beams: R selections serve a batch of R * n rows, n in a run for each.

    Args:
        model: a patched model.
        edits: for each row the ids of its edits, [] for none; None: every row uses all.
        memory: for each row whether it uses the memory; None: all do.
        prompt_lengths: tokens of each row's prompt without padding (image placeholders count); needed by the configs
            alpha="last" and retrieval="sequence".

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
    context = state.context
    before = context.rows, context.prompt
    selections = {i: ffn.edits.selection for i, ffn in state.ffns.items()}
    bounds = {i: a.memory.row_bounds for i, a in state.attentions.items() if a.memory is not None}
    try:
        context.rows = next(iter(counts.values()), context.rows)
        if prompt_lengths is not None and state.config.needs_prompt_lengths:
            context.prompt = PromptState(torch.tensor(list(prompt_lengths), device=backbones.device_of(model)))
        if edits is not None:
            for ffn in state.ffns.values():
                ffn.edits.select(edits)
        if memory is not None:
            for i in bounds:
                _select_memory(state.attentions[i], memory)
        yield
    finally:
        context.rows, context.prompt = before
        for i, selection in selections.items():
            state.ffns[i].edits.selection = selection
        for i, old in bounds.items():
            tables = state.attentions[i].memory
            if tables is not None:
                tables.row_bounds = old


def _check_rows(edits: Sequence[Sequence[str]], state: _Patched) -> None:
    for r, row in enumerate(edits):
        if isinstance(row, str):
            raise TypeError(f"edits[{r}]: expected a list of edit ids, got the string {row!r}")
        unknown = [name for name in row if name not in state.edits]
        if unknown:
            raise PatchError(f"edits[{r}]: unknown edit ids {unknown}; the model has {sorted(state.edits)}")
        if len(set(row)) != len(row):
            raise ValueError(f"edits[{r}]: expected distinct ids, got {list(row)}")


def _select_memory(attention: MemoryAttention, uses: Sequence[bool]) -> None:
    tables = attention.memory
    assert tables is not None
    entries = tables.index.shape[0]
    tables.row_bounds = torch.tensor([[0, entries if use else 0] for use in uses], device=tables.index.device)


def _check_belonging(
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
            if artifact.memory_id != (memory.id if memory else None):
                problems.append(
                    f"it was trained with the memory {artifact.memory_id}, this one is {memory.id if memory else None}"
                )
        if problems and not override:
            raise MismatchError(f"{name}: {'; '.join(problems)}. Pass override=True to use it all the same.")
        if warning:
            warnings.warn(f"{name}: {warning}", stacklevel=3)


def _build(
    layer: backbones.Layer, edits: dict[str, Edit], memory: MemoryBank | None, config: Config, context: Context
) -> tuple[list[tuple[backbones.Site, nn.Module]], PatchedFFN, MemoryAttention]:
    """What will stand where in one layer; nothing of the model is touched."""
    *ffn_parts, base_attention = [site.module for site in (*layer.ffn, layer.attention)]
    ffn = PatchedFFN.from_module(*ffn_parts, activation=layer.activation, dense=layer.dense)
    own = {name: edit.layers[layer.index] for name, edit in edits.items() if layer.index in edit.layers}
    ffn.edits.set({name: e.to(backbones.device_of(ffn_parts[0])) for name, e in own.items()})
    attention = MemoryAttention.from_module(
        base_attention,
        config,
        context=context,
        layer=layer.index,
        project=backbones.project_queries if config.values == "projected" else None,
    )
    if memory is not None and layer.index in memory.layers:
        m = memory.layers[layer.index]
        tables = MemoryTables(m.index, m.keys, m.values, m.encoder)
        attention.memory = tables.to(backbones.device_of(base_attention))
    through = [PassThrough.from_module(part) for part in ffn_parts[1:]]
    return list(zip((layer.attention, *layer.ffn), (attention, ffn, *through), strict=True)), ffn, attention


def _report(model: nn.Module, decoder: backbones.Decoder, state: _Patched) -> PatchReport:
    rows = []
    nbytes = 0
    for i, ffn in sorted(state.ffns.items()):
        tables = state.attentions[i].memory
        neurons = 0 if not ffn.edits.ids else ffn.edits.keys.shape[0]
        entries = 0 if tables is None else tables.index.shape[0]
        names = decoder.layers[i]
        rows.append((i, " + ".join(site.name for site in names.ffn), names.attention.name, neurons, entries))
        nbytes += sum(b.nbytes for b in ffn.edits.buffers()) + sum(
            b.nbytes for b in (tables.buffers() if tables else ())
        )
    memory = state.memory.id if state.memory else None
    return PatchReport(type(model).__name__, decoder.path, tuple(rows), tuple(state.edits), memory, nbytes)
