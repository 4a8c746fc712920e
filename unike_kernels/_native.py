"""The only importer of the compiled extension: its functions on torch tensors, and whether it is there at all."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .ops import _pages

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
    """The best instruction set that this CPU and the kernels support: "avx512bf16", "avx512vnni", "avx512",
    "avx2" or "baseline".

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
    out = _pages.empty(*x.shape, dtype=torch.float32)
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


class Keys:
    """The keys of a search, checked and laid out once (unike_keys); keeps the tensors alive."""

    def __init__(self, rows: Tensor | None, packed: tuple[Tensor, Tensor, Tensor] | None) -> None:
        """
        Args:
            rows: float32 [n, d] on the CPU, normalised and finite, any strides; None: `packed` alone decides, and
                scores and ids are those of the scan.
            packed: codes and bounds of `pack_keys` for all rows, and the direction; scanned instead of the rows.

        Raises:
            ValueError: for another device, dtype or shape.
            RuntimeError: without the compiled extension.
        """
        _require_extension()
        rows = None if rows is None else _table(rows, "keys", (torch.float32,))
        if rows is not None:
            self.n, self.d = rows.shape
        elif packed is not None:
            self.n, self.d = packed[0].shape[0], packed[2].shape[0]
        else:
            raise ValueError("keys or packed must be given")
        self.tensors = (rows, packed)
        addresses = [0 if rows is None else rows.data_ptr(), 0 if rows is None else rows.stride(0), 0, 0, 0, 0]
        if packed is not None:
            codes, bounds, direction = packed
            scan = _check_codes(codes, bounds, direction, self.n, self.d)
            addresses[2:] = scan, codes.data_ptr(), bounds.data_ptr(), direction.data_ptr()
        self.native = _C.Keys(self.n, self.d, *addresses)


def cosine_topk(queries: Tensor, keys: Keys, k: int, ranges: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k keys of highest cosine for each query: score descending, then id ascending.

    Where fewer than k keys are in range, the rest has id -1 and score -inf; so has all of a non-finite query.

    A signal's handler runs within a fraction of a second, however long the search takes: it comes in parts.

    Args:
        queries: float32 or bfloat16 [m, d] on the CPU, d >= 1, any strides.
        keys: the keys.
        k: how many keys to return for each query; may exceed n.
        ranges: int64 [m, 2] on the CPU, 0 <= start <= stop <= n: query i sees only the keys start, ..., stop - 1.

    Returns:
        scores, float32 [m, k], and ids (rows of `keys`), int64 [m, k].

    Raises:
        ValueError: for another device, dtype or shape, a negative k, or ranges outside the keys.
    """
    queries = _table(queries, "queries")
    m, d = queries.shape
    if d != keys.d:
        raise ValueError(f"queries have {d} columns, but keys have {keys.d}")
    if k < 0:
        raise ValueError(f"k must not be negative, got {k}")
    ranges = _ranges(ranges, m)
    threads = torch.get_num_threads()
    work = _PART_OF_A_SEARCH * threads
    keys_and_best = keys.n + 32 * min(k, keys.n)  # scoring one for good costs about as much as 32 estimates
    block = max(_QUERIES_OF_A_THREAD * threads, work // max(keys_and_best * d, 1))
    span = max(work // (min(block, max(m, 1)) * d), 1)
    scores, ids = torch.empty(m, k, dtype=torch.float32), torch.empty(m, k, dtype=torch.int64)
    for first in range(0, m, block):
        some = slice(first, first + block)
        own = None if ranges is None else ranges[some]
        if keys.n <= span:
            _search(queries[some], keys, k, own, scores[some], ids[some])
        else:
            scores[some], ids[some] = _by_spans(queries[some], keys, k, own, span)
    return scores, ids


# Multiply-adds of a thread in one call of the core, which nothing interrupts: about a tenth of a second.
_PART_OF_A_SEARCH = 1 << 29
_QUERIES_OF_A_THREAD = 8  # with fewer, keys come from memory more slowly than they are scored


def _search(queries: Tensor, keys: Keys, k: int, ranges: Tensor | None, scores: Tensor, ids: Tensor) -> None:
    addresses = (_address(ranges), scores.data_ptr(), ids.data_ptr())
    _C.cosine_topk(keys.native, _rows(queries), len(queries), k, *addresses, torch.get_num_threads())


def _by_spans(queries: Tensor, keys: Keys, k: int, ranges: Tensor | None, span: int) -> tuple[Tensor, Tensor]:
    """A search of so many keys at a time. Scores are canonical, so it does not matter where they were computed."""
    m = len(queries)
    whole = torch.tensor([[0, keys.n]], dtype=torch.int64, device="cpu").expand(m, 2) if ranges is None else ranges
    if bool((whole[:, 0] < 0).any() or (whole[:, 0] > whole[:, 1]).any() or (whole[:, 1] > keys.n).any()):
        raise ValueError("the bounds of each query must satisfy 0 <= start <= stop <= n")
    best = torch.empty(m, 0, dtype=torch.float32, device="cpu")
    numbers = torch.empty(m, 0, dtype=torch.int64, device="cpu")
    for start in range(0, keys.n, span):
        scores, ids = torch.empty(m, k, dtype=torch.float32), torch.empty(m, k, dtype=torch.int64)
        _search(queries, keys, k, whole.clamp(start, start + span).contiguous(), scores, ids)
        best, numbers = torch.cat([best, scores], 1), torch.cat([numbers, ids], 1)
        # Ids ascend from span to span and among equal scores: a stable sort keeps that.
        order = best.argsort(dim=1, descending=True, stable=True)[:, :k]
        best, numbers = best.gather(1, order), numbers.gather(1, order)
    return best, numbers


@functools.cache
def cuda_missing() -> str | None:
    """Why the CUDA kernels cannot run on this machine, or None."""
    if _C is None:
        return _REASON
    try:
        count = _C.cuda_devices()
    except RuntimeError as error:
        return str(error)
    return None if count and torch.cuda.is_available() else "torch sees no CUDA device"


class CudaWorkspace:
    """Memory of a device for searches that come one after another: those of one stream."""

    _STATE = 64  # bytes, UNIKE_CUDA_STATE_BYTES: zero at first

    def __init__(self, device: torch.device) -> None:
        self._memory = [torch.zeros(self._STATE, dtype=torch.uint8, device=device)]

    def sized(self, size: int) -> Tensor:
        """At least so many bytes."""
        if self._memory[-1].numel() < size:
            # The earlier ones stay: a captured graph may use them.
            self._memory.append(torch.zeros(size, dtype=torch.uint8, device=self._memory[0].device))
        return self._memory[-1]


@functools.lru_cache(maxsize=64)
def cuda_workspace(device: torch.device, stream: int) -> CudaWorkspace:
    """That of a stream."""
    return CudaWorkspace(device)


def cuda_cosine_topk(
    queries: Tensor,
    rows: Tensor | None,
    packed: tuple[Tensor, Tensor, Tensor] | None,
    k: int,
    ranges: Tensor | None = None,
    *,
    values: Tensor | None = None,
    workspace: CudaWorkspace | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`cosine_topk` on a CUDA device, in its current stream and without waiting for it (csrc/include/unike/cuda.h).

    Args:
        queries: float32 or bfloat16 [m, d] on the device of everything else.
        rows, packed: as `Keys` takes them. Without `packed` the rows are scanned, and copied if they are not aligned.
        k: how many.
        ranges: as of `cosine_topk`; one outside the keys gives ids -1 and scores NaN.
        values: [n, ...] contiguous; their rows of the keys that are found are gathered.
        workspace: None: that of the current stream.

    Returns:
        scores, float32 [m, k]; ids, int64 [m, k]; None, or the values [m, k, ...], zeros where there is no key.
    """
    _require_extension()
    queries = queries if queries.stride(1) == 1 else queries.contiguous()
    if rows is not None:
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        if packed is None and (rows.stride(0) % 4 or rows.data_ptr() % 16):
            rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % 4))[:, : rows.shape[1]]
    (m, d), device = queries.shape, queries.device
    codes = packed[0] if packed is not None else None
    n = len(rows) if rows is not None else len(codes)  # type: ignore[arg-type]
    addresses = [_address(rows), 0 if rows is None else rows.stride(0), 0, 0, 0, 0]
    if packed is not None:
        addresses[2:] = _SCANS[packed[0].dtype][0], *(t.data_ptr() for t in packed)
    keys = _C.Keys(n, d, *addresses)
    scores = torch.empty(m, k, dtype=torch.float32, device=device)
    ids = torch.empty(m, k, dtype=torch.int64, device=device)
    gathered, value_bytes = None, 0
    if values is not None:
        gathered = torch.empty(m, k, *values.shape[1:], dtype=values.dtype, device=device)
        value_bytes = values[0].nbytes if len(values) else 0
    ranges = None if ranges is None else ranges.contiguous()
    stream = torch.cuda.current_stream(device).cuda_stream
    workspace = workspace or cuda_workspace(device, stream)
    memory = workspace.sized(_C.cuda_cosine_topk_workspace(keys, m, k, device.index))
    _C.cuda_cosine_topk(
        keys, _rows(queries), m, k, _address(ranges), scores.data_ptr(), ids.data_ptr(), _address(values), value_bytes,
        _address(gathered), memory.data_ptr(), memory.numel(), device.index, stream,
    )  # fmt: skip
    return scores, ids, gathered


def _ranges(ranges: Tensor | None, m: int) -> Tensor | None:
    if ranges is None:
        return None
    if ranges.shape != (m, 2) or ranges.dtype != torch.int64 or ranges.device.type != "cpu":
        raise ValueError(f"ranges must be int64 [{m}, 2] on the CPU, got {_describe(ranges)}")
    return ranges.contiguous()


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


class Pool:
    """The extra neurons of a layer, checked and laid out once (unike_edit_pool); keeps the tensors alive."""

    def __init__(self, pool: Sequence[Tensor | None]) -> None:
        """
        Args:
            pool: the tensors of an `EditPool` in order, shapes checked by the caller; keys, up, values and zeta of one
                dtype, float32 or bfloat16, the biases and beta float32; contiguous, on the CPU.

        Raises:
            RuntimeError: without the compiled extension.
        """
        _require_extension()
        pool = [None if t is None else t.resolve_neg() for t in pool]
        keys, zeta, row_indptr = pool[0], pool[5], pool[8]
        assert keys is not None and zeta is not None and row_indptr is not None
        self.tensors = tuple(pool)
        sizes = (keys.shape[0], zeta.shape[0], row_indptr.shape[0] - 1)
        self.native = _C.Pool(sizes, _DTYPES[keys.dtype], [_address(t) for t in pool])


def add_extra_neurons(x: Tensor, base: Tensor, pool: Pool, activation: int) -> Tensor:
    """`base` plus the extra neurons of each token's edits (csrc/include/unike/patched_ffn.h).

    Args:
        x, base: float32 or bfloat16 [m, d] on the CPU, any strides.
        pool: the neurons.
        activation: index into `ops.ACTIVATIONS`.

    Returns:
        [m, d] in the dtype of base, contiguous.

    Raises:
        ValueError: for another device, dtype or shape, or indices out of range.
    """
    x, base = _table(x, "x"), _table(base, "base")
    if x.shape != base.shape:
        raise ValueError(f"base must be {_describe(x)}, got {_describe(base)}")
    out = torch.empty_like(base, memory_format=torch.contiguous_format)
    _C.add_extra_neurons(
        _rows(x), _rows(base), *x.shape, pool.native, activation, _rows(out), torch.get_num_threads()
    )  # fmt: skip
    return out


def add_extra_neurons_backward(grad: Tensor, x: Tensor, pool: Pool, activation: int) -> tuple[Tensor | None, ...]:
    """The gradients of `add_extra_neurons` to x and to keys, key_bias, up, up_bias, values, zeta and beta of the pool.

    Args:
        grad, x: float32 or bfloat16 [m, d] on the CPU, any strides.
        pool, activation: as of `add_extra_neurons`.

    Returns:
        float32, None for what the pool lacks.
    """
    grad, x = _table(grad, "grad"), _table(x, "x")
    if x.shape != grad.shape:
        raise ValueError(f"grad must be {_describe(x)}, got {_describe(grad)}")
    outs = [torch.empty(x.shape), *(None if t is None else torch.empty(t.shape) for t in pool.tensors[:7])]
    addresses = [_address(t) for t in outs]
    _C.add_extra_neurons_backward(
        _rows(grad), _rows(x), *x.shape, pool.native, activation, addresses, torch.get_num_threads()
    )  # fmt: skip
    return tuple(outs)


class Memory:
    """The tables of a memory, checked and laid out once (unike_memory, unike_semantic_encoder); keeps them alive."""

    def __init__(
        self, keys: Tensor, values: Tensor, projected: Tensor | None, encoder: tuple[Tensor, Tensor, Tensor, Tensor]
    ) -> None:
        """
        Args:
            keys, values: [n, heads, width] and [n, heads, d] on the CPU, one tensor or two, both float32 or both
                bfloat16; shapes checked by the caller, here and below.
            projected: float32 [n, heads, r], the values by w1, or None.
            encoder: w1 [r, d] and w2 [d, r], both float32 or both bfloat16, and float32 b1 [r], b2 [d]; in the order
                w1, b1, w2, b2.

        Raises:
            RuntimeError: without the compiled extension.
        """
        _require_extension()
        n, heads, width = keys.shape
        wide = keys.resolve_neg().contiguous()
        self.tensors = tuple(
            None if t is None else t.resolve_neg().contiguous()
            for t in (wide, wide if values is keys else values, projected, *encoder)
        )
        w1 = encoder[0]
        sizes, dtypes = (n, heads, width, w1.shape[0]), (_DTYPES[keys.dtype], _DTYPES[w1.dtype])
        self.native = _C.Memory(sizes, dtypes, [_address(t) for t in self.tensors])


class Gate(NamedTuple):
    """How far and to what tokens are shifted (unike_blend)."""

    scale: float
    eq7: bool
    match_norm: bool
    alpha: Tensor | None = None  # float32 [1] or [m], contiguous
    anchor: Tensor | None = None  # float32 [anchors, d], contiguous, anchors dividing m


def _tokens(queries: Tensor, inputs: Tensor, ids: Tensor | None, k: int, gate: Gate) -> Any:
    """The tokens of a call as the core takes them; the caller keeps the tensors."""
    m, d = inputs.shape
    return _C.Tokens(
        m,
        d,
        _rows(queries),
        _rows(inputs),
        (0, m, k) if ids is None else (ids.data_ptr(), ids.shape[0], k),
        gate.scale,
        gate.eq7,
        gate.match_norm,
        (*_counted(gate.alpha), *_counted(gate.anchor)),
    )


def _counted(t: Tensor | None) -> tuple[int, int]:
    return (0, 0) if t is None else (t.data_ptr(), t.shape[0])


def latent_attention(queries: Tensor, inputs: Tensor, ids: Tensor, memory: Memory, gate: Gate) -> tuple[Tensor, Tensor]:
    """The shifted output and alpha of each token (csrc/include/unike/latent_attention.h).

    Args:
        queries: float32 or bfloat16 [m, heads * width], any strides.
        inputs: float32 or bfloat16 [m, d], any strides.
        ids: int64 [rows, k], rows dividing m; -1: none.
        memory, gate: see there.

    Returns:
        [m, d] in the dtype of the inputs, and float32 [m], contiguous.

    Raises:
        ValueError: for another device or dtype, or ids out of range.
    """
    queries, inputs, ids = _table(queries, "queries"), _table(inputs, "inputs"), ids.contiguous()
    out, alpha = torch.empty(inputs.shape, dtype=inputs.dtype), torch.empty(inputs.shape[0])
    tokens = _tokens(queries, inputs, ids, ids.shape[1], gate)
    _C.latent_attention(memory.native, tokens, _rows(out), alpha.data_ptr(), torch.get_num_threads())
    return out, alpha


def latent_attention_backward(
    grad: Tensor, grad_alpha: Tensor, queries: Tensor, inputs: Tensor, ids: Tensor, memory: Memory, gate: Gate
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients of `latent_attention` to queries, inputs, a given alpha and a given anchor, in float32.

    Args:
        grad: float32 or bfloat16 [m, d]; grad_alpha: float32 [m].
        queries, inputs, ids, memory, gate: as of `latent_attention`.

    Returns:
        [m, heads * width], [m, d], [m] or None, [m, d] or None: the last two of each token.
    """
    queries, inputs, ids = _table(queries, "queries"), _table(inputs, "inputs"), ids.contiguous()
    grad, grad_alpha = _table(grad, "grad"), grad_alpha.contiguous()
    m = inputs.shape[0]
    to_queries, to_inputs = torch.empty(queries.shape), torch.empty(inputs.shape)
    given = None if gate.alpha is None else torch.empty(m)
    anchor = None if gate.anchor is None else torch.empty(inputs.shape)
    addresses = [_address(t) for t in (grad_alpha, to_queries, to_inputs, given, anchor)]
    tokens = _tokens(queries, inputs, ids, ids.shape[1], gate)
    _C.latent_attention_backward(memory.native, tokens, _rows(grad), *addresses, torch.get_num_threads())
    return to_queries, to_inputs, given, anchor


def memory_attention(
    hidden: Tensor,
    queries: Tensor,
    inputs: Tensor,
    k: int,
    ranges: Tensor | None,
    index: Keys,
    memory: Memory,
    gate: Gate,
    *,
    tell: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`cosine_topk` of hidden in index, then `latent_attention` with what it found, in one call.

    Args:
        hidden: float32 or bfloat16 [m, index.d], any strides.
        queries, inputs, memory, gate: as of `latent_attention`; k, ranges: as of `cosine_topk`.
        tell: return alpha and the ids; else None for both.

    Returns:
        The shifted output [m, d], alpha float32 [m] and the ids int64 [m, k].
    """
    hidden, queries, inputs = _table(hidden, "hidden"), _table(queries, "queries"), _table(inputs, "inputs")
    m = inputs.shape[0]
    ranges = _ranges(ranges, m)
    out = torch.empty(inputs.shape, dtype=inputs.dtype)
    alpha, ids = (torch.empty(m), torch.empty(m, k, dtype=torch.int64)) if tell else (None, None)
    _C.memory_attention(
        index.native,
        memory.native,
        _rows(hidden),
        _address(ranges),
        _tokens(queries, inputs, None, k, gate),
        _rows(out),
        _address(alpha),
        _address(ids),
        torch.get_num_threads(),
    )
    return out, alpha, ids


def read(*tables: Tensor) -> None:
    """Read these tensors from end to end with all threads: what any kernel that needs them takes at least.

    Args:
        tables: on the CPU, contiguous.
    """
    _require_extension()
    for t in tables:
        if t.device.type != "cpu" or not t.is_contiguous():
            raise ValueError(f"tables must be contiguous and on the CPU, got {_describe(t)}")
        _C.read(t.data_ptr(), t.nbytes, torch.get_num_threads())


def multiply_add(dtype: torch.dtype, rounds: int) -> float:
    """Multiply-adds of registers on all threads, `rounds` times some instructions each; returns how many that were.

    Args:
        dtype: of the keys, as a scan reads them: float32, float16, bfloat16 or int8.
    """
    _require_extension()
    scan = [torch.float32, torch.float16, torch.bfloat16, torch.int8].index(dtype)  # unike_scan
    return float(_C.multiply_add(scan, rounds, torch.get_num_threads()))


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
    x = x.resolve_neg()  # what torch has put off is not in memory
    return x if x.stride(1) == 1 else x.contiguous()


def _rows(x: Tensor) -> tuple[int, int, int]:
    """unike_rows of a table."""
    return x.data_ptr(), _DTYPES[x.dtype], x.stride(0)


def _describe(x: Tensor) -> str:
    return f"{x.dtype} {list(x.shape)} on {x.device}"
