"""Plots are images, of what there is to plot."""

import pytest
import torch
from unike_bench.harness.timing import Spread
from unike_bench.report import plots as drawing
from unike_bench.report.plots import plots

pytest.importorskip("matplotlib")


def test_plots_of_what_was_measured(rows, make_row):
    found = plots(rows)
    assert len(found) == 3  # what is faster, what is over the unpatched model, and what was reached
    growing = [
        make_row(system, [1e-3 * n] * 3, op="growth", case=f"growth-N{n}-B{b}", shape={"N": n, "B": b}, read=read)
        for b in (1, 64)
        for n in (10, 100)
        for system, read in (("ours", 1e-3), ("theirs", None))
    ]
    grown = plots(growing)
    assert len(grown) == 1 and not found.keys() & grown.keys()
    assert all(image.startswith(b"\x89PNG") for image in (found | grown).values())


@pytest.fixture
def drawn(monkeypatch):
    """(rows) -> title -> the axes."""
    from matplotlib.figure import Figure

    def draw(rows):
        kept = []

        def keep(lines, drawer):
            kept.append(Figure().add_subplot())
            drawer(kept[-1])
            return b""

        monkeypatch.setattr(drawing, "_draw", keep)
        return dict(zip(drawing.plots(rows), kept, strict=True))

    return draw


def test_what_is_over_the_unpatched_model(drawn, make_row):
    rows = [
        make_row("ours", case="a", title="a " * 60, over=Spread(1.0, 1.1, 1.5)),
        make_row("plain", case="a", role="base"),
        make_row("ours", case="b", title="b", over=Spread(0.5, 0.75, 0.8)),
        make_row("ours", case="c", title="c"),
    ]
    ((title, axes),) = drawn(rows).items()
    assert "unpatched" in title
    assert [bar.get_width() for bar in axes.patches] == [pytest.approx(10), pytest.approx(-25)]
    (errors,) = (bars.lines[2][0].get_segments() for bars in axes.containers if hasattr(bars, "lines"))
    assert [sorted(x for x, _ in segment) for segment in errors] == [pytest.approx([0, 50]), pytest.approx([-50, -20])]
    long, short = (label.get_text() for label in axes.get_yticklabels())
    assert short == "b" and max(map(len, long.splitlines())) <= 60 and long.split() == ["a"] * 60


def test_throughput_over_the_batch(drawn, make_row):
    def row(system, b, seconds, role="peer", n=9):
        return make_row(system, [seconds] * 3, role, op="retrieval", case=f"N{n}-B{b}", title=f"of N={n}, B={b}, x",
                        shape={"N": n, "B": b})  # fmt: skip

    rows = [
        *(row("ours", b, 1e-3 * b, "ours") for b in (1, 4)),
        *(row(f"peer {i}", b, 1e-2 * i) for i in range(1, 6) for b in (4, 1)),
        row("rough", 1, 1e-9, "approximate"), row("rough", 4, 1e-9, "approximate"),
        row("ours", 1, 1.0, "ours", n=10),  # the only size there
        make_row("failed", (), "peer", op="retrieval", title="of N=9, B=1, x", shape={"N": 9, "B": 1}, failure="x"),
    ]  # fmt: skip
    ((title, axes),) = drawn(rows).items()
    assert title == "Throughput: of N=9, x"
    lines = {line.get_label(): torch.tensor(line.get_xydata()).tolist() for line in axes.lines}
    assert list(lines) == ["ours", "peer 1", "peer 2", "peer 3"]
    assert lines["ours"] == [[1, pytest.approx(1000)], [4, pytest.approx(1000)]]
    assert lines["peer 2"] == [[1, pytest.approx(50)], [4, pytest.approx(200)]]


def test_nothing_to_plot(make_row):
    assert plots([make_row(seconds=(), failure="wrong")]) == {}
