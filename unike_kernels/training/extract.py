"""Extracting h_sem, h_pos and h_neg of in-context knowledge (paper, section 3.3)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..artifacts import files
from ..artifacts.fingerprint import compare, fingerprint, validate
from ..backbones import device_of, find_decoder, placeholder_ids
from ..errors import ArtifactError, PatchError
from ..nn import residual_of, residual_position
from ..ops import _check
from ..patching import is_patched
from .chat import parts_of, text_of
from .progress import progress_bar
from .samples import Batch, Sample, Triplet, batches, encode, evaluating, forward, taking_gradients

_PART = 1024  # triplets whose states are written together
_MOST_TOKENS = 8  # of an answer that become entries with context=True


@dataclass(frozen=True)
class Hidden:
    """Hidden states of N entries at one layer's attention module: its input ("pre") and its output ("out").

    All are float32 [N, d] on the CPU. An entry is a triplet, and sem the last token of the question, pos and neg the
    last token of the question with the true and with the wrong answer. Or, with `extract(..., context=True)`, an entry
    is a token of a triplet's true answer, sem the position that produces it, and pos and neg the same position with the
    true and with the wrong knowledge in the prompt.
    """

    sem_pre: Tensor
    sem_out: Tensor
    pos_pre: Tensor
    pos_out: Tensor
    neg_pre: Tensor
    neg_out: Tensor


@contextmanager
def _record(modules: dict[int, nn.Module]) -> Iterator[dict[tuple[int, str], Tensor]]:
    """Within the block, each pass leaves the input and the output of each module in the dictionary."""
    store: dict[tuple[int, str], Tensor] = {}

    def hook(index: int) -> Any:
        def after(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            store[index, "pre"] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            out = output[0] if isinstance(output, tuple) else output
            residual = residual_of(residual_position(module), args, kwargs)
            store[index, "out"] = out if residual is None else out - residual

        return after

    handles = [m.register_forward_hook(hook(i), with_kwargs=True) for i, m in modules.items()]
    try:
        yield store
    finally:
        for handle in handles:
            handle.remove()


@taking_gradients
def extract(
    model: nn.Module,
    processor: Any,
    triplets: Sequence[Triplet],
    *,
    layers: Sequence[int] | None = None,
    context: bool = False,
    batch_size: int = 32,
    store: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Mapping[int, Hidden]:
    """Run the positive and the negative knowledge through the unpatched model and keep the states that matter.

    With `context`, a triplet is run as "<prompt> <positive>" on its own, behind "<prompt> <positive>." and behind
    "<prompt> <negative>.", and each of the first eight tokens of the positive answer becomes an entry. An image comes
    once, in front of all; its placeholders are left out where the prompt comes again.

    Args:
        model: a Hugging Face model, not patched.
        processor: its processor or tokenizer.
        triplets: at least one. They are looked at some at a time, so that a lazy sequence need not hold all images.
        layers: decoder layers; None: the last four that have attention.
        context: the states of Config(values="context").
        batch_size: triplets per forward pass.
        store: a folder for the states. They are written there in parts as they are made, so that memory holds one layer
            at most, and an extraction that was interrupted goes on after its last part. None: all stay in memory.
        progress: show a progress bar.

    Returns:
        Layer index -> `Hidden`, entries in the order of `triplets`; with a store, read from there when asked for.

    Raises:
        ValueError: too few triplets, a positive answer that equals the negative one, with `context` one without tokens,
            or a sample that is longer than the model's context. Parts before it stay in the store.
        PatchError: the model is patched; its states would be shifted ones.
        ArtifactError: the store holds a part of other triplets, layers or of another model, or a damaged one. Images
            are not compared.
    """
    if not triplets:
        raise ValueError("triplets: expected at least one, got none")
    if is_patched(model):
        raise PatchError("extract: the model is patched; unpatch it first")
    chosen = find_decoder(model).select(layers, need=("attention",))
    starts = range(0, len(triplets), _PART)
    parts: list[dict[int, Hidden]] = []
    with progress_bar("extract", len(triplets), progress) as bar:
        for start in starts:
            part = [triplets[i] for i in range(start, min(start + _PART, len(triplets)))]
            header = _header(model, chosen, start, part, context)
            file = None if store is None else Path(store) / f"states-{start:07d}.safetensors"
            if file is None or not file.exists():
                found = _extract(model, processor, part, chosen, batch_size, start, context)
                if file is None:
                    parts.append(found)
                else:
                    tensors = {f"{i}.{name}": t for i, h in found.items() for name, t in vars(h).items()}
                    files.save(file, "states", header, tensors)
            else:
                _check_part(file, model, header)
            bar.update(len(part))
    if store is None:
        return {i: _joined([part[i] for part in parts]) for i in chosen}
    return _Stored([Path(store) / f"states-{start:07d}.safetensors" for start in starts], chosen)


def _check_part(file: Path, model: nn.Module, header: dict[str, Any]) -> None:
    """Whether a stored part is whole, and of this model and these triplets."""
    have, tensors = files.load(file, "states", mmap=True)
    have = {"context": False, **have}  # older files do not say it
    same = {name: have.get(name) == value for name, value in header.items()}
    with contextlib.suppress(ValueError):  # one of another version has sampled other weights
        same["model"] = compare(validate(have.get("model")), model) == (None, None)
    if not all(same.values()):
        other = [name for name, value in same.items() if not value]
        raise ArtifactError(f"{file}: its {' and '.join(other)} are others; give another store")
    _checked(file, tensors, header["layers"])


def _checked(file: Path, tensors: dict[str, Tensor], layers: Sequence[int]) -> None:
    """Whether these are the states of these layers: one shape, float32, finite."""
    wanted = {f"{i}.{name}" for i in layers for name in Hidden.__dataclass_fields__}
    if tensors.keys() != wanted:
        raise ArtifactError(f"{file}: expected the tensors {sorted(wanted)}, got {sorted(tensors)}")
    shapes = {(t.dtype, t.shape) for t in tensors.values()}
    if len(shapes) != 1 or next(iter(shapes))[0] != torch.float32 or len(next(iter(shapes))[1]) != 2:
        raise ArtifactError(f"{file}: expected float32 [N, d] in one shape, got {sorted(map(str, shapes))}")
    for name, t in tensors.items():
        if not _check.finite(t):
            raise ArtifactError(f"{file}: tensor {name!r} holds NaN or infinity")


def _header(
    model: nn.Module, layers: Sequence[int], start: int, part: Sequence[Triplet], context: bool
) -> dict[str, Any]:
    """What the states of these triplets depend on, but for the images."""
    told = json.dumps([[t.prompt, t.positive, t.negative, t.image is not None, *_chat(t)] for t in part])
    digest = hashlib.sha256(told.encode()).hexdigest()
    return {"model": fingerprint(model), "layers": list(layers), "triplets": digest, "start": start, "context": context}


def _chat(triplet: Triplet) -> list[list[str]]:
    return [[message["role"], text_of(message)] for message in triplet.messages or ()]


def _joined(parts: Sequence[Hidden]) -> Hidden:
    return Hidden(**{name: torch.cat([getattr(p, name) for p in parts]) for name in Hidden.__dataclass_fields__})


class _Stored(Mapping[int, Hidden]):
    """The states in these files; a layer is read when it is asked for."""

    def __init__(self, files: Sequence[Path], layers: Sequence[int]) -> None:
        self._files, self._layers = files, layers

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[int]:
        return iter(self._layers)

    def __getitem__(self, layer: int) -> Hidden:
        if layer not in self._layers:
            raise KeyError(layer)
        wanted = [f"{layer}.{name}" for name in Hidden.__dataclass_fields__]
        parts = []
        for file in self._files:
            part = files.load(file, "states", wanted)[1]
            _checked(file, part, [layer])
            parts.append(Hidden(**{name.partition(".")[2]: t for name, t in part.items()}))
        return _joined(parts)


def _runs(triplet: Triplet, context: bool, placeholders: Sequence[str]) -> list[tuple[Sample, tuple[str, ...]]]:
    """The texts of a triplet, and which states each of them gives.

    Args:
        triplet: the triplet.
        context: whether knowledge stands in front of the question.
        placeholders: texts that stand for an image.
    """
    if not context:
        answers = (triplet.positive, ("sem", "pos")), (triplet.negative, ("neg",))
        return [(triplet.answered(answer), states) for answer, states in answers]
    asked = triplet.answered(triplet.positive)
    known, misled = (_knowing(asked, answer, placeholders) for answer in (triplet.positive, triplet.negative))
    return [(asked, ("sem",)), (known, ("pos",)), (misled, ("neg",))]


def _knowing(asked: Sample, answer: str, placeholders: Sequence[str]) -> Sample:
    """The question behind itself and an answer; images stay in front of all."""
    again = asked.question
    for name in placeholders if asked.images else ():
        again = again.replace(name, "")
    more = f" {answer}{'' if answer.endswith(('.', '!', '?')) else '.'} {again.lstrip()}"
    if asked.messages is None:
        return replace(asked, prompt=asked.prompt + more)
    *before, last = asked.messages
    return replace(asked, messages=[*before, {**last, "content": [*parts_of(last), {"type": "text", "text": more}]}])


def _placeholders(model: nn.Module, processor: Any) -> list[str]:
    """The texts that stand for an image in a prompt."""
    tokenizer = getattr(processor, "tokenizer", processor)
    tokens = [tokenizer.convert_ids_to_tokens(id) for id in sorted(placeholder_ids(model))]
    tokens += [getattr(processor, name, None) for name in ("image_token", "boi_token")]
    return [token for token in tokens if token and isinstance(token, str)]


def _spans(batch: Batch, state: str, context: bool) -> list[range]:
    """Of each row, the positions whose states are entries."""
    ends, lasts = batch.ends.tolist(), batch.lasts.tolist()
    if context:
        return [range(end, min(last, end + _MOST_TOKENS)) for end, last in zip(ends, lasts, strict=True)]
    return [range(at, at + 1) for at in (ends if state == "sem" else lasts)]


def entries_of(model: nn.Module, processor: Any, triplets: Sequence[Triplet], batch_size: int) -> list[int]:
    """How many entries each triplet has in `extract(..., context=True)`; some are looked at at a time."""
    counts = [0] * len(triplets)
    for start in range(0, len(triplets), _PART):
        part = (triplets[i] for i in range(start, min(start + _PART, len(triplets))))
        asked = [t.answered(t.positive) for t in part]
        for group in batches(asked, batch_size):
            batch = encode(processor, [asked[i] for i in group], device_of(model))
            for i, span in zip(group, _spans(batch, "sem", True), strict=True):
                counts[start + i] = len(span)
    return counts


@torch.no_grad()
def _extract(
    model: nn.Module,
    processor: Any,
    triplets: Sequence[Triplet],
    layers: Sequence[int],
    batch_size: int,
    start: int,
    context: bool,
) -> dict[int, Hidden]:
    """The states of a part of the triplets, of which the first is number `start`."""
    for i, t in enumerate(triplets, start):
        if t.positive == t.negative:
            raise ValueError(f"triplets[{i}]: the positive and the negative answer are both {t.positive!r}")
    decoder = find_decoder(model)
    attention = {i: decoder.layers[i].attention.module for i in layers}
    device = device_of(model)
    seeing = any(t.answered("").images for t in triplets)
    placeholders = _placeholders(model, processor) if context and seeing else []
    runs = [_runs(t, context, placeholders) for t in triplets]
    found: dict[tuple[int, str], dict[int, Tensor]] = defaultdict(dict)
    answers: dict[int, list[int]] = {}
    with evaluating(model), _record(attention) as store:
        for indices in batches([run[0][0] for run in runs], batch_size):
            for turn, (_, states_of) in enumerate(runs[indices[0]]):
                batch = encode(processor, [runs[i][turn][0] for i in indices], device)
                forward(model, batch.inputs)
                for state in states_of:
                    spans = _spans(batch, state, context)
                    rows, at = torch.tensor(
                        [(row, position) for row, span in enumerate(spans) for position in span],
                        dtype=torch.int64, device=device,
                    ).view(-1, 2).T  # fmt: skip
                    if context:
                        tokens = batch.inputs["input_ids"][rows, at + 1].split([len(span) for span in spans])
                        _check_answers(triplets, start, indices, [t.tolist() for t in tokens], answers)
                    for (layer, site), states in store.items():
                        parts = states[rows, at].float().cpu().split([len(span) for span in spans])
                        found[layer, f"{state}_{site}"].update(zip(indices, parts, strict=True))
    order, names = range(len(triplets)), Hidden.__dataclass_fields__
    return {i: Hidden(**{name: torch.cat([found[i, name][j] for j in order]) for name in names}) for i in layers}


def _check_answers(
    triplets: Sequence[Triplet],
    start: int,
    indices: Sequence[int],
    tokens: Sequence[list[int]],
    answers: dict[int, list[int]],
) -> None:
    """Note the tokens of these triplets' answers; whether they are the same ones with knowledge in front of them."""
    for i, found in zip(indices, tokens, strict=True):
        what = f"triplets[{start + i}]: the positive answer {triplets[i].positive!r}"
        if not found:
            raise ValueError(f"{what} has no tokens")
        if answers.setdefault(i, found) != found:
            raise ValueError(f"{what} has other tokens behind the knowledge, {found}, than alone, {answers[i]}")
