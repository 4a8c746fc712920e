"""Training samples of both worlds: what is withheld is never asked for, nor told in an example."""

from collections import Counter
from random import Random

import pytest
from unike_eval.toy import digits, shapes
from unike_eval.toy.samples import Samples


@pytest.mark.parametrize("world", [digits, shapes])
def test_samples_never_reveal_a_withheld_fact_or_a_held_out_prompt(world):
    taught = [fact for fact in world.FACTS if not fact.withheld]
    asked = {(prompt, fact.shown): fact for fact in taught for prompt in fact.train}
    kind_of = {prompt: fact.kind for fact in world.FACTS for prompt in fact.train}
    # An answer that a kind of question has in withheld facts alone.
    revealing = {(f.kind, f.answer) for f in world.FACTS if f.withheld} - {(f.kind, f.answer) for f in taught}
    text = dict(world.text_items("train"))
    samples, rng = Samples(world), Random(1)
    contradictions = 0
    for number in range(2000):
        sample = samples.draw(rng, examples=number % 7)
        *examples, prompt = sample.prompt.split("\n")
        if sample.shown is None:
            assert text[prompt] == sample.answer
        else:
            fact = asked[prompt, sample.shown]
            assert (fact.kind, sample.answer) not in revealing
            if sample.answer != fact.answer:
                assert [line for line in examples if line in {f"{p} {sample.answer}" for p in fact.train}]
                contradictions += 1
        for line in examples:
            matches = [prompt for prompt in (*kind_of, *text) if line.startswith(prompt + " ")]
            prompt = max(matches, key=len)
            answer = line[len(prompt) + 1 :]
            assert text.get(prompt) == answer or (kind_of[prompt], answer) not in revealing
    assert contradictions > 100


def test_kinds_and_answers_are_drawn_as_often_as_each_other():
    facts = Samples(shapes).taught
    kinds = Counter(fact.kind for fact in facts)
    assert max(kinds.values()) < 1.2 * min(kinds.values())
    answers = Counter((fact.subject, fact.answer) for fact in facts if fact.kind == "presence")
    for subject in ("black", "teal", "triangle"):
        assert answers[subject, "yes"] == answers[subject, "no"]
    assert sorted(Samples(digits).taught, key=repr) == sorted(digits.facts(withheld=False), key=repr)


@pytest.mark.parametrize("world", [digits, shapes])
def test_every_fact_can_be_shown(world):
    for split in ("train", "validation", "test"):
        showing = world.showing(split)
        assert {fact.shown for fact in world.FACTS} == set(showing)
        assert min(map(len, showing.values())) >= 4  # a request, and three other images
    assert {i.numpy().tobytes() for images in world.showing("validation").values() for i in images}.isdisjoint(
        i.numpy().tobytes() for images in world.showing("test").values() for i in images
    )
