"""Exact batched cosine top-k: the retrieval of UniKE (section 3.2, "retrieve the top-K h_sem").

`unike::cosine_topk(queries, keys, k, normalized, ranges, codes, key_bounds, direction) -> (scores, ids)`
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _native, _pages
from .. import _backend, _check, _library
from . import cpu, cuda, reference
from .leading import Leading
from .reference import SearchOperands
from .reference import normalize_rows as _normalize_rows

MOST_RESULTS = 2**20  # of a query; more only where there are as many keys
_DIRECTION_KEYS = 2**16  # of about so many the common direction is taken

# What the native scan may read of each key -> the dtype of its codes; float32 reads the keys themselves.
SCANS = {"int8": torch.uint8, "float16": torch.float16, "bfloat16": torch.bfloat16, "float32": None}


class PackedKeys(NamedTuple):
    """Copies of unit keys in fewer bits, which the native scan reads instead of the keys; see `pack_keys`."""

    codes: Tensor  # float16, bfloat16 or uint8 [N, d, padded to 64 bytes]
    error_bounds: Tensor  # float32 [N, 4], how far the score of a code can be from that of its key
    direction: Tensor  # float32 [d], of norm 1 or zero, that is taken out of keys and queries before they are coded


_backend.register("cosine_topk", "reference", reference.cosine_topk)
_backend.register_native("cosine_topk", cpu.cosine_topk)
_backend.register(
    "cosine_topk", "cuda", cuda.cosine_topk, refuse=lambda o: cuda.refuse(o.like), missing=cuda.missing,
    launch_of=cuda.launch_of,
)  # fmt: skip
_backend.register_triton("cosine_topk", f"{__package__}.triton")


def packed_of(codes: Tensor | None, error_bounds: Tensor | None, direction: Tensor | None) -> PackedKeys | None:
    """The three arguments that stand for `PackedKeys` in an operator's schema, as one; None where any is missing."""
    if codes is None or error_bounds is None or direction is None:
        return None
    return PackedKeys(codes, error_bounds, direction)


def _run(
    queries: Tensor, keys: Tensor, k: int, normalized: bool, ranges: Tensor | None, *packed: Tensor | None
) -> tuple[Tensor, Tensor]:
    operands = SearchOperands(queries, keys, k, normalized, ranges, packed_of(*packed))
    result: tuple[Tensor, Tensor] = _backend.call("cosine_topk", operands)
    return result


def _composed(
    queries: Tensor, keys: Tensor, k: int, normalized: bool, ranges: Tensor | None, *packed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Found by a kernel, since ids have no derivative, and scored again."""
    _, ids = torch.ops.unike.cosine_topk(queries.detach(), keys.detach(), k, normalized, ranges, *packed)
    return reference.scores_of(queries, keys, ids, normalized), ids


def _fake(
    queries: Tensor, keys: Tensor, k: int, normalized: bool, ranges: Tensor | None, *_: Tensor | None
) -> tuple[Tensor, Tensor]:
    scores = torch.float64 if queries.dtype == torch.float64 else torch.float32
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=scores), queries.new_empty(shape, dtype=torch.int64)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    queries, keys, _, ctx.normalized, *_ = inputs
    ctx.save_for_backward(queries, keys, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    queries, keys, ids = ctx.saved_tensors
    grad_q, grad_k = torch.ops.unike.cosine_topk_backward(grad, queries, keys, ids, ctx.normalized)
    return (grad_q, grad_k, *(None,) * 6)


_library.define(
    "cosine_topk(Tensor queries, Tensor keys, int k, bool normalized, Tensor? ranges, Tensor? codes, "
    "Tensor? key_bounds, Tensor? direction) -> (Tensor, Tensor)",
    _run,
    _fake,
    _composed,
    setup_context=_setup,
    backward=_backward,
)
_library.define(
    "cosine_topk_backward(Tensor grad, Tensor queries, Tensor keys, Tensor ids, bool normalized) -> (Tensor, Tensor)",
    reference.cosine_topk_backward,
    lambda grad, queries, keys, ids, normalized: (torch.empty_like(queries), torch.empty_like(keys)),
    reference.cosine_topk_backward,
)


def normalize_rows(x: Tensor) -> Tensor:
    """The canonical unit rows of `x`, as `cosine_topk(..., normalized=True)` takes them.

    Args:
        x: [N, d], any float dtype, d >= 1.

    Returns:
        float32 [N, d] (float64 for a float64 input), differentiable. Zero rows stay zero.

    Raises:
        TypeError, ValueError: a wrong dtype or shape; a row holds a non-finite value, the message names the first one.
    """
    _check.rows("x", x)
    native = _native.available() and _backend.native_refuse(x) is None and not _library.differentiated(x)
    native = native and _backend.forced_backend() != "reference"
    # A row that is not finite has no finite unit row.
    rows = cpu.normalize_rows(_native.native_dtype(x)) if native else _normalize_rows(x)
    bad = _library.plain(rows[..., 0].isnan()).nonzero()
    if len(bad):
        row = ", ".join(map(str, bad[0].tolist()))  # under vmap the example's number, too
        raise ValueError(f"x: expected finite values, row {row} holds NaN or infinity")
    return rows


def check_retrieval(queries: Tensor, name: str, table: Tensor, k: int, ranges: Tensor | None) -> int:
    """The checks that all searches share, except for the shape of the table.

    Args:
        queries: [M, d].
        name: what the caller calls the table.
        table: the keys, or a tensor on their device.
        k: may be an integer of numpy's.
        ranges: int64 [M, 2], or None.

    Returns:
        k as a Python int.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or k.
    """
    k = _check.count("k", k)
    if k > (most := max(MOST_RESULTS, len(table))):
        raise ValueError(f"k: expected at most {most}, got {k}")
    if ranges is not None:
        _check.integer("ranges", ranges, (queries.shape[0], 2))
    _check.same_device("queries", queries, **{name: table, "ranges": ranges})
    return k


def pack_keys(keys: Tensor, scan: str, direction: Tensor | None = None) -> PackedKeys | None:
    """Pack unit keys so that a native scan of them reads 2 or 4 times fewer bytes. The results stay the same.

    Args:
        keys: float32 [N, d] on the CPU, as `normalize_rows` gives them, finite.
        scan: "float16", "bfloat16" or "int8" (d at most 65,536); "float32" packs nothing.
        direction: float32 [d], of keys that were packed before; None: the mean of `keys` (of some, if
            they are very many), normalised.

    Returns:
        PackedKeys, or None where the scan would read the keys themselves: "float32", or without the native extension.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or scan.
    """
    _check.one_of("scan", scan, tuple(SCANS))
    _check.rows("keys", keys)
    dtype = SCANS[scan]
    if dtype is None or not _native.available() or _backend.native_refuse(keys) is not None:
        return None
    if direction is None:
        some = keys[:: 1 + len(keys) // _DIRECTION_KEYS]
        direction = cpu.normalize_rows(some.mean(0, dtype=torch.float64).float().unsqueeze(0))[0]
        direction = direction if len(keys) else torch.zeros_like(direction)
    width = cpu.code_width(dtype, keys.shape[1])
    if not width:
        raise ValueError(f"keys: expected at most 65536 columns for scan='int8', got {keys.shape[1]}")
    codes = _pages.empty(len(keys), width, dtype=dtype)
    packed = PackedKeys(
        codes, torch.empty(len(keys), cpu.KEY_BOUNDS, dtype=torch.float32, device="cpu"), direction.contiguous()
    )
    cpu.pack_keys(keys, direction, packed.codes, packed.error_bounds)
    return packed


class PreparedSearch:
    """The keys of a retrieval for many calls: laid out once for the native kernel, where that can be."""

    def __init__(self, keys: Tensor, packed: PackedKeys | None, leading: Leading | None = None) -> None:
        """Shapes are checked by the caller.

        Args:
            keys: [N, d], unit rows.
            packed: of these.
            leading: of these, where few queries are to read it first.
        """
        self._tables = keys, packed, leading
        self._native: cpu.Keys | None = None
        self._launches = _backend.Launches("cosine_topk", (keys,))

    def _laid_out(self) -> cpu.Keys | None:
        if self._native is None or self._native.anchor.moved():
            keys, packed, leading = self._tables
            native = _native.available() and keys.device.type == "cpu" and keys.dtype != torch.float64
            self._native = cpu.Keys(keys, packed, leading) if native and not _library.wrapped(keys) else None
        return self._native

    def __reduce__(self) -> Any:  # a copy is laid out anew, at addresses of its own
        return type(self), self._tables

    def __call__(self, queries: Tensor, k: int, ranges: Tensor | None) -> tuple[Tensor, Tensor]:
        """`cosine_topk` of these keys, by the shortest way that computes it.

        Args:
            queries: [M, d], any float dtype.
            k: at most `MOST_RESULTS`.
            ranges: int64 [M, 2]; None: all keys.
        """
        direct = _library.direct(queries)  # else a trace sees the operator, not how it is prepared
        if direct and _backend.takes_native(queries) and (native := self._laid_out()) is not None:
            return native.search(queries, k, ranges)
        keys, packed, _ = self._tables
        if direct and len(queries) and _library.in_place(queries, ranges):
            form = queries.shape, queries.dtype, k, ranges is None
            launch = self._launches.of(form, lambda: SearchOperands(queries, keys, k, True, ranges, packed))
            if launch is not None:
                scores = queries.new_empty((len(queries), k), dtype=torch.float32)
                ids = queries.new_empty((len(queries), k), dtype=torch.int64)
                launch(queries, ranges, scores, ids)
                return scores, ids
        found: tuple[Tensor, Tensor] = _library.call(
            "cosine_topk", queries, queries, keys, k, True, ranges, *(packed or (None,) * 3)
        )
        return found


def cosine_topk(
    queries: Tensor,
    keys: Tensor,
    k: int,
    *,
    normalized: bool = False,
    ranges: Tensor | None = None,
    packed: PackedKeys | None = None,
) -> tuple[Tensor, Tensor]:
    """The k keys of highest cosine similarity for each query, exactly.

    Scores are canonical: the same bits on every backend, for any batch size and thread count. They come in the order
    score descending, then id ascending. Where fewer than k keys are in range, and for a query that is not finite,
    the rest is id -1 and score -inf. A zero query or key scores 0. Differentiable in queries and keys (scores only).

    Args:
        queries: [M, d], any float dtype, d >= 1.
        keys: [N, d]; finite.
        k: how many, at least 1.
        normalized: `keys` are the output of `normalize_rows` already.
        ranges: int64 [M, 2], 0 <= start <= stop <= N; query m searches only keys[start : stop]. None: all keys.
            Others are an error on a CPU alone, as nothing waits for another device: there they are clipped to the keys;
            the CUDA kernel finds nothing, with scores NaN.
        packed: of the same keys, for a faster scan on the CPU; needs `normalized`.

    Returns:
        scores: float32 [M, k] (float64 for float64 queries).
        ids: int64 [M, k].

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or k; on a CPU, ranges outside the keys.
    """
    _check.rows("queries", queries)
    _check.floating("keys", keys, (None, queries.shape[1]))
    k = check_retrieval(queries, "keys", keys, k, ranges)
    if normalized and keys.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"keys: expected the float32 rows of normalize_rows, got {_check.shape_of(keys)}")
    if packed is not None and not normalized:
        raise ValueError("packed: expected normalized=True with it, since it was packed from unit keys")
    scores, ids = _library.call(
        "cosine_topk", queries, queries, keys, k, normalized, ranges, *(packed or (None,) * 3)
    )  # fmt: skip
    return scores, ids
