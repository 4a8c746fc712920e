"""Memory that knows its bounds, which bytes were written, and by whom.

A space answers `load` and `store` for lanes of a group: `addresses` holds one address per lane, the data is an array
of (lane, element). Bytes are kept in whole granules of 16, so that a buffer can be seen as elements of any width.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import numpy as np

from .counters import Traffic
from .errors import AsyncCopyError, MisalignedError, OutOfBoundsError, RaceError, UninitialisedReadError
from .order import Clocks
from .registers import UNSIGNED

if TYPE_CHECKING:
    from .machine import Group

GRANULE = 16
SHARED_WINDOW = 1 << 60  # generic addresses of shared and local memory: far from any of the host
LOCAL_WINDOW = 1 << 61
UNWRITTEN, WRITTEN, IN_FLIGHT = 0, 1, 2
MANY = 255  # more than one warp has read
EACH_BYTE = {width: int.from_bytes(b"\1" * width, "little") for width in (1, 2, 4, 8)}


def poison(size: int) -> np.ndarray:
    """Bytes that are NaN in every float format and that no sensible result equals over a whole granule."""
    pattern = np.full(size, 0xFF, np.uint8)
    position = np.arange(size)[::4].astype(np.uint64)
    pattern[::4] = 0x82 + (position * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)) % np.uint64(125)
    return pattern


class Bytes:
    """Granules from `base` on, and a state for each byte, or None where all of them count as written."""

    def __init__(self, base: int, data: np.ndarray, state: np.ndarray | None):
        self.base, self.data, self.state = base, data, state
        self._views: dict[tuple[int, int], tuple[np.ndarray, np.ndarray | None]] = {}

    def view(self, width: int, count: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Data and state as rows of `count` elements of `width` bytes."""
        key = width, count
        if key not in self._views:
            self._views[key] = tuple(
                None if part is None else rows(part, width, count) for part in (self.data, self.state)
            )
        return self._views[key]


def rows(array: np.ndarray, width: int, count: int) -> np.ndarray:
    """An array of bytes as rows of `count` elements of `width` bytes."""
    return array.view(UNSIGNED[width]).reshape(-1, count)


def check_alignment(group: Group, lanes: np.ndarray, addresses: np.ndarray, size: int, space: str) -> None:
    """Every address must be a multiple of the whole access."""
    wrong = addresses & (size - 1)
    if wrong.any():
        i = int(np.flatnonzero(wrong)[0])
        raise MisalignedError(group.where(lanes[i], f"{space} address {int(addresses[i]):#x}, {size} bytes"))


class Buffer(Bytes):
    """Memory of the host as a launch sees it, from `low` up to `high`."""

    def __init__(self, low: int, high: int, written: bool, keep: object):
        base = low // GRANULE * GRANULE
        # An aligned granule never crosses a page: all its bytes may be read, and only those inside are written.
        size = -(-high // GRANULE) * GRANULE - base
        data = np.frombuffer((ctypes.c_uint8 * size).from_address(base), np.uint8) if size else np.empty(0, np.uint8)
        super().__init__(base, data, None if written else np.zeros(size, np.uint8))
        self.low, self.high = low, high
        self.keep = keep  # the owner of the memory, so that its address is not used again
        self.owner: np.ndarray | None = None  # by byte: 1 + the warp that wrote it last in this launch, -1 - by atomics
        self.time: np.ndarray | None = None

    def poison(self) -> None:
        """Fill with a pattern, and remember that nobody has written yet."""
        self.data[self.low - self.base : self.high - self.base] = poison(len(self.data))[
            self.low - self.base : self.high - self.base
        ]
        self.state = np.zeros(len(self.data), np.uint8)
        self._views.clear()

    def notice_host_writes(self) -> None:
        """What no longer holds the pattern was written in the meantime, by whoever."""
        changed = rows(self.data, 8, 2) != rows(poison(len(self.data)), 8, 2)
        rows(self.state, 8, 2)[changed.any(axis=1)] = EACH_BYTE[8]

    def start_launch(self) -> None:
        """Nothing was written yet in this launch."""
        self.owner = self.time = None
        if self.state is not None:
            self.notice_host_writes()


class Window:
    """The part of a buffer that one argument of a launch spans: an access outside of all windows is wild."""

    def __init__(self, name: str, buffer: Buffer, low: int, high: int):
        self.name, self.buffer, self.low, self.high = name, buffer, low, high
        self.loads, self.stores = Traffic(low, high), Traffic(low, high)


class GlobalMemory:
    """The buffers of a launch."""

    name = "global"

    def __init__(self, windows: list[Window], clocks: Clocks):
        self.windows = windows
        self.clocks = clocks
        self.changes = 0  # writes that changed something: a launch without any is spinning

    def split(self, group: Group, lanes: np.ndarray, addresses: np.ndarray, size: int):
        """Pairs of a window and the positions of the lanes that it holds; None stands for all of them."""
        low, high = int(addresses.min()), int(addresses.max()) + size
        for i, window in enumerate(self.windows):
            if window.low <= low and high <= window.high:
                if i:  # the next access most likely goes there too
                    self.windows.insert(0, self.windows.pop(i))
                return [(window, None)]
        parts, free = [], np.ones(len(addresses), bool)
        for window in self.windows:
            inside = free & (addresses >= window.low) & (addresses <= window.high - size)
            if inside.any():
                parts.append((window, np.flatnonzero(inside)))
                free &= ~inside
        if free.any():
            i = int(np.flatnonzero(free)[0])
            raise OutOfBoundsError(group.where(lanes[i], self._describe(int(addresses[i]), size)))
        return parts

    def _describe(self, address: int, size: int) -> str:
        near = min(self.windows, key=lambda w: max(w.low - address, address - w.high), default=None)
        if near is None:
            return f"{size} bytes at {address:#x}: the launch has no buffers"
        return f"{size} bytes at {near.name} + {address - near.low}, which has {near.high - near.low} bytes"

    def check(self, group: Group, lanes: np.ndarray, addresses: np.ndarray, size: int):
        """Bounds and alignment; what `split` gives."""
        check_alignment(group, lanes, addresses, size, "global")
        return self.split(group, lanes, addresses, size)

    def load(
        self, group: Group, lanes: np.ndarray, addresses: np.ndarray, width: int, count: int, atomic: bool = False
    ) -> np.ndarray:
        """The data of each lane."""
        parts = self.check(group, lanes, addresses, width * count)
        if len(parts) == 1:
            return self._load(group, lanes, addresses, width, count, parts[0][0], atomic)
        result = np.empty((len(lanes), count), UNSIGNED[width])
        for window, at in parts:
            result[at] = self._load(group, lanes[at], addresses[at], width, count, window, atomic)
        return result

    def _load(self, group, lanes, addresses, width, count, window, atomic) -> np.ndarray:
        size = width * count
        buffer = window.buffer
        index = (addresses - buffer.base) // size
        data, state = buffer.view(width, count)
        if state is not None:
            check_written(group, lanes, state[index], width, f"{window.name}", addresses - window.low)
        if buffer.owner is not None:
            self._check_order(group, lanes, index, size, window, np.ones(len(lanes), bool), atomic)
        if not atomic:  # which counts as a store
            window.loads.count(lanes, addresses, size)
            group.block.bytes += size * len(lanes)
        return data.take(index, axis=0)

    def store(
        self, group: Group, lanes: np.ndarray, addresses: np.ndarray, values: np.ndarray, atomic: bool = False
    ) -> None:
        """Write `values`, one row per lane."""
        count, width = values.shape[1], values.dtype.itemsize
        for window, at in self.check(group, lanes, addresses, width * count):
            part = (lanes, addresses, values) if at is None else (lanes[at], addresses[at], values[at])
            self._store(group, *part, window, atomic)

    def _store(self, group, lanes, addresses, values, window, atomic) -> None:
        count, width = values.shape[1], values.dtype.itemsize
        buffer, size = window.buffer, width * count
        index = (addresses - buffer.base) // size
        data, state = buffer.view(width, count)
        if buffer.owner is None:
            buffer.owner = np.zeros(len(buffer.data), np.int32)
            buffer.time = np.zeros(len(buffer.data), np.int32)
        changed = (data[index] != values).any(axis=1)
        self._check_order(group, lanes, index, size, window, changed, atomic)
        data[index] = values
        if not atomic:
            check_one_writer(group, lanes, data, index, values, window.name)
        if state is not None:
            state[index] = EACH_BYTE[width]
        warps = group.global_warps(lanes)
        stamp = (warps + 1) * (-1 if atomic else 1)
        buffer.owner.reshape(-1, size)[index] = stamp[:, None]
        buffer.time.reshape(-1, size)[index] = self.clocks.time[warps][:, None]
        self.changes += int(changed.any() or not atomic)
        window.stores.count(lanes, addresses, size)
        group.block.bytes += size * len(lanes)

    def _check_order(self, group, lanes, index, size, window, matters, atomic) -> None:
        """No access of a place that another warp wrote in this launch, unless that write happens before."""
        owner = window.buffer.owner.reshape(-1, size)[index]
        foreign = (owner > 0) | ((owner < 0) & (not atomic))
        if not foreign.any():
            return
        lane, byte = np.nonzero(foreign & matters[:, None])
        owners = np.abs(owner[lane, byte]) - 1
        times = window.buffer.time.reshape(-1, size)[index][lane, byte]
        ordered = self.clocks.ordered(owners, times, group.global_warps(lanes[lane]))
        if not ordered.all():
            i = int(np.flatnonzero(~ordered)[0])
            block, warp = divmod(int(owners[i]), self.clocks.warps)
            offset = int(index[lane[i]]) * size + int(byte[i]) + window.buffer.base - window.low
            raise RaceError(
                group.where(lanes[lane[i]], f"{window.name} + {offset} was written by warp {warp} of block {block}")
            )


def check_written(group, lanes, state, width, name, offsets) -> None:
    """Every byte that is read must have been written, and no copy may be on its way to it."""
    good = state == EACH_BYTE[width]
    if good.all():
        return
    i = int(np.flatnonzero(~good.all(axis=1))[0])
    place = group.where(lanes[i], f"{name} + {int(offsets[i])}")
    if (state[i].view(np.uint8) == IN_FLIGHT).any():
        raise AsyncCopyError(f"cp.async has not landed: {place}")
    raise UninitialisedReadError(f"never written: {place}")


def check_one_writer(group, lanes, data, index, values, name) -> None:
    """After a store: lanes that wrote different values to one place cannot all find theirs."""
    lost = (data[index] != values).any(axis=1)
    if lost.any():
        raise RaceError(group.where(lanes[int(np.flatnonzero(lost)[0])], f"lanes disagree about one place in {name}"))


class SharedMemory(Bytes):
    """The shared memory of a block. Since the last barrier: which warp wrote each byte, and which read it."""

    name = "shared"

    def __init__(self, size: int):
        self.size = size
        whole = -(-size // GRANULE) * GRANULE
        super().__init__(0, np.full(whole, 0xFF, np.uint8), np.zeros(whole, np.uint8))
        self.wrote = np.zeros(whole, np.uint8)  # 1 + warp, or 0
        self.read = np.zeros(whole, np.uint8)  # 1 + warp, MANY or 0

    def barrier(self, warps: np.ndarray | None) -> None:
        """What these warps (None: all) did is ordered from here on."""
        for stamps in (self.wrote, self.read):
            if warps is None:
                stamps[:] = 0
            else:
                stamps[np.isin(stamps, warps + 1)] = 0

    def check(self, group: Group, lanes: np.ndarray, addresses: np.ndarray, size: int) -> None:
        """Bounds and alignment."""
        check_alignment(group, lanes, addresses, size, "shared")
        outside = (addresses < 0) | (addresses > self.size - size)
        if outside.any():
            i = int(np.flatnonzero(outside)[0])
            what = f"{size} bytes at shared + {int(addresses[i])}, which has {self.size} bytes"
            raise OutOfBoundsError(group.where(lanes[i], what))

    def load(
        self, group: Group, lanes: np.ndarray, addresses: np.ndarray, width: int, count: int, atomic: bool = False
    ) -> np.ndarray:
        """The data of each lane."""
        size = width * count
        self.check(group, lanes, addresses, size)
        index = addresses // size
        data, state = self.view(width, count)
        check_written(group, lanes, state[index], width, "shared", addresses)
        mine = self._stamps(group, lanes, width)
        wrote = rows(self.wrote, width, count)[index]
        self._check_foreign(group, lanes, addresses, wrote, mine, "was written by warp")
        if not atomic:  # which counts as a store, and atomics do not disturb each other
            self._note_read(index, mine, width, count)
            group.launch.shared.count(lanes, addresses, size)
        return data.take(index, axis=0)

    def store(
        self, group: Group, lanes: np.ndarray, addresses: np.ndarray, values: np.ndarray, atomic: bool = False
    ) -> None:
        """Write `values`, one row per lane."""
        count, width = values.shape[1], values.dtype.itemsize
        size = width * count
        self.check(group, lanes, addresses, size)
        index = addresses // size
        data, state = self.view(width, count)
        mine = self._stamps(group, lanes, width)
        self.check_landed(group, lanes, addresses, width, count)
        if not atomic:
            self.claim(group, lanes, addresses, width, count, values)
        data[index] = values
        if not atomic:
            check_one_writer(group, lanes, data, index, values, "shared memory")
            rows(self.wrote, width, count)[index] = mine
        state[index] = EACH_BYTE[width]
        group.launch.shared.count(lanes, addresses, size)

    def check_landed(self, group, lanes, addresses, width, count) -> None:
        """No cp.async may be on its way to what is about to be written."""
        flying = (self.view(width, count)[1][addresses // (width * count)].view(np.uint8) == IN_FLIGHT).any(axis=1)
        if flying.any():
            i = int(np.flatnonzero(flying)[0])
            raise AsyncCopyError(group.where(lanes[i], f"cp.async has not landed: shared + {int(addresses[i])}"))

    def claim(self, group, lanes, addresses, width, count, values=None) -> None:
        """No other warp may have touched these places since the last barrier, unless `values` change nothing."""
        index = addresses // (width * count)
        mine = self._stamps(group, lanes, width)
        changed = np.ones(len(lanes), bool)
        if values is not None:
            changed = (self.view(width, count)[0][index] != values).any(axis=1)
        if changed.any():
            for stamps, verb in ((self.wrote, "was written by warp"), (self.read, "was read by warp")):
                found = rows(stamps, width, count)[index]
                self._check_foreign(group, lanes[changed], addresses[changed], found[changed], mine[changed], verb)

    @staticmethod
    def _stamps(group: Group, lanes: np.ndarray, width: int) -> np.ndarray:
        return group.stamps[width][lanes][:, None]

    @staticmethod
    def _check_foreign(group, lanes, addresses, found, mine, verb) -> None:
        if ((found == 0) | (found == mine)).all():
            return
        # Some bytes of an element may be mine and some free.
        each, own = found.view(np.uint8), np.repeat(mine, found.shape[1], axis=1).view(np.uint8)
        foreign = (each != 0) & (each != own)
        if foreign.any():
            i, byte = (int(at[0]) for at in np.nonzero(foreign))
            stamp = int(each[i, byte])
            who = "others" if stamp == MANY else stamp - 1
            raise RaceError(
                group.where(lanes[i], f"shared + {int(addresses[i]) + byte} {verb} {who}, no barrier since")
            )

    def _note_read(self, index, mine, width, count) -> None:
        stamps = rows(self.read, width, count)
        found = stamps[index]
        if ((found == 0) | (found == mine)).all():
            stamps[index] = mine
        else:
            each, own = found.view(np.uint8), np.repeat(mine, count, axis=1).view(np.uint8)
            stamps[index] = np.where((each == 0) | (each == own), own, np.uint8(MANY)).view(found.dtype)


class LocalMemory:
    """Memory of each lane of a group."""

    name = "local"

    def __init__(self, size: int, lanes: int):
        self.size = -(-size // GRANULE) * GRANULE
        self.data = np.full((lanes, self.size), 0xFF, np.uint8)
        self.state = np.zeros((lanes, self.size), np.uint8)

    def _at(self, group, lanes, addresses, width, count):
        check_alignment(group, lanes, addresses, width * count, "local")
        outside = (addresses < 0) | (addresses > self.size - width * count)
        if outside.any():
            i = int(np.flatnonzero(outside)[0])
            raise OutOfBoundsError(group.where(lanes[i], f"local + {int(addresses[i])}, which has {self.size} bytes"))
        return lanes[:, None], (addresses // width)[:, None] + np.arange(count)

    def load(
        self, group: Group, lanes: np.ndarray, addresses: np.ndarray, width: int, count: int, atomic: bool = False
    ) -> np.ndarray:
        """The data of each lane."""
        at = self._at(group, lanes, addresses, width, count)
        check_written(group, lanes, self.state.view(UNSIGNED[width])[at], width, "local", addresses)
        return self.data.view(UNSIGNED[width])[at]

    def store(
        self, group: Group, lanes: np.ndarray, addresses: np.ndarray, values: np.ndarray, atomic: bool = False
    ) -> None:
        """Write `values`, one row per lane."""
        width = values.dtype.itemsize
        at = self._at(group, lanes, addresses, width, values.shape[1])
        self.data.view(UNSIGNED[width])[at] = values
        self.state.view(UNSIGNED[width])[at] = EACH_BYTE[width]


class GenericMemory:
    """Routes each lane to the space that its address belongs to."""

    name = "generic"

    def parts(self, group: Group, addresses: np.ndarray):
        """(space, indices of the lanes in it, where its window starts) for each space that some address belongs to."""
        spaces = (
            (group.launch_memory, addresses < SHARED_WINDOW, 0),
            (group.block.shared, (addresses >= SHARED_WINDOW) & (addresses < LOCAL_WINDOW), SHARED_WINDOW),
            (group.local, addresses >= LOCAL_WINDOW, LOCAL_WINDOW),
        )
        return [(space, np.flatnonzero(inside), window) for space, inside, window in spaces if inside.any()]

    def load(
        self, group: Group, lanes: np.ndarray, addresses: np.ndarray, width: int, count: int, atomic: bool = False
    ) -> np.ndarray:
        """The data of each lane."""
        result = np.empty((len(lanes), count), UNSIGNED[width])
        for space, at, window in self.parts(group, addresses):
            result[at] = space.load(group, lanes[at], addresses[at] - window, width, count, atomic)
        return result

    def store(
        self, group: Group, lanes: np.ndarray, addresses: np.ndarray, values: np.ndarray, atomic: bool = False
    ) -> None:
        """Write `values`, one row per lane."""
        for space, at, window in self.parts(group, addresses):
            space.store(group, lanes[at], addresses[at] - window, values[at], atomic)
