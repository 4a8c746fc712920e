"""Approximate cosine retrieval through faiss, for memories of millions of entries; exact retrieval is `CosineIndex`."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from ..config import ANNConfig
from ..ops import _check, normalize_rows
from ..ops.cosine_topk import check_retrieval
from .retriever import Retriever


class ApproximateIndex:
    """Keys whose nearest by cosine are found with faiss: most of them, in much less time than all keys take to read.

    Args:
        keys: [N, d], any float dtype, finite; N at least 1. On a GPU with faiss-gpu, "ivf" is searched there.
        how: see `ANNConfig`.

    Raises:
        ImportError: faiss is not installed.
        ValueError: no keys, or a key with NaN or infinity; "hnsw" on a GPU.
    """

    def __init__(self, keys: Tensor, how: ANNConfig | None = None) -> None:
        try:
            import faiss
        except ImportError as error:
            raise ImportError("approximate retrieval needs faiss: pip install 'unike-kernels[faiss]'") from error
        if keys.dim() != 2 or not len(keys):
            raise ValueError(f"keys: expected [N, d] with N at least 1, got {list(keys.shape)}")
        if not _check.finite(keys):
            raise ValueError("keys: expected finite numbers, got NaN or infinity")
        self.how, self._device = how or ANNConfig(), keys.device
        rows, (self._count, self.d) = normalize_rows(keys.detach()).cpu().contiguous().numpy(), keys.shape
        index: Any
        if self.how.kind == "hnsw":
            if keys.is_cuda:
                raise ValueError("ANNConfig.kind: 'hnsw' is searched on the CPU; take 'ivf' for keys on a GPU")
            index = faiss.IndexHNSWFlat(self.d, self.how.links, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efSearch = self.how.breadth
        else:
            lists = min(self.how.lists or round(4 * self._count**0.5), self._count)
            index = faiss.IndexIVFFlat(faiss.IndexFlatIP(self.d), self.d, lists, faiss.METRIC_INNER_PRODUCT)
            index.cp.min_points_per_centroid = 1  # few keys are no reason for a warning on stderr
            index.train(rows)
            index.nprobe = min(self.how.probes, lists)
        index.add(rows)  # the only copy of the keys
        self._index = index
        if keys.is_cuda:
            self._index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), keys.device.index or 0, index)

    @property
    def device(self) -> torch.device:
        """Where the keys were given, and queries have to be."""
        return self._device

    def __len__(self) -> int:
        return self._count

    def search(self, queries: Tensor, k: int, ranges: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Some of the k keys of highest cosine, best first; see `Retriever.search`.

        Queries with the same range are searched together: a batch takes as many searches as it has different ranges.

        Args:
            queries: [M, d], any float dtype, on the device of the index.
            k: how many, at least 1; may exceed N.
            ranges: int64 [M, 2], 0 <= start <= stop <= N; query m searches only keys[start : stop]. None: all keys.

        Returns:
            scores float32 [M, k] and ids int64 [M, k], on the device of the index.

        Raises:
            TypeError, ValueError: a wrong dtype, shape, device or k; ranges outside the keys.
        """
        _check.rows("queries", queries)
        _check.unwrapped("queries", queries)
        _check.sized("queries", queries, (None, self.d))
        k = check_retrieval(queries, "index", torch.empty(0, dtype=torch.float32, device=self.device), k, ranges)
        finite = queries.isfinite().all(-1, keepdim=True)
        unit = torch.nn.functional.normalize(torch.where(finite, queries, 0).float(), dim=-1)
        scores = torch.full((len(queries), k), float("-inf"), dtype=torch.float32, device="cpu")
        ids = torch.full((len(queries), k), -1, dtype=torch.int64, device="cpu")
        for (start, stop), members in self._groups(len(queries), ranges):
            if start < stop:
                scores[members], ids[members] = self._found(unit.cpu()[members], k, start, stop)
        none = (ids < 0) | ~finite.cpu()
        scores, ids = scores.masked_fill(none, float("-inf")), ids.masked_fill(none, -1)
        return scores.to(self.device), ids.to(self.device)

    def _groups(self, queries: int, ranges: Tensor | None) -> list[tuple[tuple[int, int], Tensor]]:
        """Each range that occurs, and the queries that have it."""
        if ranges is None:
            return [((0, self._count), torch.arange(queries, dtype=torch.int64, device="cpu"))]
        different, which = ranges.cpu().unique(dim=0, return_inverse=True)
        bad = ((different[:, 0] < 0) | (different[:, 0] > different[:, 1]) | (different[:, 1] > self._count)).nonzero()
        if len(bad):
            raise ValueError(
                f"ranges: expected 0 <= start <= stop <= n = {self._count}, got {different[int(bad[0, 0])].tolist()}"
            )
        return [((int(a), int(b)), (which == i).nonzero().flatten()) for i, (a, b) in enumerate(different.tolist())]

    def _found(self, unit: Tensor, k: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Scores and ids of what faiss finds among the keys start, ..., stop - 1."""
        faiss: Any = importlib.import_module("faiss")
        parameters = None
        if (start, stop) != (0, self._count):
            selected = faiss.IDSelectorRange(start, stop)
            if self.how.kind == "hnsw":
                parameters = faiss.SearchParametersHNSW(sel=selected, efSearch=self.how.breadth)
            else:
                parameters = faiss.SearchParametersIVF(sel=selected, nprobe=self._index.nprobe)
        scores, ids = self._index.search(unit.contiguous().numpy(), k, params=parameters)
        return torch.from_numpy(scores), torch.from_numpy(ids)

    def recall(self, queries: Tensor, k: int, exact: Retriever) -> float:
        """The share of the true k nearest keys that `search` finds.

        Args:
            queries: [M, d].
            k: at least 1.
            exact: an exact index of the same keys, such as `CosineIndex(keys)`.
        """
        _, found = self.search(queries, k)
        _, true = exact.search(queries, k)
        hits = (found.unsqueeze(-1) == true.unsqueeze(-2)) & (true >= 0).unsqueeze(-2)
        return float(hits.sum() / (true >= 0).sum().clamp(min=1))
