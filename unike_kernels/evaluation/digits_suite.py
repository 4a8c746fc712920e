"""The built-in suite: editing what the digit models say about handwritten digits, in answers and in captions.

A request is one image and one question of a *fact*, a kind of question about a digit. Its answer is what was withheld
from the model's training, or, of a fact that was taught, another answer of its kind (a counterfactual). Of each kind
some facts are for training, some for validation and some for the test; the rest stay as they were taught, and are what
locality is measured on. Training sees the training images and phrasings only. Validation and test share the phrasings
that no training has seen, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from random import Random
from typing import Any, Literal

from torch import Tensor, nn

from .. import digits
from ..editing.samples import Sample
from .answers import answers
from .metrics import Case
from .suite import Request, Suite, Task

Split = Literal["train", "validation", "test"]
_AROUND = 3  # samples of a metric beside the request's own image and question
_UNRELATED = 4
_PRESERVED = 4  # questions about each fact that stays as it was taught


@dataclass(frozen=True)
class _Plan:
    """How many facts that were taught become counterfactual, of each kind; and how many requests there are at most."""

    counterfactual: dict[Split, int]
    requests: dict[Split, int]


# There are ten kinds of questions and two of captions: a kind of captions has to give more facts for as many requests.
_PLANS: dict[Task, _Plan] = {
    "vqa": _Plan(
        {"test": 2, "validation": 1, "train": 3}, {"test": 240, "validation": 60, "train": 600}
    ),
    "caption": _Plan(
        {"test": 4, "validation": 1, "train": 2}, {"test": 240, "validation": 60, "train": 300}
    ),
}  # fmt: skip


def split_facts(task: Task) -> tuple[dict[Split, list[digits.Fact]], list[digits.Fact]]:
    """The facts of each split, with the answers that are asked for, and those that stay as they were taught."""
    rng = Random(0)
    split: dict[Split, list[digits.Fact]] = {"test": [], "validation": [], "train": []}
    left = []
    for kind in dict.fromkeys(fact.kind for fact in digits.facts(task)):
        withheld = [f for f in digits.facts(task, withheld=True) if f.kind == kind]
        taught = [f for f in digits.facts(task, withheld=False) if f.kind == kind]
        rng.shuffle(withheld)
        rng.shuffle(taught)
        # Of two that were withheld, the test and training get one each.
        order: tuple[Split, ...] = ("test", "train", "validation")
        for name, fact in zip(order, withheld, strict=False):
            split[name].append(fact)
        for name, count in _PLANS[task].counterfactual.items():
            for _ in range(count):
                fact = taught.pop()
                others = sorted({f.answer for f in digits.facts(task) if f.kind == kind} - {fact.answer})
                split[name].append(replace(fact, answer=rng.choice(others)))
        left += taught
    return split, left


class _Draw:
    """Draws the requests of one split."""

    def __init__(self, task: Task, split: Split, plain: Sequence[digits.Fact]) -> None:
        self.task, self.split, self.plain = task, split, plain
        self.rng = Random(f"{task} {split}")
        pixels, labels = digits.images("train" if split == "train" else "test")
        shown = {digit: list(pixels[labels == digit]) for digit in range(10)}
        # A third of the test images is for validation.
        parts = {"train": slice(None), "validation": slice(0, 12), "test": slice(12, None)}
        self.images: dict[int, list[Tensor]] = {digit: images[parts[split]] for digit, images in shown.items()}
        items = digits.text_items("train" if split == "train" else "test")
        halves = {"train": slice(None), "validation": slice(0, None, 2), "test": slice(1, None, 2)}
        self.text = items[halves[split]]

    def requests(self, facts: Sequence[digits.Fact], count: int) -> Iterator[Request]:
        """At most `count`, one fact after the other in turn, until each has shown all of its images."""
        unused = {fact: self.rng.sample(range(n), n) for fact in facts for n in [len(self.images[fact.digit])]}
        number = 0
        for fact in cycle(facts):
            if number == count or not any(unused.values()):
                return
            if unused[fact]:
                yield self._request(number, fact, unused[fact].pop())
                number += 1

    def _request(self, number: int, fact: digits.Fact, image: int) -> Request:
        phrasings = digits.phrasings(fact.kind)
        prompt = self.rng.choice(phrasings)
        images = self.images[fact.digit]
        others = self.rng.sample([i for i in range(len(images)) if i != image], _AROUND)
        other_words = [p for p in phrasings if p != prompt]
        if self.split != "train":
            other_words = list(digits.phrasings(fact.kind, "held_out"))
        unrelated = self.rng.sample([f for f in self.plain if f.digit != fact.digit], _UNRELATED)
        case = Case(
            Sample(prompt, fact.answer, images[image]),
            rephrasings=tuple(Sample(p, fact.answer, images[image]) for p in other_words[:_AROUND]),
            images=tuple(Sample(prompt, fact.answer, images[i]) for i in others),
            text_locality=tuple(Sample(*item) for item in self.rng.sample(self.text, _UNRELATED)),
            image_locality=tuple(self._about(f) for f in unrelated),
        )
        return Request(f"{self.split}-{number}-{fact.kind}-{fact.digit}-{image}", self.task, case, wrong="")

    def _about(self, fact: digits.Fact) -> Sample:
        prompt = self.rng.choice(digits.phrasings(fact.kind))
        return Sample(prompt, fact.answer, self.rng.choice(self.images[fact.digit]))

    def preserve(self) -> list[Sample]:
        """Questions about facts that stay as they were taught, and half as many without an image."""
        images = [self._about(fact) for fact in self.plain for _ in range(_PRESERVED)]
        return images + [Sample(*item) for item in self.rng.sample(self.text, len(images) // 2)]


def digits_suite(task: Task, model: nn.Module, processor: Any) -> Suite:
    """The suite of a task for one of the digit models; requests that it already answers as wanted are left out.

    Args:
        task: "vqa" or "caption".
        model, processor: see `unike_kernels.digits`.

    Raises:
        ValueError: another task.
    """
    if task not in _PLANS:
        raise ValueError(f"task: expected one of {', '.join(_PLANS)}; got {task!r}")
    facts, plain = split_facts(task)
    # Captions have few facts left; locality is measured on both tasks' in any case, as it is for questions.
    stays = plain + split_facts("caption" if task == "vqa" else "vqa")[1]
    drawn = {split: _Draw(task, split, stays) for split in facts}
    requests = {
        split: _wrong(model, processor, list(drawn[split].requests(facts[split], _PLANS[task].requests[split])))
        for split in facts
    }
    return Suite(f"digits-{task}", **requests, preserve=drawn["train"].preserve())


def _wrong(model: nn.Module, processor: Any, requests: list[Request]) -> list[Request]:
    """Those that the model answers wrongly, with what it says."""
    said = answers(model, processor, [r.case.request for r in requests])
    told = (replace(r, wrong=answer) for r, answer in zip(requests, said, strict=True))
    return [r for r in told if r.wrong and r.wrong != r.case.request.answer]
