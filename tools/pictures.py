#!/usr/bin/env python3
"""Makes the pictures of the README and the docs anew: python tools/pictures.py [FOLDER], of docs/pictures by default.

demo.png and explain.png are what `unike demo` writes, speed.png is drawn from the table of docs/latency-cpu.md.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "pictures"
# What is shown of the table, in short.
SHOWN = {
    "retrieval of k=40 from N=15000, d=4096, B=1, isotropic": "search, 15,000 keys of d = 4096, 1 query",
    "retrieval of k=40 from N=15000, d=4096, B=64, isotropic": "64 queries",
    "growth: N=1000000, d=768, B=1": "a million keys of d = 768, 1 query",
    "growth: N=1000000, d=768, B=64": "64 queries",
    "latent attention over k=40 of N=15000, gate and blend, d=4096, T=1": "latent attention, d = 4096, 1 token",
    "latent attention over k=40 of N=15000, gate and blend, d=4096, T=128": "128 tokens",
}


class Bar(NamedTuple):
    """How many times faster ours is than the fastest other."""

    title: str
    times: float
    low: float
    high: float
    other: str


def bars(page: str) -> list[Bar]:
    """Of a report of `unike bench`, in Markdown, those that are shown.

    Raises:
        ValueError: the report lacks one.
    """
    found = []
    for case, title in SHOWN.items():
        line = re.search(rf"^\| {re.escape(case)} \|.*$", page, re.MULTILINE)
        told = line and re.search(r"([\d.]+) \(([\d.]+) to ([\d.]+)\)(?: times as fast as| \| than) (.+?) \|", line[0])
        if not told:
            raise ValueError(f"page: expected a report that has {case!r} in its first table")
        found.append(Bar(title, float(told[1]), float(told[2]), float(told[3]), told[4]))
    return found


def described(shown: list[Bar]) -> str:
    """The bars in words, a line for each."""
    return "\n".join(f"{bar.title}: {bar.times:.1f} times faster than {bar.other}" for bar in shown)


def speed(shown: list[Bar]) -> Any:
    """A figure of matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 0.4 + 0.42 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    errors = [[bar.times - bar.low for bar in shown], [bar.high - bar.times for bar in shown]]
    axes.barh(range(len(shown)), [bar.times for bar in shown], xerr=errors, color="#2f6fde", ecolor="#5c6675")
    for at, bar in enumerate(shown):
        axes.text(bar.high + 0.15, at, f"than {bar.other}", va="center", fontsize="small", color="#5c6675")
    axes.set_yticks(range(len(shown)), [bar.title for bar in shown])
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlim(0, max(bar.high for bar in shown) * 1.35)
    axes.set_xlabel("times faster than the fastest other on two cores, median and quartiles")
    return figure


def save_speed(shown: list[Bar], out: Path) -> None:
    """Into speed.png, which says the same in words."""
    speed(shown).savefig(out / "speed.png", dpi=100, metadata={"Description": described(shown)})


def main() -> int:
    """Write all three; returns the exit status."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURES
    out.mkdir(parents=True, exist_ok=True)
    shown = bars((ROOT / "docs" / "latency-cpu.md").read_text())
    save_speed(shown, out)
    with tempfile.TemporaryDirectory() as folder:
        status = subprocess.run([sys.executable, "-m", "unike_kernels", "demo", "--out", folder]).returncode
        for name in ("demo.png", "explain.png"):
            shutil.copyfile(Path(folder, name), out / name)
    return status


if __name__ == "__main__":
    sys.exit(main())
