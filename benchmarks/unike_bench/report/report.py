"""A report of the rows in Markdown and in HTML, each complete in itself."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..harness.measure import Row
from . import tables
from .tables import Table

_STYLE = (
    "body { font: 15px/1.5 sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em } "
    "table { border-collapse: collapse; margin: 1em 0 } td, th { border: 1px solid #ccc; padding: 0.2em 0.6em; "
    "text-align: left } td { font-variant-numeric: tabular-nums } img { max-width: 100% } .failed { background: #fcc }"
)


@dataclass(frozen=True)
class Report:
    """What is reported.

    Attributes:
        rows: as measured.
        stamp: see `stamp.stamp`.
        left_out: what could not be measured, a sentence each.
        changes: against an earlier run, see `tables.comparison`.
    """

    rows: Sequence[Row]
    stamp: Mapping[str, str]
    left_out: Sequence[str]
    changes: Table | None = None

    def _tables(self) -> list[Table]:
        found = [tables.summary(self.rows), *([self.changes] if self.changes else [])]
        if any(row.op == "growth" for row in self.rows):
            found.append(tables.growth(self.rows))
        return [*found, *tables.details(self.rows)]

    def _remarks(self) -> list[str]:
        failed = [f"FAILED its check, so not timed: {row.name}" for row in self.rows if row.failure is not None]
        return [*failed, *self.left_out]

    def markdown(self) -> str:
        """For terminals and files."""
        parts = ["# unike bench", _bullets(f"{name}: {value}" for name, value in self.stamp.items())]
        if remarks := self._remarks():
            parts.append(_bullets(remarks))
        for table in self._tables():
            parts += [f"## {table.title}", *([table.note] if table.note else []), _markdown_table(table)]
        return "\n\n".join(parts) + "\n"

    def html(self, plots: Mapping[str, bytes]) -> str:
        """A page of its own, with the plots inside: title -> PNG."""
        facts = [f"{name}: {value}" for name, value in self.stamp.items()]
        parts = ["<h1>unike bench</h1>", _list(facts), _list(self._remarks())]
        first, *rest = map(_html_table, self._tables())
        images = (
            f'<h2>{html.escape(title)}</h2><img alt="{html.escape(title)}" '
            f'src="data:image/png;base64,{base64.b64encode(image).decode()}">'
            for title, image in plots.items()
        )
        body = "\n".join([*parts, first, *images, *rest])
        return (
            f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>unike bench</title>'
            f"<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
        )


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _markdown_table(table: Table) -> str:
    lines = [table.header, tuple("---" for _ in table.header), *table.cells]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>" if lines else ""


def _html_table(table: Table) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        marked = ' class="failed"' if any(cell.startswith("FAILED") for cell in cells) else ""
        return f"<tr{marked}>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    note = f"<p>{html.escape(table.note)}</p>" if table.note else ""
    rows = "".join(line(cells, "td") for cells in table.cells)
    return f"<h2>{html.escape(table.title)}</h2>{note}<table>{line(table.header, 'th')}{rows}</table>"
