"""The quick cases of `unike bench` under pytest-benchmark: a test for each system. Run with `python3 run.py bench`,
those of a GPU with `python3 run.py bench -m gpu`.

The systems of a case are timed in turn, when the first test asks for one of them; each test hands over its own times.
Compare within a group only.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
from unike_bench import suite
from unike_bench.harness.measure import Row, measure
from unike_bench.report.replay import Replay
from unike_bench.report.results import extra_info

from unike_kernels import _native
from unike_kernels.ops import _backend

CASES = {case.name: case for device in suite.DEVICES for case in suite.cases("quick", device=device)}
REPLAY = Replay()


@functools.lru_cache(maxsize=1)
def measured(case: str) -> dict[str, Row]:
    return {row.name: row for row in measure(CASES[case])}


@pytest.mark.parametrize(
    ("case", "system"),
    [
        pytest.param(c.name, s, id=f"{c.name}-{s}", marks=[pytest.mark.gpu] if c.device == "cuda" else [])
        for c in CASES.values()
        for s in c.systems
    ],
)
@pytest.mark.benchmark(timer=REPLAY)
def test_case(benchmark: Any, case: str, system: str) -> None:
    if CASES[case].device == "cuda" and (reason := _native.cuda_missing() or _backend.triton_missing()):
        pytest.skip(reason)
    row = measured(case)[f"{case}-{system}"]
    assert row.failure is None, row.failure
    benchmark.group = row.title
    benchmark.extra_info.update(extra_info(row))
    REPLAY.load(row.seconds)
    benchmark.pedantic(lambda: None, rounds=len(row.seconds), iterations=1)
