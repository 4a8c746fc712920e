"""Requests on a model of one's own: in one call, resumed, and by the command."""

from __future__ import annotations

import json

import pytest
from unike_eval import METRICS, PROTOCOLS, Case, evaluate, observe_case, read_requests, score
from unike_eval.editors import FineTune
from unike_eval.measure import Measured
from unike_eval.results import Results
from unike_eval.suite import Request

import unike_kernels as uk
from unike_kernels.cli import main
from unike_kernels.patching import is_patched
from unike_kernels.training import EditTraining, Sample, train_edits


def requests(n):
    """Each with something for all metrics of text."""
    return [
        Request(
            f"r{i}", "vqa",
            Case(
                Sample(f"w{i} w1 w2", f"w{i + 9}"),
                rephrasings=(Sample(f"w2 w{i}", f"w{i + 9}"),),
                text_locality=(Sample("w30 w31", "w32"),),
                near_locality=(Sample(f"w{i + 20} w1 w2"),),  # without an answer
                portability=(Sample(f"w{i + 9} w5", "w6"),),
            ),
            "w3",
        )
        for i in range(n)
    ]  # fmt: skip


@pytest.fixture
def setting(make_model, processor):
    return make_model("llama"), processor


def brief(model, processor):
    return FineTune(model, processor, steps=3)


def test_trained_edits_are_measured_as_by_hand(setting):
    model, processor = setting
    asked = requests(3)
    results = train_edits(
        model, processor, [r.case.request for r in asked], None, ids=[r.id for r in asked],
        training=EditTraining(steps=8), progress=False,
    )  # fmt: skip
    edits = [result.edit for result in results][::-1]
    found = evaluate(model, processor, asked, edits, progress=False)
    assert [row.id for row in found.rows] == ["r0", "r1", "r2"]
    before = observe_case(model, processor, asked[1].case)
    with uk.patched(model, [edits[1]]):
        after = observe_case(model, processor, asked[1].case)
    assert found.rows[1].scores == {protocol: score(before, after, protocol) for protocol in PROTOCOLS}
    together = evaluate(model, processor, asked, edits, steps=3, progress=False)
    assert together.rows != found.rows and len(together.rows) == 3
    with pytest.raises(ValueError, match="edits: expected one with the id of each request, got none for r0"):
        evaluate(model, processor, asked, edits[:2])


def test_without_edits_neurons_are_trained(setting):
    model, processor = setting
    found = evaluate(model, processor, requests(2), progress=False)
    assert found.figures("unike")["reliability"].mean == 1
    assert not is_patched(model)


def test_what_is_told(setting):
    found = evaluate(*setting, requests(2), brief(*setting), progress=False)
    of = found.figures()
    assert list(of) == ["reliability", "t_generality", "t_locality", "near_locality", "portability", "mean"]
    assert of["mean"].mean == pytest.approx(sum(of[m].mean for m in list(of)[:4]) / 4)  # without portability
    assert list(found.figures("unike")) == ["reliability", "t_generality", "t_locality", "portability", "mean"]
    lines = str(found).splitlines()
    assert lines[0].startswith("| protocol | reliability | t_generality | t_locality | near_locality | portability |")
    assert [line.split(":")[0] for line in lines[2:6]] == [f"| {protocol}" for protocol in PROTOCOLS]
    assert lines[-1].startswith("2 requests, ")
    with pytest.raises(ValueError, match=r"protocol: expected one of generated, .* got 'vqa'"):
        found.figures("vqa")


def test_a_second_run_goes_on(setting, tmp_path, monkeypatch, capsys):
    model, processor = setting
    asked, edits = requests(4), []
    original = FineTune.edit
    monkeypatch.setattr(FineTune, "edit", lambda self, request: (edits.append(request), original(self, request)))
    whole = evaluate(model, processor, asked, brief(*setting), progress=False)
    add = Results.add

    def interrupted(self, measured):
        if len(self.rows) == 2:
            raise KeyboardInterrupt
        add(self, measured)

    monkeypatch.setattr(Results, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, processor, asked, brief(*setting), out=tmp_path, progress=False)
    monkeypatch.setattr(Results, "add", add)
    edits.clear()
    resumed = evaluate(model, processor, asked, brief(*setting), out=tmp_path, progress=False)
    assert len(edits) == 2
    assert [(r.id, r.scores) for r in resumed.rows] == [(r.id, r.scores) for r in whole.rows]
    assert evaluate(model, processor, asked, brief(*setting), out=tmp_path).rows == resumed.rows
    assert len(edits) == 2 and len((tmp_path / "evaluation.jsonl").read_text().splitlines()) == 1 + 4
    for changed in (requests(3), brief(model, processor)):
        given = (changed, brief(*setting)) if isinstance(changed, list) else (asked, FineTune(*setting, steps=4))
        with pytest.raises(ValueError, match=r"holds results of .* give another folder"):
            evaluate(model, processor, *given, out=tmp_path)


def test_what_cannot_be_evaluated(setting, make_memory):
    model, processor = setting
    for steps in (0, 3):
        with pytest.raises(ValueError, match=f"steps: expected 1 to 2, as there are so many requests; got {steps}"):
            evaluate(model, processor, requests(2), steps=steps)
    with pytest.raises(ValueError, match="requests: expected distinct ids, got 'r0' twice"):
        evaluate(model, processor, [*requests(2), *requests(1)])
    with pytest.raises(ValueError, match="memory: expected trained edits with it"):
        evaluate(model, processor, requests(1), memory=make_memory(model))


ROWS = [
    {
        "id": f"q{i}", "prompt": f"question: what is {a} plus 1 ? answer:", "target_new": b, "ground_truth": [["c"]],
        "rephrase_prompt": f"question: 1 plus {a} ? answer:",
        "portability": {"Reasoning": [{"prompt": f"question: {a} ? answer:", "ground_truth": [[b]]}]},
        "locality": {"Relation_Specificity": [{"prompt": "question: what is red ? answer:", "ground_truth": "red"}]},
    }
    for i, (a, b) in enumerate((("two", "nine"), ("four", "one"), ("six", "two")))
]  # fmt: skip


def test_the_command(tmp_path, capsys):
    data = tmp_path / "knowedit.json"
    data.write_text(json.dumps(ROWS))
    command = ["eval", "--data", str(data), "--model", "digits-opt", "--out", str(tmp_path / "out")]
    assert main([*command, "--systems", "FT", "UniKE", "--requests", "2"]) == 0
    text = (tmp_path / "out" / "evaluation.md").read_text()
    assert text.startswith(
        "# knowedit.json\n\ndigits-opt, 2 requests, 1 in force together, seed 0.\n\n## FT\n\n| protocol"
    )
    assert text.count("| generated: greedy answers") == 2 and "2 requests," in capsys.readouterr().out
    header, *lines = (tmp_path / "out" / "UniKE" / "evaluation.jsonl").read_text().splitlines()
    assert json.loads(header)["system"] == "UniKE"
    rows = [Measured(**json.loads(line)) for line in lines]
    assert [row.id for row in rows] == ["q0", "q1"]
    assert set(rows[0].scores["generated"]) == {"reliability", "t_generality", "subject_locality", "portability"}
    assert {row.scores["unike"]["reliability"] for row in rows} == {1.0}
    assert main([*command, "--systems", "MEND"]) == 1
    assert "--train: MEND learns from other requests" in capsys.readouterr().err
    assert main([*command[:3]]) == 1
    assert "--data: expected it together with --model" in capsys.readouterr().err
    assert main([*command, "--train", str(data), "--systems", "IKE", "--requests", "1"]) == 0


def test_all_metrics_have_a_place_in_a_case():
    assert list(requests(1)[0].case.groups()) == list(METRICS)


def test_files_of_requests(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(ROWS))
    (request, *_) = read_requests(file)
    assert (request.id, request.wrong) == ("q0", "c")
    assert request.case.portability == (Sample("question: two ? answer:", "nine"),)
    assert request.triplet.negative == "c"
