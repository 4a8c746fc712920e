"""`unike bench`: every output checked, then the systems timed in turn, then the reports."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from unike_kernels import _native
from unike_kernels.artifacts.files import write_text
from unike_kernels.errors import BackendUnavailableError
from unike_kernels.ops import _backend

from . import suite
from .harness import optional
from .harness.measure import Row, measure
from .report import results
from .report.compare import changes
from .report.plots import plots
from .report.report import Report
from .report.stamp import stamp
from .report.tables import comparison, duration

HELP = "measure the kernels against others and against this machine's bounds"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument(
        "--select",
        choices=("quick", "full"),
        default="quick",
        help="the rows that matter, some minutes, or all, most of an hour (default: %(default)s)",
    )
    parser.add_argument("--only", choices=("retrieval", "attention", "ffn", "decode"), help="of the selection, this")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    parser.add_argument("--growth", action="store_true", help="also retrieval from 15,000 to a million keys")
    parser.add_argument(
        "--out", type=Path, default=Path("unike-bench"), help="folder for the reports (default: %(default)s)"
    )
    parser.add_argument("--compare", type=Path, metavar="JSON", help="bench.json of an earlier run")
    parser.add_argument("--rounds", type=int, help="of each case, at least 3 (default: what fits into some seconds)")


def run(args: argparse.Namespace) -> int:
    """See `measure_all`."""
    return measure_all(
        args.out, select=args.select, only=args.only, growth=args.growth, device=args.device, compare=args.compare,
        rounds=args.rounds,
    )  # fmt: skip


def measure_all(
    out: Path,
    *,
    select: str = "quick",
    only: str | None = None,
    growth: bool = False,
    device: str = "cpu",
    compare: Path | None = None,
    rounds: int | None = None,
) -> int:
    """Measure a selection; write bench.json, report.md and report.html into `out`.

    Args:
        out: a folder, created if it does not exist.
        select: "quick" or "full"; see `suite.cases`.
        only: one operator's name; None: all.
        growth: add retrieval from 15,000 to a million keys.
        device: "cpu" or "cuda".
        compare: bench.json of an earlier run.
        rounds: measurements of each case; None: see `interleave`.

    Returns:
        The exit status: 1 if any output was wrong.

    Raises:
        FileNotFoundError, ValueError: `compare` cannot be read.
        ImportError: there are no compiled kernels to measure.
        BackendUnavailableError: there is no GPU to measure.
    """
    if not _native.available():
        raise ImportError(_native.reason())
    earlier = results.load(compare) if compare else None
    cases = suite.cases(select, only=only, growth=growth, device=device)
    if device == "cuda" and (reason := _backend.triton_missing()):
        raise BackendUnavailableError(f"--device cuda: {reason}")
    rows: list[Row] = []
    for number, case in enumerate(cases, 1):
        print(f"[{number}/{len(cases)}] {case.title} ...", flush=True)
        start = time.monotonic()
        measured = measure(case, rounds=rounds)
        for row in measured:
            print(f"  {row.system:30s} {_outcome(row)}")
        print(f"  {time.monotonic() - start:.1f} s")
        rows += measured

    told = stamp(device)
    changed = comparison(changes(earlier[1], rows), earlier[0]) if earlier else None
    report = Report(rows, told, optional.left_out(), changed)
    write_text(out / "bench.json", json.dumps(results.document(rows, told), indent=1))
    write_text(out / "report.md", report.markdown())
    write_text(out / "report.html", report.html(plots(rows) if optional.installed("matplotlib") else {}))
    print(f"\n{report.markdown()}\nwritten: bench.json, report.md and report.html in {out}")
    return 1 if any(row.failure is not None for row in rows) else 0


def _outcome(row: Row) -> str:
    if row.failure is not None:
        return f"FAILED: {row.failure}"
    against = f", x {row.speedup.median:.2f} ({row.against})" if row.speedup else ""
    return f"{duration(row.median)}{against}"
