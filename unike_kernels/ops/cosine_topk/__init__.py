"""Exact batched cosine top-k: the retrieval of UniKE (section 3.2, "retrieve the top-K h_sem").

`unike::cosine_topk(queries, keys, k, normalized, bounds) -> (scores, ids)`
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _native
from .. import _backend, _check, _library
from . import reference
from .reference import normalize_rows as _normalize_rows

__all__ = ["cosine_topk", "normalize_rows"]


def _run_native(
    queries: Tensor, keys: Tensor, k: int, normalized: bool, bounds: Tensor | None
) -> tuple[Tensor, Tensor]:
    q = _native.normalize_rows(queries.float())
    keys = keys.float()
    return _native.cosine_topk(q, keys if normalized else _native.normalize_rows(keys), k, bounds)


_backend.register("cosine_topk", "reference", reference.cosine_topk)
_backend.register_native("cosine_topk", _run_native)


def _run(queries: Tensor, keys: Tensor, k: int, normalized: bool, bounds: Tensor | None) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = _backend.dispatch("cosine_topk", queries)(queries, keys, k, normalized, bounds)
    return result


def _fake(queries: Tensor, keys: Tensor, k: int, normalized: bool, bounds: Tensor | None) -> tuple[Tensor, Tensor]:
    scores = torch.float64 if queries.dtype == torch.float64 else torch.float32
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=scores), queries.new_empty(shape, dtype=torch.int64)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    queries, keys, _, ctx.normalized, _ = inputs
    ctx.save_for_backward(queries, keys, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    queries, keys, ids = ctx.saved_tensors
    grad_q, grad_k = torch.ops.unike.cosine_topk_backward(grad, queries, keys, ids, ctx.normalized)
    return grad_q, grad_k, None, None, None


_library.define(
    "cosine_topk(Tensor queries, Tensor keys, int k, bool normalized, Tensor? bounds) -> (Tensor, Tensor)",
    _run,
    _fake,
    setup_context=_setup,
    backward=_backward,
)
_library.define(
    "cosine_topk_backward(Tensor grad, Tensor queries, Tensor keys, Tensor ids, bool normalized) -> (Tensor, Tensor)",
    reference.cosine_topk_backward,
    lambda grad, queries, keys, ids, normalized: (torch.empty_like(queries), torch.empty_like(keys)),
)


def normalize_rows(x: Tensor) -> Tensor:
    """The canonical unit rows of `x`, as `cosine_topk(..., normalized=True)` takes them.

    Args:
        x: [N, d], any float dtype, d >= 1.

    Returns:
        float32 [N, d] (float64 for a float64 input). Zero rows stay zero.

    Raises:
        TypeError, ValueError: a wrong dtype or shape; a row holds a non-finite value, the message names the first one.
    """
    _check.rows("x", x)
    bad = (~x.isfinite().all(-1)).nonzero()
    if len(bad):
        raise ValueError(f"x: expected finite values, row {int(bad[0])} holds NaN or infinity")
    if _backend.forced_backend() != "reference" and _native.available() and _backend.native_refuse(x) is None:
        return _native.normalize_rows(x.float())
    return _normalize_rows(x)


def check_retrieval(queries: Tensor, name: str, table: Tensor, k: int, bounds: Tensor | None) -> None:
    """The checks that cosine_topk and memory_attention share; `name` is what the caller calls `table`."""
    _check.floating(name, table, (None, queries.shape[1]))
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"k: expected an integer of at least 1, got {k!r}")
    if bounds is not None:
        _check.integer("bounds", bounds, (queries.shape[0], 2))
    _check.same_device("queries", queries, **{name: table, "bounds": bounds})


def cosine_topk(
    queries: Tensor, keys: Tensor, k: int, *, normalized: bool = False, bounds: Tensor | None = None
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
        bounds: int64 [M, 2], 0 <= start <= stop <= N; query m searches only keys[start : stop]. None: all keys.

    Returns:
        scores: float32 [M, k] (float64 for float64 queries).
        ids: int64 [M, k].

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or k; bounds outside the keys.
    """
    _check.rows("queries", queries)
    check_retrieval(queries, "keys", keys, k, bounds)
    if normalized and keys.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"keys: expected the float32 rows of normalize_rows, got {_check.shape_of(keys)}")
    scores, ids = torch.ops.unike.cosine_topk(queries, keys, k, normalized, bounds)
    return scores, ids
