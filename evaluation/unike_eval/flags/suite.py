"""The suite of flags: facts about countries that a picture names, in the words of the suite of countries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from unike_kernels.training.samples import Sample

from ..countries import Fact, codes, prompts, split_facts
from ..countries.facts import Relation
from ..countries.suite import NEAR, Asked, fact_suite
from ..countries.wordings import Split
from ..suite import Suite
from .model import IMAGE
from .pictures import HELD_OUT, TRAINED, VENDORS, Vendor, emoji, flag
from .things import THINGS

_THINGS = 3  # of a request
_LEARNED = 6  # questions about a fact that a scope learns from
RELATIONS: tuple[Relation, ...] = ("name", "capital", "continent", "currency")
_DRAWN_BY: dict[Split, tuple[Vendor, ...]] = {"train": TRAINED, "validation": ("openmoji",), "test": (HELD_OUT,)}


def flag_facts() -> dict[Split, list[Fact]]:
    """Of each split's countries what the model is asked: the name too. No two splits have a country in common."""
    found = {}
    for split, of in split_facts().items():
        known = {fact.country: [Fact(fact.country, "name", fact.country)] for fact in of}
        for fact in of:
            known[fact.country].append(fact)
        found[split] = [fact for facts in known.values() for fact in facts if fact.relation in RELATIONS]
    return found


@cache
def look_alikes(country: str) -> tuple[str, ...]:
    """All other countries, those whose flags look most like this one's first: by the means of 16 x 16 places."""
    others = [other for other in codes() if other != country]
    coarse = {name: _coarse(name) for name in (country, *others)}
    return tuple(sorted(others, key=lambda other: float((coarse[other] - coarse[country]).norm())))


@cache
def _coarse(country: str) -> Tensor:
    return F.adaptive_avg_pool2d(flag(codes()[country], "flag-icons").float(), 16)


class Shown(Asked):
    """In a text in which the country's flag stands in the place of its name.

    A request of the test, its rephrasings and what is near are drawn by the vendor whose drawings no training has seen.
    """

    @override
    def samples(self, fact: Fact) -> list[Sample]:
        words = prompts(replace(fact, country=IMAGE), self.split, self.processor.tokenizer)
        drawn = [flag(codes()[fact.country], vendor) for vendor in _DRAWN_BY[self.split]]
        return [Sample(each, "", picture) for each, picture in zip(words, cycle(drawn), strict=False)]

    @override
    def learned(self, fact: Fact) -> list[Sample]:
        """Some: the model has to look at them all."""
        return self.rng.sample(self.samples(fact), _LEARNED)

    @override
    def neighbours(self, fact: Fact, others: Sequence[Fact]) -> list[Fact]:
        """Half of them look alike, half are any."""
        order = look_alikes(fact.country)
        alike = sorted(others, key=lambda other: order.index(other.country))
        return alike[: NEAR // 2] + self.rng.sample(alike[NEAR // 2 :], NEAR - NEAR // 2)

    @override
    def pictures(self, fact: Fact, request: Sample) -> dict[str, tuple[Sample, ...]]:
        """The same flag by the other vendors; and things in place of the flag."""
        drawn = [replace(request, image=flag(codes()[fact.country], vendor)) for vendor in VENDORS]
        others = tuple(sample for sample in drawn if not torch.equal(sample.image, request.image))
        things = self.rng.sample(sorted(THINGS), _THINGS)
        words = f"This is a picture of a {IMAGE}. It shows a"
        unrelated = tuple(Sample(words, thing, emoji(THINGS[thing], HELD_OUT)) for thing in things)
        return {"images": others, "image_locality": unrelated}


def flags_suite(model: nn.Module, processor: Any) -> Suite:
    """The suite for the model of `unike_eval.flags.model`: `countries.suite.fact_suite` with flags for names.

    M-generality is about the other vendors' drawings of the request's flag, M-locality about things; half of what is
    near are the flags that look most like the request's.
    """
    return fact_suite("flags", model, processor, flag_facts(), Shown)
