"""The report says what was measured, where, what failed and what is missing."""

from unike_bench.report import tables
from unike_bench.report.compare import Change
from unike_bench.report.report import Report

STAMP = {"CPU": "a <CPU>", "torch": "9.9"}
LEFT_OUT = ["faiss is not installed: its rows left out"]


def test_markdown(rows):
    text = Report(rows, STAMP, LEFT_OUT).markdown()
    assert "- CPU: a <CPU>\n- torch: 9.9" in text
    assert LEFT_OUT[0] in text
    assert "FAILED its check, so not timed: ffn-d8-unike ffn" in text
    assert "| a retrieval | 2 ms | 2.50 (2.00 to 3.00) | than faiss flat | 1 ms | 50% |" in text
    assert r"FAILED: AssertionError: other \| ids" in text
    lines = [line for line in text.splitlines() if line.startswith("| unike int8")]
    assert len(lines) == 1


def test_html_is_complete_in_itself(rows):
    text = Report(rows, STAMP, LEFT_OUT).html({"a plot": b"PNG"})
    assert text.startswith("<!DOCTYPE html>")
    assert "CPU: a &lt;CPU&gt;" in text
    assert '<img alt="a plot" src="data:image/png;base64,UE5H">' in text
    assert "http" not in text
    assert text.count('<tr class="failed">') == 3  # in the summary, and a line of each case


def test_changes_and_growth_come_where_there_are_any(rows, make_row):
    plain = Report(rows, STAMP, []).markdown()
    assert "What changed" not in plain
    assert "Growth" not in plain
    growing = make_row(op="growth", case="growth-N10", shape={"N": 10, "B": 1})
    changes = tables.comparison([Change("a", 1.0, 2.0, True)], {})
    text = Report([*rows, growing], STAMP, [], changes).markdown()
    assert "| a | 1 s | 2 s | 2.00 | slower |" in text
    assert "## Growth" in text
