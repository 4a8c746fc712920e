"""Order of edits, measurements and resets; means and their intervals."""

import pytest
import torch
from unike_eval import Case, Observation
from unike_eval.measure import estimate, measure
from unike_eval.suite import Request, Suite

from unike_kernels.training import Sample


def seen(said):
    return Observation(torch.tensor([[said]]), torch.tensor([True]), torch.tensor([1]), str(said), said == 1)


UNEDITED = seen(7)


class Recorder:
    """An editor that answers its edits and writes down what is asked of it."""

    independent = False

    def __init__(self, fails_at=None):
        self.log, self.edits, self.fails_at = [], [], fails_at

    def prepare(self, requests):
        self.log.append("prepare " + " ".join(r.answer for r in requests))

    def edit(self, request):
        if request.answer == self.fails_at:
            raise RuntimeError("out of ideas")
        self.log.append(f"edit {request.answer}")
        self.edits.append(request)

    def reset(self):
        self.log.append("reset")
        self.edits.clear()

    def observe(self, samples):
        return [seen(1 if s in self.edits else 7) for s in samples]


def requests(n):
    return [Request(f"r{i}", "vqa", Case(Sample("q", f"a{i}")), "wrong") for i in range(n)]


def unedited(n):
    return {f"r{i}": {"reliability": [UNEDITED]} for i in range(n)}


def test_one_step_takes_each_edit_back_before_the_next():
    editor = Recorder()
    rows = list(measure(editor, requests(10), unedited(10)))
    one_by_one = [line for i in range(10) for line in (f"edit a{i}", "reset")]
    assert editor.log == [
        "prepare " + " ".join(f"a{i}" for i in range(8)), *one_by_one[:16], "prepare a8 a9", *one_by_one[16:]
    ]  # fmt: skip
    assert [r.id for r in rows] == [f"r{i}" for i in range(10)]
    assert all(r.scores["unike"] == {"reliability": 1.0} and r.seconds >= 0 for r in rows)


def test_a_sequence_is_measured_with_all_of_its_edits_in_force():
    editor = Recorder()
    rows = list(measure(editor, requests(5), unedited(5), steps=2))
    assert editor.log == ["edit a0", "edit a1", "reset", "edit a2", "edit a3", "reset"]
    assert [r.scores["mmedit"]["reliability"] for r in rows] == [1.0] * 4  # the fifth has no sequence


def test_edits_that_do_not_meet_are_prepared_for_sequences_too():
    editor = Recorder()
    editor.independent = True
    list(measure(editor, requests(12), unedited(12), steps=6))
    edits = [f"edit a{i}" for i in range(12)]
    assert editor.log == [
        "prepare " + " ".join(f"a{i}" for i in range(8)), *edits[:6], "reset",
        *edits[6:8], "prepare a8 a9 a10 a11", *edits[8:], "reset",
    ]  # fmt: skip


def test_what_another_edit_of_the_sequence_is_about_is_left_out():
    near = tuple(Sample(f"near {i}", "x") for i in range(3))
    case = Case(Sample("q", "a0"), near_locality=near)
    about = {"near_locality": ["r1", "r0", "elsewhere"]}
    first, second = Request("r0", "vqa", case, "wrong", about), requests(2)[1]
    assert first.apart(["r0", "r1"])["near_locality"] == [1, 2]
    assert first.apart(["r0"])["near_locality"] == [0, 1, 2] and first.apart([])["reliability"] == [0]
    other = seen(3)
    said = {**unedited(2), "r0": {"reliability": [UNEDITED], "near_locality": [other, UNEDITED, UNEDITED]}}
    rows = list(measure(Recorder(), [first, second], said, steps=2))
    assert rows[0].scores["unike"] == rows[0].scores["generated"] == {"reliability": 1.0, "near_locality": 1.0}
    alone = list(measure(Recorder(), [first], said))
    assert alone[0].scores["unike"]["near_locality"] == pytest.approx(2 / 3)


def test_a_failed_edit_leaves_nothing_in_force():
    editor = Recorder(fails_at="a1")
    with pytest.raises(RuntimeError, match="out of ideas"):
        list(measure(editor, requests(2), unedited(2), steps=2))
    assert editor.log == ["edit a0", "reset"]


def test_estimate():
    e = estimate([0.0, 1.0, 1.0, 0.0])
    assert (e.mean, e.count) == (0.5, 4)
    assert e.half_width == pytest.approx(1.96 * (1 / 3) ** 0.5 / 2)
    assert str(estimate([0.5, 0.5])) == "50.0 ± 0.0"
    assert estimate([1.0]).half_width == float("inf")
    with pytest.raises(ValueError, match="at least one"):
        estimate([])


def test_request_ids_are_unique():
    with pytest.raises(ValueError, match="request ids must be unique, these are not: r0"):
        Suite("twice", requests(1), [], requests(2), [])
