"""Others that find the k nearest keys: faiss, usearch, NumKong and torch, each as it is shipped and at its best."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

Search = Callable[[], Any]
Ids = Callable[[Any], Tensor]  # of what a search returned, int64 [B, k]


def faiss_flat(rows: Tensor, unit: Tensor, k: int) -> tuple[Search, Ids]:
    """IndexFlatIP over unit rows [N, d] for unit queries [B, d]."""
    return _faiss(rows, unit, k, lambda faiss, d: faiss.IndexFlatIP(d))


def faiss_fp16(rows: Tensor, unit: Tensor, k: int) -> tuple[Search, Ids]:
    """IndexScalarQuantizer of 16 bits."""
    return _faiss(rows, unit, k, lambda faiss, d: _quantizer(faiss, d, faiss.ScalarQuantizer.QT_fp16))


def faiss_8bit(rows: Tensor, unit: Tensor, k: int) -> tuple[Search, Ids]:
    """IndexScalarQuantizer of 8 bits."""
    return _faiss(rows, unit, k, lambda faiss, d: _quantizer(faiss, d, faiss.ScalarQuantizer.QT_8bit))


def _quantizer(faiss: Any, d: int, kind: Any) -> Any:
    return faiss.IndexScalarQuantizer(d, kind, faiss.METRIC_INNER_PRODUCT)


def _faiss(rows: Tensor, unit: Tensor, k: int, make: Callable[[Any, int], Any]) -> tuple[Search, Ids]:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index, keys, queries = make(faiss, rows.shape[1]), rows.numpy(), unit.numpy()
    index.train(keys)
    index.add(keys)
    return lambda: index.search(queries, k), lambda found: torch.from_numpy(found[1])


def faiss_split(rows: Tensor, unit: Tensor, k: int) -> tuple[Search, Ids]:
    """One IndexFlatIP for each thread, with its share of the keys: faiss gives a few queries to one thread alone."""
    import faiss

    threads, queries = torch.get_num_threads(), unit.numpy()
    parts = rows.chunk(threads)
    indices = [faiss.IndexFlatIP(rows.shape[1]) for _ in parts]
    for index, part in zip(indices, parts, strict=True):
        index.add(part.numpy())
    starts = torch.tensor([0, *map(len, parts[:-1])]).cumsum(0).tolist()
    # OpenMP keeps the number of threads for each thread that calls.
    pool = ThreadPoolExecutor(threads, initializer=lambda: faiss.omp_set_num_threads(1))

    def search() -> Tensor:
        found = list(pool.map(lambda index: index.search(queries, min(k, index.ntotal)), indices))
        scores = torch.cat([torch.from_numpy(s) for s, _ in found], 1)
        ids = torch.cat([torch.from_numpy(i) + start for (_, i), start in zip(found, starts, strict=True)], 1)
        return ids.gather(1, scores.topk(k).indices)

    return search, lambda found: found


def usearch_exact(rows: Tensor, unit: Tensor, k: int) -> tuple[Search, Ids]:
    """usearch's search without an index."""
    from usearch.index import MetricKind, search

    keys, queries, threads = rows.numpy(), unit.numpy(), torch.get_num_threads()
    return (
        lambda: search(keys, queries, k, MetricKind.IP, exact=True, threads=threads),
        lambda found: torch.from_numpy(found.keys.astype("int64")).reshape(len(queries), -1),
    )


def numkong_f32(rows: Tensor, unit: Tensor, k: int) -> tuple[Search, Ids]:
    """NumKong's products of float32 rows, which it packs and sums in float64, then `topk`."""
    return _numkong(rows, unit, k, lambda products: products)


def numkong_int8(rows: Tensor, unit: Tensor, k: int) -> tuple[Search, Ids]:
    """NumKong's products of int8 codes, which it packs, then `topk`."""
    (keys, steps), (queries, _) = _codes(rows), _codes(unit)
    return _numkong(keys, queries, k, lambda products: products * steps)


def _numkong(keys: Tensor, queries: Tensor, k: int, score: Callable[[Tensor], Tensor]) -> tuple[Search, Ids]:
    """A share of the keys for each thread: NumKong has none of its own."""
    import numkong
    import numpy

    parts = [numkong.dots_pack(part.numpy()) for part in keys.chunk(torch.get_num_threads())]
    asked, pool = queries.numpy(), ThreadPoolExecutor(len(parts))

    def product(part: Any) -> Tensor:
        return torch.from_numpy(numpy.asarray(numkong.dots_packed(asked, part)))

    return lambda: score(torch.cat(list(pool.map(product, parts)), 1)).topk(k), _indices


def torch_int8(rows: Tensor, unit: Tensor, k: int) -> tuple[Search, Ids]:
    """K Q^T of int8 codes in int32, then `topk`; the other order of the product is slower."""
    (keys, steps), (queries, _) = _codes(rows), _codes(unit)
    return lambda: (torch._int_mm(keys, queries.T).T * steps).topk(k), _indices


def _codes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [N, d] and the step of each row, float32 [N]."""
    steps = rows.abs().amax(1) / 127
    return (rows / steps.unsqueeze(1)).round().to(torch.int8), steps


def torch_queries_first(rows: Tensor, unit: Tensor, k: int) -> tuple[Search, Ids]:
    """Q K^T, the rows as they lie."""
    return lambda: (unit @ rows.T).topk(k), _indices


def torch_keys_first(rows: Tensor, unit: Tensor, k: int) -> tuple[Search, Ids]:
    """(K Q^T)^T: the same product, for which BLAS has other kernels."""
    return lambda: (rows @ unit.T).T.topk(k), _indices


def torch_transposed(rows: Tensor, unit: Tensor, k: int) -> tuple[Search, Ids]:
    """Q K^T from a copy of K^T that was made before."""
    columns = rows.T.contiguous()
    return lambda: (unit @ columns).topk(k), _indices


def _indices(found: Any) -> Tensor:
    ids: Tensor = found.indices
    return ids
