"""Retrieval on a GPU against faiss, cuVS and torch: `pytest benchmarks/test_gpu_retrieval.py -m gpu --benchmark-only`.

Every answer is checked before it is timed. A round is a replay of a CUDA graph with 20 calls, timed by events, or 20
calls where a library cannot be captured. Beside the time stand the bytes that each scan must read and what reading them
at the bandwidth of a copy, measured in the same run, would take: a bound, not a prediction.
"""

from __future__ import annotations

import statistics
from typing import Any

import pytest

from unike_kernels import _native
from unike_kernels.bench import gpu
from unike_kernels.bench.optional import installed
from unike_kernels.bench.replay import Replay

pytestmark = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(_native.cuda_missing() is not None, reason=str(_native.cuda_missing()))
REPLAY = Replay()


@needs_gpu
@pytest.mark.parametrize(("n", "d", "b"), gpu.SHAPES)
@pytest.mark.benchmark(timer=REPLAY)
@pytest.mark.parametrize("system", [*gpu.SCANS, *gpu.PEERS])
def test_retrieval(benchmark: Any, n: int, d: int, b: int, system: str) -> None:
    if system in ("faiss", "cuvs") and not installed(system):
        pytest.skip(f"{system} is not installed")
    keys, queries = gpu.tables(n, d)
    queries = queries[:b]
    search = gpu.PEERS[system](keys) if system in gpu.PEERS else gpu.ours(keys, system)
    gpu.check(search(queries), keys, queries)
    times = gpu.rounds(lambda: search(queries), capture=system in gpu.CAPTURED)
    scan = system if system in gpu.SCANS else "float32"
    read = gpu.scanned_bytes(n, d, scan)
    least = read / gpu.bandwidth()
    benchmark.group = f"N={n}, d={d}, B={b}, k={gpu.K}"
    benchmark.extra_info.update(bytes=read, bound=least, reached=least / statistics.median(times))
    REPLAY.load(times)
    benchmark.pedantic(lambda: None, rounds=len(times), iterations=1)
