"""An index of keys for exact cosine search: packed once, searched often (paper, section 3.2)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import artifacts
from .errors import ArtifactError
from .ops.cosine_topk import SCANS, PackedKeys, cosine_topk, normalize_rows, pack_keys, scan_topk


class CosineIndex:
    """Exact top-k by cosine over N keys: the same scores and ids, bit for bit, whatever is scanned.

    The scan reads the keys in `scan` bits and rules out all but a few by proved bounds; those few are scored from the
    float32 rows. Ids are positions: the keys in the order of their arrival.

    On a machine without the compiled extension searches give the same results, slowly.
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
        self.scan, self.exact = scan, exact
        self._set(*self._prepare(keys, None))

    def _prepare(self, keys: Tensor, direction: Tensor | None) -> tuple[Tensor, PackedKeys | None]:
        """The unit rows of `keys` and what the scan reads of them."""
        if not isinstance(keys, Tensor) or not keys.is_floating_point() or keys.dim() != 2 or keys.shape[1] < 1:
            raise ValueError(f"keys: expected floating [N, d] with d >= 1, got {_describe(keys)}")
        if keys.device.type != "cpu":
            raise ValueError(f"keys: expected them on the CPU, got {_describe(keys)}")
        rows = normalize_rows(keys.detach()).float()
        bad = (~rows.isfinite().all(-1)).nonzero()
        if len(bad):
            raise ValueError(f"keys: expected finite values, row {int(bad[0])} holds NaN or infinity")
        return rows, pack_keys(rows, self.scan, direction)

    def _set(self, rows: Tensor, packed: PackedKeys | None) -> None:
        if not self.exact and packed is None:
            raise ValueError("exact: expected True on a machine without the compiled extension, which has no codes")
        self._d = rows.shape[1]
        self._rows = rows if self.exact else None
        self._packed = packed

    def __len__(self) -> int:
        rows = self._rows if self._rows is not None else self._packed.codes  # type: ignore[union-attr]
        return int(rows.shape[0])

    def __repr__(self) -> str:
        kind = "" if self.exact else ", exact=False"
        return f"CosineIndex({len(self)} keys, d={self.d}, scan={self.scan!r}{kind}, {self.nbytes / 2**20:.1f} MiB)"

    @property
    def d(self) -> int:
        """The width of a key."""
        return self._d

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors: N d 4 for the rows, N (d, padded, times 1 or 2 + 16) for what is scanned."""
        return sum(t.nbytes for t in self._tensors().values())

    def _tensors(self) -> dict[str, Tensor]:
        named = {} if self._rows is None else {"rows": self._rows}
        return named | ({} if self._packed is None else self._packed._asdict())

    def search(self, queries: Tensor, k: int, *, bounds: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The k keys of highest cosine for each query: score descending, then id ascending.

        Where fewer than k keys are in range, and for a query that is not finite, the rest is id -1 and score -inf.

        Args:
            queries: [M, d], any float dtype, on the CPU.
            k: how many, at least 1; may exceed N.
            bounds: int64 [M, 2], 0 <= start <= stop <= N; query m searches only keys[start : stop]. None: all keys.

        Returns:
            scores float32 [M, k] and ids int64 [M, k].

        Raises:
            TypeError, ValueError: a wrong dtype, shape, device or k; bounds outside the keys.
        """
        if isinstance(queries, Tensor) and queries.dtype == torch.float64:
            queries = queries.float()
        if self._rows is None:
            assert self._packed is not None
            if not isinstance(k, int) or k < 1:
                raise ValueError(f"k: expected an integer of at least 1, got {k!r}")
            return scan_topk(queries, self._packed, k, bounds)
        with torch.no_grad():
            return cosine_topk(queries, self._rows, k, normalized=True, bounds=bounds, packed=self._packed)

    def add(self, keys: Tensor) -> None:
        """Append keys; they get the ids N, N + 1, ... On an error the index is as before.

        Args:
            keys: [M, d], finite, any float dtype, on the CPU.
        """
        if isinstance(keys, Tensor) and keys.dim() == 2 and keys.shape[1] != self.d:
            raise ValueError(f"keys: expected {self.d} columns, got {_describe(keys)}")
        direction = self._packed.direction if self._packed is not None and len(self) else None
        rows, packed = self._prepare(keys, direction)
        if self._packed is not None and packed is not None and len(self):
            codes, bounds = (torch.cat(pair) for pair in zip(self._packed[:2], packed[:2], strict=True))
            packed = PackedKeys(codes, bounds, packed.direction)
        self._set(rows if self._rows is None or not len(self) else torch.cat([self._rows, rows]), packed)

    def remove(self, ids: Sequence[int] | Tensor) -> None:
        """Remove keys by id; the keys behind them move up, so that ids are again 0, ..., N - 1.

        Raises:
            IndexError: an id outside 0, ..., N - 1.
        """
        gone = torch.as_tensor(ids, dtype=torch.int64).reshape(-1)
        outside = gone[(gone < 0) | (gone >= len(self))]
        if len(outside):
            raise IndexError(f"ids: expected 0 to {len(self) - 1}, got {int(outside[0])}")
        keep = torch.ones(len(self), dtype=torch.bool)
        keep[gone] = False
        if self._packed is not None:
            self._packed = PackedKeys(self._packed.codes[keep], self._packed.bounds[keep], self._packed.direction)
        if self._rows is not None:
            self._rows = self._rows[keep]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, atomically."""
        tensors = self._tensors()
        header: dict[str, Any] = {"keys": len(self), "d": self.d, "scan": self.scan, "id": artifacts.digest(tensors)}
        artifacts.save(path, "index", header, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, mmap: bool = False) -> CosineIndex:
        """Read a file that `save` wrote.

        Args:
            path: of the file.
            mmap: leave the tensors in the file and let the system page them in as searches touch them. Their contents
                are then trusted; otherwise they are hashed and compared with the header.

        Raises:
            FileNotFoundError: there is no such file.
            ArtifactError: truncated, of another format or version, or any field or tensor missing, wrong or left over.
        """
        header, tensors = artifacts.load(path, "index")
        reader = artifacts.Reader(path, header, {})
        n, d = reader.field("keys", int), reader.field("d", int)
        scan, stated = reader.field("scan", str), reader.field("id", str)
        reader.done()
        if scan not in SCANS:
            raise ArtifactError(f"{path}: header field 'scan': expected one of {', '.join(SCANS)}; got {scan!r:.80}")
        index = cls.__new__(cls)
        index.scan, index.exact, index._d = scan, "rows" in tensors, d
        dtype = SCANS[scan]
        names = ({"rows"} if index.exact else set()) | (set(PackedKeys._fields) if "codes" in tensors else set())
        if not names or set(tensors) != names:
            raise ArtifactError(f"{path}: expected rows, packed keys or both, got {', '.join(sorted(tensors))}")
        wanted: dict[str, tuple[torch.dtype | None, tuple[int, ...]]] = {
            "rows": (torch.float32, (n, d)),
            "codes": (dtype, (n, tensors["codes"].shape[-1] if "codes" in tensors else 0)),
            "bounds": (torch.float32, (n, 4)),
            "direction": (torch.float32, (d,)),
        }
        for name, t in tensors.items():
            if (t.dtype, tuple(t.shape)) != wanted[name]:
                raise ArtifactError(f"{path}: tensor {name!r}: expected {wanted[name]}, got {_describe(t)}")
        if not mmap:
            tensors = {name: t.clone() for name, t in tensors.items()}
            found = artifacts.digest(tensors)
            if found != stated:
                raise ArtifactError(f"{path}: its contents have the id {found}, the header says {stated!r:.80}")
        index._rows = tensors.get("rows")
        index._packed = PackedKeys(**{f: tensors[f] for f in PackedKeys._fields}) if "codes" in tensors else None
        if index._packed is None and index._rows is not None:
            index._packed = pack_keys(index._rows, scan)  # saved on a machine that could not pack
        return index


def _describe(t: object) -> str:
    return f"{t.dtype} {list(t.shape)} on {t.device}" if isinstance(t, Tensor) else type(t).__name__
