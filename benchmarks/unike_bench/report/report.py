"""A report of the rows in Markdown and in HTML, each complete in itself."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from unike_kernels.nn import page

from ..harness.measure import Row
from . import tables
from .tables import Table

_SHORT = 14  # letters of a cell that does not break: a number and its unit
_WIDE = {"case", "system", "row", "over unpatched", "beside others"}  # columns of words and ranges


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
        first, *rest = map(_html_table, self._tables())
        images = (
            f'<h2>{escape(title)}</h2><img alt="{escape(title)}" '
            f'src="data:image/png;base64,{base64.b64encode(image).decode()}">'
            for title, image in plots.items()
        )
        return page.page("unike bench", _list(facts), _list(self._remarks()), first, *images, *rest)


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _markdown_table(table: Table) -> str:
    lines = [table.header, tuple("---" for _ in table.header), *table.cells]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>" if lines else ""


def _html_table(table: Table) -> str:
    note = f"<p>{escape(table.note)}</p>" if table.note else ""
    heads = [(name, "" if name in _WIDE else "number") for name in table.header]
    return (
        f"<h2>{escape(table.title)}</h2>{note}{page.table(heads, [[_cell(c) for c in line] for line in table.cells])}"
    )


def _cell(text: str) -> str:
    if text.startswith("FAILED"):
        return f'<span class="failed">{escape(text)}</span>'
    return escape(text.replace(" ", "\N{NO-BREAK SPACE}") if len(text) <= _SHORT else text)
