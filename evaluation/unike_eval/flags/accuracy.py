"""What the model of flags knows before any edit."""

from __future__ import annotations

from typing import Any

from torch import nn

from unike_kernels.training.samples import Sample

from ..answers import answers
from ..countries import Fact, codes, prompts
from ..countries.facts import Relation
from ..countries.wordings import Split
from .model import IMAGE
from .pictures import HELD_OUT, Vendor, flag
from .suite import RELATIONS, flag_facts


def accuracy(
    model: nn.Module, processor: Any, relation: Relation, vendor: Vendor | None = HELD_OUT, split: Split = "test"
) -> float:
    """Share of all countries of which the model says the answer, greedily, each asked for in one of a split's wordings.

    Right is what begins with the answer, whatever the case of its letters.

    Args:
        model: of `load_flags`.
        processor: the model's.
        relation: what is asked.
        vendor: whose drawings are shown; None: the country's name is written instead.
        split: whose wordings.
    """
    facts = [fact for of in flag_facts().values() for fact in of if fact.relation == relation]
    asked = []
    for number, fact in enumerate(facts):
        subject = fact.country if vendor is None else IMAGE
        words = prompts(Fact(subject, relation, ""), split, processor.tokenizer)
        image = None if vendor is None else flag(codes()[fact.country], vendor)
        asked.append(Sample(words[number % len(words)], "", image))
    said = answers(model, processor, asked, max_new_tokens=10)
    return sum(s.lower().startswith(f.answer.lower()) for s, f in zip(said, facts, strict=True)) / len(facts)


def accuracies(model: nn.Module, processor: Any) -> str:
    """Of the unedited model, as a table in Markdown."""
    lines = ["| asked | from a held-out drawing | from the name in text |", "| --- | --- | --- |"]
    for relation in RELATIONS:
        shown, written = (f"{accuracy(model, processor, relation, vendor):.1%}" for vendor in (HELD_OUT, None))
        lines.append(f"| {relation} | {shown} | {written} |")
    return "\n".join(lines) + "\n"
