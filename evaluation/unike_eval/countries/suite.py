"""The suite of countries: correcting what a real language model says about them, and telling it otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

from torch import nn

from unike_kernels.training.samples import Sample

from ..answers import answers
from ..metrics import Case
from ..suite import Request, Suite
from .elsewhere import FAR, TEXT, halves
from .facts import Fact, facts
from .wordings import Split, prompts

_COUNTRIES: dict[Split, slice] = {"train": slice(100), "validation": slice(100, 121), "test": slice(121, None)}
_NEAR = 6  # neighbours of a request: the same relation of other countries
_FAR, _TEXT = 4, 2
_WORDINGS = 8  # that a fact of the training split is asked for in


def split_facts() -> dict[Split, list[Fact]]:
    """All facts; no two splits have a country in common."""
    names = sorted({fact.country for fact in facts()})
    Random(0).shuffle(names)
    return {split: [f for f in facts() if f.country in names[part]] for split, part in _COUNTRIES.items()}


def countries_suite(model: nn.Module, tokenizer: Any) -> Suite:
    """The suite for a model.

    Each fact is a request once: in one wording, with the right answer if the model says another one, else with that of
    another country (a counterfactual). Its rephrasings are the split's other wordings; near are facts of the same
    relation and other countries, the subject's are the country's other facts, both in any wording of the split; far are
    questions about other things, and free text. No split shares a country or a wording with another.

    Args:
        model: a language model, see `unike_eval.models.smollm2`.
        tokenizer: its tokenizer.
    """
    split = {name: list(_requests(name, of, model, tokenizer)) for name, of in split_facts().items()}
    kept = [s for r in split["train"] for s in (r.case.request,) if r.wrong.startswith(s.answer)]
    return Suite("countries", **split, preserve=[*kept, *halves(FAR)["validation"]])


def _requests(split: Split, of: Sequence[Fact], model: nn.Module, tokenizer: Any) -> Iterator[Request]:
    rng = Random(f"countries {split}")
    worded = {fact: prompts(fact, split, tokenizer) for fact in of}
    asked = {fact: rng.sample(words, min(len(words), _WORDINGS)) for fact, words in worded.items()}
    said = answers(model, tokenizer, [Sample(words[0], "") for words in asked.values()])

    def other(fact: Fact) -> Sample:
        return Sample(rng.choice(worded[fact]), fact.answer)

    half: Split = "validation" if split == "train" else split
    for (fact, (prompt, *rest)), found in zip(asked.items(), said, strict=True):
        right = found.lower().startswith(fact.answer.lower())
        choices = sorted({f.answer for f in of if f.relation == fact.relation} - {fact.answer})
        wanted = rng.choice(choices) if right else fact.answer
        neighbours = [f for f in of if f.relation == fact.relation and f != fact]
        case = Case(
            Sample(prompt, wanted),
            rephrasings=tuple(Sample(words, wanted) for words in rest),
            text_locality=(*rng.sample(halves(FAR)[half], _FAR), *rng.sample(halves(TEXT)[half], _TEXT)),
            near_locality=tuple(map(other, rng.sample(neighbours, _NEAR))),
            subject_locality=tuple(other(f) for f in of if f.country == fact.country and f != fact),
        )
        yield Request(f"{split}-{fact.country}-{fact.relation}", "vqa", case, wrong=found.split("\n")[0].strip())
