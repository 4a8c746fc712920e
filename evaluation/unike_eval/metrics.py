"""Reliability, generality and locality of an edit (paper, Eq. 11-15): of generated answers, and by teacher forcing.

"generated" is the main protocol: greedy answers to their natural end, of which a sample counts where its answer is the
wanted one, or for locality the one from before the edit, but for case, punctuation and articles.

The others are teacher-forced: the model sees the right answer so far, and its length. For reliability and generality
two of them give the share of answer tokens that are the model's first choice. For locality, before against after:

* "unike" (the authors' fork): first choices that agree, over the answer's positions alone;
* "mmedit" (the benchmark's own code): text: first choices that agree, over all positions; images: the ten best tokens
  that agree rank by rank, over all positions;
* "exact": as "unike", but a sample counts only where all of the answer's tokens are right, or agree.

They are not comparable; a figure is labelled with its protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from unike_kernels.backbones import device_of
from unike_kernels.training.samples import Sample, batches, encode, evaluating, forward, prompt_lengths_for

from .answers import Within, ended_answers, nothing, same_answer

PROTOCOLS = {
    "generated": "greedy answers to their natural end, exact match",
    "unike": "teacher forcing, the answer's tokens",
    "mmedit": "teacher forcing, the answer's tokens; locality at all positions, of images by the ten best tokens",
    "exact": "teacher forcing, all of the answer's tokens",
}
METRICS = (
    "reliability",
    "t_generality",
    "m_generality",
    "t_locality",
    "m_locality",
    "near_locality",
    "subject_locality",
    "portability",
)


@dataclass(frozen=True)
class Case:
    """An edit request and what is measured around it.

    Attributes:
        request: the edit itself.
        rephrasings: the same question in other words (T-generality).
        images: the same question about other images of the same thing (M-generality).
        text_locality: unrelated questions without images; their answers are only where positions are taken from.
        image_locality: unrelated questions about unrelated images.
        near_locality: the same question about other subjects.
        subject_locality: other questions about the same subject.
        portability: questions whose answers follow from the edit; told apart, not in the mean of the metrics.
    """

    request: Sample
    rephrasings: tuple[Sample, ...] = ()
    images: tuple[Sample, ...] = ()
    text_locality: tuple[Sample, ...] = ()
    image_locality: tuple[Sample, ...] = ()
    near_locality: tuple[Sample, ...] = ()
    subject_locality: tuple[Sample, ...] = ()
    portability: tuple[Sample, ...] = ()

    def groups(self) -> dict[str, tuple[Sample, ...]]:
        """Metric -> samples."""
        generality, locality = (self.rephrasings, self.images), (self.text_locality, self.image_locality)
        near = (self.near_locality, self.subject_locality)
        samples = ((self.request,), *generality, *locality, *near, self.portability)
        return dict(zip(METRICS, samples, strict=True))


@dataclass(frozen=True)
class Observation:
    """What a model says to one sample: by itself, and for each position but the last its ten best next tokens.

    Attributes:
        best: int64 [T, 10]; of all positions that are not padding.
        answer: bool [T], the positions that predict an answer token.
        wanted: int64 [A], the answer's tokens.
        said: the greedy answer to its natural end, see `answers.ended_answers`.
        right: whether that is the sample's answer.
    """

    best: Tensor
    answer: Tensor
    wanted: Tensor
    said: str
    right: bool


@torch.no_grad()
def observe(
    model: nn.Module, processor: Any, samples: Sequence[Sample], batch_size: int = 32, within: Within = nothing
) -> list[Observation]:
    """Ask the model, patched or not, for each answer, and run each sample with its answer through it.

    `within` is as in `answers.ended_answers`.
    """
    found: list[Observation | None] = [None] * len(samples)
    said = ended_answers(model, processor, samples, batch_size=batch_size, within=within)
    with evaluating(model):
        for group in batches(samples, batch_size):
            batch = encode(processor, [samples[i] for i in group], device_of(model))
            with prompt_lengths_for(model, batch), within(batch):
                logits = forward(model, batch.inputs)
            ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool()
            answers = batch.answer_mask()
            best = logits.topk(min(10, logits.shape[-1]), dim=-1).indices
            for row, i in enumerate(group):
                real = mask[row, 1:] & mask[row, :-1]
                found[i] = Observation(
                    best[row, :-1][real].cpu(),
                    answers[row, 1:][real].cpu(),
                    ids[row][answers[row]].cpu(),
                    said[i],
                    same_answer(said[i], samples[i].answer),
                )
    return [o for o in found if o is not None]


def token_accuracy(o: Observation) -> float:
    """Share of answer tokens that are the model's first choice."""
    return float((o.best[o.answer, 0] == o.wanted).float().mean())


def accuracy(o: Observation, protocol: str) -> float:
    """How far a sample is answered as it should be."""
    if protocol == "generated":
        return float(o.right)
    share = token_accuracy(o)
    return float(share == 1.0) if protocol == "exact" else share


def agreement(before: Observation, after: Observation, protocol: str, images: bool) -> float:
    """How far two observations of one sample agree."""
    if protocol == "generated":
        return float(same_answer(before.said, after.said))
    if protocol == "unike":
        return float((before.best[before.answer, 0] == after.best[after.answer, 0]).float().mean())
    if protocol == "exact":
        return float(torch.equal(before.best[before.answer, 0], after.best[after.answer, 0]))
    if protocol == "mmedit":
        ranks = 10 if images else 1
        return float((before.best[:, :ranks] == after.best[:, :ranks]).float().mean())
    raise ValueError(f"protocol: expected one of {', '.join(PROTOCOLS)}; got {protocol!r}")


def score(
    before: Mapping[str, list[Observation]], after: Mapping[str, list[Observation]], protocol: str
) -> dict[str, float]:
    """Metric -> share in 0..1; a metric without samples is left out. `before` must come from before the edit.

    What must stay is looked at where its answer is in "unike" and "exact": a sample without one does not count there.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol: expected one of {', '.join(PROTOCOLS)}; got {protocol!r}")
    scores = {}
    for name, observed in after.items():
        if not observed:
            continue
        if name.endswith("locality"):
            pairs = list(zip(before[name], observed, strict=True))
            if protocol in ("unike", "exact"):
                pairs = [(b, a) for b, a in pairs if b.answer.any()]
            values = [agreement(b, a, protocol, name == "m_locality") for b, a in pairs]
        else:
            values = [accuracy(o, protocol) for o in observed]
        if values:
            scores[name] = sum(values) / len(values)
    return scores


def observe_case(model: nn.Module, processor: Any, case: Case) -> dict[str, list[Observation]]:
    """`observe` each group of a case."""
    return in_groups(lambda samples: observe(model, processor, samples), case.groups())


def in_groups(
    observe: Callable[[Sequence[Sample]], list[Observation]], groups: Mapping[str, Sequence[Sample]]
) -> dict[str, list[Observation]]:
    """What is observed of the samples of all groups, in one call."""
    found = iter(observe([sample for samples in groups.values() for sample in samples]))
    return {name: list(islice(found, len(samples))) for name, samples in groups.items()}
