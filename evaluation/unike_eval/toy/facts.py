"""What a model is taught about images, and what is kept from it. Plain Python."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import Blip2ForConditionalGeneration

    from .processor import WorldProcessor

Task = Literal["vqa", "caption"]
Split = Literal["train", "held_out"]


@dataclasses.dataclass(frozen=True)
class Fact:
    """The answer to a question about images of one sort.

    Attributes:
        task: "vqa" or "caption".
        kind: of question.
        subject: what the question is about; facts of a kind about one subject are withheld together.
        shown: what the images show.
        answer: to every phrasing.
        withheld: never in training.
        train: full prompts that ask for it; the first is canonical.
        held_out: the like, of which no model is trained on any.
    """

    task: Task
    kind: str
    subject: Hashable
    shown: Hashable
    answer: str
    withheld: bool
    train: tuple[str, ...]
    held_out: tuple[str, ...]

    def phrasings(self, split: Split = "train") -> tuple[str, ...]:
        """The prompts of a split."""
        return self.train if split == "train" else self.held_out


class World(Protocol):
    """The facts of a world, and the models that know some of them; a module can be one."""

    @property
    def FACTS(self) -> tuple[Fact, ...]:  # noqa: N802
        """All facts."""

    def showing(self, split: Literal["train", "validation", "test"]) -> Mapping[Hashable, list[Tensor]]:
        """The images [H, W] or [3, H, W] of each sort; models are trained on those of "train" alone."""

    def text_items(self, split: Literal["train", "test"]) -> tuple[tuple[str, str], ...]:
        """Text-only prompts and their answers."""

    def text_facts(self, split: Literal["train", "test"]) -> tuple[tuple[tuple[str, str], ...], ...]:
        """The same, those of each fact together."""

    def load_model(self, name: str = "opt") -> Blip2ForConditionalGeneration:
        """The model with this decoder."""

    def load_processor(self, tokenizer_file: Path = ...) -> WorldProcessor:
        """The processor of its models."""


def question(body: str) -> str:
    """The template of every prompt but the captions': 'question: which digit is this ? answer:'."""
    return f"question: {body} ? answer:"
