"""Changes are told from noise."""

from unike_bench.report.compare import Change, changes
from unike_bench.report.results import Recorded


def test_a_change_is_one_beyond_both_spreads(make_row):
    rows = [
        make_row("slower", (2.0, 2.1, 2.2)),
        make_row("noise", (0.8, 1.2, 1.9)),
        make_row("faster", (0.5, 0.5, 0.5)),
        make_row("new", (1.0, 1.0, 1.0)),
        make_row("wrong", (), failure="wrong"),
    ]
    old = {f"ffn-d8-{name}": Recorded(1.0, 0.1) for name in ("slower", "noise", "faster", "wrong", "gone")}
    assert changes(old, rows) == [
        Change("ffn-d8-slower", 1.0, 2.1, True),
        Change("ffn-d8-noise", 1.0, 1.2, False),
        Change("ffn-d8-faster", 1.0, 0.5, True),
    ]
    assert [c.ratio for c in changes(old, rows)] == [2.1, 1.2, 0.5]
