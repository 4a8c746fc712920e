"""The rows as tables of text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from ..harness.measure import Row
from ..harness.timing import percentiles
from .compare import Change


class Table(NamedTuple):
    """A table and what is to be known about it."""

    title: str
    note: str
    header: tuple[str, ...]
    cells: list[tuple[str, ...]]


def duration(seconds: float | None) -> str:
    """With three digits, in the unit that suits it; empty for None."""
    if seconds is None:
        return ""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if abs(seconds) >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def cases(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each case; the first is ours."""
    return [list(group) for _, group in groupby(rows, key=lambda row: row.case)]


def summary(rows: Sequence[Row]) -> Table:
    """Ours, a case a line."""
    return _table(
        "Ours against the fastest of the others",
        f"Ours: the median of the rounds, {_rounds(rows)} of each; a round of a short call is the mean of as many as "
        "take 2 ms. p95 and p99: what 95% and 99% of the rounds do not exceed; of fewer than a hundred, p99 is "
        "nearly the slowest. Over unpatched, and times as fast: of both times in the same round, the median over the "
        "rounds, and its quartiles. Bound: what this machine takes to read what must be read or to make the "
        "multiply-adds, whichever is longer. Reached: its share of our time; in decode, of the time that we add to "
        "the unpatched model's. Shares above 100% tell of a machine that had other things to do.",
        [group[0] for group in cases(rows)],
        {"case": lambda row: row.title, "ours": _time, **_TAIL, **_COMPARED},
    )


def details(rows: Sequence[Row]) -> list[Table]:
    """All systems, a case a table."""
    columns: dict[str, Callable[[Row], str]] = {
        "system": lambda row: row.system,
        "p50": _time,
        **_TAIL,
        "tokens/s": _tokens,
        "added": lambda row: duration(row.added),
        "added per layer": lambda row: duration(row.added / _layers(row)) if row.added and _layers(row) > 1 else "",
        "bound per layer": lambda row: duration(row.bound / _layers(row)) if row.bound and _layers(row) > 1 else "",
        **_COMPARED,
        "recall": lambda row: "" if row.recall is None else f"{row.recall:.4f}",
        "on the host": lambda row: duration(row.host),
        "timed": lambda row: "" if row.graph is None else "a CUDA graph" if row.graph else "the call",
    }
    return [_table(group[0].title, "", group, columns) for group in cases(rows)]


def growth(rows: Sequence[Row]) -> Table:
    """Nanoseconds per key from thousands to millions of keys, and what reading them takes."""

    def per_key(row: Row, seconds: float | None) -> str:
        return "" if seconds is None else f"{seconds / int(row.shape['N']) * 1e9:.3g}"

    return _table(
        "Growth",
        "Nanoseconds per key, and those of reading what each scan must read.",
        [row for row in rows if row.op == "growth"],
        {
            "queries": lambda row: str(row.shape["B"]),
            "system": lambda row: row.system,
            "keys": lambda row: f"{row.shape['N']:,}",
            "ns per key": lambda row: per_key(row, row.median) if row.seconds else "FAILED",
            "read bound": lambda row: per_key(row, row.read),
        },
    )


def comparison(changes: Sequence[Change], old: Mapping[str, str]) -> Table:
    """What changed since an earlier run, on whose machine `old` tells."""
    cells: list[tuple[str, ...]] = [
        (c.name, duration(c.old), duration(c.new), f"{c.ratio:.2f}", ("slower" if c.ratio > 1 else "faster") * c.real)
        for c in changes
    ]
    made = ", ".join(old[name] for name in ("date", "CPU", "commit") if name in old)
    note = (
        f"The earlier run: {made or 'unknown'}. Marked: medians further apart than both interquartile ranges together."
    )
    return Table("What changed", note, ("row", "before", "now", "now / before", ""), cells)


def _table(title: str, note: str, rows: Sequence[Row], columns: Mapping[str, Callable[[Row], str]]) -> Table:
    """The columns in which any row has something to say."""
    filled = {name: [cell(row) for row in rows] for name, cell in columns.items()}
    filled = {name: cells for name, cells in filled.items() if any(cells)}
    return Table(title, note, tuple(filled), list(zip(*filled.values(), strict=True)))


def _time(row: Row) -> str:
    return duration(row.median) if row.failure is None else f"FAILED: {row.failure:.200}"


def _tokens(row: Row) -> str:
    return f"{int(row.shape['T']) / row.median:,.1f}" if row.op == "decode" and row.seconds else ""


def _layers(row: Row) -> int:
    return int(row.shape.get("layers", 1))


def _rounds(rows: Sequence[Row]) -> str:
    """How many there were, at least and at most."""
    counts = sorted({len(row.seconds) for row in rows if row.seconds})
    return " to ".join(map(str, dict.fromkeys((counts or [0])[i] for i in (0, -1))))


def _over(row: Row) -> str:
    if row.over is None:
        return ""
    low, median, high = (100 * (share - 1) for share in row.over)
    return f"{median:+.1f}% ({low:+.1f}% to {high:+.1f}%)"


def _beside(row: Row) -> str:
    s = row.speedup
    if s is None:
        return ""
    told = f"{s.median:.2f} ({s.low:.2f} to {s.high:.2f})"
    return f"{told} times as fast as {row.against}" if row.role == "ours" else f"takes {told} of {row.against}"


_TAIL: dict[str, Callable[[Row], str]] = {
    "p95": lambda row: duration(percentiles(row.seconds)[0]) if row.seconds else "",
    "p99": lambda row: duration(percentiles(row.seconds)[1]) if row.seconds else "",
}
_COMPARED: dict[str, Callable[[Row], str]] = {
    "over unpatched": _over,
    "beside others": _beside,
    "bound": lambda row: duration(row.bound),
    "reached": lambda row: "" if row.reached is None else f"{row.reached:.0%}",
}
