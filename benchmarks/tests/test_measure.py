"""From systems of known speed to rows; nothing that is wrong is timed."""

import weakref

import pytest
from unike_bench.harness.measure import measure
from unike_bench.harness.timing import Spread

WRONG = AssertionError("not  the\nsame")


@pytest.fixture
def measured(clock, make_case):
    def run(systems, **options):
        return {row.system: row for row in measure(make_case(systems, **options), rounds=3, clock=clock)}

    return run


def test_ours_against_the_fastest_that_computes_the_same(measured):
    rows = measured(
        {
            "int8": ("ours", 1.0, None),
            "float32": ("ours", 4.0, None),
            "slow": ("peer", 8.0, 1.0),
            "fast": ("peer", 2.0, 1.0),
            "rough": ("approximate", 0.5, 0.9),
        }
    )
    assert list(rows) == ["int8", "float32", "slow", "fast", "rough"]
    found = {name: (row.seconds[0], row.speedup.median, row.against, row.recall) for name, row in rows.items()}
    assert found == {
        "int8": (1.0, 2.0, "fast", None),
        "float32": (4.0, 0.5, "fast", None),
        "slow": (8.0, 8.0, "int8", 1.0),
        "fast": (2.0, 2.0, "int8", 1.0),
        "rough": (0.5, 0.5, "int8", 0.9),
    }
    assert all(row.failure is None and row.added is None and row.reached is None for row in rows.values())


def test_what_is_added_to_the_base_and_its_bound(measured):
    systems = {"patched": ("ours", 5.0, None), "plain": ("base", 4.0, None)}
    rows = measured(systems, read=0.25, multiplying=0.5, over="plain")
    ours = rows["patched"]
    assert (ours.added, ours.read, ours.bound, ours.reached) == (1.0, 0.25, 0.5, 0.5)
    assert (ours.speedup, ours.against) == (None, None)  # which there is no peer for
    assert ours.over == Spread(1.25, 1.25, 1.25)
    assert (rows["plain"].added, rows["plain"].over, rows["plain"].speedup) == (None, None, Spread(0.8, 0.8, 0.8))
    whole = measured(systems, read=2.0, multiplying=0.5)["patched"]
    assert (whole.bound, whole.reached) == (2.0, 0.4)


def test_nothing_is_reached_where_nothing_was_added(measured):
    ours = measured({"patched": ("ours", 4.0, None), "plain": ("base", 4.0, None)}, read=1.0, over="plain")["patched"]
    assert (ours.added, ours.bound, ours.reached) == (0.0, 1.0, None)


def test_a_wrong_peer_is_not_timed(measured, clock):
    rows = measured({"ours": ("ours", 2.0, None), "wrong": ("peer", 1.0, WRONG), "peer": ("peer", 3.0, 1.0)})
    assert rows["wrong"].failure == "AssertionError: not the same"
    assert (rows["wrong"].seconds, rows["wrong"].speedup) == ((), None)
    assert clock.calls.count("wrong") == 1
    assert rows["ours"].against == "peer"


def test_no_speedup_over_peers_where_ours_is_wrong(measured):
    rows = measured({"ours": ("ours", 1.0, WRONG), "second": ("ours", 1.0, None), "peer": ("peer", 3.0, 1.0)})
    assert rows["ours"].failure
    assert (rows["peer"].speedup, rows["peer"].against) == (None, None)
    assert rows["second"].speedup.median == 3.0


def test_a_bound_on_what_a_failed_base_does_not_tell(measured):
    rows = measured({"ours": ("ours", 1.0, None), "plain": ("base", 1.0, WRONG)}, read=0.5, over="plain")
    assert (rows["ours"].added, rows["ours"].bound, rows["ours"].reached) == (None, 0.5, None)
    assert rows["ours"].speedup is None


def test_data_that_cannot_be_made(measured):
    def data():
        raise MemoryError("too much")

    rows = measured({"ours": ("ours", 1.0, None), "peer": ("peer", 1.0, None)}, data=data)
    assert [row.failure for row in rows.values()] == ["MemoryError: too much"] * 2


def test_the_data_is_gone_afterwards(measured):
    gone = []

    class Data:
        pass

    def data():
        made = Data()
        weakref.finalize(made, gone.append, True)
        return made

    measured({"ours": ("ours", 1.0, None)}, data=data)
    assert gone == [True]
