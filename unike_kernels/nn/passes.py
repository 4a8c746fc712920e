"""One forward pass of a patched model as its layers see it: what is installed, what rows select, where prompts end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import Config
from .routing import Routed, Router, Rows, Seen, behind_prompts, idle
from .trace import PassTrace


@dataclass(frozen=True, eq=False)
class Version:
    """What is installed in a model between two changes.

    Attributes:
        edits: layer -> its edits.
        memories: layer -> its memory, or None.
        router: decides which edits act in a row; None: those that the row selects.
    """

    edits: Mapping[int, Any]
    memories: Mapping[int, Any]
    router: Router | None = None


NOTHING = Version({}, {})


class Decided(NamedTuple):
    """What a router has decided in the pass over a prompt, for compiled passes over the tokens behind it.

    Attributes:
        number: of what was installed then.
        csr: layer -> the edits of each row, as `LayerEdits.csr` gives them.
        entries: int64 [B, 2], see `Routed`.
    """

    number: int
    csr: Mapping[int, tuple[Tensor, Tensor]]
    entries: Tensor


@dataclass(eq=False)
class Generation:
    """What the passes over one key-value cache have in common, or those of a `rows` block that have no cache.

    Attributes:
        version: that they compute with; None: the current one.
        tokens: how many have come, in the cache and in passes.
        decoding: whether a pass of one token has followed the prompt.
        writes: `_writes` of the cache when the last pass had ended.
        saved: (layer, name) -> tensor [B, ...] that the last pass with the last prompt token computed.
        seen: what the router has seen of the prompts, and decided.
    """

    version: Version | None = None
    tokens: int = 0
    decoding: bool = False
    writes: int | None = None
    saved: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    seen: Seen | None = None


@dataclass(eq=False)
class PromptState:
    """For the modes that depend on the last prompt token, where a `rows` block tells which it is.

    Attributes:
        lengths: int64 [R], prompt tokens of each row, padding not counted.
        longest: of them.
        config: says which modes those are.
        generation: of the passes without a cache.
    """

    lengths: Tensor
    longest: int
    config: Config
    generation: Generation = field(default_factory=Generation)


@dataclass(frozen=True, eq=False)
class Selection:
    """What a `rows` block selects.

    Attributes:
        rows: how many edit sets; None: every row uses everything.
        edits: for each row the ids of its edits; None: all of them.
        forced: whether these act, though a router would decide otherwise.
        memory_ranges: int64 [R, 2], the entries that each row may retrieve, [-1, -1] for all; None: all rows all.
        ranges_memory_id: id of the memory that these ranges are of; None: they hold for any.
        prompt: set by `uk.rows(..., prompt_lengths=...)`.
        csr: layer -> `edits` as (row_indptr, row_edits); for compiled code, which need not know the ids.
        prompt_lengths: those of `prompt` as compiled code takes them; None: as they are.
    """

    rows: int | None = None
    edits: tuple[tuple[str, ...], ...] | None = None
    forced: bool = False
    memory_ranges: Tensor | None = None
    ranges_memory_id: str | None = None
    prompt: PromptState | None = None
    csr: Mapping[int, tuple[Tensor, Tensor]] | None = None
    prompt_lengths: Tensor | None = None

    @property
    def narrows(self) -> bool:
        """Whether some row may not use everything."""
        return self.edits is not None or self.memory_ranges is not None


EVERYTHING = Selection()


@dataclass(frozen=True, eq=False)
class Pass:
    """One forward pass, as its layers see it. Nothing in it changes while it runs, or when it is computed again.

    Attributes:
        version: what it computes with.
        selection: of each row.
        shifted: bool [B, T], the tokens that the memory may shift; None: all.
        visible: bool [B, T], the tokens that are no padding; None: all.
        prompted: whether it is known where prompts end.
        last: int64 [B], index among this pass's tokens of the last one of each prompt, negative where that came before;
            None: they all came before, or it does not matter.
        generation: of which it is a part.
        shape: (B, T).
        scoped: whether an edit acts from the last prompt token on alone, and where the router says so.
        trace: where layers record what they did; None: nobody asks.
        traced: whether torch.compile traces it.
        decided: before it, where it is traced and a router decides.
        graph_task: the backward pass that it is a part of, as torch numbers them; -1: none.
        outer: the pass that this one interrupts.
        inputs: of a layer whose FFN stands inline: what its first part notes for the last one, until that takes it;
            None: the first part has computed everything.
    """

    version: Version
    selection: Selection = EVERYTHING
    shifted: Tensor | None = None
    visible: Tensor | None = None
    prompted: bool = False
    last: Tensor | None = None
    generation: Generation = field(default_factory=Generation)
    shape: tuple[int, int] = (1, 0)
    scoped: bool = False
    trace: PassTrace | None = None
    traced: bool = False
    decided: Decided | None = None
    graph_task: int = -1
    outer: Pass | None = None
    inputs: dict[int, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        version: Version,
        selection: Selection = EVERYTHING,
        *,
        batch: int,
        tokens: int,
        past: int | Tensor = 0,
        attention_mask: Tensor | None = None,
        text: Tensor | None = None,
        config: Config | None = None,
        prompted: bool = False,
        ends: Tensor | None = None,
        **more: Any,
    ) -> Pass:
        """A pass over `tokens` new tokens of each of `batch` rows, after `past` cached ones.

        Args:
            version: what it computes with.
            selection: of each row.
            batch: B, rows of the batch.
            tokens: T, new tokens of each row.
            past: tokens of each row that are in the cache already; a tensor only where no prompt has to be whole.
            attention_mask: [B, past + T]; None, or of another shape: there is no padding.
            text: bool [B or fewer, T], False at image placeholders; None, or of another shape: it is not known.
            config: of the model; None: nothing in it depends on where prompts end, unless the selection says where.
            prompted: whether the model's passes tell where prompts end.
            ends: int64 [B], where the selection does not say: see `last`; None: all prompts came before.
            **more: further attributes of the pass.

        Raises:
            ValueError: the batch is not a multiple of the rows; a prompt comes in parts where it must be whole.
        """
        if selection.rows is not None and batch % selection.rows:
            raise ValueError(f"rows: {selection.rows} edit sets were given, the batch has {batch} rows")
        mask = attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None
        shifted = visible = None if mask is None else mask[:, mask.shape[1] - tokens :].bool()
        if text is not None:
            text = text.repeat_interleave(max(batch // text.shape[0], 1), 0)
            if text.shape == (batch, tokens):
                shifted = text if shifted is None else shifted & text
        prompt, last = selection.prompt, ends
        if prompt is not None:
            config = prompt.config
            lengths = prompt.lengths if selection.prompt_lengths is None else selection.prompt_lengths
            last = _prompt_ends(lengths, batch, mask)
            last = last - (past.to(last.device) if isinstance(past, Tensor) else past)
        if config is not None and last is not None and config.tokens == "answer":
            answers = torch.arange(tokens, dtype=torch.int64, device=last.device) >= last.unsqueeze(1)
            shifted = answers if shifted is None else shifted & answers
        if prompt is not None and prompt.config.needs_whole_prompts:
            past = int(past)
            if not more.get("traced"):
                _check_whole(prompt, batch, tokens, past, mask)
            last = None if past else last
        return cls(
            version,
            selection,
            shifted,
            visible,
            prompted or prompt is not None,
            last,
            shape=(batch, tokens),
            scoped=config is not None and config.scope == "memory",
            **more,
        )

    def acting(self) -> tuple[Rows | Routed | None, Tensor | None]:
        """The edits that act in each row, None for all of them in each, and the row of each token, None for equal
        runs; a row that is the last one more is that of the tokens without edits."""
        if not self.scoped:
            return self.selection.edits, None
        if not self.prompted:
            raise ValueError(
                "this Config needs the prompt's end (scope='memory'): call the model inside uk.rows(model, "
                "prompt_lengths=[...])"
            )
        batch, tokens = self.shape
        if self.selection.forced or self.version.router is None:
            named = self.selection.edits or ((),)
            rows = tuple(row for row in named for _ in range(batch // len(named)))
            return (rows, None) if self.last is None else ((*rows, ()), behind_prompts(self.last, tokens))
        routes, routed = self.version.router.routes(self, batch)
        if self.trace is not None:
            self.trace.routes[:] = self.version.router.explained(routes)
        return (routed, None) if self.last is None else (routed.with_none(), behind_prompts(self.last, tokens))

    def idle(self) -> bool:
        """Whether it is known, without waiting for a device, that no edit acts where one decides about the memory."""
        return self.scoped and not self.traced and idle(self.acting()[0])

    def entries(self, bounds: Tensor) -> Tensor:
        """int64 [B * T, 2]: of the entries [start, end) that each token may retrieve, those that shift it, where a
        router or a selection says so; [0, 0] for none. bounds: int64 [B * T, 2] or [1, 2]."""
        rows, token_rows = (None, None) if self.traced else self.acting()
        if self.decided is not None:
            own = self.decided.entries
        elif isinstance(rows, Routed):
            own = rows.entries
        else:
            own = _of_selected(tuple(map(bool, rows or ())), bounds.device)
        own = own.repeat_interleave(self.shape[1], 0) if token_rows is None else own[token_rows]
        start = torch.maximum(own[:, 0], bounds[:, 0])
        end = torch.where(own[:, 1] < 0, bounds[:, 1], torch.minimum(own[:, 1], bounds[:, 1]))
        return torch.where((start < end).unsqueeze(1), torch.stack([start, end], 1), 0)


@lru_cache(maxsize=64)
def _of_selected(rows: tuple[bool, ...], device: torch.device) -> Tensor:
    """int64 [R, 2], see `Routed.entries`, of rows that select edits, or none. Kept, and not to be written to."""
    entries = [[-1, -1] if selects else [0, 0] for selects in rows]
    return torch.tensor(entries, dtype=torch.int64, device="cpu").view(-1, 2).to(device)


def _prompt_ends(lengths: Tensor, batch: int, mask: Tensor | None) -> Tensor:
    """int64 [B], index of each row's last prompt token."""
    lengths = lengths.repeat_interleave(batch // len(lengths))
    if mask is None:
        return lengths - 1
    return (mask.long().cumsum(-1) < lengths.unsqueeze(1)).sum(-1)


def _check_whole(prompt: PromptState, batch: int, tokens: int, past: int, mask: Tensor | None) -> None:
    """Raises ValueError for prompts that neither came before, all of them, nor are in this pass.

    On a GPU a mask would have to be waited for: there what is known of the longest one decides, and where a shorter one
    has fewer tokens than it should, an index out of range fails on the device.
    """
    whole = prompt.longest <= (past or tokens)
    if whole and mask is not None and not on_gpu(mask):
        seen = mask[:, : mask.shape[1] - tokens if past else None].long().sum(-1)
        whole = bool((seen >= prompt.lengths.repeat_interleave(batch // len(prompt.lengths))).all())
    if not whole:
        raise ValueError(
            "rows: with alpha='last' or retrieval='sequence' the whole prompt must come in one forward pass; "
            f"prompts of {prompt.lengths.tolist()} tokens without padding, {past} cached and {tokens} new ones"
        )


def on_gpu(t: Tensor) -> bool:
    """Whether the host would have to wait for what it holds."""
    return t.is_cuda
