"""Which edits and which part of the memory each row of a batch uses, and what they did there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .. import backbones
from ..artifacts.memory import MemoryBank
from ..errors import PatchError
from ..nn import PromptState, Selection, Trace
from ..ops import _check
from .session import PatchedState, require_state


@contextmanager
def rows(
    model: nn.Module,
    edits: Sequence[Sequence[str]] | None = None,
    *,
    memory: Sequence[bool | str] | None = None,
    prompt_lengths: Sequence[int] | torch.Tensor | None = None,
) -> Iterator[None]:
    """Inside the block, each row of a batch has its own edits.

    Rows are expanded for beams: R selections serve a batch of R * n rows, n in a run for each.

    The block belongs to the logical call that enters it: to the asyncio task, to threads that run in a copy of its
    context (asyncio.to_thread does), or to the generator, and then not to its consumer. They may be left in any order.
    A pass without a block of its own is an error while another call has one open that gives some row less than
    everything, unless `patch` was told default="none". What torch.compile has compiled knows one selection: calls that
    select otherwise than the block entered last are refused.

    Args:
        model: a patched model.
        edits: for each row the ids of its edits, [] for none; None: every row uses all. With Config(scope="memory")
            these are the ones that may act in it.
        memory: for each row whether it uses the memory, or the tenant whose entries alone it uses (see
            `MemoryBank.joined`); None: all rows use all entries.
        prompt_lengths: tokens of each row's prompt without padding (image placeholders count), where what depends on
            that cannot see it: see `Config`.

    Raises:
        PatchError: the model is not patched, or an edit id is unknown.
        TypeError: a row is a string.
        ValueError: the arguments disagree about the number of rows; the batch is not a multiple of it.
    """
    state = require_state(model)
    given = {"edits": edits, "memory": memory, "prompt_lengths": prompt_lengths}
    counts = {name: len(value) for name, value in given.items() if value is not None}
    if len(set(counts.values())) > 1 or 0 in counts.values():
        raise ValueError(f"rows: expected one entry per row in each argument, got {counts}")
    if edits is not None:
        _check_rows(edits, state)
    if prompt_lengths is not None:
        prompt_lengths = _check.counts("prompt_lengths", prompt_lengths)
    device, chosen = backbones.device_of(model), state.context.selection() or Selection()
    if counts:
        chosen = replace(chosen, rows=next(iter(counts.values())))
    if prompt_lengths is not None and state.config.needs_prompt_ends:
        lengths = torch.tensor(list(prompt_lengths), dtype=torch.int64, device=device)
        chosen = replace(chosen, prompt=PromptState(lengths, max(prompt_lengths), state.config))
    if edits is not None:
        chosen = replace(chosen, edits=tuple(map(tuple, edits)))
    if memory is not None:
        chosen = replace(chosen, **_memory_ranges(memory, state.memory, device))
    with state.context.selecting(chosen):
        yield


@contextmanager
def explain(model: nn.Module, processor: Any = None) -> Iterator[Trace]:
    """Inside the block, each pass records what its layers did: entries, scores, gates, neurons, and how long it took.

    `print(trace)` tells the most of it in lines, `trace.to_html()` all of it in a page, which notebooks show.

    It computes these things beside the output, which does not change. The block belongs to the logical call that
    enters it, as that of `rows` does; passes that torch.compile has traced record nothing.

    Args:
        model: a patched model.
        processor: its processor or tokenizer, which spells the tokens; None: the page shows their ids.

    Raises PatchError if the model is not patched.
    """
    spell = None if processor is None else getattr(processor, "tokenizer", processor).decode
    with require_state(model).context.traces.entered(Trace(spell)) as block:
        yield block.value


def selecting(model: nn.Module, edits: Sequence[Sequence[str]]) -> AbstractContextManager[None]:
    """As `rows`, for neurons that were put in by `set_layers`: the ids are not looked up, and these edits act."""
    context = require_state(model).context
    chosen = context.selection() or Selection()
    return context.selecting(replace(chosen, rows=len(edits), edits=tuple(map(tuple, edits)), forced=True))


def _memory_ranges(rows: Sequence[bool | str], memory: MemoryBank | None, device: torch.device) -> Mapping[str, Any]:
    """The entries that each row may retrieve, as a `Selection` has them."""
    for r, use in enumerate(rows):
        if not isinstance(use, str) and use not in (True, False):
            raise TypeError(f"memory[{r}]: expected True, False or the name of a tenant, got {use!r}")
    named = {use for use in rows if isinstance(use, str)}
    tenants = memory.tenants if memory is not None else {}
    if unknown := sorted(named - set(tenants)):
        raise PatchError(f"memory: unknown tenants {unknown}; the memory has {sorted(tenants)}")
    ranges = [
        [tenants[use].start, tenants[use].stop] if isinstance(use, str) else [-1, -1] if use else [0, 0] for use in rows
    ]
    return {
        "memory_ranges": torch.tensor(ranges, dtype=torch.int64, device=device),
        "ranges_memory_id": memory.id if memory is not None and named else None,
    }


def _check_rows(edits: Sequence[Sequence[str]], state: PatchedState) -> None:
    for r, row in enumerate(edits):
        if isinstance(row, str):
            raise TypeError(f"edits[{r}]: expected a list of edit ids, got the string {row!r}")
        unknown = [name for name in row if name not in state.edits]
        if unknown:
            raise PatchError(f"edits[{r}]: unknown edit ids {unknown}; the model has {sorted(state.edits)}")
        if len(set(row)) != len(row):
            raise ValueError(f"edits[{r}]: expected distinct ids, got {list(row)}")
