"""The pictures of the README and the docs say what the docs say, and can be made anew."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "pictures"
tool = runpy.run_path(str(ROOT / "tools" / "pictures.py"))


def said(file):
    """What a picture says in words, and its size."""
    with Image.open(file) as picture:
        picture.load()
        return picture.text["Description"], picture.size


def test_the_figures_are_those_of_the_docs(tmp_path):
    """Where docs/latency-cpu.md has been measured anew, tools/pictures.py is to be run."""
    shown = tool["bars"]((ROOT / "docs" / "latency-cpu.md").read_text())
    assert len(shown) == 6 and all(bar.low <= bar.times <= bar.high and bar.other for bar in shown)
    tool["save_speed"](shown, tmp_path)
    assert said(PICTURES / "speed.png") == said(tmp_path / "speed.png")


@pytest.mark.parametrize(
    "row", ["| 2.5 (2.25 to 2.75) | than faiss flat, split |", "| 2.5 (2.25 to 2.75) times as fast as x y |"]
)
def test_a_report_in_either_form_is_read(row):
    page = "\n".join(f"| {case} | 1.19 ms | 1.2 ms {row} 957 µs | 81% |" for case in tool["SHOWN"])
    first, *_ = tool["bars"](page)
    assert first[1:] == (2.5, 2.25, 2.75, "faiss flat, split" if "than" in row else "x y")
    with pytest.raises(ValueError, match="expected a report that has 'retrieval of k=40 from N=15000, d=4096, B=1,"):
        tool["bars"](page.partition("\n")[2])


def test_they_are_small_and_shown_with_what_they_say():
    files = sorted(PICTURES.iterdir())
    assert [file.name for file in files] == ["demo.png", "explain.png", "speed.png"]
    assert sum(file.stat().st_size for file in files) < 200_000
    for file in files:
        with Image.open(file) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 50, f"nothing can be seen in {file.name}"
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    shown = {
        (page.parent / link).resolve()
        for page in pages
        for link in re.findall(r"!\[[^\]]+\]\(([^)]+\.png)\)", page.read_text())
    }
    assert set(files) <= shown
    readme = (ROOT / "README.md").read_text()
    assert readme.index("docs/pictures/demo.png") < readme.index("\n## ")


@pytest.mark.slow(minutes=1)
def test_they_can_be_made_anew(tmp_path, monkeypatch):
    """With the same questions, pictures and answers; the edit is trained on this machine."""
    monkeypatch.setattr(sys, "argv", ["pictures.py", str(tmp_path)])
    assert tool["main"]() == 0
    for name in ("demo.png", "explain.png", "speed.png"):
        assert said(tmp_path / name) == said(PICTURES / name), name
