"""What is said of a long run: a bar on a terminal, lines in a log, and nothing where nobody wants it."""

from __future__ import annotations

import io
import sys

import pytest

from unike_kernels.training import progress


class Clock:
    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


def run(clock, shown=True):
    with progress.progress_bar("edit", 9, shown) as bar:
        for i in range(9):
            clock.now += 12
            bar.set_postfix(loss=f"{i}.5")
            bar.update()


def test_a_line_now_and_then_in_a_log(clock, capsys):
    run(clock)
    captured = capsys.readouterr()
    assert captured.err == (
        "edit: 3 of 9, loss 2.5, 36 s\nedit: 6 of 9, loss 5.5, 72 s\nedit: 9 of 9, loss 8.5, 108 s\n"
    )
    assert captured.out == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    run(clock)
    assert "edit:" in sys.stderr.getvalue() and "\r" in sys.stderr.getvalue()


@pytest.mark.parametrize("kind", [Terminal, io.StringIO])
@pytest.mark.parametrize("shown", [True, False])
def test_nothing_where_nobody_wants_it(clock, monkeypatch, kind, shown):
    monkeypatch.setattr(sys, "stderr", kind())
    if shown:
        monkeypatch.setenv("UNIKE_PROGRESS", "0")
    run(clock, shown)
    assert sys.stderr.getvalue() == ""
