"""Plots are images, of what there is to plot."""

import pytest
from unike_bench.report.plots import plots

pytest.importorskip("matplotlib")


def test_plots_of_what_was_measured(rows, make_row):
    found = plots(rows)
    assert len(found) == 2  # what is faster, and what was reached
    growing = [
        make_row(system, [1e-3 * n] * 3, op="growth", case=f"growth-N{n}-B{b}", shape={"N": n, "B": b}, read=read)
        for b in (1, 64)
        for n in (10, 100)
        for system, read in (("ours", 1e-3), ("theirs", None))
    ]
    grown = plots(growing)
    assert len(grown) == 1 and not found.keys() & grown.keys()
    assert all(image.startswith(b"\x89PNG") for image in (found | grown).values())


def test_nothing_to_plot(make_row):
    assert plots([make_row(seconds=(), failure="wrong")]) == {}
