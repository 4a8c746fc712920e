"""This run and an earlier one side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..harness.measure import Row
from ..harness.timing import spread
from .results import Recorded


@dataclass(frozen=True)
class Change:
    """A row that both runs have.

    Attributes:
        name: of the row.
        old, new: medians in seconds.
        real: they differ by more than the interquartile ranges of both together.
    """

    name: str
    old: float
    new: float
    real: bool

    @property
    def ratio(self) -> float:
        """new / old."""
        return self.new / self.old


def changes(old: Mapping[str, Recorded], rows: Sequence[Row]) -> list[Change]:
    """What became of the rows that were measured before; those that failed now are left out."""
    found = []
    for row in rows:
        if row.failure is None and row.name in old:
            before, now = old[row.name], spread(row.seconds)
            real = abs(now.median - before.median) > before.iqr + now.iqr
            found.append(Change(row.name, before.median, now.median, real))
    return found
