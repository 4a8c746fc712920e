"""Rows as tables: the figures are those of the rows, and what is not known is left empty."""

import pytest
from parsing import numbers, records
from unike_bench.report import tables
from unike_bench.report.compare import Change


@pytest.mark.parametrize("seconds", [2.0, 0.0123456, 1e-3, 9.87e-6, -2e-3, 0.0])
def test_durations_have_three_digits(seconds):
    assert numbers(tables.duration(seconds)) == [pytest.approx(seconds, rel=5e-3)]


def test_no_duration_is_an_empty_cell():
    assert tables.duration(None) == ""


def test_summary_has_a_line_for_each_case(rows):
    table = tables.summary(rows)
    retrieval, decode, ffn = records(table.header, table.cells)
    assert [line["case"] for line in (retrieval, decode, ffn)] == ["a retrieval", "a decode", "an FFN"]
    assert numbers(retrieval["ours"]) == [2e-3]
    assert numbers(retrieval["p95"]) == [pytest.approx(2.9e-3)] and numbers(retrieval["p99"]) == [
        pytest.approx(2.98e-3)
    ]
    assert numbers(retrieval["beside others"]) == [2.5, 2.0, 3.0]
    assert retrieval["beside others"].endswith(" times as fast as faiss flat")
    assert (numbers(retrieval["bound"]), numbers(retrieval["reached"])) == ([1e-3], [0.5])
    assert (numbers(decode["ours"]), decode["beside others"]) == ([0.02], "")
    assert numbers(decode["over unpatched"]) == [pytest.approx(0.25), pytest.approx(-0.01), pytest.approx(0.3)]
    assert "off by one" in ffn["ours"]
    assert not any(ffn[name] for name in ("p95", "over unpatched", "beside others", "bound", "reached"))


def test_the_summary_says_how_many_rounds_there_were(make_row):
    few, more = make_row(), make_row(seconds=range(1, 12), case="other")
    assert "median of the rounds, 3 of each" in tables.summary([few]).note
    assert "median of the rounds, 3 to 11 of each" in tables.summary([few, more]).note


def test_details_have_a_line_for_each_system(rows):
    retrieval, decode, ffn = tables.details(rows)
    ours, faiss, torch = records(retrieval.header, retrieval.cells)
    assert retrieval.title == "a retrieval"
    assert [line["system"] for line in (ours, faiss, torch)] == ["unike int8", "faiss flat", "torch"]
    assert (numbers(ours["p50"]), numbers(ours["p99"])) == ([2e-3], [pytest.approx(2.98e-3)])
    assert faiss["beside others"].startswith("takes 2.50 ") and faiss["beside others"].endswith(" of unike int8")
    assert (ours["recall"], numbers(faiss["recall"])) == ("", [0.999])
    assert "other | ids" in torch["p50"]
    assert not any(torch[name] for name in torch if name not in ("system", "p50"))
    (patched,) = records(decode.header, decode.cells)
    figures = {"tokens/s": 50.0, "added": 4e-3, "added per layer": 1e-3, "bound": 2e-3, "bound per layer": 5e-4}
    assert {name: numbers(patched[name]) for name in figures} == {name: [value] for name, value in figures.items()}
    assert len(ffn.cells) == 1


def test_growth_is_per_key(make_row):
    def grown(n, seconds, **more):
        return make_row(op="growth", case=f"growth-N{n}", shape={"N": n, "d": 768, "B": 1}, seconds=seconds, **more)

    rows = [grown(1000, [1e-3] * 3, read=5e-4), grown(1_000_000, [2.0] * 3), grown(10, [], failure="x"), make_row()]
    table = tables.growth(rows)
    lines = records(table.header, table.cells)
    assert [numbers(line["keys"]) for line in lines] == [[1000], [1_000_000], [10]]
    assert [numbers(line["ns per key"]) for line in lines] == [[1000], [2000], []]
    assert [numbers(line["read bound"]) for line in lines] == [[500], [], []]


def test_comparison_marks_real_changes():
    found = [Change("a", 1.0, 2.0, True), Change("b", 1.0, 1.1, False), Change("c", 1.0, 0.5, True)]
    table = tables.comparison(found, {"CPU": "a CPU", "date": "yesterday"})
    assert [line[-1] for line in table.cells] == ["slower", "", "faster"]
    assert [numbers(line[-2]) for line in table.cells] == [[2.0], [1.1], [0.5]]
    assert "yesterday" in table.note and "a CPU" in table.note
