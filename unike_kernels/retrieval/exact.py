"""An index of keys for exact cosine search: packed once, searched often (paper, section 3.2)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _native, _pages
from ..artifacts import files
from ..errors import ArtifactError, BackendUnavailableError
from ..ops import _backend, _check
from ..ops.cosine_topk import SCANS, PackedKeys, check_retrieval, cosine_topk, cpu, cuda, normalize_rows, pack_keys


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


class CosineIndex:
    """Exact top-k by cosine over N keys: the same scores and ids, bit for bit, whatever is scanned.

    The scan reads the keys in `scan` bits and rules out all but a few by proved bounds; those few are scored from the
    float32 rows. Ids are positions: the keys in the order of their arrival.

    Searches may run side by side, but not beside `add` and `remove`. On a machine without the compiled extension
    searches give the same results, slowly.
    """

    def __init__(self, keys: Tensor, scan: str = "int8", *, exact: bool = True) -> None:
        """Normalise and pack `keys`.

        Args:
            keys: [N, d], any float dtype, on the CPU; finite. N may be 0.
            scan: "int8" (d at most 65,536), "float16", "bfloat16" or "float32".
            exact: keep the float32 rows. False saves their memory: scores and ids are then those of the scan, and may
                differ from the exact ones in the last digits that it sees. Not with scan="float32".

        Raises:
            TypeError, ValueError: a wrong dtype, shape, device or scan; a key with NaN or infinity.
        """
        if scan not in SCANS:
            raise ValueError(f"scan: expected one of {', '.join(SCANS)}; got {scan!r}")
        if not exact and scan == "float32":
            raise ValueError("exact: expected True with scan='float32', which scans the rows themselves")
        if not exact and not _native.available():
            raise ValueError(f"exact: expected True where nothing can be packed: {_native.reason()}")
        rows, packed = _prepare(keys, scan, None)
        self._set(scan, rows, packed, exact)

    def _set(self, scan: str, rows: Tensor | None, packed: PackedKeys | None, exact: bool) -> None:
        self.scan, self.exact = scan, exact
        self._rows = None if rows is None or not exact else _Rows(rows)
        self._codes = None if packed is None else (_Rows(packed.codes), _Rows(packed.error_bounds), packed.direction)
        self._lay_out()

    def _lay_out(self) -> None:
        """After a change: the tables as the operator takes them, and as the native kernel does."""
        self._keys = None if self._rows is None else self._rows()
        self._packed = None
        if self._codes is not None:
            codes, error_bounds, direction = self._codes
            self._packed = PackedKeys(codes(), error_bounds(), direction)
        on_cpu = self.device.type == "cpu"
        self._native = cpu.Keys(self._keys, self._packed) if on_cpu and _native.available() else None

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

        Room for keys to come is not counted.
        """
        return sum(t.nbytes for t in self._tensors().values())

    def _tensors(self) -> dict[str, Tensor]:
        named = {} if self._keys is None else {"rows": self._keys}
        if self._packed is not None:  # as files name them
            named |= zip(("codes", "bounds", "direction"), self._packed, strict=True)
        return named

    def search(self, queries: Tensor, k: int, ranges: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The k keys of highest cosine for each query: score descending, then id ascending.

        Where fewer than k keys are in range, and for a query that is not finite, the rest is id -1 and score -inf.

        Args:
            queries: [M, d], any float dtype, on the device of the index.
            k: how many, at least 1; may exceed N.
            ranges: int64 [M, 2], 0 <= start <= stop <= N; query m searches only keys[start : stop]. None: all keys.
                On a CUDA device, which is not waited for, other ranges are no error: ids -1 and scores NaN.

        Returns:
            scores float32 [M, k] and ids int64 [M, k], constants: `ops.cosine_topk` has scores with derivatives.

        Raises:
            TypeError, ValueError: a wrong dtype, shape, device or k; ranges outside the keys; queries that `torch.func`
                has wrapped.
        """
        _check.rows("queries", queries)
        _check.unwrapped("queries", queries)
        _check.sized("queries", queries, (None, self.d))
        k = check_retrieval(queries, "index", self._table(), k, ranges)
        queries = _native.native_dtype(queries)
        if self._native is not None and self._native.anchor.moved():
            self._lay_out()  # which sets it at once: others may search meanwhile
        if self._native is not None and (self._keys is None or _backend.takes_native(queries)):
            return self._native.search(queries, k, ranges)
        if self._keys is None:
            return cuda.search(queries, None, self._packed, k, ranges)[:2]
        with torch.no_grad():
            return cosine_topk(queries, self._keys, k, normalized=True, ranges=ranges, packed=self._packed)

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
        if rows is not None and packed is None and wanted.type == "cuda":
            rows = torch.nn.functional.pad(rows, (0, -self.d % 4)).to(wanted)[:, : self.d]  # aligned, to be scanned
        elif rows is not None:
            rows = rows.to(wanted)
        packed = None if packed is None else PackedKeys(*(t.to(wanted) for t in packed))
        index = type(self).__new__(type(self))
        index._set(self.scan, rows, packed, self.exact)
        return index

    def _on_cpu(self) -> None:
        if self.device.type != "cpu":
            raise ValueError(f"the index is on {self.device}: change it on the CPU, and move it again")

    def add(self, keys: Tensor) -> None:
        """Append keys; they get the ids N, N + 1, ... On an error the index is as before.

        The cost is that of packing them; now and then all keys are copied to a place with more room.

        Args:
            keys: [M, d], finite, any float dtype, on the CPU.

        Raises:
            TypeError, ValueError: see the constructor; the index is on a CUDA device.
        """
        self._on_cpu()
        if isinstance(keys, Tensor) and keys.dim() == 2 and keys.shape[1] != self.d:
            raise ValueError(f"keys: expected {self.d} columns, got {_check.shape_of(keys)}")
        # An index of no keys has no direction yet that keys share.
        rows, packed = _prepare(keys, self.scan, self._packed.direction if self._packed and len(self) else None)
        if not len(self):
            return self._set(self.scan, rows, packed, self.exact)
        grown = None if self._rows is None else self._rows.appended(rows)
        codes = self._codes
        if codes is not None and packed is not None:
            codes = (codes[0].appended(packed.codes), codes[1].appended(packed.error_bounds), codes[2])
        self._rows, self._codes = grown, codes
        self._lay_out()

    def remove(self, ids: Sequence[int] | Tensor) -> None:
        """Remove keys by id; the keys behind them move up, so that ids are again 0, ..., N - 1. Copies all that stay.

        Raises:
            IndexError: an id outside 0, ..., N - 1.
            TypeError: ids that are no integers; a mask becomes ids by `mask.nonzero()`.
            ValueError: the index is on a CUDA device.
        """
        self._on_cpu()
        gone = _check.ids("ids", ids)
        outside = gone[(gone < 0) | (gone >= len(self))]
        if len(outside):
            raise IndexError(f"ids: expected 0 to {len(self) - 1}, got {int(outside[0])}")
        keep = torch.ones(len(self), dtype=torch.bool, device="cpu")
        keep[gone] = False
        packed = self._packed
        if packed is not None:
            packed = PackedKeys(_kept(packed.codes, keep), _kept(packed.error_bounds, keep), packed.direction)
        self._set(self.scan, None if self._keys is None else _kept(self._keys, keep), packed, self.exact)

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
        index = cls.__new__(cls)
        try:
            index._restore(scan, tensors)
        except BackendUnavailableError as error:
            raise ArtifactError(f"{path}: {error}") from error
        return index

    def _restore(self, scan: str, tensors: dict[str, Tensor]) -> None:
        """From what `_tensors` gave, here or on a machine that packs as this one does, or packs nothing."""
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
        self._set(scan, rows, packed, rows is not None)

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


def _prepare(keys: Tensor, scan: str, direction: Tensor | None) -> tuple[Tensor, PackedKeys | None]:
    """The unit rows of `keys` and what the scan reads of them."""
    if not isinstance(keys, Tensor):
        raise TypeError(f"keys: expected a tensor, got {type(keys).__name__}")
    if keys.device.type != "cpu":
        raise ValueError(f"keys: expected them on the CPU, got {keys.device}")
    try:
        rows = normalize_rows(keys.detach()).float()
    except (TypeError, ValueError) as error:
        raise type(error)(f"keys{str(error).removeprefix('x')}") from None
    return rows, pack_keys(rows, scan, direction)
