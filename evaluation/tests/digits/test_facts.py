"""The facts, phrasings and training samples: what is taught stays apart from what is not."""

import subprocess
import sys

import pytest
from unike_eval.toy import digits

KINDS = list(dict.fromkeys(fact.kind for fact in digits.FACTS))


def test_facts_cover_every_kind_and_digit():
    assert len(digits.FACTS) == 10 * len(KINDS) == len({(fact.kind, fact.shown) for fact in digits.FACTS})
    assert sum(fact.task == "vqa" for fact in digits.FACTS) >= 60
    assert all(1 <= len(fact.answer.split()) <= 4 for fact in digits.FACTS)


def test_at_least_a_fifth_is_withheld_across_kinds_and_digits():
    withheld = digits.facts(withheld=True)
    assert len(withheld) >= 25
    assert len(withheld) / len(digits.FACTS) >= 0.2
    assert {fact.kind for fact in withheld} == set(KINDS)
    assert {fact.shown for fact in withheld} == set(range(10))
    for kind in KINDS:
        assert 2 <= sum(fact.kind == kind for fact in withheld) <= 3


def test_facts_filters():
    assert {fact.task for fact in digits.facts("caption")} == {"caption"}
    assert set(digits.facts(withheld=True)) | set(digits.facts(withheld=False)) == set(digits.FACTS)
    assert not set(digits.facts(withheld=True)) & set(digits.facts(withheld=False))


def test_phrasings_are_distinct_over_kinds_and_splits():
    prompts = [p for kind in KINDS for split in ("train", "held_out") for p in digits.phrasings(kind, split)]
    assert len(prompts) == len(set(prompts))
    assert all(len(digits.phrasings(kind)) >= 4 and len(digits.phrasings(kind, "held_out")) >= 2 for kind in KINDS)
    assert digits.phrasings("which")[0] == "question: which digit is this ? answer:"


def test_phrasings_errors():
    with pytest.raises(ValueError, match="which, parity"):
        digits.phrasings("colour")
    with pytest.raises(ValueError, match="held_out"):
        digits.phrasings("which", "test")


def test_text_items_are_disjoint_and_answered_alike():
    train, test = digits.text_items("train"), digits.text_items("test")
    assert len(dict(train)) == len(train)
    assert len(dict(test)) == len(test) >= 100
    assert not dict(train).keys() & dict(test).keys()
    assert dict(train)["question: what is nine plus eight ? answer:"] == "seventeen"


def test_import_needs_neither_transformers_nor_sklearn():
    code = "import sys, unike_eval.toy.digits; print({'transformers', 'sklearn'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
