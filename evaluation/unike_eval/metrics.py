"""Reliability, generality and locality of an edit (paper, Eq. 11-15) in the two protocols in use, and in a strict one.

All are teacher-forced. For reliability and generality the first two give the share of answer tokens that are the
model's first choice. For locality, before against after the edit:

* "mmedit" (the benchmark's own code): text: first choices that agree, over all positions; images: the ten best tokens
  that agree rank by rank, over all positions;
* "unike" (the authors' fork): first choices that agree, over the answer's positions alone;
* "exact": as "unike", but a sample counts only where all of the answer's tokens are right, or agree.

They are not comparable; a figure is labelled with its protocol.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unike_kernels.backbones import device_of
from unike_kernels.training.samples import Sample, batches, encode, evaluating, forward, prompt_lengths_for

PROTOCOLS = ("mmedit", "unike", "exact")
METRICS = (
    "reliability",
    "t_generality",
    "m_generality",
    "t_locality",
    "m_locality",
    "near_locality",
    "subject_locality",
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
    """

    request: Sample
    rephrasings: tuple[Sample, ...] = ()
    images: tuple[Sample, ...] = ()
    text_locality: tuple[Sample, ...] = ()
    image_locality: tuple[Sample, ...] = ()
    near_locality: tuple[Sample, ...] = ()
    subject_locality: tuple[Sample, ...] = ()

    def groups(self) -> dict[str, tuple[Sample, ...]]:
        """Metric -> samples."""
        generality, locality = (self.rephrasings, self.images), (self.text_locality, self.image_locality)
        samples = ((self.request,), *generality, *locality, self.near_locality, self.subject_locality)
        return dict(zip(METRICS, samples, strict=True))


@dataclass(frozen=True)
class Observation:
    """What a model says to one sample: for each position but the last, its ten best next tokens.

    Attributes:
        best: int64 [T, 10]; of all positions that are not padding.
        answer: bool [T], the positions that predict an answer token.
        wanted: int64 [A], the answer's tokens.
    """

    best: Tensor
    answer: Tensor
    wanted: Tensor


@torch.no_grad()
def observe(model: nn.Module, processor: Any, samples: Sequence[Sample], batch_size: int = 32) -> list[Observation]:
    """Run each sample with its answer through the model as it is now, patched or not."""
    found: list[Observation | None] = [None] * len(samples)
    with evaluating(model):
        for group in batches(samples, batch_size):
            batch = encode(processor, [samples[i] for i in group], device_of(model))
            with prompt_lengths_for(model, batch):
                logits = forward(model, batch.inputs)
            ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool()
            answers = batch.answer_mask()
            best = logits.topk(min(10, logits.shape[-1]), dim=-1).indices
            for row, i in enumerate(group):
                real = mask[row, 1:] & mask[row, :-1]
                found[i] = Observation(
                    best[row, :-1][real].cpu(), answers[row, 1:][real].cpu(), ids[row][answers[row]].cpu()
                )
    return [o for o in found if o is not None]


def token_accuracy(o: Observation) -> float:
    """Share of answer tokens that are the model's first choice."""
    return float((o.best[o.answer, 0] == o.wanted).float().mean())


def agreement(before: Observation, after: Observation, protocol: str, images: bool) -> float:
    """How far two observations of one sample agree."""
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
    """Metric -> share in 0..1; a metric without samples is left out. `before` must come from before the edit."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol: expected one of {', '.join(PROTOCOLS)}; got {protocol!r}")
    scores = {}
    for name, observed in after.items():
        if not observed:
            continue
        if name.endswith("locality"):
            pairs = zip(before[name], observed, strict=True)
            values = [agreement(b, a, protocol, name == "m_locality") for b, a in pairs]
        else:
            values = [token_accuracy(o) for o in observed]
            values = [float(v == 1.0) for v in values] if protocol == "exact" else values
        scores[name] = sum(values) / len(values)
    return scores


def observe_case(model: nn.Module, processor: Any, case: Case) -> dict[str, list[Observation]]:
    """`observe` each group of a case."""
    return {name: observe(model, processor, samples) for name, samples in case.groups().items()}
