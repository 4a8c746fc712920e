"""The built-in suite: enough requests, real mistakes, and splits that share nothing that they must not."""

import pytest

from unike_kernels import digits
from unike_kernels.evaluation.digits_suite import digits_suite, split_facts

TASKS = ("vqa", "caption")


@pytest.fixture(scope="module", params=TASKS)
def suite(request):
    return digits_suite(request.param, digits.load_model("llama"), digits.load_processor())


def picture(sample):
    return sample.image.numpy().tobytes()


def questions(request):
    case = request.case
    return [case.request, *case.rephrasings, *case.images]


def test_enough_requests_that_the_model_gets_wrong(suite):
    assert len(suite.test) >= 200
    assert len(suite.validation) >= 30
    for request in [*suite.test, *suite.validation, *suite.train]:
        assert request.wrong
        assert request.wrong != request.case.request.answer
    assert len(suite.test[0].case.rephrasings) == len(suite.test[0].case.images) == 3


def test_splits_share_no_image(suite):
    seen = [
        {picture(s) for r in split for s in (*questions(r), *r.case.image_locality)}
        for split in (suite.train, suite.validation, suite.test)
    ]
    assert not seen[0] & seen[1]
    assert not seen[0] & seen[2]
    assert not seen[1] & seen[2]
    assert {picture(s) for s in suite.preserve if s.image is not None}.isdisjoint(seen[1] | seen[2])


def test_training_sees_no_rephrasing_of_the_others(suite):
    taught = {s.prompt for r in suite.train for s in questions(r)} | {s.prompt for s in suite.preserve}
    measured = {s.prompt for r in [*suite.validation, *suite.test] for s in r.case.rephrasings}
    assert not taught & measured
    texts = {s.prompt for r in [*suite.validation, *suite.test] for s in r.case.text_locality}
    assert not texts & {s.prompt for r in suite.train for s in r.case.text_locality}


@pytest.mark.parametrize("task", TASKS)
def test_facts_are_split(task):
    split, plain = split_facts(task)
    of = {name: {(f.kind, f.digit) for f in facts} for name, facts in split.items()}
    of["plain"] = {(f.kind, f.digit) for f in plain}
    everything = [pair for pairs in of.values() for pair in pairs]
    assert len(everything) == len(set(everything)) == len(digits.facts(task))
    true = {(f.kind, f.digit): f.answer for f in digits.facts(task)}
    for facts in split.values():
        for fact in facts:
            assert (fact.answer == true[fact.kind, fact.digit]) == fact.withheld
    assert all(not f.withheld for f in plain)
    assert any(f.withheld for f in split["test"])
    assert any(f.withheld for f in split["train"])


def test_locality_is_measured_on_what_no_request_changes(suite):
    changed = {
        (f.kind, f.digit)
        for facts in split_facts("vqa" if "vqa" in suite.name else "caption")[0].values()
        for f in facts
    }
    prompts = {p: f.kind for f in digits.FACTS for p in digits.phrasings(f.kind)}
    pixels, labels = digits.images("test")
    shown = {image.numpy().tobytes(): int(label) for image, label in zip(pixels, labels, strict=True)}
    for request in suite.test:
        own = shown[picture(request.case.request)]
        for sample in request.case.image_locality:
            kind, digit = prompts[sample.prompt], shown[picture(sample)]
            assert (kind, digit) not in changed
            assert digit != own


def test_the_same_every_time(suite):
    task = suite.name.removeprefix("digits-")
    again = digits_suite(task, digits.load_model("llama"), digits.load_processor())
    assert [(r.id, r.wrong, r.case.request.prompt) for r in again.test] == [
        (r.id, r.wrong, r.case.request.prompt) for r in suite.test
    ]


def test_another_task():
    with pytest.raises(ValueError, match="task: expected one of vqa, caption; got 'ocr'"):
        digits_suite("ocr", None, None)
