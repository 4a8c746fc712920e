"""The built-in suites: editing what the shipped models say about images of their world, in answers and in captions.

A request is one image and one question of a *fact*. Its answer is what was withheld from the model's training, or, of a
fact that was taught, another answer of its kind (a counterfactual). Of each kind some facts are for training, some for
validation and some for the test; others stay as they were taught, and are what locality is measured on. Training sees
the training images and phrasings only. Validation and test share the phrasings that no training has seen, and nothing
else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from random import Random
from typing import Any, Literal

from torch import nn

from unike_kernels import training
from unike_kernels.training.samples import Sample

from .answers import answers
from .metrics import Case
from .suite import Request, Suite, Task
from .toy import Fact, World, digits, shapes

WORLDS: dict[str, World] = {"digits": digits, "easyvqa": shapes}
Split = Literal["train", "validation", "test"]
_AROUND = 3  # samples of a metric beside the request's own image and question
_UNRELATED = 4
_PRESERVED = 4  # questions about each fact that stays as it was taught
_TEXT_FACTS = 60  # that a scope learns from
_WORDINGS = 24  # of a fact that a scope learns from, each with an image of its own


@dataclass(frozen=True)
class _Plan:
    """How many facts that were taught become counterfactual, and how many stay, of each kind; and the most requests."""

    counterfactual: dict[Split, int]
    requests: dict[Split, int]
    plain: int | None = None


# There are ten kinds of questions and two of captions about digits: a kind of captions has to give more facts for as
# many requests. Of shapes two of four kinds have ten times the facts of the others, but locality is about all kinds.
_PLANS: dict[tuple[str, Task], _Plan] = {
    ("digits", "vqa"): _Plan(
        {"test": 2, "validation": 1, "train": 3}, {"test": 240, "validation": 60, "train": 600}
    ),
    ("digits", "caption"): _Plan(
        {"test": 4, "validation": 1, "train": 2}, {"test": 240, "validation": 60, "train": 300}
    ),
    ("easyvqa", "vqa"): _Plan(
        {"test": 4, "validation": 2, "train": 4}, {"test": 240, "validation": 60, "train": 600}, plain=5
    ),
}  # fmt: skip


def split_facts(name: str, task: Task) -> tuple[dict[Split, list[Fact]], list[Fact]]:
    """The facts of each split, with the answers that are asked for, and those that stay as they were taught."""
    if (name, task) not in _PLANS:
        raise ValueError(f"task: expected one of {', '.join(map(' '.join, _PLANS))}; got {name} {task}")
    plan, rng = _PLANS[name, task], Random(0)
    split: dict[Split, list[Fact]] = {"test": [], "validation": [], "train": []}
    left = []
    facts = [fact for fact in WORLDS[name].FACTS if fact.task == task]
    for kind in dict.fromkeys(fact.kind for fact in facts):
        of_kind = [f for f in facts if f.kind == kind]
        taught = [f for f in of_kind if not f.withheld]
        subjects = list(dict.fromkeys(f.subject for f in of_kind if f.withheld))
        rng.shuffle(subjects)
        rng.shuffle(taught)
        # Of two subjects that were withheld, the test and training get one each.
        order: tuple[Split, ...] = ("test", "train", "validation")
        for name, subject in zip(order, subjects, strict=False):
            split[name] += [f for f in of_kind if f.withheld and f.subject == subject]
        for name, count in plan.counterfactual.items():
            for _ in range(count):
                fact = taught.pop()
                others = sorted({f.answer for f in of_kind} - {fact.answer})
                split[name].append(replace(fact, answer=rng.choice(others)))
        left += taught[: plan.plain]
    return split, left


class _Draw:
    """Draws the requests of one split."""

    def __init__(self, world: World, task: Task, split: Split, plain: Sequence[Fact]) -> None:
        self.task, self.split, self.plain = task, split, plain
        self.rng = Random(f"{task} {split}")
        self.images = world.showing(split)
        items = world.text_items("train" if split == "train" else "test")
        halves = {"train": slice(None), "validation": slice(0, None, 2), "test": slice(1, None, 2)}
        self.text = items[halves[split]]

    def requests(self, facts: Sequence[Fact], count: int) -> Iterator[Request]:
        """At most `count`, one fact after the other in turn, until each has shown all of its images."""
        unused = {fact: self.rng.sample(range(n), n) for fact in facts for n in [len(self.images[fact.shown])]}
        number = 0
        for fact in cycle(facts):
            if number == count or not any(unused.values()):
                return
            if unused[fact]:
                yield self._request(number, fact, unused[fact].pop())
                number += 1

    def _request(self, number: int, fact: Fact, image: int) -> Request:
        prompt = self.rng.choice(fact.train)
        images = self.images[fact.shown]
        others = self.rng.sample([i for i in range(len(images)) if i != image], _AROUND)
        other_words = [p for p in fact.train if p != prompt] if self.split == "train" else fact.held_out
        unrelated = self.rng.sample([f for f in self.plain if f.shown != fact.shown], _UNRELATED)
        case = Case(
            Sample(prompt, fact.answer, images[image]),
            rephrasings=tuple(Sample(p, fact.answer, images[image]) for p in other_words[:_AROUND]),
            images=tuple(Sample(prompt, fact.answer, images[i]) for i in others),
            text_locality=tuple(Sample(*item) for item in self.rng.sample(self.text, _UNRELATED)),
            image_locality=tuple(self._about(f) for f in unrelated),
        )
        return Request(f"{self.split}-{number}-{fact.kind}-{fact.shown}-{image}", self.task, case, wrong="")

    def _about(self, fact: Fact) -> Sample:
        prompt = self.rng.choice(fact.train)
        return Sample(prompt, fact.answer, self.rng.choice(self.images[fact.shown]))

    def preserve(self) -> list[Sample]:
        """Questions about facts that stay as they were taught, and half as many without an image."""
        images = [self._about(fact) for fact in self.plain for _ in range(_PRESERVED)]
        return images + [Sample(*item) for item in self.rng.sample(self.text, len(images) // 2)]


def world_suite(name: str, task: Task, model: nn.Module, processor: Any) -> Suite:
    """The suite of a world and a task for one of its models; requests that it already answers as wanted are left out.

    Args:
        name: of the world, "digits" or "easyvqa".
        task: "vqa"; of digits, "caption" too.
        model: one of the world's own; see `unike_eval.toy.digits` and `unike_eval.toy.shapes`.
        processor: the model's.

    Raises:
        ValueError: an unknown world or task.
    """
    facts, plain = split_facts(name, task)
    # Captions have few facts left; locality is measured on both tasks' in any case, as it is for questions.
    stays = plain + [fact for of, other in _PLANS if of == name and other != task for fact in split_facts(of, other)[1]]
    drawn = {split: _Draw(WORLDS[name], task, split, stays) for split in facts}
    requests = {
        split: _wrong(model, processor, list(drawn[split].requests(facts[split], most)))
        for split, most in _PLANS[name, task].requests.items()
    }
    return Suite(
        f"{name}-{task}",
        requests["train"],
        requests["validation"],
        requests["test"],
        drawn["train"].preserve(),
        scope_facts(name),
    )


def scope_facts(name: str) -> list[training.Fact]:
    """What a scope of a world learns from: the facts for training and those that stay, of all of its tasks, in training
    phrasings about training images; and the text-only facts."""
    world, rng = WORLDS[name], Random(f"{name} scope")
    images, found = world.showing("train"), []
    for task in (task for of, task in _PLANS if of == name):
        split, stays = split_facts(name, task)
        for fact in [*split["train"], *stays]:
            shown = rng.sample(images[fact.shown], _WORDINGS)
            prompts = rng.sample(fact.train, len(fact.train))
            wordings = [Sample(prompt, "", image) for prompt, image in zip(cycle(prompts), shown, strict=False)]
            found.append(training.Fact(wordings))
    text = [items for items in world.text_facts("train") if len(items) > 1]
    for items in rng.sample(text, _TEXT_FACTS):
        found.append(training.Fact([Sample(prompt, "") for prompt, _ in items]))
    return found


def _wrong(model: nn.Module, processor: Any, requests: list[Request]) -> list[Request]:
    """Those that the model answers wrongly, with what it says."""
    said = answers(model, processor, [r.case.request for r in requests])
    told = (replace(r, wrong=answer) for r, answer in zip(requests, said, strict=True))
    return [r for r in told if r.wrong and r.wrong != r.case.request.answer]
