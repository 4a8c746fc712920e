"""The facts about coloured shapes."""

import subprocess
import sys
from collections import Counter

import easy_vqa
from unike_eval.toy import shapes


def test_every_kind_about_every_sort():
    assert len(shapes.SORTS) == 24
    assert Counter(fact.kind for fact in shapes.FACTS) == {"color": 24, "shape": 24, "presence": 264, "absence": 264}
    assert len({(f.kind, f.subject, f.shown) for f in shapes.FACTS}) == len(shapes.FACTS)


def test_answers_are_easy_vqas():
    """Every question of the package about an image of a known sort, with its answer there."""
    facts = {
        (body, fact.shown): fact.answer
        for fact in shapes.FACTS
        for prompt in (*fact.train, *fact.held_out)
        for body in [prompt.removeprefix("question: ").removesuffix(" ? answer:") + "?"]
    }
    from unike_eval.toy.shapes.data import _sorts

    questions = easy_vqa.get_test_questions()
    known = _sorts(*questions)
    asked = [(text, known[number], answer) for text, answer, number in zip(*questions, strict=True) if number in known]
    assert len(asked) > 8000
    assert all(facts[text, sort] == answer for text, sort, answer in asked)
    assert {text for text, _ in facts} == set(questions[0])


def test_subjects_are_withheld_whole():
    withheld = {(f.kind, f.subject) for f in shapes.FACTS if f.withheld}
    assert len(withheld) == 10
    for fact in shapes.FACTS:
        seen = str(fact.subject) in str(fact.shown).split()
        assert fact.withheld == ((fact.kind, fact.subject) in withheld and seen)


def test_held_out_wordings_are_in_no_training_prompt():
    trained = {prompt for fact in shapes.FACTS for prompt in fact.train}
    held_out = {prompt for fact in shapes.FACTS for prompt in fact.held_out}
    assert not trained & held_out
    assert len(trained | held_out) == 107


def test_import_needs_neither_transformers_nor_the_images():
    code = "import sys, unike_eval.toy.shapes; print({'transformers', 'sklearn', 'easy_vqa', 'PIL'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
