"""What the model of flags knows before any edit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from unike_kernels.training.samples import Sample

from ..answers import answers
from ..countries import Fact, codes, prompts
from ..countries.wordings import Split
from .model import IMAGE
from .pictures import HELD_OUT, Vendor, flag
from .suite import RELATIONS


def accuracy(
    model: nn.Module,
    processor: Any,
    facts: Sequence[Fact],
    vendor: Vendor | None = HELD_OUT,
    split: Split = "test",
) -> float:
    """Share of the facts that the model says, greedily: what is in front of the first stop or comma is the answer.

    Args:
        model: of `load_flags`.
        processor: the model's.
        facts: one or more; each is asked for once.
        vendor: whose drawings are shown; None: the country's name is written instead.
        split: whose wordings, which come in turn.
    """
    asked = []
    for number, fact in enumerate(facts):
        subject = fact.country if vendor is None else IMAGE
        words = prompts(Fact(subject, fact.relation, ""), split, processor.tokenizer)
        image = None if vendor is None else flag(codes()[fact.country], vendor)
        asked.append(Sample(words[number % len(words)], "", image))
    said = answers(model, processor, asked)
    right = [_answer(text) == fact.answer.casefold() for text, fact in zip(said, facts, strict=True)]
    return sum(right) / len(right)


def _answer(text: str) -> str:
    return re.split(r"[.,;\n]", text)[0].strip().casefold()


def accuracies(model: nn.Module, processor: Any, facts: Sequence[Fact]) -> str:
    """Of the unedited model in the test's wordings, as a table in Markdown."""
    lines = ["| asked | facts | from a held-out drawing | from the name in text |", "| --- | --- | --- | --- |"]
    for relation in RELATIONS:
        of = [fact for fact in facts if fact.relation == relation]
        shown, written = (f"{accuracy(model, processor, of, vendor):.1%}" for vendor in (HELD_OUT, None))
        lines.append(f"| {relation} | {len(of)} | {shown} | {written} |")
    return "\n".join(lines) + "\n"
