"""The quick cases of `unike bench` under pytest-benchmark, which measures them: a test for each system. Run with
`python3 run.py bench`, those of a GPU with `python3 run.py bench -m gpu`; pytest-benchmark's own options hold.

An output is checked before it is timed. Compare within a group only; `unike bench` times its systems in turn.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from unike_bench import suite
from unike_bench.harness import device

from unike_kernels.ops import _backend

CASES = {case.name: case for device_ in suite.DEVICES for case in suite.cases("quick", device=device_)}


@functools.lru_cache(maxsize=1)
def data(case: str) -> Any:
    return CASES[case].data()


@pytest.mark.parametrize(
    ("case", "system"),
    [
        pytest.param(c.name, s, id=f"{c.name}-{s}", marks=[pytest.mark.gpu] if c.device == "cuda" else [])
        for c in CASES.values()
        for s in c.systems
    ],
)
@torch.no_grad()
def test_case(benchmark: Any, case: str, system: str) -> None:
    c = CASES[case]
    if c.device == "cuda" and (reason := _backend.triton_missing()):
        pytest.fail(reason)
    run = c.systems[system].prepare(data(case))
    recall = run.check(run.call())
    benchmark.group = c.title
    benchmark.extra_info.update(op=c.op, **c.shape, system=system, role=c.systems[system].role, checked=True)
    if recall is not None:
        benchmark.extra_info["recall"] = recall
    benchmark(device.finished(run.call, c.device))
