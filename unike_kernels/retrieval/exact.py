"""An index of keys for exact cosine search: packed once, searched often (paper, section 3.2)."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _native, _pages
from ..artifacts import files
from ..errors import ArtifactError, BackendUnavailableError
from ..ops import _backend, _check
from ..ops.cosine_topk import (
    SCANS,
    Leading,
    PackedKeys,
    check_retrieval,
    cosine_topk,
    cpu,
    cuda,
    leading_of,
    normalize_rows,
    pack_keys,
)
from ..ops.cosine_topk.leading import appended, pack_leading
from .index import Ids, KeyedIndex, own_ids, taken, tensor_of


class _Rows:
    """Rows of a table that grows: what is there is copied once for each doubling, not for each addition."""

    def __init__(self, rows: Tensor) -> None:
        self._room, self._count = rows, len(rows)

    def __call__(self) -> Tensor:
        return self._room[: self._count]

    def appended(self, rows: Tensor) -> _Rows:
        """These rows and more; shares the memory behind the last one."""
        count = self._count + len(rows)
        new = _Rows(self._room)
        if count > len(self._room):
            new._room = _pages.empty(max(count, 2 * self._count), *self._room.shape[1:], dtype=self._room.dtype)
            new._room[: self._count] = self()
        new._room[self._count : count] = rows
        new._count = count
        return new


class CosineIndex(KeyedIndex):
    """Exact top-k by cosine over N keys: the same scores and ids, bit for bit, whatever is scanned.

    The scan reads the keys in `scan` bits and rules out all but a few by proved bounds; those few are scored from the
    float32 rows. Keys have the ids that the caller gives them, as in faiss's IndexIDMap2, and keep them. An index of
    keys without ids counts them in the order of their arrival, as faiss's IndexFlat does: there keys move up where
    others are removed. All keys of an index have ids of the caller's, or none has.

    Allowed keys that do not lie side by side are copied, rows and codes, in each search: of a set that stays, make an
    index. Scores and ids are constants: `ops.cosine_topk` has scores with derivatives. On a CUDA device, which is not
    waited for, ranges outside the keys are no error: ids -1 and scores NaN.

    Searches may run side by side, but not beside `add` and `remove`. On a machine without the compiled extension
    searches give the same results, slowly.
    """

    def __init__(
        self,
        keys: Tensor | np.ndarray[Any, Any] | int,
        scan: str = "int8",
        *,
        ids: Ids | None = None,
        exact: bool = True,
    ) -> None:
        """Normalise and pack `keys`.

        Args:
            keys: [N, d], any float dtype, on the CPU; finite; a tensor, or an array of numpy. N may be 0. A number: the
                width d of an index that has no keys yet.
            scan: "int8" (d at most 65,536), "float16", "bfloat16" or "float32".
            ids: one integer of at least 0 for each key, none twice; None: their positions.
            exact: keep the float32 rows. False saves their memory: scores and ids are then those of the scan, and may
                differ from the exact ones in the last digits that it sees. Not with scan="float32".

        Raises:
            TypeError, ValueError: a wrong dtype, shape, device or scan; a key with NaN or infinity; wrong ids.
        """
        if scan not in SCANS:
            raise ValueError(f"scan: expected one of {', '.join(SCANS)}; got {scan!r}")
        if not exact and scan == "float32":
            raise ValueError("exact: expected True with scan='float32', which scans the rows themselves")
        if not exact and not _native.available():
            raise ValueError(f"exact: expected True where nothing can be packed: {_native.reason()}")
        if isinstance(keys, int | np.integer):
            keys = torch.empty(0, _check.count("keys", keys), dtype=torch.float32, device="cpu")
        rows, packed = _prepare(keys, scan, None)
        leading = leading_of(rows if exact else None, packed)
        self._set(scan, rows, packed, exact, own_ids(ids, len(rows)), leading)

    def _set(
        self,
        scan: str,
        rows: Tensor | None,
        packed: PackedKeys | None,
        exact: bool,
        ids: Tensor | None = None,
        leading: Leading | None = None,
    ) -> None:
        self.scan, self.exact = scan, exact
        self._own_ids = None if ids is None else _Rows(ids)
        self._rows = None if rows is None or not exact else _Rows(rows)
        self._codes = None if packed is None else (_Rows(packed.codes), _Rows(packed.error_bounds), packed.direction)
        self._leading, self._led = leading, 0 if rows is None else len(rows)
        self._lay_out()

    def _lay_out(self) -> None:
        """After a change: the tables as the operator takes them, and as the native kernel does."""
        self._keys = None if self._rows is None else self._rows()
        self._ids = None if self._own_ids is None else self._own_ids()
        self._packed = None
        if self._codes is not None:
            codes, error_bounds, direction = self._codes
            self._packed = PackedKeys(codes(), error_bounds(), direction)
        on_cpu = self.device.type == "cpu"
        native = on_cpu and _native.available()
        self._native = cpu.Keys(self._keys, self._packed, self._leading) if native else None

    def _table(self) -> Tensor:
        """[N, d], or the codes in its place."""
        table = self._packed.codes if self._keys is None and self._packed is not None else self._keys
        assert table is not None
        return table

    def __len__(self) -> int:
        return len(self._table())

    @property
    def device(self) -> torch.device:
        """Where the tables are."""
        return self._table().device

    @property
    def d(self) -> int:
        """The width of a key."""
        return int(self._table().shape[1] if self._packed is None else self._packed.direction.shape[0])

    def __repr__(self) -> str:
        kind = "" if self.exact else ", exact=False"
        return f"CosineIndex({len(self)} keys, d={self.d}, scan={self.scan!r}{kind}, {self.nbytes / 2**20:.1f} MiB)"

    @property
    def nbytes(self) -> int:
        """Bytes of all tables: for each key 4 d of its row (if exact), d or 2 d, padded to 64, of its codes, and 16.

        8 more where it has an id of the caller's, and p + 20 where p directions lead. Room for keys to come is not
        counted.
        """
        leading = 0 if self._leading is None else len(self) * (len(self._leading.directions) + 19)
        return leading + sum(t.nbytes for t in self._tensors().values())

    def _tensors(self) -> dict[str, Tensor]:
        named = {} if self._keys is None else {"rows": self._keys}
        if self._packed is not None:  # as files name them
            named |= zip(("codes", "bounds", "direction"), self._packed, strict=True)
        return named if self._ids is None else named | {"ids": self._ids}

    def _nearest(self, queries: Tensor, k: int, ranges: Tensor | None, chosen: Tensor | None) -> tuple[Tensor, Tensor]:
        k = check_retrieval(queries, "index", self._table(), k, ranges)
        if chosen is not None:
            return self._among(chosen, queries, k)
        queries = _native.native_dtype(queries)
        if self._native is not None and self._native.anchor.moved():
            self._lay_out()  # which sets it at once: others may search meanwhile
        if self._native is not None and (self._keys is None or _backend.takes_native(queries)):
            return self._native.search(queries, k, ranges)
        if self._keys is None:
            return cuda.search(queries, None, self._packed, k, ranges)[:2]
        with torch.no_grad():
            return cosine_topk(queries, self._keys, k, normalized=True, ranges=ranges, packed=self._packed)

    def _among(self, chosen: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Of the keys at these ascending positions: in their range where they fill it, else in a copy of them."""
        start, stop = (int(chosen[0]), int(chosen[-1]) + 1) if len(chosen) else (0, 0)
        if stop - start == len(chosen):
            ranges = chosen.new_tensor([[start, stop]], dtype=torch.int64).repeat(len(queries), 1)
            return self._nearest(queries, k, ranges, None)
        part, fewer = self._part(chosen), min(k, len(chosen))
        scores, found = part._nearest(queries, fewer, None, None)
        pad = torch.nn.functional.pad
        return pad(scores, (0, k - fewer), value=float("-inf")), pad(taken(chosen, found), (0, k - fewer), value=-1)

    def _part(self, chosen: Tensor) -> CosineIndex:
        """An index of the keys at these positions, in memory of its own."""
        rows, packed = self._keys, self._packed
        if rows is not None:
            rows = _aligned(rows[chosen]) if rows.is_cuda and packed is None else rows[chosen]
        if packed is not None:
            packed = PackedKeys(packed.codes[chosen], packed.error_bounds[chosen], packed.direction)
        part = type(self).__new__(type(self))
        part._set(self.scan, rows, packed, self.exact)
        return part

    def reconstruct(self, id: int) -> Tensor:
        """The key with this id as searches score it: its unit row, float32 [d].

        Raises:
            IndexError: no key has this id.
            ValueError: the index has no rows (exact=False).
        """
        position = self._position(id)
        if self._keys is None:
            raise ValueError("reconstruct: expected an index with rows; this one was made with exact=False")
        return self._keys[position].clone()

    def to(self, device: torch.device | str) -> CosineIndex:
        """This index on a CUDA device or on the CPU: itself where it is there already, else a copy.

        Searches on a CUDA device give the same bits. Keys are added and removed on the CPU.

        Raises:
            BackendUnavailableError: there is no CUDA device; or this build has no CUDA kernels, and there are no
                rows, which those of Triton read.
            ValueError: another kind of device.
        """
        wanted = torch.device(device)
        if wanted.type not in ("cpu", "cuda"):
            raise ValueError(f"device: expected a CUDA device or the CPU, got {device}")
        by_triton = self._keys is not None and not _backend.triton_missing()
        if wanted.type == "cuda" and (reason := cuda.missing()) and not by_triton:
            raise BackendUnavailableError(f"CosineIndex.to({str(device)!r}): {reason}")
        if wanted.type == self.device.type and wanted.index in (None, self.device.index):
            return self
        rows, packed = self._keys, self._packed
        if rows is not None:
            rows = _aligned(rows.to(wanted)) if packed is None and wanted.type == "cuda" else rows.to(wanted)
        packed = None if packed is None else PackedKeys(*(t.to(wanted) for t in packed))
        index = type(self).__new__(type(self))
        ids = None if self._ids is None else self._ids.to(wanted)
        index._set(self.scan, rows, packed, self.exact, ids, leading_of(rows, packed))
        return index

    def _on_cpu(self) -> None:
        if self.device.type != "cpu":
            raise ValueError(f"the index is on {self.device}: change it on the CPU, and move it again")

    def add(self, keys: Tensor | np.ndarray[Any, Any], ids: Ids | None = None) -> None:
        """Append keys. On an error the index is as before.

        The cost is that of packing them; now and then all keys are copied to a place with more room.

        Args:
            keys: [M, d], finite, any float dtype, on the CPU; a tensor, or an array of numpy.
            ids: one integer of at least 0 for each key, none twice and none that is there. None, where the keys before
                have none either: N, N + 1, ...

        Raises:
            TypeError, ValueError: see the constructor; keys with ids among keys without, or the other way round; the
                index is on a CUDA device.
        """
        self._on_cpu()
        keys = tensor_of("keys", keys)
        if keys.dim() == 2 and keys.shape[1] != self.d:
            raise ValueError(f"keys: expected {self.d} columns, got {_check.shape_of(keys)}")
        # An index of no keys has no direction yet that keys share.
        rows, packed = _prepare(keys, self.scan, self._packed.direction if self._packed and len(self) else None)
        added = self._ids_to_add(ids, len(rows))
        if not len(self):
            return self._set(
                self.scan, rows, packed, self.exact, added, leading_of(rows if self.exact else None, packed)
            )
        own = self._own_ids if added is None or self._own_ids is None else self._own_ids.appended(added)
        grown = None if self._rows is None else self._rows.appended(rows)
        codes = self._codes
        if codes is not None and packed is not None:
            codes = (codes[0].appended(packed.codes), codes[1].appended(packed.error_bounds), codes[2])
        count, leading = len(self) + len(rows), self._leading
        if grown is not None and count >= 2 * self._led:  # other directions may lead now
            leading, self._led = leading_of(grown(), packed), count
        elif leading is not None:
            leading = appended(leading, rows, len(self))
        self._rows, self._codes, self._own_ids, self._leading = grown, codes, own, leading
        self._lay_out()

    def remove(self, ids: Ids) -> None:
        """Remove keys by id. Copies all that stay.

        Ids of the caller's own stay; without these, the keys behind move up, so that ids are again 0, ..., N - 1.

        Raises:
            IndexError: an id that no key has.
            TypeError: ids that are no integers; a mask becomes ids by `mask.nonzero()`.
            ValueError: the index is on a CUDA device.
        """
        self._on_cpu()
        keep = self._without(ids)
        packed = self._packed
        if packed is not None:
            packed = PackedKeys(_kept(packed.codes, keep), _kept(packed.error_bounds, keep), packed.direction)
        rows, own = (None if table is None else _kept(table, keep) for table in (self._keys, self._ids))
        leading = None if rows is None or self._leading is None else pack_leading(rows, self._leading.directions)
        self._set(self.scan, rows, packed, self.exact, own, leading)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, atomically, with checksums of all that is in it."""
        files.save(path, "index", {"keys": len(self), "d": self.d, "scan": self.scan}, self._tensors())

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, mmap: bool = False) -> CosineIndex:
        """Read a file that `save` wrote.

        Args:
            path: of the file.
            mmap: leave the tables in the file, for the system to page in as searches touch them. Their contents are
                then trusted, and the file must not change as long as the index lives: what is written to it shows in
                searches, and reading what was cut off ends the process. Otherwise they are verified, and in memory of
                their own.

        Raises:
            FileNotFoundError: there is no such file.
            ArtifactError: truncated, damaged, of another format or version, or any field or tensor missing, wrong or
                left over; no regular file.
        """
        header, tensors = files.load(path, "index", mmap=mmap, verify=not mmap)
        stated = header.pop("id", None)  # of a file of version 1, in the place of checksums
        reader = files.Reader(path, header, {})
        n, d, scan = reader.field("keys", int), reader.field("d", int), reader.field("scan", str)
        reader.done()
        if scan not in SCANS or n < 0 or d < 1:
            raise ArtifactError(f"{path}: there is no index of {n} keys of width {d} for a scan of {scan!r:.80}")
        wanted = _layout(n, d, scan)
        found = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
        if found.get("ids") == (torch.int64, (n,)):
            del found["ids"]
        codes = {name: layout for name, layout in wanted.items() if name != "rows"}
        # Rows alone: saved where nothing could be packed. Codes alone: not exact.
        if not found or found not in (wanted, {"rows": wanted["rows"]}, codes):
            raise ArtifactError(f"{path}: expected the tensors {wanted}, got {found}")
        if not mmap:
            if stated is not None and (contents := files.digest(tensors)) != stated:
                raise ArtifactError(f"{path}: its contents have the id {contents}, the header says {stated!r:.80}")
            for name, t in tensors.items():
                if t.is_floating_point() and not _check.finite(t):
                    raise ArtifactError(f"{path}: tensor {name!r} holds NaN or infinity")
            reader.build(own_ids, tensors.get("ids"), n)
        index = cls.__new__(cls)
        try:
            index._restore(scan, tensors, in_memory=not mmap)
        except BackendUnavailableError as error:
            raise ArtifactError(f"{path}: {error}") from error
        return index

    def _restore(self, scan: str, tensors: dict[str, Tensor], in_memory: bool = True) -> None:
        """From what `_tensors` gave, here or on a machine that packs as this one does, or packs nothing.

        Leading directions are for tables in memory: to find them all keys are read.
        """
        rows = tensors.get("rows")
        packed = PackedKeys(*(tensors[f] for f in ("codes", "bounds", "direction"))) if "codes" in tensors else None
        if not _native.available():
            if rows is None:
                raise BackendUnavailableError(
                    f"it holds codes without rows, which nothing can search: {_native.reason()}"
                )
            packed = None
        elif packed is None and rows is not None and rows.device.type == "cpu":
            packed = pack_keys(rows, scan)
        leading = leading_of(rows if in_memory else None, packed)
        self._set(scan, rows, packed, rows is not None, tensors.get("ids"), leading)

    def __getstate__(self) -> dict[str, Any]:
        """For pickling and copying: the tables, without the room for keys to come."""
        return {"scan": self.scan, "tensors": {name: _whole(t) for name, t in self._tensors().items()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._restore(state["scan"], state["tensors"])


def _layout(n: int, d: int, scan: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The tables of an index: dtypes and shapes (csrc/include/unike/cosine_topk.h)."""
    tables: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"rows": (torch.float32, (n, d))}
    dtype = SCANS[scan]
    if dtype is not None:
        width = -(-d * dtype.itemsize // 64) * 64 // dtype.itemsize
        tables |= {"codes": (dtype, (n, width)), "bounds": (torch.float32, (n, cpu.KEY_BOUNDS))}
        tables["direction"] = (torch.float32, (d,))
    return tables


def _kept(table: Tensor, keep: Tensor | slice) -> Tensor:
    """A copy of some rows, in memory of its own."""
    rows = table[keep]
    copy = _pages.empty(*rows.shape, dtype=rows.dtype)
    copy.copy_(rows)
    return copy


def _whole(table: Tensor) -> Tensor:
    """The table itself, or a copy of one that is a part of a larger memory, which would be copied with it."""
    return table if table.untyped_storage().nbytes() == table.nbytes else table.clone()


def _aligned(rows: Tensor) -> Tensor:
    """Rows that a CUDA kernel scans themselves, each at a multiple of 16 bytes."""
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % 4))[:, : rows.shape[1]]


def _prepare(keys: object, scan: str, direction: Tensor | None) -> tuple[Tensor, PackedKeys | None]:
    """The unit rows of `keys` and what the scan reads of them."""
    keys = tensor_of("keys", keys)
    if keys.device.type != "cpu":
        raise ValueError(f"keys: expected them on the CPU, got {keys.device}")
    try:
        rows = normalize_rows(keys.detach()).float()
    except (TypeError, ValueError) as error:
        raise type(error)(f"keys{str(error).removeprefix('x')}") from None
    return rows, pack_keys(rows, scan, direction)
