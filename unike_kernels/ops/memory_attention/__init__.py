"""The memory of UniKE in one operator: top-K retrieval, latent attention, gate and blend (paper, section 3.2-3.3).

`unike::memory_attention(...) -> (out, alpha, ids)`
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ... import _native
from .. import _backend, _check, _library
from ..cosine_topk import PackedKeys, check_retrieval, native_dtype, packed_of
from ..latent_attention import (
    SemanticEncoder,
    alpha_dtype,
    backward_of,
    check_tables,
    native_inputs,
    pack,
    with_heads,
)
from . import reference

__all__ = ["attend", "memory_attention"]


def _composed(
    hidden: Tensor,
    index: Tensor,
    k: int,
    bounds: Tensor | None,
    queries: Tensor,
    inputs: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """The fastest cosine_topk followed by the fastest latent_attention that there are."""
    _, ids = _backend.dispatch("cosine_topk", hidden)(hidden, index, k, True, bounds)
    keys, values, *tail = rest
    out, alpha = _backend.dispatch("latent_attention", inputs)(queries, inputs, keys, values, ids, *tail)
    return out, alpha, ids


def _run_native(
    hidden: Tensor,
    index: Tensor,
    k: int,
    bounds: Tensor | None,
    queries: Tensor,
    inputs: Tensor,
    keys: Tensor,
    values: Tensor,
    *rest: Any,
    packed: PackedKeys | None = None,
    projected: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    of = native_inputs(queries, inputs, keys, values, projected, *rest)
    out, alpha, ids = _native.memory_attention(native_dtype(hidden), index.float(), k, bounds, packed, of)
    return out.to(inputs.dtype), alpha, ids


_backend.register("memory_attention", "reference", reference.memory_attention)
_backend.register_native("memory_attention", _run_native)


def _run(
    hidden: Tensor,
    index: Tensor,
    k: int,
    bounds: Tensor | None,
    codes: Tensor | None,
    key_bounds: Tensor | None,
    direction: Tensor | None,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    queries, inputs, keys, values, projected, *rest = args
    packed, _ = pack((queries, inputs, keys, values, None, None, *rest))
    given = (hidden, index, k, bounds, *packed[:4], *packed[5:])
    run = _backend.dispatch("memory_attention", inputs if hidden.dtype != torch.float64 else hidden)
    if run is _run_native:
        out, alpha, ids = run(*given, packed=packed_of(codes, key_bounds, direction), projected=projected)
    else:
        out, alpha, ids = (run if _backend.forced_backend() else _composed)(*given)
    return out, alpha, ids


def _fake(
    hidden: Tensor,
    index: Tensor,
    k: int,
    bounds: Tensor | None,
    codes: Tensor | None,
    key_bounds: Tensor | None,
    direction: Tensor | None,
    queries: Tensor,
    inputs: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    m = inputs.shape[0]
    alpha = inputs.new_empty(m, dtype=alpha_dtype(inputs))
    return torch.empty_like(inputs), alpha, inputs.new_empty((m, k), dtype=torch.int64)


_RETRIEVAL = 7  # arguments of the schema before those of the latent attention


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    queries, states, keys, values, projected, *rest = inputs[_RETRIEVAL:]
    ids = output[2]
    ctx.save_for_backward(queries, states, keys, values, projected, ids, *rest[:6])
    ctx.switches = rest[6:]
    ctx.mark_non_differentiable(ids)


def _backward(ctx: Any, grad: Tensor, grad_alpha: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    to_latent = backward_of(ctx, grad, grad_alpha)
    return (*(None,) * _RETRIEVAL, *to_latent[:5], *to_latent[6:])  # ids are no argument here


_library.define(
    "memory_attention(Tensor hidden, Tensor index, int k, Tensor? bounds, Tensor? codes, Tensor? key_bounds, "
    "Tensor? direction, Tensor queries, Tensor inputs, Tensor keys, Tensor values, Tensor? projected, Tensor w1, "
    "Tensor b1, Tensor w2, Tensor b2, Tensor? alpha, Tensor? anchor, float scale, str convention, str norm) "
    "-> (Tensor, Tensor, Tensor)",
    _run,
    _fake,
    setup_context=_setup,
    backward=_backward,
)


def attend(
    hidden: Tensor,
    index: Tensor,
    k: int,
    bounds: Tensor | None,
    packed: PackedKeys | None,
    queries: Tensor,
    inputs: Tensor,
    keys: Tensor,
    values: Tensor,
    projected: Tensor | None,
    encoder: SemanticEncoder,
    alpha: Tensor | None,
    anchor: Tensor | None,
    scale: float | None,
    convention: str,
    norm: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`memory_attention` unchecked and with heads: for callers that made the tables themselves."""
    factor = 1 / math.sqrt(queries.shape[-1]) if scale is None else float(scale)
    out, gate, ids = torch.ops.unike.memory_attention(
        hidden, index, k, bounds, *(packed or (None,) * 3), queries, inputs, keys, values, projected, *encoder,
        alpha, anchor, factor, convention, norm,
    )  # fmt: skip
    return out, gate, ids


def memory_attention(
    hidden: Tensor,
    inputs: Tensor,
    index: Tensor,
    keys: Tensor,
    values: Tensor,
    encoder: SemanticEncoder,
    *,
    k: int,
    queries: Tensor | None = None,
    bounds: Tensor | None = None,
    scale: float | None = None,
    alpha: Tensor | None = None,
    anchor: Tensor | None = None,
    convention: str = "inclusion",
    norm: str = "match",
    packed: PackedKeys | None = None,
    projected: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each token retrieves its own k entries and is shifted towards them: `cosine_topk`, then `latent_attention`.

    Args:
        hidden: [M, d], the attention module's input h_pre, which retrieves.
        inputs: [M, d], the attention module's output h_input, which is shifted.
        index: float32 [N, d], the retrieval keys h_sem as `ops.normalize_rows` gives them.
        keys, values: [N, d], or [N, H, c] and [N, H, d]; see `latent_attention`.
        encoder: Enc_sem.
        k: entries per token.
        queries: [M, H, c], what attends to `keys`; None: `hidden`.
        bounds: int64 [M, 2], the entries that each token may retrieve (an empty range: the token is not shifted).
        scale, alpha, anchor, convention, norm, projected: see `latent_attention`.
        packed: `ops.pack_keys(index, ...)`, for a faster scan on the CPU.

    Returns:
        out [M, d] in the dtype of `inputs`, alpha [M], ids int64 [M, k].

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or switch.
    """
    _check.rows("hidden", hidden)
    check_retrieval(hidden, "index", index, k, bounds)
    queries, keys = with_heads(hidden if queries is None else queries), with_heads(keys_given := keys)
    values = keys if values is keys_given else with_heads(values)
    projected = None if projected is None else with_heads(projected)
    check_tables(inputs, queries, keys, values, projected, encoder, alpha, anchor, convention, norm)
    _check.sized("hidden", hidden, (inputs.shape[0], None))
    _check.sized("index", index, (keys.shape[0], None))
    _check.same_device("inputs", inputs, hidden=hidden)
    if index.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"index: expected the float32 rows of normalize_rows, got {_check.shape_of(index)}")
    return attend(
        hidden, index, k, bounds, packed, queries, inputs, keys, values, projected, encoder, alpha, anchor, scale,
        convention, norm,
    )  # fmt: skip
