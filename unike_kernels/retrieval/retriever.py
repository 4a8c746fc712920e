"""What every index of this folder can do, and what a patched model's memory asks of one."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Retriever(Protocol):
    """Keys that are searched by cosine: `CosineIndex`, `ShardedIndex`, `ApproximateIndex`, or one of your own."""

    @property
    def device(self) -> torch.device:
        """Where queries have to be."""

    def __len__(self) -> int:
        """How many keys there are."""

    def search(self, queries: Tensor, k: int, ranges: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The k keys of highest cosine for each query, best first.

        Where fewer than k are in range, and for a query that is not finite, the rest is id -1 and score -inf.

        Args:
            queries: [M, d], any float dtype.
            k: how many, at least 1; may exceed the number of keys.
            ranges: int64 [M, 2], 0 <= start <= stop <= N; query m sees only keys[start : stop]. None: all keys.

        Returns:
            scores float32 [M, k] and ids int64 [M, k], the positions of keys: not ids of the caller's own.
        """
