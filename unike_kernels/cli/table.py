"""Tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def table(cells: Sequence[Sequence[str]], words: int) -> list[str]:
    """A line for each row of cells; the first so many columns hold words, the others numbers."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    aligned = [str.ljust if i < words else str.rjust for i in range(len(widths))]
    return ["  ".join(a(cell, w) for a, cell, w in zip(aligned, row, widths, strict=True)) for row in cells]
