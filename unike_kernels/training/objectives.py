"""What the training of an edit minimises."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..artifacts.edit import EditLayer
from ..backbones import device_of, placeholder_ids
from ..nn import ExtraNeurons
from .activation_cache import Recording, Replay
from .samples import (
    Batch,
    Sample,
    batches,
    drop_tokens,
    encode,
    evaluating,
    forward,
    prompt_lengths_for,
    repeated,
)
from .settings import EditTraining

_THINNED = 2  # copies of each protected sample, where an edit is trained on such


@contextmanager
def _watched(ffns: dict[int, ExtraNeurons]) -> Iterator[dict[int, Tensor]]:
    """Within the block each pass leaves the FFN inputs [tokens, d] of each layer in the dictionary."""
    seen: dict[int, Tensor] = {}
    handles = [
        ffn.modules[0].register_forward_pre_hook(lambda _, args, i=i: seen.__setitem__(i, args[0].flatten(0, -2)))
        for i, ffn in ffns.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _ffn_inputs(ffns: dict[int, ExtraNeurons], run: Callable[[], object]) -> dict[int, Tensor]:
    """The FFN inputs [tokens, d] of each layer in one forward pass."""
    with _watched(ffns) as seen, torch.no_grad():
        run()
    return seen


def _pre_activations(layers: dict[int, EditLayer], inputs: dict[int, Tensor]) -> list[Tensor]:
    """Of each layer's neurons at each input, [tokens, n]; of gated ones those of the gate."""
    return [inputs[i].float() @ layer.keys.T + layer.key_bias for i, layer in layers.items()]


def _activation_loss(layers: dict[int, EditLayer], at_target: dict[int, Tensor]) -> Tensor:
    """exp(-a) of each neuron at its own token of the answer, in the mean; see `_initial_layers`."""
    own = []
    for a in _pre_activations(layers, at_target):
        neurons = torch.arange(a.shape[1], dtype=torch.int64, device=a.device)
        own.append(a[neurons % len(a), neurons])
    return torch.cat(own).neg().exp().mean()


class _Targets:
    """Requests, each a row with its answer, and what ends it where that is trained."""

    def __init__(self, processor: Any, requests: Sequence[Sample], device: torch.device, ended: bool) -> None:
        self.batch = encode(processor, requests, device, ended=ended)
        self.answers = self.batch.answer_mask()
        self.recording = Recording()  # of the batch as it is
        self.ahead = Recording()  # of copies of it, for the next steps
        for request, tokens in zip(requests, self.answers.sum(-1).tolist(), strict=True):
            if not tokens:
                raise ValueError(f"request.answer: {request.answer!r} has no tokens")

    def losses(self, model: nn.Module, batch: Batch | None = None) -> tuple[Tensor, list[bool]]:
        """Of each row the mean negative log-likelihood of its answer's tokens, [A], and whether each is predicted."""
        batch = batch or self.batch
        answers, wanted = batch.answer_mask()[:, 1:], batch.inputs["input_ids"][:, 1:]
        at = answers.any(0).nonzero().flatten()
        with prompt_lengths_for(model, batch):
            logits = forward(model, batch.inputs, at)
        answers, wanted = answers[:, at], wanted[:, at]
        token = torch.zeros(answers.shape, dtype=torch.float32, device=logits.device)
        token[answers] = F.cross_entropy(logits[answers].float(), wanted[answers], reduction="none")
        right = (logits.argmax(-1) == wanted) | ~answers
        return token.sum(-1) / answers.sum(-1), right.all(-1).tolist()

    def producing(self, states: Tensor, row: int) -> Tensor:
        """Of states [tokens, d] of the pass those that produce a row's answer."""
        at = states.unflatten(0, (-1, self.answers.shape[1]))[row]
        return at[int(self.batch.ends[row]) : int(self.batch.lasts[row])]


@torch.no_grad()
def predicted(model: nn.Module, processor: Any, samples: Sequence[Sample], *, batch_size: int = 32) -> list[bool]:
    """Of each sample, whether every token of its answer is the model's first choice, given those before it.

    Args:
        model: a Hugging Face model, patched or not.
        processor: its processor or tokenizer.
        samples: each with an answer.
        batch_size: samples per forward pass.
    """
    right = [False] * len(samples)
    with evaluating(model):
        for group in batches(samples, batch_size):
            targets = _Targets(processor, [samples[i] for i in group], device_of(model), ended=False)
            for i, found in zip(group, targets.losses(model)[1], strict=True):
                right[i] = found
    return right


class _Preserve:
    """Samples on which an edited model is held to what it said before, over all their tokens."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.targets: list[Tensor] = []
        self._recordings: dict[tuple[int, int], Recording] = {}

    @torch.no_grad()
    def add(
        self, model: nn.Module, processor: Any, samples: Sequence[Sample], training: EditTraining, share: float = 0.0
    ) -> None:
        """Samples on which it is held to what the model says now; with a share, also to what it says without words."""
        every = [*samples] * (1 + _THINNED if share else 1)
        for group in batches(every, training.preserve_batch):
            batch = encode(processor, [every[i] for i in group], device_of(model))
            seeds = {row: training.seed + i for row, i in enumerate(group) if i >= len(samples)}
            batch = drop_tokens(batch, seeds, share, placeholder_ids(model))
            self.batches.append(batch)
            self.targets.append(self._logits(model, batch).float().log_softmax(-1))

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        with prompt_lengths_for(model, batch):
            return forward(model, batch.inputs)

    def mean_inputs(self, model: nn.Module, ffns: dict[int, ExtraNeurons]) -> dict[int, Tensor]:
        """The mean FFN input [d] of each layer over all tokens but padding."""
        sums, count = {i: torch.zeros((), dtype=torch.float32, device="cpu") for i in ffns}, 0
        for batch in self.batches:
            mask = batch.inputs["attention_mask"].bool().flatten()
            seen = _ffn_inputs(ffns, lambda batch=batch: self._logits(model, batch))  # type: ignore[misc]
            sums = {i: sums[i].to(q.device) + q[mask].sum(0) for i, q in seen.items()}
            count += int(mask.sum())
        return {i: s / count for i, s in sums.items()}

    def size(self, step: int) -> int:
        """Samples that a step looks at."""
        return len(self.batches[step % len(self.batches)].ends)

    def losses(self, model: nn.Module, step: int, edits: int, replay: Replay) -> Tensor:
        """The divergence of each of so many edited models, [A]; the model computes theirs behind one another."""
        at = step % len(self.batches)
        batch, target = self.batches[at], self.targets[at]
        self._recordings = {key: kept for key, kept in self._recordings.items() if key[1] == edits}
        with replay.of(self._recordings.setdefault((at, edits), Recording())):
            logits = self._logits(model, repeated(batch, edits))
        found = logits.float().log_softmax(-1).unflatten(0, (edits, -1))
        mask = batch.inputs["attention_mask"].bool()
        apart = F.kl_div(found[:, mask], target[mask].expand(edits, -1, -1), reduction="none", log_target=True)
        return apart.sum(-1).mean(-1)

    def activity(self, layers: dict[int, EditLayer], inputs: dict[int, Tensor], step: int, at: int, n: int) -> Tensor:
        """Pre-activations of the neurons of edit number `at` of `n` in the pass of `losses` of this step, flat."""
        mask = self.batches[step % len(self.batches)].inputs["attention_mask"].bool().flatten()
        own = {i: q.unflatten(0, (n, -1))[at][mask] for i, q in inputs.items()}
        return torch.cat([a.flatten() for a in _pre_activations(layers, own)])
