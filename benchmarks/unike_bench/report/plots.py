"""Plots of the rows as PNG images."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from ..harness.measure import Row
from .tables import cases


def plots(rows: Sequence[Row]) -> dict[str, bytes]:
    """Title -> PNG: the speed-ups and the shares of the bounds of ours, and growth where it was measured.

    Raises:
        ImportError: matplotlib is not installed.
    """
    ours = [group[0] for group in cases(rows)]
    faster = [row for row in ours if row.speedup is not None]
    reached = [row for row in ours if row.reached is not None]
    growing = [row for row in rows if row.op == "growth" and row.seconds]
    found: dict[str, bytes] = {}
    if faster:
        found["Times faster than the fastest of the others"] = _draw(len(faster), lambda axes: _speedups(axes, faster))
    if reached:
        found["Share of the bound that ours reached"] = _draw(len(reached), lambda axes: _reached(axes, reached))
    if growing:
        found["Time per key"] = _draw(12, lambda axes: _growth(axes, growing))
    return found


def _draw(lines: int, draw: Callable[[Any], None]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1 + 0.35 * lines), layout="constrained")
    draw(figure.add_subplot())
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _speedups(axes: Any, rows: Sequence[Row]) -> None:
    spreads = [row.speedup for row in rows if row.speedup is not None]
    errors = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
    _bars(axes, rows, [s.median for s in spreads], xerr=errors)
    axes.set_xlabel("their time / ours, median and quartiles")


def _reached(axes: Any, rows: Sequence[Row]) -> None:
    _bars(axes, rows, [row.reached or 0.0 for row in rows])
    axes.set_xlabel("bound / time")


def _bars(axes: Any, rows: Sequence[Row], values: Sequence[float], **options: Any) -> None:
    axes.barh(range(len(rows)), values, **options)
    axes.set_yticks(range(len(rows)), [row.case for row in rows])
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=0.8)


def _growth(axes: Any, rows: Sequence[Row]) -> None:
    def per_key(row: Row, seconds: float) -> float:
        return seconds / int(row.shape["N"]) * 1e9

    for (system, b), group in groupby(sorted(rows, key=_line), _line):
        points = list(group)
        keys = [row.shape["N"] for row in points]
        times = [per_key(row, row.median) for row in points]
        line = axes.loglog(keys, times, "o-", label=f"{system}, B={b}")
        if all(row.read for row in points):
            axes.loglog(keys, [per_key(row, row.read or 0.0) for row in points], ":", color=line[0].get_color())
    axes.set(xlabel="keys", ylabel="ns per key; dotted: reading what is scanned")
    axes.legend(fontsize="small")


def _line(row: Row) -> tuple[str, int]:
    """Rows of one line in the plot of growth."""
    return row.system, int(row.shape["B"])
