"""Runs are resumed where they stopped, never mixed up, and become tables."""

import csv
import io
import json
from dataclasses import replace

import pytest
import torch
from unike_eval import experiments, tables
from unike_eval.editors import EDITORS
from unike_eval.experiments import Run, perform, table
from unike_eval.measure import Measured, figures
from unike_eval.metrics import METRICS, PROTOCOLS
from unike_eval.results import Results
from unike_eval.settings import CANDIDATES, DEFAULTS, REAL, REAL_CANDIDATES, SCOPED, told

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
    monkeypatch.setattr(Results, "add", stop_after(2))
    with pytest.raises(KeyboardInterrupt):
        perform(RUN, tmp_path / "parts", split="validation", limit=4)
    monkeypatch.undo()
    file = tmp_path / "parts" / "validation" / f"{RUN.name}.jsonl"
    file.write_text(file.read_text()[:-9])  # the last line was cut off
    resumed = perform(RUN, tmp_path / "parts", split="validation", limit=4)
    assert [(r.id, r.scores) for r in resumed] == [(r.id, r.scores) for r in whole]
    assert len(file.read_text().splitlines()) == 1 + 4


def stop_after(count, add=Results.add):
    """`Results.add`, for so many new ones."""
    done = []

    def write(self, measured):
        if measured.id in self.rows:
            return
        if len(done) == count:
            raise KeyboardInterrupt
        add(self, measured)
        done.append(measured)

    return write


def test_sequences_are_begun_anew(tmp_path, monkeypatch, edits):
    run = Run("digits-opt", "vqa", "FT", steps=2)
    monkeypatch.setattr(Results, "add", stop_after(3))
    with pytest.raises(KeyboardInterrupt):
        perform(run, tmp_path, split="validation", limit=5)
    assert len(edits) == 4
    monkeypatch.setattr(Results, "add", stop_after(1))
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


@pytest.mark.parametrize(
    ("name", "runs"),
    [
        ("1", 44),
        ("2", 44),
        ("3", 11),
        ("4", 16),
        ("4a", 9),
        ("4b", 6),
        ("4c", 4),
        ("easyvqa", 22),
        ("countries", 3 * 15),
        ("countries-search", 78),
        ("flags", 4),
        ("search", 84),
    ],
)
def test_the_papers_tables(name, runs):
    found = table(name)
    assert len(found) == len({run.name for run in found}) == runs
    with pytest.raises(
        ValueError,
        match=r"table: expected one of 1, 2, 3, .*, easyvqa, countries, flags, countries-search, search; got '5'",
    ):
        table("5")


def test_with_a_scope_an_edit_acts_where_it_is_meant(tmp_path):
    run = Run("digits-opt", "vqa", "UniKE", 2, "scope", {**SCOPED, "scope": replace(SCOPED["scope"], steps=60)})
    rows = perform(run, tmp_path, split="validation", limit=4)
    found = {name: estimate.mean for name, estimate in figures(rows, "mmedit").items()}
    assert found["reliability"] == 1
    assert found["t_generality"] > 0.9 and found["m_generality"] > 0.9
    assert found["t_locality"] > 0.98 and found["m_locality"] > 0.98  # without, 0.95 and 0.77


def test_fewer_requests_than_a_sequence_needs(tmp_path):
    with pytest.raises(ValueError, match=r"requests: expected at least 10 for a sequence of .*10-step_FT, got 9"):
        perform(Run("digits-opt", "vqa", "FT", steps=10), tmp_path, split="validation", limit=9)
    assert not list(tmp_path.iterdir())


def test_variants_change_what_they_say_and_nothing_else():
    """Against the defaults of UniKE: the ablation's settings differ in what the row is called after."""
    usual = DEFAULTS["UniKE"]["config"]
    changes = {
        run.variant: (usual.differences(config), config.beta, run.system)
        for run in table("4")
        if run.variant
        for config in [run.settings.get("config", usual)]
    }
    alpha = [f"alpha: {usual.alpha!r} != 0.3"]
    assert changes == {
        "only Intrin": ([], 0.0, "UniKE"),
        "only Latent-IKE": (alpha, usual.beta, "UniKE"),
        "Intrin + Latent-IKE (alpha 0.3)": (alpha, 0.0, "UniKE"),
        "Intrin + Latent-IKE, alpha": ([], 0.0, "UniKE"),
        "Intrin + Latent-IKE (alpha 0.3), zeta": (alpha, usual.beta, "UniKE"),
        "UniKE, without prompt dropout": ([], usual.beta, "UniKE"),
    }
    whole = replace(DEFAULTS["UniKE"]["training"], prompt_dropout=0.0)
    assert DEFAULTS["UniKE"]["training"].prompt_dropout > 0
    # All rows of the ablation but the last one, which is UniKE as it is in the other tables.
    assert {run.settings.get("training") for run in table("4") if run.variant or run.system != "UniKE"} == {whole}
    assert [run.variant for run in table("4") if not run.settings] == ["", ""]
    assert [run.settings["latent"] for run in table("4") if run.variant == "only Intrin"] == [False, False]
    (plain, *_) = [run for run in table("4") if run.system == "Intrin + IKE"]
    assert plain.settings["config"].beta == 0


def test_prompt_dropout_changes_nothing_else():
    """Of the systems that train each edit, there is a row with it and one without."""
    found = {run.variant or run.system: run for run in table("easyvqa") if run.backbone == "easyvqa-opt"}
    for name in ("FT", "T-Patcher"):
        assert found[f"{name}, with prompt dropout"].settings == {"prompt_dropout": 0.15}
        assert found[name].settings == {}
        assert "prompt_dropout" not in DEFAULTS[name]


def test_the_seed_reaches_the_system():
    made = Run("digits-opt", "vqa", "UniKE").editor(torch.nn.Linear(1, 1), None, seed=7)
    assert (made.seed, made.encoders.seed) == (7, 7)
    assert made.config == DEFAULTS["UniKE"]["config"]


def test_every_system_has_as_many_candidates_and_its_default_is_one_of_them():
    for found, chosen in ((CANDIDATES, DEFAULTS), (REAL_CANDIDATES, REAL)):
        assert found.keys() == chosen.keys()
        for name, candidates in found.items():
            assert chosen[name] in candidates
            assert len({told(c) for c in candidates}) == len(candidates) == 6
    assert CANDIDATES.keys() < REAL_CANDIDATES.keys() == EDITORS.keys() - {"Intrin + IKE"}


def test_the_choice_is_the_best_mean_over_backbones_and_protocols():
    def measured(value):
        return [Measured("r", {p: dict.fromkeys(METRICS, v) for p, v in zip(PROTOCOLS, value, strict=True)}, 1.0)]

    runs = [
        (Run("digits-opt", "both", "FT", variant="slow"), measured((0.0, 0.5, 0.7, 0.0))),
        (Run("digits-llama", "both", "FT", variant="slow"), measured((0.0, 0.9, 0.9, 0.0))),
        (Run("digits-opt", "both", "FT", variant="fast"), measured((1.0, 0.8, 0.8, 1.0))),
        (Run("digits-llama", "both", "FT", variant="fast"), measured((1.0, 0.6, 0.6, 1.0))),
    ]
    assert tables.choice(runs, ("unike", "mmedit")).splitlines()[2:] == ["| FT | slow | 75.0 |", "| FT | fast | 70.0 |"]


def test_both_tasks_come_in_turn(tmp_path):
    run = Run("digits-opt", "both", "FT", steps=10)
    rows = perform(run, tmp_path, split="validation", limit=10)
    assert [r.id.split("-")[0] for r in rows] == ["vqa", "caption"] * 5
    header, *lines = (tmp_path / "validation" / f"{run.name}.jsonl").read_text().splitlines()
    assert json.loads(header)["run"] == "digits-opt_both_10-step_FT"
    assert len(lines) == 10
