"""`pytest --budget SECONDS`: no test begins that would end behind it, by the minutes that its mark `slow` states.

What was left out is listed by name at the end, so that a run that is cut off does not look like a whole one.
"""

from __future__ import annotations

import time

import pytest

BEGUN = pytest.StashKey[float]()
LEFT_OUT = "beyond the budget"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--budget", type=float, metavar="SECONDS", help="begin no test that would end behind this")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[BEGUN] = time.monotonic()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    budget = item.config.getoption("--budget")
    if budget is None:
        return
    mark = item.get_closest_marker("slow")
    seconds = 60 * mark.kwargs.get("minutes", 0) if mark else 0
    if time.monotonic() - item.config.stash[BEGUN] + seconds > budget:
        pytest.skip(LEFT_OUT)


def pytest_terminal_summary(terminalreporter) -> None:
    left_out = [
        report.nodeid
        for report in terminalreporter.stats.get("skipped", [])
        if isinstance(report.longrepr, tuple) and LEFT_OUT in report.longrepr[2]
    ]
    if left_out:
        terminalreporter.section(f"{len(left_out)} not run: {LEFT_OUT}")
        for name in left_out:
            terminalreporter.write_line(name)
