"""Times that were taken before, handed to pytest-benchmark as if its own clock had taken them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence


class Replay:
    """A clock, read before and after each round: `benchmark(timer=...)`."""

    __name__ = "interleaved"  # what pytest-benchmark calls it in its files

    def __init__(self) -> None:
        self._readings: Iterator[float] = iter(())

    def load(self, times: Sequence[float]) -> None:
        """Make the next rounds take these seconds."""
        self._readings = iter(_readings(times))

    def __call__(self) -> float:
        return next(self._readings)


def _readings(times: Iterable[float]) -> Iterator[float]:
    for seconds in times:
        yield 0.0
        yield seconds
