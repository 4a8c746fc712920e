"""The only importer of the compiled extension: its functions on torch tensors, and whether it is there at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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
    """The best instruction set that this CPU and the kernels support: "avx512vnni", "avx512", "avx2" or "baseline".

    Raises:
        RuntimeError: without the compiled extension.
    """
    _require_extension()
    return _C.cpu_isa()


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
    _require_extension()
    x = _table(x, "x")
    out = torch.empty(x.shape, dtype=torch.float32)
    _C.normalize_rows(_rows(x), *x.shape, out.data_ptr(), torch.get_num_threads())
    return out


# The scans of csrc/include/unike/cosine_topk.h, by the dtype of the codes, and the bytes of a code.
_SCANS = {torch.float16: (1, 2), torch.bfloat16: (2, 2), torch.uint8: (3, 1)}
KEY_BOUNDS = 4


def code_width(dtype: torch.dtype, d: int) -> int:
    """The columns of the codes of rows of width d; 0 where there are no such codes (uint8 for d above 65,536)."""
    _require_extension()
    scan, size = _SCANS[dtype]
    return int(_C.code_bytes(scan, d)) // size


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
    _require_extension()
    rows = _table(rows, "rows", (torch.float32,))
    n, d = rows.shape
    scan = _check_codes(codes, bounds, direction, n, d)
    addresses = (direction.data_ptr(), codes.data_ptr(), bounds.data_ptr())
    _C.pack_keys(rows.data_ptr(), n, d, rows.stride(0), scan, *addresses, torch.get_num_threads())


def cosine_topk(
    queries: Tensor,
    keys: Tensor | None,
    k: int,
    ranges: Tensor | None = None,
    packed: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The k keys of highest cosine for each query: score descending, then id ascending.

    Where fewer than k keys are in range, the rest has id -1 and score -inf; so has all of a non-finite query.

    Args:
        queries: float32 or bfloat16 [m, d] on the CPU, d >= 1, any strides.
        keys: float32 [n, d] on the CPU, rows already normalised and finite, any strides; None: `packed` alone decides,
            and scores and ids are those of the scan.
        k: how many keys to return for each query; may exceed n.
        ranges: int64 [m, 2] on the CPU, 0 <= start <= stop <= n: query i sees only the keys start, ..., stop - 1.
        packed: codes and bounds of `pack_keys` for all keys, and the direction: they are scanned instead of the keys.

    Returns:
        scores, float32 [m, k], and ids (rows of `keys`), int64 [m, k].

    Raises:
        ValueError: for another device, dtype or shape, a negative k, or ranges outside the keys.
        RuntimeError: without the compiled extension.
    """
    _require_extension()
    queries = _table(queries, "queries")
    m, d = queries.shape
    if k < 0:
        raise ValueError(f"k must not be negative, got {k}")
    if ranges is not None:
        if ranges.shape != (m, 2) or ranges.dtype != torch.int64 or ranges.device.type != "cpu":
            raise ValueError(f"ranges must be int64 [{m}, 2] on the CPU, got {_describe(ranges)}")
        ranges = ranges.contiguous()
    keys = None if keys is None else _table(keys, "keys", (torch.float32,))
    scores, ids = torch.empty(m, k, dtype=torch.float32), torch.empty(m, k, dtype=torch.int64)
    _C.cosine_topk(
        _keys(keys, packed, d),
        _rows(queries),
        m,
        k,
        _address(ranges),
        scores.data_ptr(),
        ids.data_ptr(),
        torch.get_num_threads(),
    )
    return scores, ids


def _keys(keys: Tensor | None, packed: tuple[Tensor, Tensor, Tensor] | None, d: int) -> tuple[int, ...]:
    """unike_keys of rows, packed or not, or of packed keys alone."""
    if keys is not None and keys.shape[1] != d:
        raise ValueError(f"queries have {d} columns, but keys have {keys.shape[1]}")
    rows = (0, 0) if keys is None else (keys.data_ptr(), keys.stride(0))
    if packed is None:
        if keys is None:
            raise ValueError("keys or packed must be given")
        return (keys.shape[0], d, *rows, 0, 0, 0, 0)
    codes, bounds, direction = packed
    n = codes.shape[0] if keys is None else keys.shape[0]
    scan = _check_codes(codes, bounds, direction, n, d)
    return (n, d, *rows, scan, codes.data_ptr(), bounds.data_ptr(), direction.data_ptr())


def _check_codes(codes: Tensor, bounds: Tensor, direction: Tensor, n: int, d: int) -> int:
    """The number of the scan that reads these codes of n rows of width d."""
    if codes.dtype not in _SCANS:
        raise ValueError(f"codes must be float16, bfloat16 or uint8, got {_describe(codes)}")
    width = code_width(codes.dtype, d)
    if not width:
        raise ValueError(f"rows must have at most 65536 columns for an int8 scan, got {d}")
    for name, t, shape, dtype in (
        ("codes", codes, (n, width), codes.dtype),
        ("bounds", bounds, (n, KEY_BOUNDS), torch.float32),
        ("direction", direction, (d,), torch.float32),
    ):
        if t.shape != shape or t.dtype != dtype or not t.is_contiguous() or t.device.type != "cpu":
            raise ValueError(f"{name} must be contiguous {dtype} {list(shape)} on the CPU, got {_describe(t)}")
    return _SCANS[codes.dtype][0]


def add_extra_neurons(x: Tensor, base: Tensor, pool: Sequence[Tensor | None], activation: int) -> Tensor:
    """`base` plus the extra neurons of each token's edits (csrc/include/unike/patched_ffn.h).

    Args:
        x, base: float32 or bfloat16 [m, d] on the CPU, any strides.
        pool: the tensors of an `EditPool` in order, shapes checked by the caller; keys, up, values and zeta of one
            dtype, float32 or bfloat16, the biases and beta float32.
        activation: index into `ops.ACTIVATIONS`.

    Returns:
        [m, d] in the dtype of base, contiguous.

    Raises:
        ValueError: for another device, dtype or shape, or indices out of range.
        RuntimeError: without the compiled extension.
    """
    _require_extension()
    x, base = _table(x, "x"), _table(base, "base")
    if x.shape != base.shape:
        raise ValueError(f"base must be {_describe(x)}, got {_describe(base)}")
    out = torch.empty(base.shape, dtype=base.dtype)
    _C.add_extra_neurons(
        _rows(x), _rows(base), *x.shape, *_pool(pool), activation, _rows(out), torch.get_num_threads()
    )  # fmt: skip
    return out


def add_extra_neurons_backward(
    grad: Tensor, x: Tensor, pool: Sequence[Tensor | None], activation: int
) -> tuple[Tensor | None, ...]:
    """The gradients of `add_extra_neurons` to x and to keys, key_bias, up, up_bias, values, zeta and beta of the pool.

    Args:
        grad, x: float32 or bfloat16 [m, d] on the CPU, any strides.
        pool, activation: as of `add_extra_neurons`.

    Returns:
        float32, None for what the pool lacks.
    """
    _require_extension()
    grad, x = _table(grad, "grad"), _table(x, "x")
    if x.shape != grad.shape:
        raise ValueError(f"grad must be {_describe(x)}, got {_describe(grad)}")
    outs = [torch.empty(x.shape), *(None if t is None else torch.empty(t.shape) for t in pool[:7])]
    addresses = [_address(t) for t in outs]
    _C.add_extra_neurons_backward(
        _rows(grad), _rows(x), *x.shape, *_pool(pool), activation, addresses, torch.get_num_threads()
    )  # fmt: skip
    return tuple(outs)


def _pool(pool: Sequence[Tensor | None]) -> tuple[tuple[int, int, int], int, list[int]]:
    """Sizes, dtype and addresses of unike_edit_pool."""
    keys, zeta, row_indptr = pool[0], pool[5], pool[8]
    assert keys is not None and zeta is not None and row_indptr is not None
    sizes = (keys.shape[0], zeta.shape[0], row_indptr.shape[0] - 1)
    return sizes, _DTYPES[keys.dtype], [_address(t) for t in pool]


class LatentInputs(NamedTuple):
    """What the latent attention takes (csrc/include/unike/latent_attention.h); shapes are checked by the caller.

    On the CPU. queries [m, heads, width] and inputs [m, d] are float32 or bfloat16, of any strides; keys
    [n, heads, width] and values [n, heads, d], one tensor or two, are both float32 or both bfloat16, and so are the
    encoder's w1 [r, d] and w2 [d, r]; all else that is floating is float32: projected [n, heads, r] or None, b1 [r],
    b2 [d], alpha [1] or [m] or None, anchor [anchors, d] or None, anchors dividing m.
    """

    queries: Tensor
    inputs: Tensor
    keys: Tensor
    values: Tensor
    projected: Tensor | None
    encoder: tuple[Tensor, Tensor, Tensor, Tensor]
    alpha: Tensor | None
    anchor: Tensor | None
    scale: float
    eq7: bool
    match_norm: bool


class _Latent:
    """`LatentInputs` as the core takes them, and the tensors that these addresses belong to."""

    def __init__(self, of: LatentInputs, ids: Tensor | None, k: int) -> None:
        _require_extension()
        inputs = _table(of.inputs, "inputs")
        (m, d), (n, heads, width) = inputs.shape, of.keys.shape
        queries = _table(of.queries.flatten(1) if heads > 1 else of.queries.squeeze(1), "queries")
        encoder = [t.contiguous() for t in of.encoder]
        keys = of.keys.contiguous()
        values = keys if of.values is of.keys else of.values.contiguous()
        projected, alpha, anchor = (None if t is None else t.contiguous() for t in (of.projected, of.alpha, of.anchor))
        ids = None if ids is None else ids.contiguous()
        self.tensors = (inputs, queries, keys, values, projected, *encoder, alpha, anchor, ids)
        self.shape, self.dtype, self.queries_shape = (m, d), inputs.dtype, of.queries.shape
        tables = [_address(t) for t in (keys, values, projected, *encoder)]
        gate = (
            _address(alpha), 0 if alpha is None else alpha.shape[0],
            _address(anchor), 0 if anchor is None else anchor.shape[0],
        )  # fmt: skip
        self.arguments = _C.LatentArguments(
            (m, d, m if ids is None else ids.shape[0], k, n, heads, width, encoder[0].shape[0]),
            _rows(queries),
            _rows(inputs),
            _address(ids),
            tables,
            (_DTYPES[keys.dtype], _DTYPES[encoder[0].dtype]),
            of.scale,
            of.eq7,
            of.match_norm,
            gate,
        )


def latent_attention(of: LatentInputs, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The shifted output and alpha of each token.

    Args:
        of: the inputs.
        ids: int64 [rows, k], rows dividing m; -1: none.

    Returns:
        [m, d] in the dtype of the inputs, and float32 [m], contiguous.

    Raises:
        ValueError: for another device or dtype, or ids out of range.
        RuntimeError: without the compiled extension.
    """
    latent = _Latent(of, ids, ids.shape[1])
    out, gate = torch.empty(latent.shape, dtype=latent.dtype), torch.empty(latent.shape[0])
    _C.latent_attention(latent.arguments, _rows(out), gate.data_ptr(), torch.get_num_threads())
    return out, gate


def latent_attention_backward(
    grad: Tensor, grad_alpha: Tensor, of: LatentInputs, ids: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients of `latent_attention` to queries, inputs, a given alpha and a given anchor, in float32.

    Args:
        grad: float32 or bfloat16 [m, d]; grad_alpha: float32 [m].
        of, ids: as of `latent_attention`.

    Returns:
        [m, heads, width], [m, d], [m] or None, [m, d] or None: the last two of each token.
    """
    latent, grad, grad_alpha = _Latent(of, ids, ids.shape[1]), _table(grad, "grad"), grad_alpha.contiguous()
    m, d = latent.shape
    queries, inputs = torch.empty(latent.queries_shape), torch.empty(m, d)
    given = None if of.alpha is None else torch.empty(m)
    anchor = None if of.anchor is None else torch.empty(m, d)
    addresses = [_address(t) for t in (grad_alpha, queries, inputs, given, anchor)]
    _C.latent_attention_backward(latent.arguments, _rows(grad), *addresses, torch.get_num_threads())
    return queries, inputs, given, anchor


def memory_attention(
    hidden: Tensor,
    index: Tensor,
    k: int,
    ranges: Tensor | None,
    packed: tuple[Tensor, Tensor, Tensor] | None,
    of: LatentInputs,
) -> tuple[Tensor, Tensor, Tensor]:
    """`cosine_topk` of hidden in index, and `latent_attention` with what it found, in one call.

    Returns:
        The shifted output [m, d], alpha float32 [m] and the ids int64 [m, k].
    """
    latent, hidden, index = _Latent(of, None, k), _table(hidden, "hidden"), _table(index, "index", (torch.float32,))
    m, d = latent.shape
    out, gate = torch.empty(m, d, dtype=latent.dtype), torch.empty(m)
    ids = torch.empty(m, k, dtype=torch.int64)
    ranges = None if ranges is None else ranges.contiguous()
    keys = _keys(index, packed, hidden.shape[1])
    addresses = (gate.data_ptr(), ids.data_ptr())
    _C.memory_attention(
        keys, _rows(hidden), _address(ranges), latent.arguments, _rows(out), *addresses, torch.get_num_threads()
    )
    return out, gate, ids


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _require_extension() -> None:
    if _C is None:
        raise RuntimeError(_REASON)


_DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # unike_dtype


def _table(x: Tensor, name: str, dtypes: tuple[torch.dtype, ...] = tuple(_DTYPES)) -> Tensor:
    """Checks that `x` is [N, d >= 1] on the CPU, and makes its rows contiguous (their stride may stay any)."""
    if x.ndim != 2 or x.dtype not in dtypes or x.device.type != "cpu":
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} must be {wanted} [N, d] on the CPU, got {_describe(x)}")
    if x.shape[1] == 0:
        raise ValueError(f"{name} must have at least one column")
    return x if x.stride(1) == 1 else x.contiguous()


def _rows(x: Tensor) -> tuple[int, int, int]:
    """unike_rows of a table."""
    return x.data_ptr(), _DTYPES[x.dtype], x.stride(0)


def _describe(x: Tensor) -> str:
    return f"{x.dtype} {list(x.shape)} on {x.device}"
