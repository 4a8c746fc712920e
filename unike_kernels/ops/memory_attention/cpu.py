"""Retrieval and latent attention in one call of the native core (csrc/include/unike/memory_attention.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _native
from ..cosine_topk.cpu import Keys, checked_ranges
from ..latent_attention.cpu import Gate, Memory, flat_queries, tokens_of
from ..latent_attention.reference import Blend, SemanticEncoder


def attend(
    hidden: Tensor,
    queries: Tensor,
    inputs: Tensor,
    k: int,
    ranges: Tensor | None,
    index: Keys,
    memory: Memory,
    gate: Gate,
    *,
    out: Tensor | None = None,
    details: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`Keys.search` of hidden in index, then `Memory.attend` with what it found, in one call.

    Args:
        hidden: float32 or bfloat16 [m, index.d], any strides.
        queries: float32 or bfloat16 [m, heads * width], any strides.
        inputs: float32 or bfloat16 [m, d], any strides.
        k: entries a token.
        ranges: int64 [m, 2] on the CPU, the entries start, ..., stop - 1 that each token may retrieve; None: all.
        index: the retrieval keys.
        memory: the tables to attend to.
        gate: how far tokens are shifted.
        out: [m, d] in the dtype of the inputs with contiguous rows, written; may be the inputs. None: a new one.
        details: return alpha and the ids; else None for both.

    Returns:
        The shifted output [m, d], alpha float32 [m] and the ids int64 [m, k].
    """
    hidden, queries = _native.table(hidden, "hidden"), _native.table(queries, "queries")
    inputs = _native.table(inputs, "inputs")
    m = inputs.shape[0]
    ranges = checked_ranges(ranges, m)
    if out is None:
        out = _native.allocate(*inputs.shape, dtype=inputs.dtype)
    elif out.shape != inputs.shape or out.dtype != inputs.dtype or out.stride(-1) != 1 or out.device.type != "cpu":
        raise ValueError(f"out must be {_native.describe(inputs)} with contiguous rows, got {_native.describe(out)}")
    alpha, ids = (_native.allocate(m), _native.allocate(m, k, dtype=torch.int64)) if details else (None, None)
    _native.core().memory_attention(
        index.native,
        memory.native,
        _native.rows(hidden),
        _native.address(ranges),
        tokens_of(queries, inputs, None, k, gate),
        _native.rows(out),
        _native.address(alpha),
        _native.address(ids),
        torch.get_num_threads(),
    )
    return out, alpha, ids


def memory_attention(
    hidden: Tensor,
    index: Tensor,
    k: int,
    ranges: Tensor | None,
    queries: Tensor,
    inputs: Tensor,
    keys: Tensor,
    values: Tensor,
    encoder: SemanticEncoder,
    alpha: Tensor | None,
    anchor: Tensor | None,
    blend: Blend,
    packed: tuple[Tensor, Tensor, Tensor] | None = None,
    projected: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `MemoryOperands`."""
    out, opened, ids = attend(
        _native.native_dtype(hidden), flat_queries(queries), _native.native_dtype(inputs), k, ranges,
        Keys(index.float(), packed), Memory(keys, values, projected, encoder), Gate.of(blend, alpha, anchor),
    )  # fmt: skip
    assert opened is not None and ids is not None
    return out.to(inputs.dtype), opened, ids
