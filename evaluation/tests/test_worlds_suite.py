"""The built-in suite: enough requests, real mistakes, and splits that share nothing that they must not."""

import pytest
from unike_eval.builtin_suite import WORLDS, split_facts, world_suite

SUITES = (("digits", "vqa"), ("digits", "caption"), ("easyvqa", "vqa"))


def made(name):
    world, task = name.split("-")
    return world_suite(world, task, WORLDS[world].load_model("llama"), WORLDS[world].load_processor())


@pytest.fixture(scope="module", params=map("-".join, SUITES))
def suite(request):
    return made(request.param)


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
    case = suite.test[0].case
    assert (len(case.rephrasings), len(case.images)) == (2 if suite.name == "easyvqa-vqa" else 3, 3)


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


def key(fact):
    return fact.kind, fact.subject, fact.shown


@pytest.mark.parametrize(("world", "task"), SUITES)
def test_facts_are_split(world, task):
    split, plain = split_facts(world, task)
    true = {key(f): f for f in WORLDS[world].FACTS if f.task == task}
    everything = [key(f) for f in [*split["train"], *split["validation"], *split["test"], *plain]]
    assert len(everything) == len(set(everything))
    assert set(everything) <= set(true)
    if world == "digits":  # whose facts are few enough to use each
        assert set(everything) == set(true)
    for facts in split.values():
        for fact in facts:
            assert (fact.answer == true[key(fact)].answer) == fact.withheld
    assert all(f == true[key(f)] and not f.withheld for f in plain)
    withheld = {name: {(f.kind, f.subject) for f in facts if f.withheld} for name, facts in split.items()}
    assert withheld["test"] and withheld["train"]
    assert not withheld["test"] & (withheld["train"] | withheld["validation"])
    assert not withheld["train"] & withheld["validation"]


def test_locality_is_measured_on_what_no_request_changes(suite):
    world, task = suite.name.split("-")
    changed = {key(f) for facts in split_facts(world, task)[0].values() for f in facts}
    facts = {(p, f.shown): f for f in WORLDS[world].FACTS for p in f.train}
    showing = WORLDS[world].showing("test")
    shown = {image.numpy().tobytes(): name for name, images in showing.items() for image in images}
    for request in suite.test:
        own = shown[picture(request.case.request)]
        for sample in request.case.image_locality:
            fact = facts[sample.prompt, shown[picture(sample)]]
            assert key(fact) not in changed
            assert sample.answer == fact.answer
            assert fact.shown != own


def test_a_scope_learns_from_nothing_that_is_measured(suite):
    world, _ = suite.name.split("-")
    measured = [r for split in (suite.validation, suite.test) for r in split]
    images = {picture(s) for r in measured for s in (*questions(r), *r.case.image_locality)}
    prompts = {s.prompt for r in measured for s in (*r.case.rephrasings, *r.case.text_locality)}
    changed = {
        key(fact)
        for of, task in SUITES
        if of == world
        for name in ("validation", "test")
        for fact in split_facts(world, task)[0][name]
    }
    known = {(p, f.shown): key(f) for f in WORLDS[world].FACTS for p in f.train}
    training = WORLDS[world].showing("train")
    shown = {image.numpy().tobytes(): name for name, images in training.items() for image in images}
    found = []
    for fact in suite.facts:
        assert prompts.isdisjoint(s.prompt for s in fact.wordings)
        pictures = [picture(s) for s in fact.wordings if s.image is not None]
        assert images.isdisjoint(pictures)
        asked = {known[s.prompt, shown[picture(s)]] for s in fact.wordings if s.image is not None}
        assert len(asked) == bool(pictures)  # its wordings ask for one fact, each with an image of its own
        assert len(set(pictures)) == len(pictures)
        assert not asked & changed
        found += asked
    assert len(found) == len(set(found)) > 40
    assert len(suite.facts) - len(found) == 60  # without images


def test_the_same_every_time(suite):
    assert [(r.id, r.wrong, r.case.request.prompt) for r in made(suite.name).test] == [
        (r.id, r.wrong, r.case.request.prompt) for r in suite.test
    ]


@pytest.mark.parametrize(("world", "task"), [("digits", "ocr"), ("easyvqa", "caption"), ("letters", "vqa")])
def test_another_task(world, task):
    expected = f"task: expected one of digits vqa, digits caption, easyvqa vqa; got {world} {task}"
    with pytest.raises(ValueError, match=expected):
        world_suite(world, task, None, None)
