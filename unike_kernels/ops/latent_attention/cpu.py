"""The latent attention by the native core: its calls on torch tensors (csrc/include/unike/latent_attention.h)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _native
from .reference import Blend, SemanticEncoder


def _one_dtype(*tables: Tensor) -> list[Tensor]:
    """All bfloat16 as they are, anything else as float32."""
    narrow = all(t.dtype == torch.bfloat16 for t in tables)
    return [t if narrow or t.dtype == torch.float32 else t.float() for t in tables]


class Gate(NamedTuple):
    """How far and to what tokens are shifted (unike_blend)."""

    scale: float
    eq7: bool
    match_norm: bool
    alpha: Tensor | None = None  # float32 [1] or [m], contiguous
    anchor: Tensor | None = None  # float32 [anchors, d], contiguous, anchors dividing m

    @classmethod
    def of(cls, blend: Blend, alpha: Tensor | None, anchor: Tensor | None) -> Gate:
        """From the operands of an operator."""
        alpha, anchor = (None if t is None else _native.aligned(t.float()) for t in (alpha, anchor))
        return cls(blend.scale, blend.convention == "eq7", blend.norm == "match", alpha, anchor)


class Memory:
    """The tables of a memory, checked and laid out once (unike_memory, unike_semantic_encoder); keeps them alive."""

    def __init__(self, keys: Tensor, values: Tensor, projected: Tensor | None, encoder: SemanticEncoder) -> None:
        """Lay out the tables. Shapes are checked by the caller, here and below.

        Args:
            keys: [n, heads, width] on the CPU, any float dtype but float64.
            values: [n, heads, d], likewise; may be the same tensor as the keys.
            projected: [n, heads, r], the values multiplied by w1, or None.
            encoder: Enc_sem.

        Raises:
            RuntimeError: without the compiled extension.
        """
        n, heads, width = keys.shape
        wide_keys, wide_values = _one_dtype(keys, values)
        w1, w2 = _one_dtype(encoder.w1, encoder.w2)
        wide_keys = _native.aligned(wide_keys)
        tables = (
            wide_keys, wide_keys if values is keys else wide_values, None if projected is None else projected.float(),
            w1, encoder.b1.float(), w2, encoder.b2.float(),
        )  # fmt: skip
        self.tensors = tuple(None if t is None else _native.aligned(t) for t in tables)
        self.anchor = _native.Anchor(self.tensors[0])
        sizes, dtypes = (n, heads, width, w1.shape[0]), (_native.DTYPES[wide_keys.dtype], _native.DTYPES[w1.dtype])
        self.native = _native.core().Memory(sizes, dtypes, [_native.address(t) for t in self.tensors])

    def attend(self, queries: Tensor, inputs: Tensor, ids: Tensor, gate: Gate) -> tuple[Tensor, Tensor]:
        """The shifted output and alpha of each token.

        Args:
            queries: float32 or bfloat16 [m, heads * width], any strides.
            inputs: float32 or bfloat16 [m, d], any strides.
            ids: int64 [rows, k], rows dividing m; -1: none.
            gate: see there.

        Returns:
            [m, d] in the dtype of the inputs, and float32 [m], contiguous.

        Raises:
            ValueError: for another device or dtype, or ids out of range.
        """
        queries, inputs, ids = _native.table(queries, "queries"), _native.table(inputs, "inputs"), _native.aligned(ids)
        out, alpha = _native.allocate(*inputs.shape, dtype=inputs.dtype), _native.allocate(inputs.shape[0])
        tokens = tokens_of(queries, inputs, ids, ids.shape[1], gate)
        _native.core().latent_attention(
            self.native, tokens, _native.rows(out), alpha.data_ptr(), torch.get_num_threads()
        )  # fmt: skip
        return out, alpha

    def gradients(
        self, grad: Tensor, grad_alpha: Tensor, queries: Tensor, inputs: Tensor, ids: Tensor, gate: Gate
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The gradients of `attend` with respect to queries, inputs, a given alpha and a given anchor, in float32.

        Args:
            grad: float32 or bfloat16 [m, d], of the output.
            grad_alpha: float32 [m], of alpha.
            queries: [m, heads * width], of the `attend` call.
            inputs: [m, d], of the same call.
            ids: int64 [rows, k], of the same call.
            gate: of the same call.

        Returns:
            [m, heads * width], [m, d], [m] or None, [m, d] or None; the last two hold a gradient for each token.
        """
        queries, inputs, ids = _native.table(queries, "queries"), _native.table(inputs, "inputs"), _native.aligned(ids)
        grad, grad_alpha = _native.table(grad, "grad"), _native.aligned(grad_alpha)
        m = inputs.shape[0]
        to_queries, to_inputs = _native.allocate(*queries.shape), _native.allocate(*inputs.shape)
        given = None if gate.alpha is None else _native.allocate(m)
        anchor = None if gate.anchor is None else _native.allocate(*inputs.shape)
        addresses = [_native.address(t) for t in (grad_alpha, to_queries, to_inputs, given, anchor)]
        tokens = tokens_of(queries, inputs, ids, ids.shape[1], gate)
        _native.core().latent_attention_backward(
            self.native, tokens, _native.rows(grad), *addresses, torch.get_num_threads()
        )
        return to_queries, to_inputs, given, anchor


def tokens_of(queries: Tensor, inputs: Tensor, ids: Tensor | None, k: int, gate: Gate) -> Any:
    """The tokens of a call as the core takes them; the caller keeps the tensors."""
    m, d = inputs.shape
    return _native.core().Tokens(
        m,
        d,
        _native.rows(queries),
        _native.rows(inputs),
        (0, m, k) if ids is None else (ids.data_ptr(), ids.shape[0], k),
        gate.scale,
        gate.eq7,
        gate.match_norm,
        (*_counted(gate.alpha), *_counted(gate.anchor)),
    )


def _counted(t: Tensor | None) -> tuple[int, int]:
    return (0, 0) if t is None else (t.data_ptr(), t.shape[0])


def flat_queries(queries: Tensor) -> Tensor:
    """[M, H, c] -> [M, H * c] of a native dtype."""
    return _native.native_dtype(queries).flatten(1)


def latent_attention(
    queries: Tensor,
    inputs: Tensor,
    keys: Tensor,
    values: Tensor,
    ids: Tensor,
    encoder: SemanticEncoder,
    alpha: Tensor | None,
    anchor: Tensor | None,
    blend: Blend,
    projected: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `LatentOperands`."""
    memory, gate = Memory(keys, values, projected, encoder), Gate.of(blend, alpha, anchor)
    out, opened = memory.attend(flat_queries(queries), _native.native_dtype(inputs), ids, gate)
    return out.to(inputs.dtype), opened


def latent_attention_backward(
    grad: Tensor,
    grad_alpha: Tensor,
    queries: Tensor,
    inputs: Tensor,
    keys: Tensor,
    values: Tensor,
    ids: Tensor,
    encoder: SemanticEncoder,
    alpha: Tensor | None,
    anchor: Tensor | None,
    blend: Blend,
    projected: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """See `LatentBackwardOperands`."""
    memory, gate = Memory(keys, values, projected, encoder), Gate.of(blend, alpha, anchor)
    to_queries, to_inputs, given, per_token = memory.gradients(
        _native.native_dtype(grad), grad_alpha.float(), flat_queries(queries), _native.native_dtype(inputs), ids, gate
    )
    if given is not None and alpha is not None:
        given = (given.sum().reshape(1) if alpha.numel() == 1 else given).to(alpha.dtype)
    to_anchor = None
    if per_token is not None and anchor is not None:
        rows, d = anchor.shape
        to_anchor = per_token.reshape(rows, len(per_token) // max(rows, 1), d).sum(1).to(anchor.dtype)
    return to_queries.reshape(queries.shape).to(queries.dtype), to_inputs.to(inputs.dtype), given, to_anchor
