"""What editing systems are compared on: requests to learn from, to choose settings on, and to be measured on."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from unike_kernels.training import Fact, Sample, Triplet

from .metrics import Case

Task = Literal["vqa", "caption"]


@dataclass(frozen=True)
class Request:
    """An edit to be made.

    Attributes:
        id: of the request in its suite.
        task: "vqa" or "caption".
        case: the edit, and what is measured around it.
        wrong: what the model says instead.
        about: metric -> for each of its samples the id of the request that asks for the same fact, "" for none. Where
            that one is edited, too, the sample says nothing about what an edit leaves alone.
    """

    id: str
    task: Task
    case: Case
    wrong: str
    about: Mapping[str, Sequence[str]] = field(default_factory=dict)
    subject: str = ""

    def apart(self, edited: Collection[str]) -> dict[str, list[int]]:
        """Metric -> which of its samples are not about facts of other edited requests."""
        others = set(edited) - {self.id}
        found = {}
        for name, samples in self.case.groups().items():
            about = self.about.get(name, [""] * len(samples))
            found[name] = [i for i, id in enumerate(about) if id not in others]
        return found

    @property
    def triplet(self) -> Triplet:
        """The request as a piece of in-context knowledge."""
        sample = self.case.request
        return Triplet(sample.prompt, sample.answer, self.wrong, sample.image)


@dataclass(frozen=True)
class Suite:
    """The requests of one task, split; no two splits share a request, a rephrasing, an image or a withheld fact.

    Attributes:
        name: of the suite and the task.
        train: for the memory, the encoders, hypernetworks and classifiers.
        validation: for choosing settings.
        test: for the figures that are reported.
        preserve: questions that the model answers, on which training may hold it; none of them is measured.
        facts: for training, each asked for in several ways, from which a scope learns to tell facts apart.
        ended: edits are trained to end the model's turn after their answer, without which generated answers may go on;
            in the paper's worlds they are not.
    """

    name: str
    train: Sequence[Request]
    validation: Sequence[Request]
    test: Sequence[Request]
    preserve: Sequence[Sample]
    facts: Sequence[Fact] = ()
    ended: bool = False

    def subjects(self) -> dict[str, str]:
        """Prompt of a request -> its subject, where that is known."""
        requests = [*self.train, *self.validation, *self.test]
        return {r.case.request.prompt: r.subject for r in requests if r.subject}

    def __post_init__(self) -> None:
        ids = [r.id for split in (self.train, self.validation, self.test) for r in split]
        twice = sorted({i for i in ids if ids.count(i) > 1}) if len(set(ids)) < len(ids) else []
        if twice:
            raise ValueError(f"{self.name}: request ids must be unique, these are not: {', '.join(twice[:5])}")
