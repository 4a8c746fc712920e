"""`ShardedIndex`: an exact search of a memory that is spread over the processes of a torch.distributed group."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .exact import CosineIndex
from .index import Ids, Index, best_of, mask_or_ids


class ShardedIndex(Index):
    """The index of all ranks' keys, in the order of the ranks: each searches its own, and the best are merged.

    Every rank gets the same answer as one index of all keys gives, bit for bit: scores are canonical, so it does not
    matter where they are computed. A search moves k scores and ids of each query from every rank to every other one.
    Every rank passes the same queries and, if any, the same ranges or allowed keys, of all ranks' keys.

    Args:
        index: of this rank's keys; may be empty, all ranks' must have one width. Ids of the caller's own must differ
            between the ranks, which nobody checks; without them, ids count the keys of all ranks.
        group: None: the default one. All of its ranks make the object, and search, together.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        ValueError: the ranks' indices have different widths, or some of them ids of the caller's own, and others not.
    """

    def __init__(self, index: CosineIndex, group: dist.ProcessGroup | None = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("ShardedIndex needs torch.distributed: call torch.distributed.init_process_group first")
        self.index, self.group = index, group
        own = [len(index), index.d, index._ids is not None, index.exact]
        all_sizes = [t.tolist() for t in self._gathered(torch.tensor(own, dtype=torch.int64, device=index.device))]
        if len({d for _, d, *_ in all_sizes}) != 1:
            raise ValueError(f"index: expected one width on all ranks, got {[d for _, d, *_ in all_sizes]}")
        if len({keyed for n, _, keyed, _ in all_sizes if n}) > 1:
            raise ValueError("index: expected ids of the caller's own on all ranks or on none")
        sizes = [n for n, *_ in all_sizes]
        self.first = sum(sizes[: dist.get_rank(group)])  # the number of this rank's first key
        self._total, self._exact = sum(sizes), all(exact for *_, exact in all_sizes)
        self._counted = not any(keyed for n, _, keyed, _ in all_sizes if n)  # ids are numbers of keys

    def __getstate__(self) -> dict[str, Any]:
        if self.group is not None:
            raise TypeError(
                "ShardedIndex: a process group is of its process; send `index`, and make a new one of it there"
            )
        return self.__dict__

    def __len__(self) -> int:
        """Keys of all ranks."""
        return self._total

    @property
    def device(self) -> torch.device:
        """Where this rank's keys are."""
        return self.index.device

    @property
    def counted(self) -> bool:
        """Whether ids count the keys of all ranks."""
        return self._counted

    @property
    def d(self) -> int:
        """The width of a key."""
        return self.index.d

    def _search(self, queries: Tensor, k: int, ranges: Tensor | None, allowed: Ids | None) -> tuple[Tensor, Tensor]:
        own = None if ranges is None else (ranges - self.first).clamp(0, len(self.index))
        scores, ids = self.index._search(queries, k, own, None if allowed is None else self._own(allowed))
        if self._counted:
            ids = torch.where(ids >= 0, ids + self.first, ids)
        scores, ids = (torch.cat(self._gathered(t), 1) for t in (scores, ids))
        return best_of(scores, ids, k)

    def _own(self, allowed: Ids) -> Tensor:
        """What is allowed, of this rank's keys. Raises TypeError, ValueError."""
        given = mask_or_ids(self, allowed)
        if given.dtype == torch.bool:
            return given[self.first : self.first + len(self.index)]
        return given - (self.first if self._counted else 0)

    def reconstruct(self, id: int) -> Tensor:
        """See `CosineIndex.reconstruct`; all ranks call it together."""
        if not self._exact:
            raise ValueError("reconstruct: expected indexes with rows; one was made with exact=False")
        row = torch.zeros(self.d + 1, dtype=torch.float32, device=self.device)  # and whether it is here
        with contextlib.suppress(IndexError):
            row[:-1], row[-1] = self.index.reconstruct(id - (self.first if self._counted else 0)), 1
        for found in self._gathered(row):
            if found[-1]:
                return found[:-1]
        raise IndexError(f"id: expected that of a key, got {id}")

    def _gathered(self, t: Tensor) -> list[Tensor]:
        """Of all ranks, in their order."""
        found = [torch.empty_like(t) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(found, t.contiguous(), group=self.group)
        return found
