"""Runs are resumed where they stopped, never mixed up, and become tables."""

import csv
import io
import json

import pytest

from unike_kernels.evaluation import experiments, tables
from unike_kernels.evaluation.editors import EDITORS
from unike_kernels.evaluation.experiments import Run, perform, table

RUN = Run("digits-opt", "vqa", "FT")


@pytest.fixture
def edits(monkeypatch):
    """How many edits FT has made."""
    made = []
    original = EDITORS["FT"].edit
    monkeypatch.setattr(EDITORS["FT"], "edit", lambda self, request: (made.append(request), original(self, request)))
    return made


def test_what_is_done_is_not_done_again(tmp_path, edits):
    first = perform(RUN, tmp_path, split="validation", limit=3)
    assert len(edits) == len(first) == 3
    more = perform(RUN, tmp_path, split="validation", limit=5)
    assert len(edits) == 5
    assert more[:3] == first
    assert perform(RUN, tmp_path, split="validation", limit=5) == more
    assert len(edits) == 5


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch, edits):
    whole = perform(RUN, tmp_path / "whole", split="validation", limit=4)
    monkeypatch.setattr(experiments, "_append", stop_after(2))
    with pytest.raises(KeyboardInterrupt):
        perform(RUN, tmp_path / "parts", split="validation", limit=4)
    monkeypatch.undo()
    file = tmp_path / "parts" / "validation" / f"{RUN.name}.jsonl"
    file.write_text(file.read_text()[:-9])  # the last line was cut off
    resumed = perform(RUN, tmp_path / "parts", split="validation", limit=4)
    assert [(r.id, r.scores) for r in resumed] == [(r.id, r.scores) for r in whole]
    assert len(file.read_text().splitlines()) == 1 + 4


def stop_after(count, append=experiments._append):
    done = []

    def write(*args):
        if len(done) == count:
            raise KeyboardInterrupt
        append(*args)
        done.append(args)

    return write


def test_sequences_are_begun_anew(tmp_path, monkeypatch, edits):
    run = Run("digits-opt", "vqa", "FT", steps=2)
    monkeypatch.setattr(experiments, "_append", stop_after(3))
    with pytest.raises(KeyboardInterrupt):
        perform(run, tmp_path, split="validation", limit=5)
    assert len(edits) == 4
    monkeypatch.setattr(experiments, "_append", stop_after(1))
    assert len(perform(run, tmp_path, split="validation", limit=5)) == 4  # the fifth has no sequence
    assert len(edits) == 4 + 2


def test_results_of_other_settings_are_not_mixed_in(tmp_path, monkeypatch):
    perform(RUN, tmp_path, split="validation", limit=1)
    with pytest.raises(ValueError, match=r"holds results of .*'seed': '0'.*, not of .*'seed': '1'"):
        perform(RUN, tmp_path, split="validation", limit=1, seed=1)
    other = Run("digits-opt", "vqa", "FT", settings={"lr": 1e-4})
    with pytest.raises(ValueError, match=r"not of .*0\.0001"):
        perform(other, tmp_path, split="validation", limit=1)
    monkeypatch.setattr(experiments, "PROTOCOLS", ("mmedit",))
    with pytest.raises(ValueError, match=r"holds results of .*, not of .*'protocols': 'mmedit'"):
        perform(RUN, tmp_path, split="validation", limit=1)
    monkeypatch.undo()
    file = tmp_path / "validation" / f"{RUN.name}.jsonl"
    file.write_text(file.read_text() + "{}\n")
    with pytest.raises(ValueError, match="not a file of results"):
        perform(RUN, tmp_path, split="validation", limit=1)


def test_tables(tmp_path):
    rows = perform(RUN, tmp_path, split="validation", limit=2)
    text = tables.markdown([(RUN, rows)], "unike")
    assert text.splitlines()[2].startswith("| digits-opt | vqa | 1 | FT | 100.0 ± 0.0 |")
    (line,) = csv.DictReader(io.StringIO(tables.as_csv([(RUN, rows)], "unike")))
    assert (line["system"], float(line["reliability"]), line["requests"]) == ("FT", 1.0, "2")
    mean = sum(sum(r.scores["unike"].values()) / 5 for r in rows) / 2
    assert float(line["mean"]) == pytest.approx(mean)


def test_a_baseline_that_fails_is_marked(tmp_path):
    rows = perform(Run("digits-opt", "vqa", "FT"), tmp_path, split="validation", limit=2)
    for row in rows:
        row.scores["unike"]["reliability"] = 0.5
    assert "| MEND (not reproduced) |" in tables.markdown([(Run("digits-opt", "vqa", "MEND"), rows)], "unike")
    assert "| FT |" in tables.markdown([(RUN, rows)], "unike")


@pytest.mark.parametrize(("name", "runs"), [("1", 28), ("2", 28), ("3", 7), ("4", 14), ("4a", 5), ("4b", 6), ("4c", 4)])
def test_the_papers_tables(name, runs):
    found = table(name)
    assert len(found) == len({run.name for run in found}) == runs
    with pytest.raises(ValueError, match="table: expected one of 1, 2, 3, 4, 4a, 4b, 4c; got '5'"):
        table("5")


def test_both_tasks_come_in_turn(tmp_path):
    run = Run("digits-opt", "both", "FT", steps=10)
    rows = perform(run, tmp_path, split="validation", limit=10)
    assert [r.id.split("-")[0] for r in rows] == ["vqa", "caption"] * 5
    header, *lines = (tmp_path / "validation" / f"{run.name}.jsonl").read_text().splitlines()
    assert json.loads(header)["run"] == "digits-opt_both_10-step_FT"
    assert len(lines) == 10
