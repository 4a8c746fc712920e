"""The exact answer to a retrieval, found in float64, and how an answer is compared with it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from unike_kernels.ops.cosine_topk.reference import canonical_dot

_CHUNK = 16_384  # keys that are widened at a time
_BIT_FOR_BIT = 8  # queries that are, where there are more
_SCORE_ERROR = 1e-6  # of a canonical score, rounded to float32, from the float64 one
_GAP = 1e-7  # float64 scores that are further apart than this keep their order in float32
_PEER_ERROR = 1e-5  # of the float32 sums of others
_QUERIES = 32  # whose found rows are widened at a time


class Truth:
    """The k nearest keys of each query.

    Attributes:
        scores: float64 [B, k], descending.
        ids: int64 [B, k].
        next: float64 [B], the score behind the last one; -inf where there is no further key.
    """

    def __init__(self, rows: Tensor, unit: Tensor, k: int) -> None:
        """
        Args:
            rows: unit keys, float32 [N, d], N >= k.
            unit: unit queries, float32 [B, d].
            k: how many.
        """
        self._rows, self._unit = rows, unit
        where = unit.device
        best = torch.full((len(unit), k + 1), float("-inf"), dtype=torch.float64, device=where)
        ids = torch.full((len(unit), k + 1), -1, device=where)
        for start, scores in self._scores(unit):
            both = torch.cat([best, scores], 1)
            best, chosen = both.topk(k + 1, dim=1)
            here = torch.arange(start, start + scores.shape[1], device=where)
            ids = torch.cat([ids, here.expand(len(unit), -1)], 1)
            ids = ids.gather(1, chosen)
        self.scores, self.next, self.ids = best[:, :k], best[:, k], ids[:, :k]

    def _scores(self, unit: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(first key, float64 scores [B, keys]) of the keys, a chunk at a time."""
        wide = unit.double()
        for start in range(0, len(self._rows), _CHUNK):
            yield start, wide @ self._rows[start : start + _CHUNK].double().T

    def check_exact(self, scores: Tensor, ids: Tensor) -> None:
        """Raises AssertionError unless scores float32 [B, k] and ids int64 [B, k] are the canonical ones.

        Bit for bit for 8 queries, taken at random where there are more; for all others the scores within 1e-6, and the
        ids wherever float64 tells them apart.
        """
        self.check_ids(ids)
        torch.testing.assert_close(scores.double(), self.scores, rtol=0, atol=_SCORE_ERROR)
        chosen = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))[:_BIT_FOR_BIT]
        for b, near in zip(chosen.tolist(), self._near(chosen), strict=True):
            # Candidates come by id, so a stable sort by score leaves ties in their canonical order.
            best, order = canonical_dot(self._unit[b], self._rows[near]).float().sort(descending=True, stable=True)
            assert torch.equal(scores[b], best[: scores.shape[1]]), f"not the canonical scores of query {b}"
            assert torch.equal(ids[b], near[order][: ids.shape[1]]), f"not the canonical ids of query {b}"

    def _near(self, chosen: Tensor) -> list[Tensor]:
        """For some queries the ids, ascending, of all keys that float64 does not rule out."""
        lowest = self.scores[chosen, -1:] - _SCORE_ERROR
        near: list[list[Tensor]] = [[] for _ in chosen]
        for start, scores in self._scores(self._unit[chosen]):
            for found, reaches in zip(near, scores >= lowest, strict=True):
                found.append(start + reaches.nonzero().flatten())
        return [torch.cat(found) for found in near]

    def check_ids(self, ids: Tensor) -> None:
        """Raises AssertionError unless ids [B, k] are those of float64, rank by rank, wherever it tells them apart."""
        self.recall(ids)
        torch.testing.assert_close(self._scores_of(ids), self.scores, rtol=0, atol=_GAP)

    def check_peer(self, ids: Tensor) -> float:
        """The recall of ids [B, k]. Raises AssertionError unless they score the same but for float32 rounding."""
        recall = self.recall(ids)
        found = self._scores_of(ids).sort(dim=1, descending=True).values
        torch.testing.assert_close(found, self.scores, rtol=0, atol=_PEER_ERROR)
        return recall

    def _scores_of(self, ids: Tensor) -> Tensor:
        """float64 [B, k]."""
        pairs = zip(self._unit.split(_QUERIES), ids.split(_QUERIES), strict=True)
        return torch.cat([torch.einsum("bd,bkd->bk", q.double(), self._rows[rows].double()) for q, rows in pairs])

    def recall(self, ids: Tensor) -> float:
        """The share of the true ids among ids [B, k]. Raises AssertionError for ids that are no keys or come twice."""
        assert ids.shape == self.ids.shape, f"expected ids {list(self.ids.shape)}, got {list(ids.shape)}"
        assert bool(((ids >= 0) & (ids < len(self._rows))).all()), "ids outside of the keys"
        assert bool((ids.sort(dim=1).values.diff(dim=1) > 0).all()), "an id came twice"
        return float((ids.unsqueeze(2) == self.ids.unsqueeze(1)).any(2).double().mean())
