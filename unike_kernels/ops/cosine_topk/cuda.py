"""The exact search on a CUDA device: its calls on torch tensors (csrc/include/unike/cuda.h)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ... import _native
from .. import _backend, _workspace
from .cpu import SCANS
from .reference import SearchOperands, normalize_rows


@functools.cache
def missing() -> str | None:
    """Why the CUDA kernels cannot run on this machine, or None."""
    if not _native.available():
        return _native.reason()
    try:
        count = _native.core().cuda_devices()
    except RuntimeError as error:
        return str(error)
    return _backend.gpu_missing() if count else "the CUDA kernels see no device"


class SearchWorkspace:
    """Memory of a device for searches that come one after another: those of one stream, or one alone in a graph.

    Attributes:
        state: of their launches, zero at first (csrc/include/unike/cuda.h).
    """

    def __init__(self, device: torch.device) -> None:
        self.state = _workspace.counters(device)
        self._device, self._memory = device, torch.empty(0, dtype=torch.uint8, device=device)

    def sized(self, size: int) -> Tensor:
        """At least so many bytes. What it was before it grows goes back to torch, for later work of the stream."""
        before = self._memory.numel()
        if before < size:
            self._memory = self._memory.new_empty(0, dtype=torch.uint8)  # first: the two of them need not fit
            self._memory = self._allocated(_workspace.grown(size, before))
        return self._memory

    def _allocated(self, size: int) -> Tensor:
        def make() -> Tensor:
            return torch.empty(size, dtype=torch.uint8, device=self._device)

        return make() if _workspace.capturing(self._device) else _workspace.kept(self._device, make)


@functools.lru_cache(maxsize=64)
def _of_stream(device: torch.device, stream: int) -> SearchWorkspace:
    _workspace.stock(device)
    return SearchWorkspace(device)


def workspace_of(device: torch.device, stream: int) -> SearchWorkspace:
    """That of a stream, the current one of the device; of the next search alone in a capture."""
    return SearchWorkspace(device) if _workspace.capturing(device) else _of_stream(device, stream)


def search(
    queries: Tensor,
    rows: Tensor | None,
    packed: tuple[Tensor, Tensor, Tensor] | None,
    k: int,
    ranges: Tensor | None = None,
    *,
    values: Tensor | None = None,
    workspace: SearchWorkspace | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`Keys.search` on a CUDA device, in its current stream and without waiting for it (csrc/include/unike/cuda.h).

    Args:
        queries: float32 or bfloat16 [m, d] on the device of everything else.
        rows: float32 [n, d], unit rows; without `packed` they are scanned, and copied if they are not aligned.
            None: `packed` alone decides.
        packed: codes, bounds and direction of `pack_keys`, scanned instead of the rows, int8 codes by up to 8 queries;
            None: the rows are scanned.
        k: keys to return for each query; may exceed n.
        ranges: int64 [m, 2], the keys start, ..., stop - 1 that each query sees; a range outside the keys gives ids -1
            and scores NaN. None: all keys.
        values: [n, ...] contiguous; the rows that belong to the keys found are gathered.
        workspace: None: see `workspace_of`.

    Returns:
        scores, float32 [m, k]; ids, int64 [m, k]; None, or the values [m, k, ...], zeros where there is no key.
    """
    queries = queries if queries.stride(1) == 1 else queries.contiguous()
    if rows is not None:
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        if packed is None and not _aligned(rows):
            rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % 4))[:, : rows.shape[1]]
    (m, d), device = queries.shape, queries.device
    keys = _keys(rows, packed, d)
    scores = torch.empty(m, k, dtype=torch.float32, device=device)
    ids = torch.empty(m, k, dtype=torch.int64, device=device)
    gathered, value_bytes = None, 0
    if values is not None:
        gathered = torch.empty(m, k, *values.shape[1:], dtype=values.dtype, device=device)
        value_bytes = values[0].nbytes if len(values) else 0
    ranges = None if ranges is None else ranges.contiguous()
    size = _native.core().cuda_cosine_topk_workspace(keys, m, k, device.index)
    own = _native.address(values), value_bytes, _native.address(gathered)
    _launch(keys, size, queries, k, ranges, scores, ids, own, workspace)
    return scores, ids, gathered


def _aligned(rows: Tensor) -> bool:
    """Whether rows can be scanned where they are."""
    return rows.stride(0) % 4 == 0 and rows.data_ptr() % 16 == 0


def _keys(rows: Tensor | None, packed: tuple[Tensor, Tensor, Tensor] | None, d: int) -> Any:
    """What the core knows them by; their addresses, and nothing that keeps them."""
    n = len(rows) if rows is not None else len(packed[0])  # type: ignore[index]
    addresses = [_native.address(rows), 0 if rows is None else rows.stride(0), 0, 0, 0, 0]
    if packed is not None:
        addresses[2:] = SCANS[packed[0].dtype][0], *(t.data_ptr() for t in packed)
    return _native.core().Keys(n, d, *addresses)


def _launch(
    keys: Any,
    size: int,
    queries: Tensor,
    k: int,
    ranges: Tensor | None,
    scores: Tensor,
    ids: Tensor,
    values: tuple[int, int, int] = (0, 0, 0),
    workspace: SearchWorkspace | None = None,
) -> None:
    """In the current stream. size: of the workspace; values: their address, the bytes of each, and where they go."""
    device = queries.device
    stream = torch.cuda.current_stream(device).cuda_stream
    workspace = workspace or workspace_of(device, stream)
    memory = workspace.sized(size)
    _native.core().cuda_cosine_topk(
        keys, _native.rows(queries), len(queries), k, _native.address(ranges), scores.data_ptr(), ids.data_ptr(),
        *values, workspace.state.data_ptr(), memory.data_ptr(), memory.numel(), device.index, stream,
    )  # fmt: skip


class Launch:
    """A search of keys that stay where they are, by queries of one form: see `launch_of`."""

    def __init__(self, o: SearchOperands) -> None:
        self._rows, self._packed, self._k = o.keys, o.packed, o.k
        self._tables = o.keys, *(o.packed or ())
        self._addresses: list[int] | None = None

    def __call__(self, queries: Tensor, ranges: Tensor | None, scores: Tensor, ids: Tensor) -> None:
        """Into scores, float32 [m, k], and ids, int64 [m, k]; all are contiguous."""
        addresses = [t.data_ptr() for t in self._tables]
        if addresses != self._addresses:  # at first, and where another memory was set
            m, d = queries.shape
            self._keys = _keys(self._rows, self._packed, d)
            self._size = _native.core().cuda_cosine_topk_workspace(self._keys, m, self._k, queries.device.index)
            self._addresses = addresses
        _launch(self._keys, self._size, queries, self._k, ranges, scores, ids)


def launch_of(o: SearchOperands) -> Launch | None:
    """What is launched for such operands with contiguous rows; None: something has to be copied before.

    It is given queries, ranges, scores and ids.
    """
    native = o.keys.dtype == torch.float32 and o.queries.dtype in (torch.float32, torch.bfloat16)
    scanned = o.packed is not None or _aligned(o.keys)
    return Launch(o) if native and scanned and o.normalized and o.keys.is_contiguous() else None


def refuse(t: Tensor) -> str | None:
    """Why the kernel cannot run on a tensor like this, or None."""
    if t.device.type != "cuda":
        return f"it runs on CUDA devices, the tensors are on {t.device}"
    return "it works in float32, the tensors are float64" if t.dtype == torch.float64 else None


def cosine_topk(
    queries: Tensor,
    keys: Tensor,
    k: int,
    normalized: bool = False,
    ranges: Tensor | None = None,
    packed: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """See `SearchOperands`."""
    rows = keys.float() if normalized else normalize_rows(_native.native_dtype(keys)).float()
    return search(_native.native_dtype(queries), rows, packed, k, ranges)[:2]
