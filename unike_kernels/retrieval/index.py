"""What all indexes share: arrays of torch or numpy, ids of the caller's own, filters, and searches by a threshold."""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..ops import _check

Array = TypeVar("Array", Tensor, "np.ndarray[Any, Any]")
Ids = Sequence[int] | Tensor | np.ndarray[Any, Any]

_FIRST_RESULTS = 64  # of a search by a threshold; those that all exceed it are searched again for more


def tensor_of(name: str, values: object) -> Tensor:
    """A tensor itself, or an array of numpy as one. Raises TypeError for anything else."""
    if isinstance(values, Tensor):
        return values
    if not isinstance(values, np.ndarray):
        raise TypeError(f"{name}: expected a tensor or an array of numpy, got {type(values).__name__}")
    # torch takes neither negative strides nor another byte order, and warns of what it must not write to.
    plain = np.require(values, values.dtype.newbyteorder("="), ("C", "W"))
    try:
        return torch.from_numpy(plain)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from None


def own_ids(ids: Ids | None, count: int) -> Tensor | None:
    """The ids of so many keys: int64 [count] on the CPU, none negative, none twice. Raises TypeError, ValueError."""
    if ids is None:
        return None
    found = _check.ids("ids", ids)
    if len(found) != count:
        raise ValueError(f"ids: expected one for each of the {count} keys, got {len(found)}")
    if (found < 0).any():
        raise ValueError(f"ids: expected integers of at least 0, as -1 stands for no key; got {int(found.min())}")
    values, counts = found.unique(return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"ids: expected each once, got {int(values[counts > 1][0])} twice")
    return found


def best_of(scores: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of what ranks have found, scores and ids [M, c], as one search of all their keys finds them.

    Ranks come in the order of their keys, each with ties in their order: a stable sort keeps it.
    """
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    return scores.gather(1, order), ids.gather(1, order)


class Index(ABC):
    """Keys that are searched by cosine; a class says how, with `_search`."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the keys are, and queries have to be."""

    @property
    @abstractmethod
    def d(self) -> int:
        """The width of a key."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _search(self, queries: Tensor, k: int, ranges: Tensor | None, allowed: Ids | None) -> tuple[Tensor, Tensor]:
        """See `search`; queries [M, d]."""

    @property
    @abstractmethod
    def counted(self) -> bool:
        """Whether ids are the numbers of keys, in the order of their arrival, and none of the caller's own."""

    @property
    def ntotal(self) -> int:
        """How many keys there are, by faiss's name."""
        return len(self)

    def search(
        self, queries: Array, k: int, ranges: Array | None = None, *, allowed: Ids | None = None
    ) -> tuple[Array, Array]:
        """The k keys of highest cosine for each query: score descending, then in the order of their arrival.

        Where fewer than k keys are in range or allowed, and for a query that is not finite, the rest is id -1 and score
        -inf.

        Args:
            queries: [M, d], or one [d], any float dtype: a tensor on the device of the index, or an array of numpy.
            k: how many, at least 1; may exceed N.
            ranges: int64 [M, 2], 0 <= start <= stop <= N; query m searches only the keys that arrived as number start,
                ..., stop - 1. None: all keys.
            allowed: the only keys that may be found: ids, of which those that no key has allow nothing; or a mask
                bool [N] over the keys in the order of their arrival. None: all keys. Not with `ranges`.

        Returns:
            scores float32 [M, k] and ids int64 [M, k], or [k] of one query: tensors, or arrays where the queries are.

        Raises:
            TypeError, ValueError: a wrong dtype, shape, device or k; ranges outside the keys; a mask of another length;
                queries that `torch.func` has wrapped.
        """
        if ranges is not None and allowed is not None:
            raise ValueError("allowed: expected None where ranges are given")
        bounds = None if ranges is None else self._given("ranges", ranges)
        scores, ids = self._search(self._asked(queries), k, bounds, allowed)
        if queries.ndim == 1:
            scores, ids = scores[0], ids[0]
        return _like(queries, scores), _like(queries, ids)

    def range_search(
        self, queries: Array, threshold: float, *, allowed: Ids | None = None
    ) -> tuple[Array, Array, Array]:
        """All keys whose cosine with a query is greater than a threshold, in the form of faiss's range_search.

        Takes a search for the 64 best of each query, and one for four times as many of those queries that need it, as
        often as they do.

        Args:
            queries: as in `search`.
            threshold: of the scores, compared in float32; not NaN.
            allowed: as in `search`.

        Returns:
            lims int64 [M + 1], scores float32 [lims[M]] and ids int64 [lims[M]]: those of query m lie from lims[m] to
            lims[m + 1], in the order of `search`.

        Raises:
            TypeError, ValueError: as `search`; a threshold that is no number.
        """
        if not isinstance(threshold, int | float | np.floating) or math.isnan(threshold):
            raise ValueError(f"threshold: expected a number, got {threshold!r}")
        rows = self._asked(queries)
        found: dict[int, tuple[Tensor, Tensor]] = {}
        asking, k = torch.arange(len(rows), dtype=torch.int64, device=rows.device), min(_FIRST_RESULTS, len(self)) or 1
        while len(asking):
            scores, ids = self._search(rows[asking], k, None, allowed)
            above = scores > threshold
            for i, query in enumerate(asking.tolist()):
                found[query] = scores[i, above[i]], ids[i, above[i]]
            asking = asking[above[:, -1]] if k < len(self) else asking[:0]
            k = min(4 * k, len(self))
        each: list[tuple[Tensor, Tensor]] = [found[query] for query in range(len(rows))]
        lims = torch.tensor([0, *(len(ids) for _, ids in each)], dtype=torch.int64, device=rows.device).cumsum(0)
        scores = torch.cat([rows.new_empty(0, dtype=torch.float32), *(scores for scores, _ in each)])
        ids = torch.cat([torch.empty_like(lims[:0]), *(ids for _, ids in each)])
        return _like(queries, lims), _like(queries, scores), _like(queries, ids)

    def _given(self, name: str, values: object) -> Tensor:
        """A tensor as it is; an array of numpy on the device of the index."""
        found = tensor_of(name, values)
        return found if found is values else found.to(self.device)

    def _asked(self, queries: object) -> Tensor:
        """[M, d], of one query too. Raises TypeError, ValueError."""
        rows = self._given("queries", queries)
        rows = rows.unsqueeze(0) if rows.dim() == 1 else rows
        _check.rows("queries", rows)
        _check.unwrapped("queries", rows)
        _check.sized("queries", rows, (None, self.d))
        return rows


class KeyedIndex(Index):
    """An index that finds keys by their positions, which are their ids unless the caller has given others."""

    _ids: Tensor | None  # int64 [N], on the device of the index; None: the positions

    @abstractmethod
    def _nearest(self, queries: Tensor, k: int, ranges: Tensor | None, chosen: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `search`: scores and positions, -1 for none, among the chosen positions, which ascend."""

    @property
    def counted(self) -> bool:
        """Whether ids are positions."""
        return self._ids is None

    @property
    def ids(self) -> Tensor:
        """int64 [N]: of the keys in the order of their arrival."""
        if self._ids is None:
            return torch.arange(len(self), dtype=torch.int64, device=self.device)
        return self._ids.clone()

    def _search(self, queries: Tensor, k: int, ranges: Tensor | None, allowed: Ids | None) -> tuple[Tensor, Tensor]:
        chosen = None if allowed is None else self._chosen(allowed)
        scores, found = self._nearest(queries, k, ranges, chosen)
        return scores, found if self._ids is None else taken(self._ids, found)

    def _chosen(self, allowed: Ids) -> Tensor:
        """The positions of the allowed keys, ascending. Raises TypeError, ValueError."""
        wanted = mask_or_ids(self, allowed)
        if wanted.dtype == torch.bool:
            return wanted.nonzero().flatten()
        if self._ids is None:
            return wanted[(wanted >= 0) & (wanted < len(self))].unique()
        return torch.isin(self._ids, wanted).nonzero().flatten()

    def _ids_to_add(self, ids: Ids | None, count: int) -> Tensor | None:
        """Of so many keys, checked against those that are there. Raises TypeError, ValueError."""
        added = own_ids(ids, count)
        if not len(self):
            return added
        if self._ids is None:
            if added is not None:
                raise ValueError("ids: expected None, as the keys before these have none of their own")
            return None
        if added is None:
            raise ValueError("ids: expected one for each key, as the keys before these have ids of their own")
        there = added[torch.isin(added, self._ids.cpu())]
        if len(there):
            raise ValueError(f"ids: expected ids that no key has yet, got {int(there[0])}")
        return added

    def _without(self, ids: Ids) -> Tensor:
        """Which keys stay when these go, bool [N] on the CPU. Raises IndexError, TypeError."""
        gone = _check.ids("ids", ids)
        own = None if self._ids is None else self._ids.cpu()
        if own is not None:
            outside, keep = gone[~torch.isin(gone, own)], ~torch.isin(own, gone)
        else:
            outside = gone[(gone < 0) | (gone >= len(self))]
            keep = torch.ones(len(self), dtype=torch.bool, device="cpu")
            keep[gone[(gone >= 0) & (gone < len(self))]] = False
        if len(outside):
            known = f"0 to {len(self) - 1}" if own is None else "those of keys"
            raise IndexError(f"ids: expected {known}, got {int(outside[0])}")
        return keep

    def _position(self, id: int) -> int:
        """Of the key with this id. Raises IndexError, TypeError."""
        id = operator.index(id)
        if self._ids is None:
            found = [id] if 0 <= id < len(self) else []
        else:
            found = (self._ids == id).nonzero().flatten().tolist()
        if not found:
            raise IndexError(f"id: expected that of a key, got {id}")
        return int(found[0])


def mask_or_ids(index: Index, allowed: Ids) -> Tensor:
    """What may be found in an index: a mask bool [N], or ids int64 [n], on its device. Raises TypeError, ValueError."""
    given = torch.as_tensor(allowed, dtype=None, device=index.device)
    if given.dtype != torch.bool:
        return _check.ids("allowed", given).to(index.device)
    _check.sized("allowed", given, (len(index),))
    return given


def taken(table: Tensor, positions: Tensor) -> Tensor:
    """What stands there in a table of ids; -1 for -1."""
    if not len(table):
        return positions
    return torch.where(positions >= 0, table[positions.clamp(min=0)], positions)


def _like(given: Array, t: Tensor) -> Array:
    return t if isinstance(given, Tensor) else t.cpu().numpy()
