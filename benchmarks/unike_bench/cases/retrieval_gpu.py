"""Retrieval on a GPU: `CosineIndex` with every scan and the Triton kernel, against torch in full and in reduced
precision, and against FlashInfer's selection, faiss-gpu and cuVS where they are installed."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from unike_kernels import ops
from unike_kernels.ops.cosine_topk import cuda
from unike_kernels.ops.cosine_topk.reference import normalize_rows
from unike_kernels.retrieval.exact import CosineIndex

from ..harness.case import Case, Run, System
from ..harness.optional import installed
from ..harness.roofline import Bound
from .data import keys_and_queries
from .truth import Truth

K = 40
SCANS = ("int8", "float16", "float32")
_SHAPES = [(15_000, 4096, b) for b in (1, 8, 64, 512)] + [(1_000_000, 768, b) for b in (1, 64)]
_QUICK = _SHAPES[:4]
Search = Callable[[], tuple[Tensor, Tensor]]


class Tables:
    """Keys and queries on a device, and the true answer.

    Attributes:
        rows: float32 [N, d], the unit keys; unit: float32 [B, d], the unit queries.
        queries: [B, d], as they come.
        k: how many are looked for.
    """

    def __init__(self, n: int, d: int, b: int, k: int, device: str) -> None:
        keys, queries = keys_and_queries("isotropic", n, b, d)
        self._keys, self._device = keys, device
        self.rows, self.unit = (normalize_rows(t).to(device) for t in (keys, queries))
        self.queries, self.k = queries.to(device), k

    def index(self, scan: str) -> CosineIndex:
        """The keys, packed for a scan."""
        return CosineIndex(self._keys, scan).to(self._device)

    @functools.cached_property
    def truth(self) -> Truth:
        """The exact answer."""
        return Truth(self.rows, self.unit, self.k)


def _ours(scan: str, t: Tables) -> Run:
    index = t.index(scan)
    tables = index._tensors()
    reads = [tables[name] for name in ("codes", "bounds") if name in tables] or [t.rows]
    return Run(
        lambda: index.search(t.queries, t.k), lambda found: t.truth.check_exact(*found), Bound((*reads, t.queries))
    )


def _by_triton(t: Tables) -> Run:
    """What a build without the CUDA kernels has."""

    def search() -> tuple[Tensor, Tensor]:
        with ops.backend("triton"):
            return ops.cosine_topk(t.queries, t.rows, t.k, normalized=True)

    return Run(search, lambda found: t.truth.check_exact(*found), Bound((t.rows, t.queries)))


def with_torch(t: Tables) -> Search:
    """All scores by the vendor's library, then topk."""
    return lambda: (t.unit @ t.rows.T).topk(t.k)


def with_tf32(t: Tables) -> Search:
    """The same, factors rounded to 11 bits."""

    def search() -> tuple[Tensor, Tensor]:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            return with_torch(t)()
        finally:
            torch.set_float32_matmul_precision(before)

    return search


def with_bfloat16(t: Tables) -> Search:
    """The same from half the bytes, factors and scores rounded to 8 bits."""
    rows, unit = t.rows.bfloat16(), t.unit.bfloat16()
    return lambda: (unit @ rows.T).topk(t.k)


def with_flashinfer(t: Tables) -> Search:
    """All scores by the vendor's library, then FlashInfer's radix selection."""
    import flashinfer

    return lambda: flashinfer.top_k(t.unit @ t.rows.T, t.k, sorted=True)


def with_faiss(t: Tables) -> Search:
    """GpuIndexFlatIP."""
    import faiss
    import faiss.contrib.torch_utils  # tensors of the device in and out

    index = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), t.rows.shape[1])
    index.add(t.rows)
    return lambda: index.search(t.unit, t.k)


def with_cuvs(t: Tables) -> Search:
    """Brute force."""
    from cuvs.neighbors import brute_force

    index = brute_force.build(t.rows, metric="inner_product")
    return lambda: tuple(torch.as_tensor(found, device="cuda") for found in brute_force.search(index, t.unit, t.k))  # type: ignore[return-value]


def _peer(make: Callable[[Tables], Search], t: Tables) -> Run:
    return Run(make(t), lambda found: t.truth.check_peer(found[1].long()))


def _approximate(make: Callable[[Tables], Search], t: Tables) -> Run:
    return Run(make(t), lambda found: t.truth.recall(found[1]))


PEERS = {"torch": with_torch, "flashinfer": with_flashinfer, "faiss": with_faiss, "cuvs": with_cuvs}
ROUGH = {"torch TF32": with_tf32, "torch bfloat16": with_bfloat16}


def case(n: int, d: int, b: int, device: str = "cuda") -> Case:
    """The k = 40 nearest of n keys for b queries of width d."""
    systems: dict[str, System] = {}
    if device == "cpu" or not cuda.missing():
        systems |= {f"unike {scan}": System("ours", functools.partial(_ours, scan)) for scan in SCANS}
    if device == "cuda":
        systems["unike Triton"] = System("ours", _by_triton)
    for name, make in PEERS.items():
        if installed(name):
            systems[name] = System("peer", functools.partial(_peer, make))
    systems |= {name: System("approximate", functools.partial(_approximate, make)) for name, make in ROUGH.items()}
    title = f"retrieval of k={K} from N={n}, d={d}, B={b} on a GPU"
    shape = {"N": n, "d": d, "B": b, "k": K}
    return Case("retrieval", title, shape, functools.partial(Tables, n, d, b, K, device), systems, device)


def quick(device: str) -> list[Case]:
    """At the width of LLaMA-7B."""
    return [case(*shape, device) for shape in _QUICK]


def full(device: str) -> list[Case]:
    """And a million keys."""
    return [case(*shape, device) for shape in _SHAPES]
