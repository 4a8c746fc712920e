"""The results of runs as tables: Markdown and CSV."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence

from .experiments import Run
from .measure import Measured, figures
from .metrics import METRICS

Results = Sequence[tuple[Run, Sequence[Measured]]]
_NEEDED = 0.9  # reliability of the systems that the paper has there; below it the reason is to be found
_EXPECTED = ("KE", "MEND", "IKE", "SERAC")


def _cells(run: Run, rows: Sequence[Measured], protocol: str) -> dict[str, str]:
    found = figures(rows, protocol)
    reached = run.steps > 1 or run.system not in _EXPECTED or found["reliability"].mean >= _NEEDED
    about = {
        "backbone": run.backbone,
        "tasks": run.tasks,
        "steps": str(run.steps),
        "system": (run.variant or run.system) + ("" if reached else " (not reproduced)"),
    }
    last = {"requests": str(len(rows)), "seconds an edit": f"{statistics.median(r.seconds for r in rows):.2f}"}
    return about | {name: str(e) for name, e in found.items()} | last


def markdown(results: Results, protocol: str) -> str:
    """A line for each run; percentages with their 95% confidence intervals over requests."""
    table = [_cells(run, rows, protocol) for run, rows in results]
    measured = [m for m in METRICS if any(m in cells for cells in table)]
    columns = ("backbone", "tasks", "steps", "system", *measured, "mean", "requests", "seconds an edit")
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(cells.get(column, "") for column in columns) + " |" for cells in table]
    return "\n".join(lines) + "\n"


def as_csv(results: Results, protocol: str) -> str:
    """The means and half-widths as shares in 0..1, for other programs."""
    names = [f"{m}{part}" for m in (*METRICS, "mean") for part in ("", " ±")]
    out = io.StringIO()
    writer = csv.DictWriter(out, ["backbone", "tasks", "steps", "system", "variant", *names, "requests"])
    writer.writeheader()
    for run, rows in results:
        found = figures(rows, protocol)
        numbers = {m: e.mean for m, e in found.items()} | {f"{m} ±": e.half_width for m, e in found.items()}
        about = {n: getattr(run, n) for n in ("backbone", "tasks", "steps", "system", "variant")}
        writer.writerow(about | numbers | {"requests": len(rows)})
    return out.getvalue()


def choice(results: Results, protocols: Sequence[str]) -> str:
    """Each system's candidates, best first, by the mean over backbones, metrics and these protocols.

    A backbone counts as much as another.
    """
    scores: dict[tuple[str, str], list[float]] = {}
    for run, rows in results:
        means = [figures(rows, protocol)["mean"].mean for protocol in protocols]
        scores.setdefault((run.system, run.variant), []).append(statistics.fmean(means))
    lines = ["| system | settings | mean |", "| --- | --- | --- |"]
    for system in dict.fromkeys(system for system, _ in scores):
        ranked = sorted(
            ((statistics.fmean(v), variant) for (name, variant), v in scores.items() if name == system), reverse=True
        )
        lines += [f"| {system} | {variant} | {100 * mean:.1f} |" for mean, variant in ranked]
    return "\n".join(lines) + "\n"
