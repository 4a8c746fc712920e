"""A memory whose entries lie on several ranks: each searches and attends to its own, and they join what they find.

A token's k entries are those of one memory, ties included: scores are canonical, wherever they are computed. The
softmax over these entries is that of one memory but for rounding: each rank averages its own, and the averages are
summed, each weighted by its share of the sum of exponentials.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import Config
from ..ops import latent_attention
from ..retrieval.index import best_of
from .memory_attention import MemoryTables, asking, fixed_alpha, logits_of


@dataclass(frozen=True)
class Ranks:
    """Processes that compute the same tokens, each with its part of a memory's entries.

    Attributes:
        rank: of this process.
        count: of the processes.
        gather: [M, c] of each -> [M, count c] of all, in the order of the ranks.
        total: [M, d] of each -> their sum.
    """

    rank: int
    count: int
    gather: Callable[[Tensor], Tensor]
    total: Callable[[Tensor], Tensor]

    def part(self, entries: int) -> range:
        """Those of so many entries that this process has: as many as the others, or one more or less."""
        return range(entries * self.rank // self.count, entries * (self.rank + 1) // self.count)


@dataclass(frozen=True)
class SharedMemory:
    """How the entries of a memory lie on ranks, all of which call `shift` together.

    Attributes:
        entries: of the whole memory.
        ranks: that share them.

    Raises:
        ValueError: fewer entries than ranks.
    """

    entries: int
    ranks: Ranks

    def __post_init__(self) -> None:
        if self.entries < self.ranks.count:
            raise ValueError(f"memory: {self.entries} entries cannot be shared by {self.ranks.count} ranks")

    def shift(
        self,
        memory: MemoryTables,
        config: Config,
        hidden: Tensor,
        queries: Tensor,
        inputs: Tensor,
        bounds: Tensor | None,
        *,
        out: Tensor,
    ) -> Tensor:
        """`shift_tokens`, the same on each rank.

        Args:
            memory: of the layer, with the entries of this rank.
            config: k, scale, alpha, convention and norm are read.
            hidden: [M, d], the attention's input, which retrieves.
            queries: [M, 1, d], of the latent attention.
            inputs: [M, d], the attention's output, which is shifted.
            bounds: int64 [M, 2], the entries of the whole memory that each token may retrieve; None: all.
            out: [M, d], written and returned; may be the inputs.
        """
        ids = self._retrieve(memory, config.k, hidden, bounds)
        start, stop = self._own.start, self._own.stop
        know = self._averaged(memory, config, queries, torch.where((ids >= start) & (ids < stop), ids - start, -1))
        # Gate and blend as everywhere, of a memory with one entry for each token.
        tokens = torch.arange(len(ids), dtype=torch.int64, device=ids.device)
        one = torch.where((ids >= 0).any(-1), tokens, -1).unsqueeze(1)
        shifted, _ = latent_attention(
            queries, inputs, know, know, one, memory.encoder,
            alpha=fixed_alpha(config, inputs), convention=config.convention, norm=config.norm,
        )  # fmt: skip
        return out.copy_(shifted)

    @property
    def _own(self) -> range:
        return self.ranks.part(self.entries)

    def _retrieve(self, memory: MemoryTables, k: int, hidden: Tensor, bounds: Tensor | None) -> Tensor:
        """int64 [M, k]: entries of the whole memory, -1 where there are fewer."""
        own, k = self._own, max(min(k, self.entries), 1)
        if bounds is not None:
            bounds = (bounds - own.start).clamp(0, len(own))
        scores, ids = memory.retrieve(hidden, k, bounds)
        ids, rest = torch.where(ids >= 0, ids + own.start, -1), (0, k - ids.shape[1])
        scores, ids = (torch.nn.functional.pad(t, rest, value=v) for t, v in ((scores, float("-inf")), (ids, -1)))
        # Both at once, the ids as bits of float32: not all that gathers takes other dtypes.
        both = torch.cat([scores.float(), ids.int().view(torch.float32)], 1)
        found = self.ranks.gather(both).view(len(ids), -1, 2, k)
        return best_of(found[:, :, 0].flatten(1), found.view(torch.int32)[:, :, 1].flatten(1), k)[1].long()

    def _averaged(self, memory: MemoryTables, config: Config, queries: Tensor, ids: Tensor) -> Tensor:
        """[M, d]: the average over the entries of all ranks, of which this one has `ids` [M, k]; 0 where none has any.

        In float32, float64 for queries of that dtype.
        """
        values = memory.keys if memory.values is None else memory.values
        weights = logits_of(memory, config, queries, ids).squeeze(1).logsumexp(-1, keepdim=True)
        q, scale = asking(config, queries)
        zeros = queries.new_zeros(len(ids), values.shape[-1], dtype=weights.dtype)
        open_gate = zeros.new_ones(1, dtype=zeros.dtype)
        average, _ = latent_attention(
            q, zeros, memory.keys, values, ids, memory.encoder, scale=scale, alpha=open_gate, norm="none"
        )
        share = (weights - self.ranks.gather(weights).logsumexp(-1, keepdim=True)).exp()
        return self.ranks.total(torch.where((ids >= 0).any(-1, keepdim=True), share, 0.0) * average)
