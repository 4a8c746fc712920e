"""Interleaved rounds on a clock that only the calls advance."""

import pytest
from unike_bench.harness.timing import Spread, interleave, percentiles, ratio, spread


def test_quartiles_are_interpolated():
    assert spread([4.0, 1.0, 2.0, 3.0]) == Spread(1.75, 2.5, 3.25)
    assert spread([1.0, 3.0]) == Spread(1.5, 2.0, 2.5)
    assert spread([4.0, 1.0, 2.0, 3.0]).iqr == 1.5


def test_percentiles_are_interpolated():
    assert percentiles(range(101)) == (95, 99)
    assert percentiles([2.0, 1.0]) == (pytest.approx(1.95), pytest.approx(1.99))


def test_ratios_are_those_of_each_round():
    assert ratio([2.0, 6.0, 30.0], [1.0, 2.0, 3.0]) == Spread(2.5, 3.0, 6.5)
    with pytest.raises(ValueError, match="shorter"):
        ratio([1.0, 2.0], [1.0])


def test_each_round_calls_each_system_once_in_changing_order(clock):
    times = interleave({"a": clock.call("a", 0.5), "b": clock.call("b", 1.5)}, rounds=8, clock=clock)
    assert times == {"a": [0.5] * 8, "b": [1.5] * 8}
    rounds = clock.calls[-16:]
    pairs = [tuple(rounds[i : i + 2]) for i in range(0, 16, 2)]
    assert set(pairs) == {("a", "b"), ("b", "a")}


def test_short_calls_are_repeated_after_one_that_is_not_counted(clock):
    times = interleave({"a": clock.call("a", 0.6e-3), "b": clock.call("b", 0.5)}, rounds=3, clock=clock)
    assert times["a"] == pytest.approx([0.6e-3] * 3)
    assert clock.calls.count("a") == 3 + 3 * (1 + 4)  # warm-up; 4 calls take 2.4 ms
    assert clock.calls.count("b") == 1 + 3


def test_a_long_call_that_was_made_before_is_the_warm_up(clock):
    systems = {name: clock.call(name, 0.5) for name in ("a", "b")}
    interleave(systems, {"a": 0.5, "b": 0.01}, rounds=3, clock=clock)
    assert (clock.calls.count("a"), clock.calls.count("b")) == (3, 4)


def test_a_drift_of_the_machine_cancels_in_the_ratios(clock):
    def system(seconds):
        def run():
            clock.now += seconds * (1 + 0.01 * clock.now)

        return run

    times = interleave({"a": system(1.0), "b": system(3.0)}, rounds=25, clock=clock)
    assert times["a"][-1] > 2 * times["a"][0]
    assert ratio(times["b"], times["a"]).median == pytest.approx(3, rel=0.04)


@pytest.mark.parametrize(("seconds", "rounds"), [(3.5, 4), (0.1, 3), (1000.0, 25)])
def test_rounds_fit_into_the_time(clock, seconds, rounds):
    assert len(interleave({"a": clock.call("a", 1.0)}, seconds=seconds, clock=clock)["a"]) == rounds


def test_too_few_rounds(clock):
    with pytest.raises(ValueError, match="rounds: expected at least 3, got 2"):
        interleave({"a": clock.call("a", 1.0)}, rounds=2, clock=clock)


def test_nothing_to_time(clock):
    assert interleave({}, rounds=3, clock=clock) == {}
