"""The suite of countries: correcting what a real language model says about them, and telling it otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    another country (a counterfactual). Of the facts for training that the model knows, half are no requests but what is
    preserved. Rephrasings are the split's other wordings; near are facts of the same relation and other countries, the
    subject's are the country's other facts, both in any wording of the split; far are questions about other things, and
    free text. No two splits share any of these.

    Args:
        model: a language model, see `unike_eval.models.smollm2`.
        tokenizer: its tokenizer.
    """
    preserve = list(of_split(FAR, "train"))
    split = {name: list(_requests(name, of, model, tokenizer, preserve)) for name, of in split_facts().items()}
    asked = [
        training.Fact([Sample(words, "") for words in prompts(fact, "train", tokenizer)], fact.country, fact.relation)
        for fact in split_facts()["train"]
    ]
    return Suite("countries", split["train"], split["validation"], split["test"], preserve, asked, ended=True)


def _requests(
    split: Split, of: Sequence[Fact], model: nn.Module, tokenizer: Any, preserve: list[Sample]
) -> Iterator[Request]:
    """Half of what the model is right about in training is no request, but goes to what is preserved."""
    rng = Random(f"countries {split}")
    worded = {fact: prompts(fact, split, tokenizer) for fact in of}
    asked = {fact: rng.sample(words, min(len(words), _WORDINGS)) for fact, words in worded.items()}
    said = answers(model, tokenizer, [Sample(words[0], "") for words in asked.values()])

    def other(fact: Fact) -> Sample:
        return Sample(rng.choice(worded[fact]), fact.answer)

    for (fact, (prompt, *rest)), found in zip(asked.items(), said, strict=True):
        right = found.lower().startswith(fact.answer.lower())
        if right and split == "train" and rng.random() < 0.5:
            preserve.append(Sample(prompt, fact.answer))
            continue
        choices = sorted({f.answer for f in of if f.relation == fact.relation} - {fact.answer})
        wanted = rng.choice(choices) if right else fact.answer
        far = (*rng.sample(of_split(FAR, split), _FAR), *rng.sample(of_split(TEXT, split), _TEXT))
        neighbours = rng.sample([f for f in of if f.relation == fact.relation and f != fact], _NEAR)
        siblings = [f for f in of if f.country == fact.country and f != fact]
        case = Case(
            Sample(prompt, wanted),
            rephrasings=tuple(Sample(words, wanted) for words in rest),
            text_locality=far,
            near_locality=tuple(map(other, neighbours)),
            subject_locality=tuple(map(other, siblings)),
        )
        about = {
            "near_locality": [_id(split, f) for f in neighbours],
            "subject_locality": [_id(split, f) for f in siblings],
        }
        yield Request(_id(split, fact), "vqa", case, found.split("\n")[0].strip(), about, fact.country)


def _id(split: Split, fact: Fact) -> str:
    return f"{split}-{fact.country}-{fact.relation}"
