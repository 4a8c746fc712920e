"""Retrieval: `CosineIndex` with every scan against faiss, usearch, NumKong and torch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from unike_kernels.ops.cosine_topk import SCANS
from unike_kernels.ops.cosine_topk.reference import normalize_rows
from unike_kernels.retrieval.exact import CosineIndex

from ..baselines import peers
from ..harness.case import Case, Run, System
from ..harness.optional import installed
from ..harness.roofline import Bound
from . import hidden
from .data import keys_and_queries
from .truth import Truth

K = 40
N = 15_000
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_FEW = 8  # queries, up to which splitting the keys helps faiss
_LARGE = 2**28  # numbers in the rows, beyond which not every scan gets its own: all tables together stay below 12 GB
_QUANTIZED = 64 * N  # scores, beyond which faiss's scalar quantizers take seconds: query by query, each as long as one


class Tables:
    """Keys and queries, the indices of the keys, and the true answer.

    Attributes:
        indices: scan -> index.
        rows: float32 [N, d], the unit keys, as the first index holds them.
        queries: float32 [B, d], as they come.
        unit: the same normalised.
        k: how many are looked for.
    """

    def __init__(self, kind: str, n: int, d: int, b: int, k: int) -> None:
        """kind, n, b, d: see `keys_and_queries`."""
        keys, self.queries = keys_and_queries(kind, n, b, d)
        self.indices = {scan: CosineIndex(keys, scan) for scan in _scans(n, d)}
        self.rows = next(iter(self.indices.values()))._tensors()["rows"]
        self.unit, self.k = normalize_rows(self.queries), k
        some = slice(None, None, max(1, n // 64))
        assert torch.equal(self.rows[some], normalize_rows(keys[some])), "the rows of the index are not the unit keys"

    @functools.cached_property
    def truth(self) -> Truth:
        """The exact answer."""
        return Truth(self.rows, self.unit, self.k)


def _scans(n: int, d: int) -> list[str]:
    return [scan for scan in SCANS if n * d <= _LARGE or scan in ("int8", "float32")]


def _ours(scan: str, t: Tables) -> Run:
    index = t.indices[scan]
    tables = index._tensors()
    codes = [tables[name] for name in ("codes", "bounds") if name in tables]
    # Beside the codes the rows of what is found, each once.
    reads = [*codes, t.rows[: len(t.truth.ids.unique())]] if codes else [t.rows]
    multiply_adds = float(t.rows.shape[0] * t.rows.shape[1] * len(t.queries))
    return Run(
        lambda: index.search(t.queries, t.k),
        lambda found: t.truth.check_exact(*found),
        Bound((*reads, t.queries), {getattr(torch, scan): multiply_adds}),
    )


def _peer(make: Callable[[Tensor, Tensor, int], tuple[peers.Search, peers.Ids]], *, exact: bool = True) -> System:
    def prepare(t: Tables) -> Run:
        search, ids = make(t.rows, t.unit, t.k)
        check = t.truth.check_peer if exact else t.truth.recall
        return Run(search, lambda found: check(ids(found)))

    return System("peer" if exact else "approximate", prepare)


def _systems(n: int, d: int, b: int) -> dict[str, System]:
    systems = {f"unike {scan}": System("ours", functools.partial(_ours, scan)) for scan in _scans(n, d)}
    if installed("faiss"):
        systems["faiss flat"] = _peer(peers.faiss_flat)
        if b <= _FEW:
            systems["faiss flat, split"] = _peer(peers.faiss_split)
        if n * b <= _QUANTIZED:
            systems["faiss SQ fp16"] = _peer(peers.faiss_fp16, exact=False)
            systems["faiss SQ 8bit"] = _peer(peers.faiss_8bit, exact=False)
    if installed("usearch"):
        systems["usearch exact"] = _peer(peers.usearch_exact)
    if installed("numkong"):
        systems["numkong f32"] = _peer(peers.numkong_f32)
        systems["numkong int8"] = _peer(peers.numkong_int8, exact=False)
    systems["torch int8"] = _peer(peers.torch_int8, exact=False)
    systems["torch Q @ K.T"] = _peer(peers.torch_queries_first)
    systems["torch K @ Q.T"] = _peer(peers.torch_keys_first)
    systems["torch Q @ Kt"] = _peer(peers.torch_transposed)
    return systems


def case(kind: str, n: int, d: int, b: int) -> Case:
    """The k = 40 nearest of n keys for b queries of width d, of one `kind` of data."""
    return Case(
        "retrieval",
        f"retrieval of k={K} from N={n}, d={d}, B={b}, {kind}",
        {"N": n, "d": d, "B": b, "k": K, "data": kind},
        functools.partial(Tables, kind, n, d, b, K),
        _systems(n, d, b),
    )


def quick() -> list[Case]:
    """At the width of LLaMA-7B, and hidden states as they are."""
    return [*(case("isotropic", N, 4096, b) for b in (1, 8, 64, 512)), *_hidden((1, 64))]


def full() -> list[Case]:
    """All widths at the usual size, other sizes and data for four batches each."""
    some = (1, 8, 64, 512)
    return [
        *(case("isotropic", N, d, b) for d in (576, 768, 2560, 4096) for b in BATCHES),
        *(case("isotropic", n, d, b) for n in (1000, 100_000) for d in (768, 4096) for b in some),
        *(case("clumped", N, d, b) for d in (768, 4096) for b in some),
        *_hidden(some),
    ]


def _hidden(batches: Iterable[int]) -> list[Case]:
    d = hidden.width()
    return [] if d is None else [case("hidden", N, d, b) for b in batches]


_GROWING = ("unike int8", "unike float32", "faiss flat", "torch K @ Q.T")  # what a million keys leave room for


def growth() -> list[Case]:
    """From 15,000 to a million keys of width 768: does the time per key stay what it is?"""
    return [_growing(n, 768, b) for b in (1, 64) for n in (N, 100_000, 1_000_000)]


def _growing(n: int, d: int, b: int) -> Case:
    systems = {name: system for name, system in _systems(n, d, b).items() if name in _GROWING}
    data = functools.partial(Tables, "isotropic", n, d, b, K)
    return Case("growth", f"growth: N={n}, d={d}, B={b}", {"N": n, "d": d, "B": b, "k": K}, data, systems)
