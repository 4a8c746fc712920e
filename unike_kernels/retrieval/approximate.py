"""Approximate cosine retrieval through faiss, for memories of millions of entries; exact retrieval is `CosineIndex`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..config import Approximate
from ..ops import _check, cosine_topk, normalize_rows


class ApproximateIndex:
    """Keys whose nearest by cosine are found with faiss: most of them, in much less time than all keys take to read.

    Args:
        keys: [N, d], any float dtype, finite; N at least 1. On a GPU with faiss-gpu, "ivf" is searched there.
        how: see `Approximate`.

    Raises:
        ImportError: faiss is not installed.
        ValueError: no keys, or a key with NaN or infinity; "hnsw" on a GPU.
    """

    def __init__(self, keys: Tensor, how: Approximate | None = None) -> None:
        try:
            import faiss
        except ImportError as error:
            raise ImportError("approximate retrieval needs faiss: pip install 'unike-kernels[faiss]'") from error
        if keys.dim() != 2 or not len(keys):
            raise ValueError(f"keys: expected [N, d] with N at least 1, got {list(keys.shape)}")
        if not keys.isfinite().all():
            raise ValueError("keys: expected finite numbers, got NaN or infinity")
        self.how, self.device = how or Approximate(), keys.device
        self._rows = normalize_rows(keys)
        rows, (n, d) = self._rows.cpu().contiguous().numpy(), keys.shape
        index: Any
        if self.how.kind == "hnsw":
            if keys.is_cuda:
                raise ValueError("Approximate.kind: 'hnsw' is searched on the CPU; take 'ivf' for keys on a GPU")
            index = faiss.IndexHNSWFlat(d, self.how.links, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efSearch = self.how.breadth
        else:
            lists = min(self.how.lists or round(4 * n**0.5), n)
            index = faiss.IndexIVFFlat(faiss.IndexFlatIP(d), d, lists, faiss.METRIC_INNER_PRODUCT)
            index.cp.min_points_per_centroid = 1  # few keys are no reason for a warning on stderr
            index.train(rows)
            index.nprobe = min(self.how.probes, lists)
        index.add(rows)
        self._index = index
        if keys.is_cuda:
            self._index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), keys.device.index or 0, index)

    def __len__(self) -> int:
        return len(self._rows)

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Some of the k keys of highest cosine, best first: scores float32 [M, k], ids int64 [M, k].

        Where fewer are found, and for a query that is not finite, the rest is id -1 and score -inf.

        Raises ValueError for a k below 1 or queries that are not [M, d].
        """
        k = _check.count("k", k)
        if queries.dim() != 2 or queries.shape[1] != self._rows.shape[1]:
            raise ValueError(f"queries: expected [M, {self._rows.shape[1]}], got {list(queries.shape)}")
        finite = queries.isfinite().all(-1)
        unit = torch.nn.functional.normalize(torch.where(finite.unsqueeze(-1), queries, 0).float(), dim=-1)
        found = self._index.search(unit.cpu().contiguous().numpy(), k)
        scores, ids = (torch.from_numpy(t).to(self.device) for t in found)
        none = (ids < 0) | ~finite.unsqueeze(-1)
        return scores.masked_fill(none, float("-inf")), ids.masked_fill(none, -1)

    def recall(self, queries: Tensor, k: int) -> float:
        """The share of the true k nearest keys that `search` finds, measured against the exact kernel."""
        _, found = self.search(queries, k)
        _, exact = cosine_topk(queries, self._rows, k, normalized=True)
        hits = (found.unsqueeze(-1) == exact.unsqueeze(-2)) & (exact >= 0).unsqueeze(-2)
        return float(hits.sum() / (exact >= 0).sum().clamp(min=1))
