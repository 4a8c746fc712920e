"""`ShardedIndex`: an exact search of a memory that is spread over the processes of a torch.distributed group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .exact import CosineIndex


class ShardedIndex:
    """The index of all ranks' keys, in the order of the ranks: each searches its own, and the best are merged.

    Every rank gets the same answer as one index of all keys gives, bit for bit: scores are canonical, so it does not
    matter where they are computed. A search moves k scores and ids of each query from every rank to every other one.

    Args:
        index: of this rank's keys; may be empty, all ranks' must have one width.
        group: None: the default one. All of its ranks make the object, and search, together.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        ValueError: the ranks' indices have different widths.
    """

    def __init__(self, index: CosineIndex, group: dist.ProcessGroup | None = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("ShardedIndex needs torch.distributed: call torch.distributed.init_process_group first")
        self.index, self.group = index, group
        own = torch.tensor([len(index), index.d], dtype=torch.int64, device=index.device)
        all_sizes = self._gathered(own)
        if len({int(d) for _, d in all_sizes}) != 1:
            raise ValueError(f"index: expected one width on all ranks, got {[int(d) for _, d in all_sizes]}")
        sizes = [int(n) for n, _ in all_sizes]
        self.first = sum(sizes[: dist.get_rank(group)])  # the id of this rank's first key
        self._total = sum(sizes)

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

    def search(self, queries: Tensor, k: int, ranges: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `CosineIndex.search`; every rank passes the same queries.

        Args:
            queries: [M, d].
            k: at least 1.
            ranges: int64 [M, 2], over all ranks' keys.

        Returns:
            scores float32 [M, k] and ids int64 [M, k], counted over all ranks' keys; -1 and -inf where there are fewer.
        """
        own = None if ranges is None else (ranges - self.first).clamp(0, len(self.index))
        scores, ids = self.index.search(queries, k, own)
        ids = torch.where(ids >= 0, ids + self.first, ids)
        scores, ids = (torch.cat(self._gathered(t), 1) for t in (scores, ids))
        # Ranks come in the order of their ids, each with ties in the order of ids: a stable sort keeps it.
        order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
        return scores.gather(1, order), ids.gather(1, order)

    def _gathered(self, t: Tensor) -> list[Tensor]:
        """Of all ranks, in their order."""
        found = [torch.empty_like(t) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(found, t.contiguous(), group=self.group)
        return found
