"""Plots of the rows as PNG images."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from itertools import groupby
from textwrap import fill
from typing import Any

from ..harness.measure import Row
from ..harness.timing import Spread
from .tables import cases

_BATCH = {"retrieval": "B", "attention": "T", "ffn": "T"}  # operator -> which of its sizes is that of a batch
_FASTEST = 3  # peers of a batch curve


def plots(rows: Sequence[Row]) -> dict[str, bytes]:
    """Title -> PNG: the speed-ups of ours, what it adds to the unpatched model, throughput over the batch, the shares
    of the bounds, and growth; each where it was measured.

    Raises:
        ImportError: matplotlib is not installed.
    """
    ours = [group[0] for group in cases(rows)]
    faster = [row for row in ours if row.speedup is not None]
    over = [row for row in ours if row.over is not None]
    reached = [row for row in ours if row.reached is not None]
    growing = [row for row in rows if row.op == "growth" and row.seconds]
    found: dict[str, bytes] = {}
    if faster:
        found["Times faster than the fastest of the others"] = _draw(len(faster), lambda axes: _speedups(axes, faster))
    if over:
        found["Time over the unpatched model's"] = _draw(len(over), lambda axes: _over(axes, over))
    for title, group in _curves(rows):
        found[title] = _draw(12, lambda axes, group=group: _throughput(axes, group))  # type: ignore[misc]
    if reached:
        found["Share of the bound that ours reached"] = _draw(len(reached), lambda axes: _reached(axes, reached))
    if growing:
        found["Time per key"] = _draw(12, lambda axes: _growth(axes, growing))
    return found


def _draw(lines: int, draw: Callable[[Any], None]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1 + 0.42 * lines), layout="constrained")
    draw(figure.add_subplot())
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _speedups(axes: Any, rows: Sequence[Row]) -> None:
    _bars(axes, rows, [row.speedup for row in rows if row.speedup is not None])
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("their time / ours, median and quartiles")


def _over(axes: Any, rows: Sequence[Row]) -> None:
    _bars(axes, rows, [Spread(*(100 * (share - 1) for share in row.over)) for row in rows if row.over is not None])
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.set_xlabel("% more than the unpatched one takes, median and quartiles")


def _reached(axes: Any, rows: Sequence[Row]) -> None:
    _bars(axes, rows, [Spread(*[row.reached or 0.0] * 3) for row in rows])
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("bound / time")


def _bars(axes: Any, rows: Sequence[Row], values: Sequence[Spread]) -> None:
    errors = [[v.median - v.low for v in values], [v.high - v.median for v in values]]
    axes.barh(range(len(rows)), [v.median for v in values], xerr=errors)
    axes.set_yticks(range(len(rows)), [fill(row.title, 60) for row in rows], fontsize="small")
    axes.invert_yaxis()


def _curves(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """What was measured at several sizes of a batch, under a title without that size."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        size = _BATCH.get(row.op, "")
        if size in row.shape and row.seconds:
            others = tuple((name, value) for name, value in row.shape.items() if name != size)
            groups.setdefault((row.op, others, row.title.replace(f", {size}={row.shape[size]}", "")), []).append(row)
    return [
        (f"Throughput: {title}", group)
        for (op, _, title), group in groups.items()
        if len({row.shape[_BATCH[str(op)]] for row in group}) > 1
    ]


def _throughput(axes: Any, rows: Sequence[Row]) -> None:
    """Ours, what it is an addition to, and the fastest of the others, those that are among them at any size."""
    size = _BATCH[rows[0].op]
    shown = {row.system for row in rows if row.role in ("ours", "base")}
    for _, group in groupby(sorted(rows, key=lambda row: int(row.shape[size])), lambda row: row.shape[size]):
        peers = sorted((row for row in group if row.role == "peer"), key=lambda row: row.median)
        shown |= {row.system for row in peers[:_FASTEST]}
    for system in dict.fromkeys(row.system for row in rows if row.system in shown):
        points = sorted((row for row in rows if row.system == system), key=lambda row: int(row.shape[size]))
        sizes = [int(row.shape[size]) for row in points]
        own = points[0].role == "ours"
        line = "o-" if own else "o--"
        axes.loglog(sizes, [n / row.median for n, row in zip(sizes, points, strict=True)], line, label=system)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="queries at once" if size == "B" else "tokens at once", ylabel="a second")
    axes.legend(fontsize="small")


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
