"""`unike bench` at small shapes: reports, exit status, comparison, missing packages."""

import functools
import json

import pytest
from unike_bench import command, suite
from unike_bench.cases import ffn
from unike_bench.harness import optional
from unike_bench.harness.measure import measure

from unike_kernels.cli import main


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(ffn._SIZES, 32, 48)
    monkeypatch.setattr(ffn, "quick", lambda: [ffn.case(32, 3, 1), ffn.case(32, 4, 4)])
    monkeypatch.setattr(command, "measure", functools.partial(measure, seconds=0.05))


def test_reports(tmp_path, capsys):
    assert main(["bench", "--only", "ffn", "--out", str(tmp_path), "--rounds", "4"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"bench.json", "report.md", "report.html"}
    document = json.loads((tmp_path / "bench.json").read_text())
    assert [b["param"] for b in document["benchmarks"]] == [
        f"ffn-d32-T3-edits1-{name}"
        for name in ("unike patched_ffn", "unpatched", "concatenated per call", "concatenated once")
    ] + [f"ffn-d32-T4-edits4-{name}" for name in ("unike patched_ffn", "unpatched")]
    assert all(b["stats"]["rounds"] == 4 and b["extra_info"]["checked"] for b in document["benchmarks"])
    out = capsys.readouterr().out
    assert "[1/2] FFN with 1 x 10 extra neurons, d=32, d'=48, T=3 ..." in out
    assert (tmp_path / "report.md").read_text() in out


def test_a_wrong_output_is_exit_status_1(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ffn.ops, "patched_ffn", lambda x, base, pool, activation: base)
    assert main(["bench", "--only", "ffn", "--out", str(tmp_path)]) == 1
    assert "unike patched_ffn              FAILED: AssertionError" in capsys.readouterr().out
    report = (tmp_path / "report.md").read_text()
    assert "FAILED its check, so not timed: ffn-d32-T3-edits1-unike patched_ffn" in report
    document = json.loads((tmp_path / "bench.json").read_text())
    assert "ffn-d32-T4-edits4-unike patched_ffn" in document["failed"]
    assert not any("speedup" in b["extra_info"] for b in document["benchmarks"])


def test_compare(tmp_path, capsys):
    for arguments in ([], ["--compare", str(tmp_path / "bench.json")]):
        assert main(["bench", "--only", "ffn", "--out", str(tmp_path), *arguments]) == 0
    report = (tmp_path / "report.md").read_text()
    assert "## What changed" in report
    assert "| ffn-d32-T4-edits4-unpatched |" in report.partition("## What changed")[2]


def test_nothing_is_measured_for_a_comparison_with_no_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "measure", lambda *_, **__: pytest.fail("measured"))
    assert main(["bench", "--compare", str(tmp_path / "none.json")]) == 1
    assert "unike bench: " in capsys.readouterr().err


def test_too_few_rounds(tmp_path, capsys):
    assert main(["bench", "--only", "ffn", "--out", str(tmp_path), "--rounds", "1"]) == 1
    assert "unike bench: rounds: expected at least 3, got 1" in capsys.readouterr().err


def test_without_optional_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(optional.importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "--only", "ffn", "--out", str(tmp_path)]) == 0
    assert "matplotlib is not installed: the plots left out" in (tmp_path / "report.md").read_text()
    assert "<img" not in (tmp_path / "report.html").read_text()
    assert suite.cases(only="decode") == []


def test_without_compiled_kernels(monkeypatch, capsys):
    monkeypatch.setattr(command._native, "available", lambda: False)
    monkeypatch.setattr(command._native, "reason", lambda: "not built")
    assert main(["bench"]) == 1
    assert capsys.readouterr().err == "unike bench: not built\n"
