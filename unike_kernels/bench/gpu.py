"""Retrieval on a GPU: ours and others, the check of their answers, timing by events, and the bound by bytes."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _native
from ..index import CosineIndex

K = 40
CALLS = 20  # of a round
ROUNDS = 15
SHAPES = [(15_000, 4096, b) for b in (1, 8, 64, 512)] + [(1_000_000, 768, b) for b in (1, 64)]
SCANS = ("int8", "float16", "float32")
Search = Callable[[Tensor], tuple[Tensor, Tensor]]


def scanned_bytes(n: int, d: int, scan: str) -> int:
    """That a scan must read."""
    size = {"int8": 1, "float16": 2, "float32": 4}[scan]
    return n * (-(-d * size // 64) * 64 + (0 if scan == "float32" else 16))


@functools.lru_cache(maxsize=1)
def tables(n: int, d: int) -> tuple[Tensor, Tensor]:
    """Unit keys on the device, and 512 queries."""
    generator = torch.Generator().manual_seed(0)
    keys, queries = (torch.randn(rows, d, generator=generator) for rows in (n, 512))
    return _native.normalize_rows(keys).cuda(), _native.normalize_rows(queries).cuda()


def ours(keys: Tensor, scan: str) -> Search:
    """`CosineIndex` on the device."""
    index = CosineIndex(keys.cpu(), scan).to("cuda")
    return lambda queries: index.search(queries, K)


def with_torch(keys: Tensor) -> Search:
    """All scores by cuBLAS, then topk."""

    def search(queries: Tensor) -> tuple[Tensor, Tensor]:
        found = (queries @ keys.T).topk(K)
        return found.values, found.indices

    return search


def with_faiss(keys: Tensor) -> Search:
    """GpuIndexFlatIP."""
    import faiss
    import faiss.contrib.torch_utils  # tensors of the device in and out

    index = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), keys.shape[1])
    index.add(keys)
    return lambda queries: index.search(queries, K)


def with_cuvs(keys: Tensor) -> Search:
    """Brute force."""
    from cuvs.neighbors import brute_force

    index = brute_force.build(keys, metric="inner_product")

    def search(queries: Tensor) -> tuple[Tensor, Tensor]:
        scores, ids = brute_force.search(index, queries, K)
        return torch.as_tensor(scores, device="cuda"), torch.as_tensor(ids, device="cuda")

    return search


def check(found: tuple[Tensor, Tensor], keys: Tensor, queries: Tensor) -> None:
    """The scores are those of the best keys, in whatever order they were summed, and of the ids that stand there."""
    wanted = (queries.double() @ keys.double().T).topk(K).values
    scores, ids = found[0].double(), found[1].long()
    torch.testing.assert_close(scores, wanted, rtol=0, atol=2e-3)  # tf32 in other libraries
    own = (queries.double().unsqueeze(1) * keys[ids].double()).sum(-1)
    torch.testing.assert_close(own, wanted, rtol=0, atol=2e-3)


def rounds(call: Callable[[], Any], capture: bool) -> list[float]:
    """Seconds of a call, one for each round."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    run: Callable[[], Any] = lambda: [call() for _ in range(CALLS)]  # noqa: E731
    if capture:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        run = graph.replay
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / CALLS)
    return times


@functools.cache
def bandwidth() -> float:
    """Bytes a second of a copy of 1 GB, read and written."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / statistics.median(rounds(lambda: target.copy_(source), capture=True))


PEERS: dict[str, Callable[[Tensor], Search]] = {"torch": with_torch, "faiss": with_faiss, "cuvs": with_cuvs}
CAPTURED = (*SCANS, "torch")  # into a graph
