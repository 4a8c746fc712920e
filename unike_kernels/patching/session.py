"""What `patch` keeps on a model, and the hooks that tell the patched modules about a pass."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import backbones
from ..artifacts.edit import Edit
from ..artifacts.memory import MemoryBank
from ..config import Config
from ..errors import PatchError
from ..nn import (
    Context,
    MemoryAttention,
    ModelContext,
    PatchedFFN,
    PromptState,
)

_ATTRIBUTE = "_unike"


Running = Literal["keep", "switch"]


_log = logging.getLogger("unike_kernels")


@dataclass
class _Decode:
    """Forward pre-hook of the decoder: tells the patched modules about this pass. Picklable with the model."""

    context: ModelContext
    placeholders: frozenset[int] | None  # given where those of images and the like must be told from text

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.context.begin(kwargs.get("past_key_values"))
        context = self.context.now()
        ids = kwargs.get("input_ids", args[0] if args else None)
        source = ids if ids is not None else kwargs.get("inputs_embeds")
        if source is None:
            return
        if ids is not None and self.placeholders is not None and context.text is None:
            context.text = _is_text(ids, self.placeholders)
        elif self.placeholders is not None and context.text is None:
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
    """Forward pre-hook of the embedding, and of what is given the ids before: notes which tokens are text.

    Ids may have been replaced when they come to the embedding, so what was noted before stands. Picklable with the
    model.
    """

    context: ModelContext
    placeholders: frozenset[int]
    first: bool = False  # whether its module comes before the embedding

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        context, ids = self.context.now(), kwargs.get("input_ids", args[0] if args else None)
        if isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point():
            if self.first or context.text is None or context.text.shape != ids.shape:
                context.text = _is_text(ids, self.placeholders)
        elif not self.first:
            context.text = None


def _is_text(ids: Tensor, placeholders: frozenset[int]) -> Tensor:
    text = torch.ones_like(ids, dtype=torch.bool)
    for placeholder in placeholders:
        text &= ids != placeholder
    return text


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


def _state(model: nn.Module) -> _Patched | None:
    return model.__dict__.get(_ATTRIBUTE)


def _require(model: nn.Module) -> _Patched:
    state = _state(model)
    if state is None:
        raise PatchError(f"{type(model).__name__} is not patched: call unike_kernels.patch(model, ...) first")
    return state


def _tell(event: str, state: _Patched, **more: Any) -> None:
    """A record of level INFO for those who listen to the logger "unike_kernels"; its `unike` is a dict for machines."""
    memory = state.memory
    told = {"event": event, "edits": len(state.edits), "memory": memory.id if memory else None, **more}
    _log.info("%s", " ".join(f"{k}={v}" for k, v in told.items()), extra={"unike": told})
