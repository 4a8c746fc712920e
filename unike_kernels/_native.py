"""The only importer of the compiled extension: its functions on torch tensors, and whether it is there at all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

try:
    import unike_kernels._C as _C
except ImportError as error:
    _C = None
    _REASON = f"the compiled extension unike_kernels._C cannot be imported: {error}"
else:
    _REASON = ""


def available() -> bool:
    """Whether the compiled extension can be used."""
    return _C is not None


def reason() -> str:
    """Why the compiled extension cannot be used; empty if it can."""
    return _REASON


def isa() -> str:
    """The best instruction set that this CPU and the kernels support: "avx512", "avx2" or "baseline".

    Raises:
        RuntimeError: without the compiled extension.
    """
    _require_extension()
    return _C.cpu_isa()


def normalize_rows(x: Tensor) -> Tensor:
    """Rows divided by their norms in canonical arithmetic (csrc/include/unike/cosine_topk.h).

    A row of zeros stays zero; a row with a NaN or an infinity becomes all NaN.

    Args:
        x: float32 [N, d] on the CPU, d >= 1, any strides.

    Returns:
        float32 [N, d], contiguous.

    Raises:
        ValueError: for another device, dtype or shape.
        RuntimeError: without the compiled extension.
    """
    _require_extension()
    x = _table(x, "x")
    out = torch.empty(x.shape, dtype=torch.float32)
    _C.normalize_rows_f32(x.data_ptr(), *x.shape, x.stride(0), out.data_ptr(), torch.get_num_threads())
    return out


def cosine_topk(queries: Tensor, keys: Tensor, k: int, bounds: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k best keys of each query by canonical dot product: score descending, then id ascending.

    Where fewer than k keys are in range, the rest has id -1 and score -inf; so has all of a non-finite query.

    Args:
        queries: float32 [m, d] on the CPU, d >= 1, rows already normalised, any strides.
        keys: float32 [n, d] on the CPU, rows already normalised and finite, any strides.
        k: how many keys to return for each query; may exceed n.
        bounds: int64 [m, 2] on the CPU, 0 <= start <= stop <= n: query i sees only the keys start, ..., stop - 1.

    Returns:
        scores, float32 [m, k], and ids (rows of `keys`), int64 [m, k].

    Raises:
        ValueError: for another device, dtype or shape, a negative k, or bounds outside the keys.
        RuntimeError: without the compiled extension.
    """
    _require_extension()
    queries, keys = _table(queries, "queries"), _table(keys, "keys")
    (m, d), n = queries.shape, keys.shape[0]
    if keys.shape[1] != d:
        raise ValueError(f"queries have {d} columns, but keys have {keys.shape[1]}")
    if k < 0:
        raise ValueError(f"k must not be negative, got {k}")
    if bounds is not None:
        if bounds.shape != (m, 2) or bounds.dtype != torch.int64 or bounds.device.type != "cpu":
            raise ValueError(f"bounds must be int64 [{m}, 2] on the CPU, got {_describe(bounds)}")
        bounds = bounds.contiguous()
    scores, ids = torch.empty(m, k, dtype=torch.float32), torch.empty(m, k, dtype=torch.int64)
    _C.cosine_topk_f32(
        queries.data_ptr(),
        m,
        queries.stride(0),
        keys.data_ptr(),
        n,
        keys.stride(0),
        d,
        k,
        0 if bounds is None else bounds.data_ptr(),
        scores.data_ptr(),
        ids.data_ptr(),
        torch.get_num_threads(),
    )
    return scores, ids


def add_extra_neurons(x: Tensor, base: Tensor, pool: Sequence[Tensor | None], activation: int) -> Tensor:
    """`base` plus the extra neurons of each token's edits (csrc/include/unike/patched_ffn.h).

    Args:
        x, base: float32 [m, d] on the CPU, any strides.
        pool: the tensors of an `EditPool` in order, float32 or int64, contiguous, shapes checked by the caller.
        activation: index into `ops.ACTIVATIONS`.

    Returns:
        float32 [m, d], contiguous.

    Raises:
        ValueError: for another device, dtype or shape, or indices out of range.
        RuntimeError: without the compiled extension.
    """
    _require_extension()
    x, base = _table(x, "x"), _table(base, "base")
    if x.shape != base.shape:
        raise ValueError(f"base must be {_describe(x)}, got {_describe(base)}")
    keys, zeta, row_indptr = pool[0], pool[5], pool[8]
    assert keys is not None and zeta is not None and row_indptr is not None
    m, d = x.shape
    out = torch.empty(m, d, dtype=torch.float32)
    _C.add_extra_neurons_f32(
        x.data_ptr(),
        x.stride(0),
        base.data_ptr(),
        base.stride(0),
        m,
        d,
        (keys.shape[0], zeta.shape[0], row_indptr.shape[0] - 1),
        [_address(t) for t in pool],
        activation,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def latent_attention(
    queries: Tensor,
    inputs: Tensor,
    keys: Tensor,
    values: Tensor,
    ids: Tensor,
    encoder: Sequence[Tensor],
    alpha: Tensor | None,
    anchor: Tensor | None,
    scale: float,
    *,
    eq7: bool,
    match_norm: bool,
) -> tuple[Tensor, Tensor]:
    """The shifted output and alpha of each token (csrc/include/unike/latent_attention.h).

    Args:
        queries: float32 [m, heads, width].
        inputs: float32 [m, d], any strides.
        keys, values: float32 [n, heads, width] and [n, heads, d]; one tensor may serve as both.
        ids: int64 [rows, k], rows dividing m.
        encoder: w1 [r, d], b1 [r], w2 [d, r], b2 [d], float32.
        alpha: float32 [1] or [m], or None; anchor: float32 [anchors, d], anchors dividing m, or None.
        scale: of the logits.
        eq7, match_norm: the switches of the blend.

    Returns:
        float32 [m, d] and [m], contiguous.

    Raises:
        ValueError: for another device or dtype, or ids out of range; shapes are checked by the caller.
        RuntimeError: without the compiled extension.
    """
    _require_extension()
    inputs = _table(inputs, "inputs")
    queries, keys, values, ids = (t.contiguous() for t in (queries, keys, values, ids))
    encoder = [t.contiguous() for t in encoder]
    alpha, anchor = (None if t is None else t.contiguous() for t in (alpha, anchor))
    (m, d), (n, heads, width) = inputs.shape, keys.shape
    out, gate = torch.empty(m, d, dtype=torch.float32), torch.empty(m, dtype=torch.float32)
    _C.latent_attention_f32(
        queries.data_ptr(),
        inputs.data_ptr(),
        inputs.stride(0),
        m,
        d,
        (n, heads, width),
        keys.data_ptr(),
        values.data_ptr(),
        ids.data_ptr(),
        ids.shape[0],
        ids.shape[1],
        encoder[0].shape[0],
        [t.data_ptr() for t in encoder],
        scale,
        eq7,
        match_norm,
        _address(alpha),
        0 if alpha is None else alpha.shape[0],
        _address(anchor),
        0 if anchor is None else anchor.shape[0],
        out.data_ptr(),
        gate.data_ptr(),
        torch.get_num_threads(),
    )
    return out, gate


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _require_extension() -> None:
    if _C is None:
        raise RuntimeError(_REASON)


def _table(x: Tensor, name: str) -> Tensor:
    """Checks that `x` is float32 [N, d >= 1] on the CPU, and makes its rows contiguous (their stride may stay any)."""
    if x.ndim != 2 or x.dtype != torch.float32 or x.device.type != "cpu":
        raise ValueError(f"{name} must be float32 [N, d] on the CPU, got {_describe(x)}")
    if x.shape[1] == 0:
        raise ValueError(f"{name} must have at least one column")
    return x if x.stride(1) == 1 else x.contiguous()


def _describe(x: Tensor) -> str:
    return f"{x.dtype} {list(x.shape)} on {x.device}"
