"""What a key is near to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor

from ..cosine_topk import cosine_topk

T = TypeVar("T")


def nearest(keys: Tensor, entries: Tensor, k: int, ranges: Tensor | None = None) -> list[list[tuple[float, int]]]:
    """For each key [n, c] the k best cosines with entries [N, c], and which they are; waits for the device.

    Args:
        keys: [n, c], unit rows.
        entries: [N, c], unit rows.
        k: where there are fewer, all of them.
        ranges: int64 [n, 2], the entries of each key; None: all.
    """
    if not len(entries) or not len(keys):
        return [[] for _ in keys]
    found = cosine_topk(keys, entries, min(k, len(entries)), normalized=True, ranges=ranges)
    both = zip(*(t.tolist() for t in found), strict=True)
    return [[(s, i) for s, i in zip(scores, ids, strict=True) if i >= 0] for scores, ids in both]


def surely_about(near: Sequence[tuple[float, T]], same_fact: float, threshold: float) -> T | None:
    """What a prompt surely asks for, of these cosines with what they are of: the nearest, if it is near enough, and
    nearer than anything else by more than the threshold. None: nothing."""
    if not near:
        return None
    score, about = max(near, key=lambda pair: pair[0])
    rival = max((s for s, what in near if what != about), default=0.0)
    return about if score > same_fact and score - rival > threshold else None
