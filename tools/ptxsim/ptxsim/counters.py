"""What a launch did, in units that do not depend on time."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

SECTOR = 32


class Traffic:
    """Loads, or stores, of one buffer. A request is one memory instruction of one warp."""

    def __init__(self, first_byte: int, last_byte: int):
        self.requests = 0
        self.bytes = 0  # that lanes asked for, the same byte as often as it was asked for
        self.sectors = 0  # of 32 bytes, counted once in each request
        self._first = first_byte // SECTOR
        self._seen = np.zeros((last_byte - 1) // SECTOR - self._first + 1, bool)

    @property
    def unique_sectors(self) -> int:
        """Sectors touched at least once in the launch."""
        return int(self._seen.sum())

    @property
    def sectors_per_request(self) -> float:
        """4 is what a full warp needs for 4-byte elements side by side, 16 for 16-byte ones."""
        return self.sectors / max(self.requests, 1)

    def count(self, lanes: np.ndarray, addresses: np.ndarray, size: int) -> None:
        """One instruction of the warps that `lanes` belong to."""
        sectors = addresses // SECTOR
        # Distinct (warp, sector) pairs: the sector number never needs the upper 15 bits.
        keys = np.sort((lanes // 32 << 48) | (sectors - self._first))
        distinct = np.empty(len(keys), bool)
        distinct[:1] = True
        np.not_equal(keys[1:], keys[:-1], out=distinct[1:])
        self.requests += len(np.unique(lanes // 32))
        self.bytes += size * len(addresses)
        self.sectors += int(distinct.sum())
        self._seen[sectors - self._first] = True


@dataclass
class SharedTraffic:
    """Shared memory: a request needs `ideal` passes of 32 banks when no two lanes are in each other's way."""

    requests: int = 0
    passes: int = 0
    ideal: int = 0
    _known: dict[tuple[int, bytes, bytes], tuple[int, int, int]] = field(default_factory=dict, repr=False)

    @property
    def bank_conflicts(self) -> int:
        """Passes beyond the ideal number."""
        return self.passes - self.ideal

    def count(self, lanes: np.ndarray, addresses: np.ndarray, size: int) -> None:
        """One instruction; the same pattern of addresses is worked out once."""
        key = (size, lanes.tobytes(), addresses.tobytes())
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = _bank_passes(lanes, addresses, size)
        self.requests += found[0]
        self.passes += found[1]
        self.ideal += found[2]


def _bank_passes(lanes: np.ndarray, addresses: np.ndarray, size: int) -> tuple[int, int, int]:
    """Requests, passes and ideal passes. Half-warps go together for 8 bytes a lane, quarter-warps for 16."""
    unit = max(size, 4)
    together = 128 // unit
    phase, word = lanes // together, addresses // unit
    distinct = np.unique(np.stack([phase, word % together, word], axis=1), axis=0)
    in_bank = np.unique(distinct[:, :2], axis=0, return_counts=True)
    passes = sum(int(in_bank[1][in_bank[0][:, 0] == p].max()) for p in np.unique(phase))
    return len(np.unique(lanes // 32)), passes, len(np.unique(phase))


@dataclass
class Launch:
    """The counts of one launch."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    instructions: Counter[str] = field(default_factory=Counter)  # executed warp instructions by opcode
    loads: dict[str, Traffic] = field(default_factory=dict)  # by argument
    stores: dict[str, Traffic] = field(default_factory=dict)
    shared: SharedTraffic = field(default_factory=SharedTraffic)
    largest_block_bytes: int = 0  # that one block asked for, loads and stores
    largest_block_instructions: int = 0  # warp instructions of one block
