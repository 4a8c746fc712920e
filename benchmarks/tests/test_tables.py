"""Rows as tables of text."""

import pytest
from unike_bench.report import tables
from unike_bench.report.compare import Change


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, ""),
        (2.0, "2 s"),
        (0.0123456, "12.3 ms"),
        (1e-3, "1 ms"),
        (9.87e-6, "9.87 µs"),
        (-2e-3, "-2 ms"),
        (0, "0 µs"),
    ],
)
def test_durations(seconds, text):
    assert tables.duration(seconds) == text


def test_summary_has_a_line_for_each_case(rows):
    table = tables.summary(rows)
    assert table.header == ("case", "ours", "ours is faster", "", "bound", "reached")
    assert table.cells == [
        ("a retrieval", "2 ms", "2.50 (2.00 to 3.00)", "than faiss flat", "1 ms", "50%"),
        ("a decode", "20 ms", "", "", "2 ms", "50%"),
        ("an FFN", "FAILED: AssertionError: off by one", "", "", "", ""),
    ]


def test_details_have_a_line_for_each_system(rows):
    retrieval, decode, ffn = tables.details(rows)
    assert retrieval.title == "a retrieval"
    assert retrieval.header == ("system", "time", "IQR", "ours is faster", "", "bound", "reached", "recall")
    assert retrieval.cells[1] == (
        "faiss flat",
        "5 ms",
        "0 µs",
        "2.50 (2.00 to 3.00)",
        "unike int8 than this",
        "",
        "",
        "0.9990",
    )
    assert retrieval.cells[2] == ("torch", "FAILED: AssertionError: other | ids", "", "", "", "", "", "")
    assert dict(zip(decode.header, decode.cells[0], strict=True)) == {
        "system": "unike patched", "time": "20 ms", "IQR": "0 µs", "tokens/s": "50.0", "added": "4 ms",
        "added per layer": "1 ms", "bound per layer": "500 µs", "bound": "2 ms", "reached": "50%",
    }  # fmt: skip
    assert ffn.cells == [("unike ffn", "FAILED: AssertionError: off by one")]


def test_growth_is_per_key(make_row):
    def grown(n, seconds, **more):
        return make_row(op="growth", case=f"growth-N{n}", shape={"N": n, "d": 768, "B": 1}, seconds=seconds, **more)

    rows = [grown(1000, [1e-3] * 3, read=5e-4), grown(1_000_000, [2.0] * 3), grown(10, [], failure="x"), make_row()]
    table = tables.growth(rows)
    assert table.header == ("queries", "system", "keys", "ns per key", "read bound")
    assert table.cells == [
        ("1", "ours", "1,000", "1e+03", "500"),
        ("1", "ours", "1,000,000", "2e+03", ""),
        ("1", "ours", "10", "FAILED", ""),
    ]


def test_comparison_marks_real_changes():
    found = [Change("a", 1.0, 2.0, True), Change("b", 1.0, 1.1, False), Change("c", 1.0, 0.5, True)]
    table = tables.comparison(found, {"CPU": "a CPU", "date": "yesterday"})
    assert [(line[0], line[3], line[4]) for line in table.cells] == [
        ("a", "2.00", "slower"),
        ("b", "1.10", ""),
        ("c", "0.50", "faster"),
    ]
    assert "The earlier run: yesterday, a CPU." in table.note
