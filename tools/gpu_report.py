#!/usr/bin/env python3
"""What this machine's GPU makes of the kernels: their tests, the tuning and the benchmark, and one report of all three.

`python3 run.py gpu` sets up and runs it, in less than ten minutes behind the setting up: each part has its time. The
report, `unike-gpu/report.md` and `report.json`, is meant to be posted; its figures are those of this GPU alone.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINES = 40  # of a part's output that a report has where it failed


@dataclass
class Part:
    """What is run, and what came of it.

    Attributes:
        title: in words.
        command: behind the name of this Python.
        limit: seconds.
        seconds: that it took.
        status: its exit status; None: it was stopped, as its time was over.
        told: of its result, a line each.
        output: its last lines.
    """

    title: str
    command: list[str]
    limit: float
    seconds: float = 0.0
    status: int | None = None
    told: list[str] = field(default_factory=list)
    output: list[str] = field(default_factory=list)

    def run(self) -> None:
        """Runs it; what it prints is shown as it comes."""
        print(f"\n== {self.title} ==", flush=True)
        start = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, *self.command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        stop = threading.Timer(self.limit, os.killpg, (process.pid, signal.SIGKILL))  # it and what it has started
        stop.start()
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            self.output = [*self.output, line.rstrip()][-LINES:]
        status = process.wait()
        stop.cancel()
        self.seconds = time.monotonic() - start
        self.status = None if status == -signal.SIGKILL and self.seconds >= self.limit else status

    @property
    def outcome(self) -> str:
        """In a word or two."""
        if self.status is None:
            return f"stopped after {self.limit:.0f} s"
        return "passed" if self.status == 0 else f"FAILED, exit status {self.status}"


def parts(out: Path) -> list[Part]:
    """The tests, the tuning and the benchmark, which then takes what was tuned."""
    tests = ["-m", "pytest", "-m", "gpu", "tests", "-q", "-p", "no:cacheprovider", f"--junitxml={out / 'tests.xml'}"]
    return [
        Part("tests", tests, 240),
        Part("tuning", ["-m", "unike_kernels", "tune"], 150),
        Part("benchmark", ["-m", "unike_kernels", "bench", "--device", "cuda", "--out", str(out / "bench")], 200),
    ]


def tests_told(xml: Path) -> list[str]:
    """How many passed, failed and were skipped, and the names of those that failed, of a JUnit file."""
    if not xml.is_file():
        return ["no result"]
    cases = list(ET.parse(xml).getroot().iter("testcase"))
    failed = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = [c for c in cases if c.find("skipped") is not None]
    passed = len(cases) - len(failed) - len(skipped)
    lines = [f"{passed} passed, {len(failed)} failed, {len(skipped)} skipped"]
    lines += [f"failed: {c.get('classname')}::{c.get('name')}" for c in failed]
    reasons = sorted({(c.find("skipped").get("message") or "") for c in skipped})  # type: ignore[union-attr]
    return lines + [f"skipped: {reason}" for reason in reasons]


def markdown(facts: Sequence[str], done: Sequence[Part], bench: str) -> str:
    """The report."""
    lines = ["# unike_kernels on a GPU", "", *(f"- {fact}" for fact in facts), ""]
    lines += ["| part | outcome | seconds |", "| --- | --- | --- |"]
    lines += [f"| {p.title} | {p.outcome} | {p.seconds:.0f} |" for p in done]
    for part in done:
        shown = part.told if part.status == 0 else [*part.told, "```", *part.output, "```"]
        lines += ["", f"## {part.title.capitalize()}", "", *shown]
    return "\n".join([*lines, "", bench.removeprefix("# unike bench")]) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run all parts; returns 1 if one of them failed or did not end."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "unike-gpu", help="folder for the report")
    out = parser.parse_args(argv).out.resolve()

    from unike_kernels.environment import show_config
    from unike_kernels.ops import _backend

    if reason := _backend.triton_missing():
        print(f"run.py gpu: {reason}", file=sys.stderr)
        return 1
    out.mkdir(parents=True, exist_ok=True)
    tests, written = out / "tests.xml", out / "bench" / "report.md"
    for earlier in (tests, written):  # of another run, which a part that fails would not replace
        earlier.unlink(missing_ok=True)
    done = parts(out)
    for part in done:
        part.run()
    done[0].told = tests_told(tests)
    done[1].told = [line for line in done[1].output if "->" in line]
    bench = written.read_text() if written.is_file() else ""
    facts = show_config().splitlines()
    (out / "report.md").write_text(markdown(facts, done, bench))
    (out / "report.json").write_text(json.dumps({"machine": facts, "parts": [asdict(part) for part in done]}, indent=1))
    print(f"\nwritten: report.md and report.json in {out}")
    return 0 if all(part.status == 0 for part in done) else 1


if __name__ == "__main__":
    sys.exit(main())
