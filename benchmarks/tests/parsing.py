"""Reads reports as a reader does: the numbers in a cell, the tables of a page."""

from __future__ import annotations

import re
from html.parser import HTMLParser

UNITS = {"s": 1.0, "ms": 1e-3, "µs": 1e-6}


def numbers(cell: str) -> list[float]:
    """All numbers of a cell, durations in seconds and shares as fractions."""
    found = re.findall(r"(-?[\d,]+(?:\.\d+)?(?:e[+-]?\d+)?)(%| (?:s|ms|µs)\b)?", cell)
    scale = {"": 1.0, "%": 0.01}
    return [float(n.replace(",", "")) * (scale[unit] if unit in scale else UNITS[unit.strip()]) for n, unit in found]


def records(header, cells) -> list[dict[str, str]]:
    """The lines of a table, by column."""
    return [dict(zip(header, line, strict=True)) for line in cells]


def markdown_tables(text: str) -> dict[str, list[dict[str, str]]]:
    """Heading -> lines of the table below it."""
    found = {}
    for part in text.split("\n## ")[1:]:
        lines = [
            [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            for line in part.splitlines()
            if line.startswith("|")
        ]
        found[part.splitlines()[0]] = records(lines[0], lines[2:])
    return found


class Page(HTMLParser):
    """What a page consists of: its elements, in order, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]
