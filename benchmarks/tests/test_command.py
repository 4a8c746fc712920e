"""`unike bench` at small shapes: reports, exit status, comparison, missing packages."""

import functools
import json

import pytest
from parsing import Page, markdown_tables
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
    assert (tmp_path / "report.md").read_text() in capsys.readouterr().out


def test_a_wrong_output_is_exit_status_1(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ffn.ops, "patched_ffn", lambda x, base, pool, activation: base)
    assert main(["bench", "--only", "ffn", "--out", str(tmp_path)]) == 1
    assert "AssertionError" in capsys.readouterr().out
    document = json.loads((tmp_path / "bench.json").read_text())
    wrong = {f"ffn-d32-{shape}-unike patched_ffn" for shape in ("T3-edits1", "T4-edits4")}
    assert set(document["failed"]) == wrong
    assert all(name in (tmp_path / "report.md").read_text() for name in wrong)
    assert not any("speedup" in b["extra_info"] for b in document["benchmarks"])


def test_compare(tmp_path):
    for arguments in ([], ["--compare", str(tmp_path / "bench.json")]):
        assert main(["bench", "--only", "ffn", "--out", str(tmp_path), *arguments]) == 0
    changed = markdown_tables((tmp_path / "report.md").read_text())["What changed"]
    assert "ffn-d32-T4-edits4-unpatched" in [line["row"] for line in changed]


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
    assert "matplotlib" in (tmp_path / "report.md").read_text()
    assert Page((tmp_path / "report.html").read_text()).named("img") == []
    assert suite.cases(only="decode") == []


def test_without_compiled_kernels(monkeypatch, capsys):
    monkeypatch.setattr(command._native, "available", lambda: False)
    monkeypatch.setattr(command._native, "reason", lambda: "not built")
    assert main(["bench"]) == 1
    assert capsys.readouterr().err == "unike bench: not built\n"
