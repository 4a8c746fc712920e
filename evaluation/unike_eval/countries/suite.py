"""The suite of countries: correcting what a real language model says about them, and telling it otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import Any

from torch import nn

from unike_kernels import training
from unike_kernels.training.samples import Sample

from ..answers import answers
from ..metrics import Case
from ..suite import Request, Suite
from .elsewhere import FAR, TEXT, of_split
from .facts import Fact, facts
from .wordings import Split, prompts

_COUNTRIES: dict[Split, slice] = {"train": slice(100), "validation": slice(100, 121), "test": slice(121, None)}
NEAR = 6  # neighbours of a request: the same relation of other countries
_FAR, _TEXT = 4, 2
_WORDINGS = 8  # that a fact of the training split is asked for in


def split_facts() -> dict[Split, list[Fact]]:
    """All facts; no two splits have a country in common."""
    names = sorted({fact.country for fact in facts()})
    Random(0).shuffle(names)
    return {split: [f for f in facts() if f.country in names[part]] for split, part in _COUNTRIES.items()}


class Asked:
    """How facts of a split are asked for: in a text that names the country.

    Args:
        split: whose words.
        processor: of the model, for its chat template.
    """

    def __init__(self, split: Split, processor: Any) -> None:
        self.split, self.processor, self.rng = split, processor, Random(f"countries {split}")

    def samples(self, fact: Fact) -> list[Sample]:
        """A question for each wording, without its answer."""
        return [Sample(words, "") for words in prompts(fact, self.split, self.processor)]

    def learned(self, fact: Fact) -> list[Sample]:
        """The questions from which a scope learns what the fact is."""
        return self.samples(fact)

    def neighbours(self, fact: Fact, others: Sequence[Fact]) -> list[Fact]:
        """Those of the others that are told to be near."""
        return self.rng.sample(others, NEAR)

    def pictures(self, fact: Fact, request: Sample) -> dict[str, tuple[Sample, ...]]:
        """Metrics of a `Case` that are about pictures, and what they are measured on: text has none."""
        return {}


def countries_suite(model: nn.Module, tokenizer: Any) -> Suite:
    """The suite for a language model, see `unike_eval.models.smollm2`, and its tokenizer; see `fact_suite`."""
    return fact_suite("countries", model, tokenizer, split_facts(), Asked)


def fact_suite(
    name: str, model: nn.Module, processor: Any, split: Mapping[Split, Sequence[Fact]], asked: type[Asked]
) -> Suite:
    """The suite of facts for a model.

    Each fact is a request once: in one wording, with the right answer if the model says another one, else with that of
    another country (a counterfactual). Of the facts for training that the model knows, half are no requests but what is
    preserved. Rephrasings are the split's other wordings; near are facts of the same relation and other countries, the
    subject's are the country's other facts, both in any wording of the split; far are questions about other things, and
    free text. No two splits share any of these.

    Args:
        name: of the suite.
        model: that is asked what it knows.
        processor: its processor or tokenizer.
        split: the facts of each.
        asked: how they are asked for.
    """
    preserve = list(of_split(FAR, "train"))
    requests = {part: list(_requests(asked(part, processor), of, model, preserve)) for part, of in split.items()}
    learning = asked("train", processor)
    known = [training.Fact(learning.learned(fact), fact.country, fact.relation) for fact in split["train"]]
    return Suite(name, requests["train"], requests["validation"], requests["test"], preserve, known, ended=True)


def _requests(asked: Asked, of: Sequence[Fact], model: nn.Module, preserve: list[Sample]) -> Iterator[Request]:
    """Half of what the model is right about in training is no request, but goes to what is preserved."""
    split, rng = asked.split, asked.rng
    worded = {fact: asked.samples(fact) for fact in of}
    chosen = {fact: rng.sample(samples, min(len(samples), _WORDINGS)) for fact, samples in worded.items()}
    said = answers(model, asked.processor, [samples[0] for samples in chosen.values()])

    def other(fact: Fact) -> Sample:
        return replace(rng.choice(worded[fact]), answer=fact.answer)

    for (fact, (first, *rest)), found in zip(chosen.items(), said, strict=True):
        right = found.lower().startswith(fact.answer.lower())
        if right and split == "train" and rng.random() < 0.5:
            preserve.append(replace(first, answer=fact.answer))
            continue
        choices = sorted({f.answer for f in of if f.relation == fact.relation} - {fact.answer})
        wanted = rng.choice(choices) if right else fact.answer
        far = (*rng.sample(of_split(FAR, split), _FAR), *rng.sample(of_split(TEXT, split), _TEXT))
        neighbours = asked.neighbours(fact, [f for f in of if f.relation == fact.relation and f != fact])
        siblings = [f for f in of if f.country == fact.country and f != fact]
        request = replace(first, answer=wanted)
        case = Case(
            request,
            rephrasings=tuple(replace(sample, answer=wanted) for sample in rest),
            text_locality=far,
            near_locality=tuple(map(other, neighbours)),
            subject_locality=tuple(map(other, siblings)),
            **asked.pictures(fact, request),
        )
        about = {
            "near_locality": [_id(split, f) for f in neighbours],
            "subject_locality": [_id(split, f) for f in siblings],
        }
        yield Request(_id(split, fact), "vqa", case, found.split("\n")[0].strip(), about, fact.country)


def _id(split: Split, fact: Fact) -> str:
    return f"{split}-{fact.country}-{fact.relation}"
