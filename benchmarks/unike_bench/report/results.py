"""Rows as a file in pytest-benchmark's own schema, so that its `compare` reads them, and back."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from unike_kernels._version import __version__

from ..harness.measure import Row
from ..harness.timing import spread

_TEST = "test_case"  # of benchmarks/test_latency.py, where the same rows have the same names


class Recorded(NamedTuple):
    """What is compared of a row, in seconds."""

    median: float
    iqr: float


def extra_info(row: Row) -> dict[str, Any]:
    """What a row says beside its times."""
    info = {
        "op": row.op,
        **row.shape,
        "system": row.system,
        "role": row.role,
        "speedup": row.speedup and row.speedup.median,
        "speedup_quartiles": row.speedup and [row.speedup.low, row.speedup.high],
        "against": row.against,
        "over_base": row.over and row.over.median,
        "over_base_quartiles": row.over and [row.over.low, row.over.high],
        "added": row.added,
        "read": row.read,
        "bound": row.bound,
        "reached": row.reached,
        "recall": row.recall,
        "host": row.host,
        "graph": row.graph,
    }
    return {name: value for name, value in info.items() if value is not None} | {"checked": True}


def document(rows: Sequence[Row], stamp: Mapping[str, str]) -> dict[str, Any]:
    """The rows that passed their check, in the schema; the others' names and reasons under "failed"."""
    commit, _, changes = stamp.get("commit", "unknown").partition(",")
    return {
        "machine_info": dict(stamp),
        "commit_info": {"id": commit, "dirty": bool(changes), "project": "unike-kernels", "time": None},
        "benchmarks": [_benchmark(row) for row in rows if row.failure is None],
        "failed": {row.name: row.failure for row in rows if row.failure is not None},
        "datetime": datetime.now(timezone.utc).isoformat(),
        "version": __version__,
    }


def _benchmark(row: Row) -> dict[str, Any]:
    name = f"{_TEST}[{row.name}]"
    return {
        "group": row.title,
        "name": name,
        "fullname": f"benchmarks/test_latency.py::{name}",
        "params": {"case": row.case, "system": row.system},
        "param": row.name,
        "extra_info": extra_info(row),
        "options": {"timer": "perf_counter", "warmup": True},
        "stats": _stats(row.seconds),
    }


def _stats(times: Sequence[float]) -> dict[str, Any]:
    """pytest-benchmark's figures. Its outliers: further than a standard deviation; or 1.5 IQR beyond the quartiles."""
    low, median, high = spread(times)
    iqr, mean, deviation = high - low, statistics.mean(times), statistics.stdev(times)
    inside = [t for t in times if low - 1.5 * iqr <= t <= high + 1.5 * iqr]
    far = sum(abs(t - mean) > deviation for t in times)
    return {
        "min": min(times),
        "max": max(times),
        "mean": mean,
        "stddev": deviation,
        "rounds": len(times),
        "median": median,
        "iqr": iqr,
        "q1": low,
        "q3": high,
        "iqr_outliers": len(times) - len(inside),
        "stddev_outliers": far,
        "outliers": f"{far};{len(times) - len(inside)}",
        "ld15iqr": min(inside),
        "hd15iqr": max(inside),
        "ops": 1 / mean,
        "total": sum(times),
        "data": list(times),
        "iterations": 1,
    }


def load(path: Path) -> tuple[dict[str, Any], dict[str, Recorded]]:
    """What is known of the machine, and row name -> times, of a file of `document` or of pytest-benchmark.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is another file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        found = json.loads(path.read_text())
        pairs = [(b["param"], b["stats"]) for b in found["benchmarks"]]
        rows = {name: Recorded(float(stats["median"]), float(stats["iqr"])) for name, stats in pairs}
        return {"date": found["datetime"], **found["machine_info"]}, rows
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected a file in pytest-benchmark's schema ({error!r})") from error
