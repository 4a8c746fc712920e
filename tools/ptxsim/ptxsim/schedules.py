"""In which order blocks and warps run. A schedule must not matter for a correct kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .machine import Group


class Lockstep:
    """All warps of a block execute together, the blocks one after another: fast, and the kindest to a kernel."""

    warps_together = True
    window = 1  # blocks that are started before one has to wait for another

    def blocks(self, count: int) -> Sequence[int]:
        """The order in which blocks start."""
        return range(count)

    def pick(self, groups: list[Group]) -> Group:
        """Which of the groups that can go on does so, until it has to wait."""
        return groups[0]


class Reversed(Lockstep):
    """One warp at a time, the last warp of the last block first."""

    warps_together = False

    def blocks(self, count: int) -> Sequence[int]:
        """The order in which blocks start."""
        return range(count)[::-1]

    def pick(self, groups: list[Group]) -> Group:
        """Which of the groups that can go on does so, until it has to wait."""
        return groups[-1]


class Random(Lockstep):
    """One warp at a time in random order, of a few blocks at once, which start in random order."""

    warps_together = False
    window = 4

    def __init__(self, seed: int):
        self._random = np.random.default_rng(seed)

    def blocks(self, count: int) -> Sequence[int]:
        """The order in which blocks start."""
        return self._random.permutation(count).tolist()

    def pick(self, groups: list[Group]) -> Group:
        """Which of the groups that can go on does so, until it has to wait."""
        return groups[self._random.integers(len(groups))]


def schedule(name: str) -> Lockstep:
    """`lockstep`, `reversed`, or `random:SEED`."""
    kind, _, seed = name.partition(":")
    if kind == "random" and seed:
        return Random(int(seed))
    if name not in ("lockstep", "reversed"):
        raise ValueError(f"schedule: expected lockstep, reversed or random:SEED; got {name!r}")
    return Lockstep() if name == "lockstep" else Reversed()
