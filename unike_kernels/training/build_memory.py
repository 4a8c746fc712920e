"""From triplets to a memory: extract, disentangle, assemble."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..artifacts.fingerprint import fingerprint
from ..artifacts.memory import MemoryBank, MemoryLayer, joined_texts
from ..artifacts.pictures import Pictures
from ..artifacts.scope import Scope
from ..backbones import Decoder, find_decoder, project_memory, score_scale, unwrap
from ..config import Config
from ..ops import SemanticEncoder
from ..patching import check_artifacts
from .encoders import Disentangled, EncoderTraining, disentangle
from .extract import Hidden, entries_of, extract
from .samples import Triplet, opened, taking_gradients
from .scope import prompt_keys


@dataclass(frozen=True)
class MemoryResult:
    """A memory and how it came about.

    Attributes:
        memory: ready to patch in or save.
        hidden: layer -> extracted states.
        spaces: layer -> encoders, zeta, W_zeta and their held-out accuracies.
    """

    memory: MemoryBank
    hidden: Mapping[int, Hidden]
    spaces: dict[int, Disentangled]

    def __repr__(self) -> str:
        lines = [f"memory {self.memory.id}: {len(self.memory)} entries, layers {sorted(self.spaces)}"]
        lines += [
            f"  layer {i}: held-out truthfulness {s.truth_accuracy:.0%}, held-out semantics {s.semantic_accuracy:.0%}"
            + ("; no better than chance: more triplets are needed" if s.truth_accuracy <= 0.5 else "")
            for i, s in sorted(self.spaces.items())
        ]
        return "\n".join(lines)


@torch.no_grad()
def _tables(decoder: Decoder, layer: int, hidden: Hidden, values: str) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """keys [N, H, c], values [N, H, d] or None for the same, and what Enc_sem sees of h_pos and of h_neg [N, d]."""
    if values == "pre":
        return hidden.pos_pre.unsqueeze(1), None, hidden.pos_pre, hidden.neg_pre
    if values in ("out", "context"):
        # Context: what asks there is the question alone, so the keys are its states, too.
        keys = hidden.pos_pre if values == "out" else hidden.sem_pre
        return keys.unsqueeze(1), hidden.pos_out.unsqueeze(1), hidden.pos_out, hidden.neg_out
    attention = decoder.layers[layer].attention.module
    parameter = next(attention.parameters())
    keys, table = (t.float().cpu() for t in project_memory(attention, hidden.pos_pre.to(parameter)))
    _, negative = project_memory(attention, hidden.neg_pre.to(parameter))
    return keys, table, table.sum(1), negative.float().cpu().sum(1)


@taking_gradients
def build_memory(
    model: nn.Module,
    processor: Any,
    triplets: Sequence[Triplet],
    *,
    config: Config | None = None,
    layers: Sequence[int] | None = None,
    training: EncoderTraining | None = None,
    batch_size: int = 32,
    store: str | os.PathLike[str] | None = None,
    scope: Scope | None = None,
    keep_texts: bool = True,
    progress: bool = True,
) -> MemoryResult:
    """Make the memory of `triplets` for a model (paper, section 3.3 and Appendix C).

    Of a model in bfloat16 or float16, tables and Enc_sem are stored in that dtype, which the notes name: the states are
    its own numbers, so nothing of them is lost, and the attention reads half as much.

    Args:
        model: a Hugging Face model, not patched.
        processor: its processor or tokenizer.
        triplets: knowledge that the model gets wrong.
        config: the semantics; with values="projected" and no scale, the scale of the model's own attention is set.
        layers: None: the last four that have attention.
        training: of the encoders.
        batch_size: triplets per forward pass of the extraction.
        store: a folder for the extracted states, as for `extract`: for thousands of triplets of a large model.
        scope: what decides where edits act, see `build_scope`; needed where the config says scope="memory". With
            values="context", too, the memory edits by itself: in a row whose prompt asks for the fact of a triplet, its
            entries act, and no others.
        keep_texts: whether the memory, and so its file, keeps what each entry says, the question with both answers, and
            a small picture (48 x 48 pixels) of the image that it is about: `uk.explain` shows them. Else the facts of
            its scope get no names, either.
        progress: show progress bars.

    Raises:
        ValueError: too few triplets, an unknown layer.
        PatchError: the model is patched.
    """
    config = config or Config()
    decoder = find_decoder(model)
    if config.values == "projected" and config.scale is None:
        first = decoder.select(layers, need=("attention",))[0]
        config = Config(**{**config.to_dict(), "scale": score_scale(decoder.layers[first].attention.module)})
    hidden = extract(
        model, processor, triplets, layers=layers, context=config.values == "context", batch_size=batch_size,
        store=store, progress=progress,
    )  # fmt: skip
    counts = _counts(model, processor, triplets, config, batch_size)
    if scope is not None and _acts(config):
        scope = _with_facts(model, processor, scope, triplets, _ranges(counts, 0), batch_size, keep_texts)
    tables, spaces, dtype = {}, {}, _dtype_of(model)
    for i, h in hidden.items():
        keys, values, pos, neg = _tables(decoder, i, h, config.values)
        # zeta' steers the FFN, whose input is of the kind of "pre": truthfulness is told there, whatever the values.
        truth = h.pos_pre, h.neg_pre
        space = disentangle(h.sem_out, pos, neg, training, truth_states=truth, progress=progress)
        spaces[i] = space
        index, keys = _stored(h.sem_pre, dtype), _stored(keys, dtype)
        encoder = SemanticEncoder(*(t.to(dtype) for t in space.semantic_weights()))
        values = None if values is None else _stored(values, dtype)
        tables[i] = MemoryLayer(index, keys, values, encoder, space.zeta, space.zeta_prime)
    told = {"training": str(training or EncoderTraining()), "dtype": str(dtype).removeprefix("torch.")}
    held_out = [f"layer {i}: {s.truth_accuracy:.0%}, {s.semantic_accuracy:.0%}" for i, s in sorted(spaces.items())]
    told["held-out truthfulness and semantics"] = "; ".join(held_out)
    notes = {"triplets": str(len(triplets)), **told}
    texts = _texts(triplets, counts) if keep_texts else None
    pictures = _pictures(triplets, counts) if keep_texts else None
    bank = MemoryBank(tables, config, fingerprint(model), notes, scope=scope, texts=texts, pictures=pictures)
    return MemoryResult(bank, hidden, spaces)


@taking_gradients
def extend_memory(
    model: nn.Module,
    processor: Any,
    memory: MemoryBank,
    triplets: Sequence[Triplet],
    *,
    batch_size: int = 32,
    store: str | os.PathLike[str] | None = None,
    keep_texts: bool = True,
    progress: bool = True,
) -> MemoryBank:
    """A memory with further triplets as entries behind its own; its encoders and zeta' stay what they are.

    Of a memory with a scope, the triplets' prompts become further facts that a prompt may ask for.

    It has an id of its own, as edits that were trained with the other one were not trained with these entries. In a
    memory of tenants the new entries are nobody's own: rows that name a tenant do not use them.

    Args:
        model: the Hugging Face model that the memory was made for, not patched.
        processor: its processor or tokenizer.
        memory: what is added to; it stays as it is.
        triplets: one or more.
        batch_size: triplets per forward pass of the extraction.
        store: a folder for the extracted states, as for `extract`.
        keep_texts: whether it keeps what the new entries say and show, see `build_memory`; the others keep what they
            have.
        progress: show a progress bar.

    Raises:
        ValueError: no triplets.
        PatchError: the model is patched.
        MismatchError: the memory was made for another model.
    """
    if not triplets:
        raise ValueError("triplets: expected at least one, got none")
    decoder = find_decoder(model)
    check_artifacts(model, decoder, [], memory, memory.config, override=False)
    scope, counts = memory.scope, _counts(model, processor, triplets, memory.config, batch_size)
    if scope is not None:
        own = _ranges(counts, len(memory)) if _acts(memory.config) else None
        scope = _with_facts(model, processor, scope, triplets, own, batch_size, keep_texts)
    notes = {**memory.notes, "extended": f"by {len(triplets)} triplets"}
    layers = sorted(memory.layers)
    if not layers:
        return replace(memory, scope=scope, notes=notes)
    hidden = extract(
        model, processor, triplets, layers=layers, context=memory.config.values == "context", batch_size=batch_size,
        store=store, progress=progress,
    )  # fmt: skip
    tables = {}
    for i in layers:
        have, states = memory.layers[i], hidden[i]
        keys, values, *_ = _tables(decoder, i, states, memory.config.values)
        tables[i] = replace(
            have,
            index=_behind(have.index, states.sem_pre),
            keys=_behind(have.keys, keys),
            values=None if have.values is None or values is None else _behind(have.values, values),
        )
    more = _texts(triplets, counts) if keep_texts else None
    texts = joined_texts([(memory.texts, len(memory)), (more, sum(counts))])
    seen = _pictures(triplets, counts) if keep_texts else None
    pictures = Pictures.joined([(memory.pictures, len(memory)), (seen, sum(counts))])
    return replace(memory, layers=tables, notes=notes, scope=scope, texts=texts, pictures=pictures)


def _acts(config: Config) -> bool:
    """Whether a memory's entries act in the rows whose prompt is about them."""
    return config.scope == "memory" and config.values == "context"


def _counts(
    model: nn.Module, processor: Any, triplets: Sequence[Triplet], config: Config, batch_size: int
) -> list[int]:
    """The entries of each triplet."""
    return entries_of(model, processor, triplets, batch_size) if config.values == "context" else [1] * len(triplets)


def _texts(triplets: Sequence[Triplet], counts: Sequence[int]) -> tuple[str, ...]:
    """What each entry says."""
    return tuple(text for triplet, n in zip(triplets, counts, strict=True) for text in [triplet.text] * n)


def _pictures(triplets: Sequence[Triplet], counts: Sequence[int]) -> Pictures | None:
    """Of each entry the first image that its triplet is about."""
    images = [triplet.answered("").images for triplet in triplets]
    return Pictures.made([opened(seen[0]) if seen else None for seen in images], counts)


def _ranges(counts: Sequence[int], start: int) -> Tensor:
    """int64 [F, 2], where the entries of each triplet are in tables in which the first one is at `start`."""
    of = torch.tensor(counts, dtype=torch.int64, device="cpu")
    ends = start + of.cumsum(0)
    return torch.stack([ends - of, ends], 1)


def _with_facts(
    model: nn.Module,
    processor: Any,
    scope: Scope,
    triplets: Sequence[Triplet],
    own: Tensor | None,
    batch_size: int,
    named: bool,
) -> Scope:
    """The scope with the facts of triplets, which act by these entries; None: they act nowhere."""
    prompts = [triplet.answered("") for triplet in triplets]
    keys = prompt_keys(model, processor, scope, prompts, batch_size=batch_size)
    names = tuple(prompt.question for prompt in prompts) if named else None
    if own is not None:
        return scope.with_own(keys, own, names)
    return scope.extended(keys, torch.arange(len(prompts), dtype=torch.int64, device="cpu"), names)


def _dtype_of(model: nn.Module) -> torch.dtype:
    """What a memory of the model is stored in."""
    found = getattr(unwrap(model), "dtype", None)
    return found if found in (torch.bfloat16, torch.float16) else torch.float32


def _stored(table: Tensor, dtype: torch.dtype) -> Tensor:
    """In this dtype, unless that would lose something, as of a layer that computes in float32 in a narrower model."""
    narrow = table.to(dtype)
    return narrow if torch.equal(narrow.to(table.dtype), table) else table


def _behind(table: Tensor, rows: Tensor) -> Tensor:
    return torch.cat([table, rows.to(table)])
