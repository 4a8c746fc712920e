"""The memory of UniKE in one operator: top-K retrieval, latent attention, gate and blend (paper, section 3.2-3.3).

`unike::memory_attention(...) -> (out, alpha, ids)`
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _native
from .. import _backend, _check, _library
from ..cosine_topk import PackedKeys, check_retrieval, native_dtype, packed_of, run_search
from ..latent_attention import (
    SemanticEncoder,
    alpha_dtype,
    backward_of,
    blend_of,
    check_tables,
    latent_implementation,
    native_gate,
    native_memory,
    native_queries,
    pack,
    with_heads,
)
from ..latent_attention.reference import Blend
from . import reference

__all__ = ["Plan", "attend", "memory_attention"]


def _composed(
    hidden: Tensor,
    index: Tensor,
    k: int,
    bounds: Tensor | None,
    queries: Tensor,
    inputs: Tensor,
    keys: Tensor,
    values: Tensor,
    *gate: Any,
    packed: PackedKeys | None,
    projected: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The fastest cosine_topk followed by the fastest latent_attention that there are."""
    _, ids = run_search(hidden, index, k, True, bounds, packed)
    out, alpha = latent_implementation("latent_attention", inputs, projected)(queries, inputs, keys, values, ids, *gate)
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
    encoder: SemanticEncoder,
    *gate: Any,
    packed: PackedKeys | None = None,
    projected: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    out, alpha, ids = _native.memory_attention(
        native_dtype(hidden),
        native_queries(queries),
        native_dtype(inputs),
        k,
        bounds,
        _native.Keys(index.float(), packed),
        native_memory(keys, values, projected, encoder),
        native_gate(*gate),
    )
    assert alpha is not None and ids is not None
    return out.to(inputs.dtype), alpha, ids


_backend.register("memory_attention", "reference", reference.memory_attention)
_backend.register_native("memory_attention", _run_native)
_backend.register_triton("memory_attention", f"{__name__}.triton")


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
    flat, _ = pack((queries, inputs, keys, values, None, None, *rest))
    given = (hidden, index, k, bounds, *flat[:4], *flat[5:])
    faster: dict[str, Any] = dict(packed=packed_of(codes, key_bounds, direction), projected=projected)
    run = _backend.dispatch("memory_attention", inputs if hidden.dtype != torch.float64 else hidden)
    if run is _run_native:
        out, alpha, ids = run(*given, **faster)
    elif _backend.forced_backend() is None and (run is reference.memory_attention or _better_apart(hidden, index)):
        out, alpha, ids = _composed(*given, **faster)
    else:
        out, alpha, ids = run(*given, **({} if run is reference.memory_attention else {"projected": projected}))
    return out, alpha, ids


def _better_apart(hidden: Tensor, index: Tensor) -> bool:
    """Whether a search in fewer bits saves more than the second launch costs, 3 us: 10 MB of an H100's memory."""
    return index.numel() > 2**21 and _backend.takes("cosine_topk", "cuda", hidden)


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
    blend: Blend,
) -> tuple[Tensor, Tensor, Tensor]:
    """`memory_attention` unchecked and with heads: for callers that made the tables themselves."""
    out, gate, ids = _library.call(
        "memory_attention", inputs, hidden, index, k, bounds, *(packed or (None,) * 3), queries, inputs, keys, values,
        projected, *encoder, alpha, anchor, *blend,
    )  # fmt: skip
    return out, gate, ids


class Plan:
    """The tables of a memory, laid out for the native kernel once for many calls of `attend`."""

    def __init__(
        self,
        index: Tensor,
        packed: PackedKeys | None,
        keys: Tensor,
        values: Tensor,
        projected: Tensor | None,
        encoder: SemanticEncoder,
    ) -> None:
        self._tables: tuple[_native.Keys, _native.Memory] | None = None
        wide = any(t.dtype == torch.float64 for t in (index, keys, values, *encoder))
        if _native.available() and index.device.type == "cpu" and not wide:
            self._tables = _native.Keys(index, packed), native_memory(keys, values, projected, encoder)

    def takes(self, hidden: Tensor, queries: Tensor, inputs: Tensor) -> bool:
        """Whether `run` computes what `attend` would: see `_library.direct`."""
        return self._tables is not None and _library.direct(inputs) and _backend.takes_native(hidden, queries, inputs)

    def run(
        self,
        hidden: Tensor,
        queries: Tensor,
        inputs: Tensor,
        k: int,
        bounds: Tensor | None,
        alpha: Tensor | None,
        anchor: Tensor | None,
        blend: Blend,
    ) -> Tensor:
        """The shifted output [M, d]. hidden, inputs [M, d], queries [M, H, c]."""
        assert self._tables is not None
        gate = native_gate(alpha, anchor, blend)
        queries = queries.flatten(1)
        return _native.memory_attention(hidden, queries, inputs, k, bounds, *self._tables, gate, tell=False)[0]


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
    _check.floating("index", index, (None, hidden.shape[1]))
    k = check_retrieval(hidden, "index", index, k, bounds)
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
        hidden, index, k, bounds, packed, queries, inputs, keys, values, projected, encoder, alpha, anchor,
        blend_of(queries, scale, convention, norm),
    )  # fmt: skip
