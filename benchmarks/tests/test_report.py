"""The report holds what was measured, where, what failed and what is missing."""

import base64

from parsing import Page, markdown_tables, numbers
from unike_bench.report import tables
from unike_bench.report.compare import Change
from unike_bench.report.report import Report

STAMP = {"CPU": "a <CPU>", "torch": "9.9"}
LEFT_OUT = ["faiss is not installed: its rows left out"]


def test_markdown(rows):
    text = Report(rows, STAMP, LEFT_OUT).markdown()
    remarks = [line for line in text.partition("\n## ")[0].splitlines() if line.startswith("- ")]
    assert all(any(fact in line for line in remarks) for fact in ("a <CPU>", "9.9", LEFT_OUT[0], "ffn-d8-unike ffn"))
    summary, *details = markdown_tables(text).values()
    assert [line["case"] for line in summary] == ["a retrieval", "a decode", "an FFN"]
    assert numbers(summary[0]["ours"]) == [2e-3]
    assert [line["system"] for table in details for line in table] == [row.system for row in rows]
    assert "other | ids" in details[0][2]["p50"]  # a bar inside of a cell


def test_html_is_complete_in_itself(rows):
    text = Report(rows, STAMP, LEFT_OUT).html({"a plot": b"PNG"})
    page = Page(text)
    assert page.open == []
    assert "a <CPU>" in page.text
    (image,) = page.named("img")
    assert base64.b64decode(image["src"].partition("base64,")[2]) == b"PNG"
    assert "http" not in text
    # In the summary, and a line of each case.
    assert [part.get("class") for part in page.named("span")].count("failed") == 3
    assert "2\N{NO-BREAK SPACE}ms" in page.text  # a number is not parted from its unit


def test_changes_and_growth_come_where_there_are_any(rows, make_row):
    plain = markdown_tables(Report(rows, STAMP, []).markdown())
    growing = make_row(op="growth", case="growth-N10", title="growing", shape={"N": 10, "B": 1})
    changes = tables.comparison([Change("a", 1.0, 2.0, True)], {})
    text = Report([*rows, growing], STAMP, [], changes).markdown()
    more = markdown_tables(text)
    assert len(more) == len(plain) + 3  # and the details of what grows
    assert [line["row"] for line in more[changes.title]] == ["a"]
    assert [line["keys"] for line in more[tables.growth([growing]).title]] == ["10"]
