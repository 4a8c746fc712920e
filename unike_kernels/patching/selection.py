"""Which edits and which part of the memory each row of a batch uses, and what they did there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from .. import backbones
from ..artifacts.memory import MemoryBank
from ..errors import PatchError
from ..nn import (
    Explanation,
    PromptState,
)
from ..ops import _check
from .session import _Block, _Patched, _require


@contextmanager
def rows(
    model: nn.Module,
    edits: Sequence[Sequence[str]] | None = None,
    *,
    memory: Sequence[bool | str] | None = None,
    prompt_lengths: Sequence[int] | torch.Tensor | None = None,
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
    if prompt_lengths is not None:
        prompt_lengths = _check.counts("prompt_lengths", prompt_lengths)
    device, own = backbones.device_of(model), state.context.now()
    outer = chosen = _Block(own.rows, own.prompt, own.edits, own.remembers, own.remembers_in)
    if counts:
        chosen = replace(chosen, rows=next(iter(counts.values())))
    if prompt_lengths is not None and state.config.needs_prompt_lengths:
        chosen = replace(chosen, prompt=PromptState(torch.tensor(list(prompt_lengths), device=device), state.config))
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
    return replace(block, remembers=torch.tensor(ranges, device=device), remembers_in=where)


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
