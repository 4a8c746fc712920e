"""What happens before what: vector clocks over the warps of a launch.

A barrier orders all earlier accesses of its warps before all later ones. Across blocks, order comes from atomics and
volatile accesses together with fences, or from their .release and .acquire forms. Synchronisation is kept per word of
memory, and every strong access of a word both publishes and sees, whatever value it reads: a little too forgiving.
"""

from __future__ import annotations

import numpy as np


class Clocks:
    """`known[w]`, where there is one, holds for every warp how far w has seen it; warps are numbered over the grid."""

    def __init__(self, blocks: int, warps: int):
        self.warps = warps
        self.time = np.ones(blocks * warps, np.int64)
        self._known: dict[int, np.ndarray] = {}
        self._fenced: dict[int, np.ndarray] = {}  # what a later relaxed write publishes
        self._pending: dict[int, np.ndarray] = {}  # what a later fence lets the warp know
        self._published: dict[int, np.ndarray] = {}  # by word

    def _view(self, warp: int) -> np.ndarray:
        if warp not in self._known:
            self._known[warp] = np.zeros_like(self.time)
        return self._known[warp]

    def _now(self, warp: int) -> np.ndarray:
        view = self._view(warp).copy()
        view[warp] = self.time[warp]
        self.time[warp] += 1
        return view

    def barrier(self, warps: list[int]) -> None:
        """These warps wait for one another."""
        joint = np.maximum.reduce([self._view(warp) for warp in warps])
        joint[warps] = self.time[warps]
        for warp in warps:
            self._known[warp] = joint.copy()
        self.time[warps] += 1

    def fence(self, warp: int) -> None:
        """A memory fence of at least device scope."""
        if warp in self._pending:
            np.maximum(self._view(warp), self._pending.pop(warp), out=self._view(warp))
        self._fenced[warp] = self._now(warp)

    def strong_write(self, warp: int, word: int, release: bool) -> None:
        """An atomic or volatile write: publishes all before it (release), or all before the last fence."""
        news = self._now(warp) if release else self._fenced.get(warp)
        if news is not None:
            old = self._published.get(word)
            self._published[word] = news if old is None else np.maximum(old, news)

    def strong_read(self, warp: int, word: int, acquire: bool) -> None:
        """An atomic or volatile read: sees what was published, at once (acquire) or from the next fence on."""
        news = self._published.get(word)
        if news is None:
            return
        if acquire:
            np.maximum(self._view(warp), news, out=self._view(warp))
        else:
            old = self._pending.get(warp)
            self._pending[warp] = news if old is None else np.maximum(old, news)

    def ordered(self, owners: np.ndarray, times: np.ndarray, warps: np.ndarray) -> np.ndarray:
        """Whether what `owners` did at `times` happens before what `warps` do now."""
        result = owners == warps
        for warp in np.unique(warps):
            mine = warps == warp
            result[mine] |= self._view(int(warp))[owners[mine]] >= times[mine]
        return result
