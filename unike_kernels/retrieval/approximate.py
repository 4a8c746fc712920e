"""Approximate cosine retrieval through faiss, for memories of millions of entries; exact retrieval is `CosineIndex`."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import ANNConfig
from ..ops import _check, normalize_rows
from ..ops.cosine_topk import check_retrieval
from .index import Ids, KeyedIndex, own_ids, tensor_of
from .retriever import Retriever


class ApproximateIndex(KeyedIndex):
    """Keys whose nearest by cosine are found with faiss: most of them, in much less time than all keys take to read.

    A batch takes as many searches as it has different ranges. Where what is read holds fewer than k of the keys in
    range or allowed, though there are more, all is read: then none is left out. Ties come in any order.

    Args:
        keys: [N, d], any float dtype, finite; N at least 1; a tensor, or an array of numpy. On a GPU with faiss-gpu,
            "ivf" is searched there.
        how: see `ANNConfig`.
        ids: as of `CosineIndex`.

    Raises:
        ImportError: faiss is not installed.
        TypeError, ValueError: no keys, or a key with NaN or infinity; "hnsw" on a GPU; wrong ids.
    """

    def __init__(
        self, keys: Tensor | np.ndarray[Any, Any], how: ANNConfig | None = None, *, ids: Ids | None = None
    ) -> None:
        try:
            import faiss
        except ImportError as error:
            raise ImportError("approximate retrieval needs faiss: pip install 'unike-kernels[faiss]'") from error
        keys = tensor_of("keys", keys)
        if keys.dim() != 2 or not len(keys):
            raise ValueError(f"keys: expected [N, d] with N at least 1, got {list(keys.shape)}")
        self.how, self._device = how or ANNConfig(), keys.device
        rows, (self._count, self._d) = _unit_rows(keys), keys.shape
        own = own_ids(ids, self._count)
        self._ids = None if own is None else own.to(keys.device)
        index: Any
        if self.how.kind == "hnsw":
            if keys.is_cuda:
                raise ValueError("ANNConfig.kind: 'hnsw' is searched on the CPU; take 'ivf' for keys on a GPU")
            index = faiss.IndexHNSWFlat(self._d, self.how.links, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efSearch = self.how.breadth
        else:
            lists = min(self.how.lists or round(4 * self._count**0.5), self._count)
            index = faiss.IndexIVFFlat(faiss.IndexFlatIP(self._d), self._d, lists, faiss.METRIC_INNER_PRODUCT)
            index.cp.min_points_per_centroid = 1  # few keys are no reason for a warning on stderr
            index.train(rows)
            index.nprobe = min(self.how.probes, lists)
        index.add(rows)  # the only copy of the keys
        self._index, self._next = index, self._count
        # int64 [N] on the CPU, ascending: of the keys in faiss; None: their positions.
        self._numbers: Tensor | None = None
        if keys.is_cuda:
            self._index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), keys.device.index or 0, index)

    @property
    def device(self) -> torch.device:
        """Where the keys were given, and queries have to be."""
        return self._device

    def __len__(self) -> int:
        return self._count

    @property
    def d(self) -> int:
        """The width of a key."""
        return self._d

    def reconstruct(self, id: int) -> Tensor:
        """See `CosineIndex.reconstruct`; on the CPU."""
        position = self._position(id)
        number = position if self._numbers is None else int(self._numbers[position])
        if self.how.kind == "ivf":  # where each key lies; once
            self._index.set_direct_map_type(importlib.import_module("faiss").DirectMap.Hashtable)
        return torch.from_numpy(self._index.reconstruct(number))

    def add(self, keys: Tensor | np.ndarray[Any, Any], ids: Ids | None = None) -> None:
        """Append keys. On an error the index is as before.

        The lists of "ivf" stay those of the first keys: of keys that are nothing like these, make a new index.

        Args:
            keys: [M, d], finite, any float dtype, where the first ones were.
            ids: as of `CosineIndex.add`.

        Raises:
            TypeError, ValueError: a wrong dtype, shape or device, a key with NaN or infinity, wrong ids.
        """
        keys = self._given("keys", keys)
        _check.rows("keys", keys)
        _check.sized("keys", keys, (None, self.d))
        if keys.device != self.device:
            raise ValueError(f"keys: expected them on {self.device}, got {keys.device}")
        rows, added = _unit_rows(keys), self._ids_to_add(ids, len(keys))
        numbers = torch.arange(self._next, self._next + len(rows), dtype=torch.int64, device="cpu")
        if self.how.kind == "hnsw":
            self._index.add(rows)
        else:
            self._index.add_with_ids(rows, numbers.numpy())
        own = None if added is None else added.to(self.device)
        if not self._count:
            self._ids = own
        elif own is not None and self._ids is not None:
            self._ids = torch.cat([self._ids, own])
        if self._numbers is not None:
            self._numbers = torch.cat([self._numbers, numbers])
        self._count, self._next = self._count + len(rows), self._next + len(rows)

    def remove(self, ids: Ids) -> None:
        """Remove keys by id, as `CosineIndex.remove` does.

        Raises:
            IndexError: an id that no key has.
            TypeError: ids that are no integers.
            ValueError: "hnsw", whose keys others are reached by; keys on a GPU.
        """
        if self.how.kind == "hnsw" or self.device.type != "cpu":
            raise ValueError(
                f"remove: expected ANNConfig(kind='ivf') on the CPU, got {self.how.kind!r} on {self.device}"
            )
        keep, faiss = self._without(ids), importlib.import_module("faiss")
        everyone = torch.arange(self._count, dtype=torch.int64, device="cpu")
        numbers = everyone if self._numbers is None else self._numbers
        self._index.set_direct_map_type(faiss.DirectMap.NoMap)  # faiss removes by few selectors where there is one
        self._index.remove_ids(faiss.IDSelectorBatch(numbers[~keep].numpy()))
        self._numbers, self._count = numbers[keep], int(keep.sum())
        self._ids = None if self._ids is None else self._ids[keep.to(self.device)]

    def _nearest(self, queries: Tensor, k: int, ranges: Tensor | None, chosen: Tensor | None) -> tuple[Tensor, Tensor]:
        k = check_retrieval(queries, "index", torch.empty(0, dtype=torch.float32, device=self.device), k, ranges)
        finite = queries.isfinite().all(-1, keepdim=True)
        unit = torch.nn.functional.normalize(torch.where(finite, queries, 0).float(), dim=-1).cpu()
        scores = torch.full((len(queries), k), float("-inf"), dtype=torch.float32, device="cpu")
        ids = torch.full((len(queries), k), -1, dtype=torch.int64, device="cpu")
        hnsw = self.how.kind == "hnsw"
        few, every = (self.how.breadth, self._count) if hnsw else (self._index.nprobe, self._index.nlist)
        for selected, count, members in self._groups(len(queries), ranges, chosen):
            scores[members], ids[members] = self._found(unit[members], k, selected, few)
            short = members[(ids[members] >= 0).sum(1) < min(k, count)]
            if selected is not None and len(short):
                scores[short], ids[short] = self._found(unit[short], k, selected, every)
        none = (ids < 0) | ~finite.cpu()
        scores, ids = scores.masked_fill(none, float("-inf")), ids.masked_fill(none, -1)
        return scores.to(self.device), ids.to(self.device)

    def _groups(self, queries: int, ranges: Tensor | None, chosen: Tensor | None) -> list[tuple[Any, int, Tensor]]:
        """What may be found, as faiss takes it (None: all), how many keys that are, and the queries that ask for it."""
        faiss: Any = importlib.import_module("faiss")
        everyone = torch.arange(queries, dtype=torch.int64, device="cpu")
        numbers = self._numbers
        if chosen is not None:
            chosen = chosen.cpu() if numbers is None else numbers[chosen.cpu()]
            return [(faiss.IDSelectorBatch(chosen.numpy()), len(chosen), everyone)]
        if ranges is None:
            return [(None, self._count, everyone)]
        different, which = ranges.cpu().unique(dim=0, return_inverse=True)
        bad = ((different[:, 0] < 0) | (different[:, 0] > different[:, 1]) | (different[:, 1] > self._count)).nonzero()
        if len(bad):
            raise ValueError(
                f"ranges: expected 0 <= start <= stop <= n = {self._count}, got {different[int(bad[0, 0])].tolist()}"
            )

        def selector(a: int, b: int) -> Any:
            if [a, b] == [0, self._count]:
                return None
            if numbers is not None and a < b:
                return faiss.IDSelectorRange(int(numbers[a]), int(numbers[b - 1]) + 1)
            return faiss.IDSelectorRange(a, b)

        return [
            (selector(a, b), b - a, (which == i).nonzero().flatten()) for i, (a, b) in enumerate(different.tolist())
        ]

    def _found(self, unit: Tensor, k: int, selected: Any, breadth: int) -> tuple[Tensor, Tensor]:
        """Scores and positions of what faiss finds, in so many lists or candidates."""
        faiss: Any = importlib.import_module("faiss")
        parameters = None
        if selected is not None and self.how.kind == "hnsw":
            parameters = faiss.SearchParametersHNSW(sel=selected, efSearch=breadth)
        elif selected is not None:
            parameters = faiss.SearchParametersIVF(sel=selected, nprobe=breadth)
        scores, ids = self._index.search(unit.contiguous().numpy(), k, params=parameters)
        found = torch.from_numpy(ids)
        if self._numbers is not None:
            found = torch.where(found < 0, found, torch.searchsorted(self._numbers, found))
        return torch.from_numpy(scores), found

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


def _unit_rows(keys: Tensor) -> np.ndarray[Any, Any]:
    """As faiss takes them. Raises ValueError for a key with NaN or infinity."""
    if not _check.finite(keys):
        raise ValueError("keys: expected finite numbers, got NaN or infinity")
    return normalize_rows(keys.detach()).float().cpu().contiguous().numpy()
