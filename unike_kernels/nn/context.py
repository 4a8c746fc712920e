"""What a forward pass of a patched model must know beside the hidden states. One `Context` is shared by its modules."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..config import Config
from .explanation import Explanation


@dataclass
class PromptState:
    """For the modes that depend on the last prompt token: where it is in this forward pass, and what it left behind.

    Attributes:
        lengths: int64 [R], prompt tokens of each row, padding not counted.
        config: says which modes those are.
        last: int64 [B], index of the last prompt token in the current chunk; None: the prompt lies in the past.
        saved: (layer, name) -> tensor [B, ...] that the chunk with the last prompt token computed.
    """

    lengths: Tensor
    config: Config
    last: Tensor | None = None
    saved: dict[tuple[int, str], Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Version:
    """What is installed in a model between two changes: layer -> its edits, and layer -> its memory."""

    edits: Mapping[int, Any]
    memories: Mapping[int, Any]


@dataclass
class Context:
    """Shared by all patched modules of a model, refreshed by a hook before each forward pass of the decoder.

    Attributes:
        shifted: bool [B, T], the tokens that the memory may shift; None: all.
        rows: how many edit sets `uk.rows` selected; None: no selection, every row uses everything.
        prompt: set by `uk.rows(..., prompt_lengths=...)`.
        text: bool [B, T] of the last embedded ids, False at image placeholders; only with `Config(tokens="text")`.
        edits: for each row the ids of its edits; None: all of them.
        remembers: int64 [R, 2], the range of entries that each row may retrieve, [-1, -1] for all; None: all rows all.
        remembers_in: id of the memory that these ranges are of; None: they hold for any.
        version: what this pass computes with; None: what is installed now.
        explanation: where layers tell what they did; None: nobody asks.
    """

    shifted: Tensor | None = None
    rows: int | None = None
    prompt: PromptState | None = None
    text: Tensor | None = None
    edits: tuple[tuple[str, ...], ...] | None = None
    remembers: Tensor | None = None
    remembers_in: str | None = None
    version: Version | None = None
    explanation: Explanation | None = None

    def now(self) -> Context:
        """That of the pass that asks."""
        return self

    def enter(self, batch: int, tokens: int, past: int, attention_mask: Tensor | None) -> None:
        """Called before each forward pass: `tokens` new ones after `past` cached ones, of `batch` rows."""
        if self.explanation is not None:
            self.explanation.begin(batch, tokens)
        if self.rows is not None and batch % self.rows:
            raise ValueError(f"rows: {self.rows} edit sets were given, the batch has {batch} rows")
        mask = attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None
        shifted = None if mask is None else mask[:, mask.shape[1] - tokens :].bool()
        if self.text is not None:
            text = self.text.repeat_interleave(max(batch // self.text.shape[0], 1), 0)
            if text.shape == (batch, tokens):
                shifted = text if shifted is None else shifted & text
        if self.prompt is not None:
            last = self._prompt_ends(self.prompt, batch, mask) - past
            if self.prompt.config.tokens == "answer":
                answers = torch.arange(tokens, dtype=torch.int64, device=last.device) >= last.unsqueeze(1)
                shifted = answers if shifted is None else shifted & answers
            if self.prompt.config.needs_whole_prompts:
                self._locate_prompt_end(self.prompt, last, tokens, past)
        self.shifted = shifted

    @staticmethod
    def _prompt_ends(prompt: PromptState, batch: int, mask: Tensor | None) -> Tensor:
        """int64 [B], index of each row's last prompt token."""
        lengths = prompt.lengths.repeat_interleave(batch // len(prompt.lengths))
        if mask is None:
            return lengths - 1
        seen = mask.long().cumsum(-1)
        if prompt.config.needs_whole_prompts and bool((seen[:, -1] < lengths).any()):
            raise ValueError(
                f"rows: prompt_lengths {lengths.tolist()} exceed the sequences' {seen[:, -1].tolist()} tokens; "
                "the whole prompt must come in one forward pass"
            )
        return (seen < lengths.unsqueeze(1)).sum(-1)

    @staticmethod
    def _locate_prompt_end(prompt: PromptState, last: Tensor, tokens: int, past: int) -> None:
        if bool((last < 0).all()):
            prompt.last = None
            return
        if bool((last < 0).any()) or bool((last >= tokens).any()) or past:
            raise ValueError(
                f"rows: with alpha='last' or retrieval='sequence' the whole prompt must come in one forward pass; "
                f"prompts of {prompt.lengths.tolist()} tokens, {past} cached and {tokens} new ones"
            )
        prompt.last = last
        prompt.saved.clear()


class ModelContext(Context):
    """That of a patched model: each thread has passes of its own, and a generation keeps the version it began with.

    A generation is known by its key-value cache. What torch.compile traces knows one thread and no versions.

    Attributes:
        current: the version that a new pass gets.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current: Version | None = None
        self._threads = threading.local()
        self.forget_running()

    def forget_running(self) -> None:
        """Let running generations go on with the current version."""
        self._running: WeakKeyDictionary[Any, Version | None] = WeakKeyDictionary()

    def now(self) -> Context:
        if torch.compiler.is_compiling():
            return self
        found: Context | None = getattr(self._threads, "context", None)
        if found is None:
            found = self._threads.context = Context()
        return found

    def begin(self, cache: Any) -> None:
        """A pass with this cache, or None, begins."""
        if torch.compiler.is_compiling():
            return
        version = self.current
        try:
            known = self._running.setdefault(cache, version)
        except TypeError:  # None, or a tuple: nothing that a generation could be known by
            known = version
        if known is not version and cache.get_seq_length() == 0:  # asked only now: on a GPU, some have to wait for it
            known = self._running[cache] = version
        self.now().version = known

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_threads", "_running")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._threads = threading.local()
        self.forget_running()
