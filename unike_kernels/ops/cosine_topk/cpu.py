"""The exact search by the native core: its calls on torch tensors (csrc/include/unike/cosine_topk.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _native, _pages
from .leading import Leading

# The scans of csrc/include/unike/cosine_topk.h, by the dtype of the codes, and the bytes of a code.
SCANS = {torch.float16: (1, 2), torch.bfloat16: (2, 2), torch.uint8: (3, 1)}


KEY_BOUNDS = 4


def normalize_rows(x: Tensor) -> Tensor:
    """Rows divided by their norms in canonical arithmetic (csrc/include/unike/cosine_topk.h).

    A row of zeros stays zero; a row with a NaN or an infinity becomes all NaN.

    Args:
        x: float32 or bfloat16 [N, d] on the CPU, d >= 1, any strides.

    Returns:
        float32 [N, d], contiguous.

    Raises:
        ValueError: for another device, dtype or shape.
        RuntimeError: without the compiled extension.
    """
    x = _native.table(x, "x")
    out = _pages.empty(*x.shape, dtype=torch.float32)
    _native.core().normalize_rows(_native.rows(x), *x.shape, out.data_ptr(), torch.get_num_threads())
    return out


def code_width(dtype: torch.dtype, d: int) -> int:
    """The columns of the codes of rows of width d; 0 where there are no such codes (uint8 for d above 65,536)."""
    scan, size = SCANS[dtype]
    return int(_native.core().code_bytes(scan, d)) // size


def pack_keys(rows: Tensor, direction: Tensor, codes: Tensor, bounds: Tensor) -> None:
    """Write what the scan of a search reads of each row, and the bounds on what it leaves out (unike_pack_keys).

    Args:
        rows: float32 [n, d] on the CPU, normalised and finite, any strides.
        direction: float32 [d], of norm 1 or zero, that the rows share.
        codes: [n, code_width(dtype, d)], contiguous; float16, bfloat16 or uint8 (the int8 scan, d at most 65,536).
        bounds: float32 [n, 4], contiguous.

    Raises:
        ValueError: for another device, dtype or shape.
        RuntimeError: without the compiled extension.
    """
    rows = _native.table(rows, "rows", (torch.float32,))
    n, d = rows.shape
    scan = _check_codes(codes, bounds, direction, n, d)
    addresses = (direction.data_ptr(), codes.data_ptr(), bounds.data_ptr())
    _native.core().pack_keys(rows.data_ptr(), n, d, rows.stride(0), scan, *addresses, torch.get_num_threads())


class Keys:
    """The keys of a search, checked and laid out once (unike_keys); keeps the tensors alive."""

    def __init__(
        self,
        rows: Tensor | None,
        packed: tuple[Tensor, Tensor, Tensor] | None,
        leading: Leading | None = None,
    ) -> None:
        """
        Args:
            rows: float32 [n, d] on the CPU, normalised and finite, any strides; None: `packed` alone decides, and
                scores and ids are those of the scan.
            packed: codes and bounds of `pack_keys` for all rows, and the direction; scanned instead of the rows.
            leading: of all rows, with an int8 scan of keys that have rows; None: there is nothing of this.

        Raises:
            ValueError: for another device, dtype or shape.
            RuntimeError: without the compiled extension.
        """
        rows = None if rows is None else _native.table(rows, "keys", (torch.float32,))
        if rows is not None:
            n, self.d = rows.shape
        elif packed is not None:
            n, self.d = packed[0].shape[0], packed[2].shape[0]
        else:
            raise ValueError("keys or packed must be given")
        self.tensors = (rows, packed, leading)
        addresses = [0 if rows is None else rows.data_ptr(), 0 if rows is None else rows.stride(0), 0, 0, 0, 0]
        if packed is not None:
            codes, bounds, direction = packed
            scan = _check_codes(codes, bounds, direction, n, self.d)
            addresses[2:] = scan, codes.data_ptr(), bounds.data_ptr(), direction.data_ptr()
        self.anchor = _native.Anchor(packed[0] if rows is None and packed is not None else rows)
        if leading is not None:
            addresses += len(leading.directions) - 1, *(t.data_ptr() for t in leading)
        self.native = _native.core().Keys(n, self.d, *addresses)

    def search(self, queries: Tensor, k: int, ranges: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The k keys of highest cosine for each query: score descending, then id ascending.

        Where fewer than k keys are in range, the rest has id -1 and score -inf; so has all of a non-finite query.

        Args:
            queries: float32 or bfloat16 [m, d] on the CPU, d >= 1, any strides.
            k: how many keys to return for each query; may exceed n.
            ranges: int64 [m, 2] on the CPU, 0 <= start <= stop <= n: query i sees only the keys start, ..., stop - 1.

        Returns:
            scores, float32 [m, k], and ids (rows of the keys), int64 [m, k].

        Raises:
            ValueError: for another device, dtype or shape, a negative k, or ranges outside the keys.
        """
        queries = _native.table(queries, "queries")
        m, d = queries.shape
        if d != self.d:
            raise ValueError(f"queries have {d} columns, but keys have {self.d}")
        if k < 0:
            raise ValueError(f"k must not be negative, got {k}")
        ranges = checked_ranges(ranges, m)
        scores, ids = _native.allocate(m, k), _native.allocate(m, k, dtype=torch.int64)
        addresses = (_native.address(ranges), scores.data_ptr(), ids.data_ptr())
        _native.core().cosine_topk(self.native, _native.rows(queries), m, k, *addresses, torch.get_num_threads())
        return scores, ids


def checked_ranges(ranges: Tensor | None, m: int) -> Tensor | None:
    """As the core takes them. Raises ValueError for another device, dtype or shape than int64 [m, 2] on the CPU."""
    if ranges is None:
        return None
    if ranges.shape != (m, 2) or ranges.dtype != torch.int64 or ranges.device.type != "cpu":
        raise ValueError(f"ranges must be int64 [{m}, 2] on the CPU, got {_native.describe(ranges)}")
    return _native.aligned(ranges)


def _check_codes(codes: Tensor, bounds: Tensor, direction: Tensor, n: int, d: int) -> int:
    """The number of the scan that reads these codes of n rows of width d."""
    if codes.dtype not in SCANS:
        raise ValueError(f"codes must be float16, bfloat16 or uint8, got {_native.describe(codes)}")
    width = code_width(codes.dtype, d)
    if not width:
        raise ValueError(f"rows must have at most 65536 columns for an int8 scan, got {d}")
    for name, t, shape, dtype in (
        ("codes", codes, (n, width), codes.dtype),
        ("bounds", bounds, (n, KEY_BOUNDS), torch.float32),
        ("direction", direction, (d,), torch.float32),
    ):
        if t.shape != shape or t.dtype != dtype or not t.is_contiguous() or t.device.type != "cpu":
            raise ValueError(f"{name} must be contiguous {dtype} {list(shape)} on the CPU, got {_native.describe(t)}")
    return SCANS[codes.dtype][0]


def cosine_topk(
    queries: Tensor,
    keys: Tensor,
    k: int,
    normalized: bool = False,
    ranges: Tensor | None = None,
    packed: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """See `SearchOperands`."""
    rows = keys.float() if normalized else normalize_rows(_native.native_dtype(keys))
    return Keys(rows, packed).search(_native.native_dtype(queries), k, ranges)
