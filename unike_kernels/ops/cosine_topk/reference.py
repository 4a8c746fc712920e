"""Exact cosine top-k in plain torch: the definition.

The score of a pair is one canonical function of its two rows, so that every backend returns the same bits:

* normalise: s = sum of x_i^2 in float64, then float32(x_i / sqrt(s)), so that -0 stays -0; a zero row becomes 0;
* dot: the products of the float32 rows (exact in float64), summed in float64, rounded once to float32.

The order of the float64 sums is fixed: 16 interleaved partial sums (i = j, j + 16, ...), folded in halves. Order of
the results: score descending, then id ascending. float64 inputs stay in float64 throughout (for derivations and
gradient checks).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LANES = 16


class SearchOperands(NamedTuple):
    """What `cosine_topk` is called with, here and in every kernel."""

    queries: Tensor  # [M, d]
    keys: Tensor  # [N, d]
    k: int
    normalized: bool = False  # keys are unit rows already
    ranges: Tensor | None = None  # int64 [M, 2], the keys that each query sees
    packed: tuple[Tensor, Tensor, Tensor] | None = None  # `PackedKeys`, for kernels that scan them

    @property
    def like(self) -> Tensor:
        """Its device and dtype choose the backend."""
        return self.queries


def canonical_dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum of a_i * b_i over the last dimension in the canonical order. a, b: [..., d], broadcast -> float64 [...]."""
    a, b = a.double(), b.double()
    total: Tensor | None = None
    for start in range(0, a.shape[-1], LANES):
        part = a[..., start : start + LANES] * b[..., start : start + LANES]
        part = torch.nn.functional.pad(part, (0, LANES - part.shape[-1]))
        total = part + 0.0 if total is None else total + part
    assert total is not None
    width = LANES
    while width > 1:
        width //= 2
        total = total[..., :width] + total[..., width : 2 * width]
    return total.squeeze(-1)


def normalize_rows(x: Tensor) -> Tensor:
    """Rows scaled to unit length. [N, d] of any float dtype -> float32 [N, d] (float64 stays float64).

    A zero row stays zero; a row with a non-finite value becomes NaN.
    """
    wide = x.double()
    squares = canonical_dot(wide, wide).unsqueeze(-1)
    zero = squares == 0
    norm = _square_root(torch.where(zero, 1.0, squares))
    finite = wide.isfinite().all(-1, keepdim=True)
    unit = torch.where(zero, 0.0, torch.where(finite, wide / norm, float("nan")))
    return unit if x.dtype == torch.float64 else unit.float()


def _square_root(x: Tensor) -> Tensor:
    """Of float64, rounded as IEEE 754 says, which torch's is not on every CPU: there it may be the number beside it."""
    small = x < 2.0**-900  # whose parts below would not be exact
    x = torch.where(small, x * 2.0**200, x)
    root = x.sqrt()
    with torch.no_grad():
        # root^2 as a sum of two numbers, exactly (Dekker); what it lacks to x is a step far below the root's last bit.
        r = root.detach()
        split = (2**27 + 1.0) * r
        high = split - (split - r)
        low = r - high
        square = r * r
        rest = x.detach() - square - (high * high - square + 2 * high * low + low * low)
        step = torch.where(x.isfinite(), rest / (2 * r), 0.0)
    rounded = root + step
    return torch.where(small, rounded * 2.0**-100, rounded)


def _check_ranges(ranges: Tensor, n: int) -> None:
    start, stop = ranges.unbind(-1)
    bad = ((start < 0) | (start > stop) | (stop > n)).nonzero()
    if len(bad):
        row = int(bad[0])
        raise ValueError(f"ranges: expected 0 <= start <= stop <= n = {n}, row {row} is {ranges[row].tolist()}")


def cosine_topk(
    queries: Tensor,
    keys: Tensor,
    k: int,
    normalized: bool = False,
    ranges: Tensor | None = None,
    packed: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The k keys of highest cosine for each query: scores [M, k] and ids int64 [M, k]; see `SearchOperands`."""
    q = normalize_rows(queries)
    keys = keys.to(q.dtype)
    keys = keys if normalized else normalize_rows(keys)
    m, n = q.shape[0], keys.shape[0]
    if ranges is not None and ranges.device.type == "cpu":  # elsewhere one would have to wait; they are clipped
        _check_ranges(ranges, n)
    with torch.no_grad():
        scores = canonical_dot(q.unsqueeze(1), keys.unsqueeze(0)).to(q.dtype) + 0.0
        position = torch.arange(n, dtype=torch.int64, device=q.device)
        allowed = q.isfinite().all(-1, keepdim=True).expand(m, n)
        if ranges is not None:
            allowed = allowed & (position >= ranges[:, :1]) & (position < ranges[:, 1:])
        scores = torch.where(allowed, scores, float("-inf"))
        best, ids = scores.sort(dim=-1, descending=True, stable=True)
        best, ids = best[:, :k], ids[:, :k]
        ids = torch.where(best == float("-inf"), -1, ids)
        ids = torch.nn.functional.pad(ids, (0, k - ids.shape[1]), value=-1)
    return scores_of(queries, keys, ids, True), ids


def scores_of(queries: Tensor, keys: Tensor, ids: Tensor, normalized: bool) -> Tensor:
    """The scores [M, k] of keys that a search has found: the same bits, with all derivatives.

    Args:
        queries: [M, d].
        keys: [N, d].
        ids: int64 [M, k], -1: none.
        normalized: the keys are unit rows already.
    """
    found = ids >= 0
    # What a query that found nothing holds reaches no gradient.
    q = normalize_rows(torch.where(found.any(-1, keepdim=True), queries, 0.0))
    if len(keys) == 0:
        return torch.full_like(ids, float("-inf"), dtype=q.dtype)
    chosen = keys[ids.clamp(min=0)].to(q.dtype)
    chosen = chosen if normalized else normalize_rows(chosen)
    return torch.where(found, canonical_dot(q.unsqueeze(1), chosen).to(q.dtype) + 0.0, float("-inf"))


def cosine_topk_backward(
    grad: Tensor, queries: Tensor, keys: Tensor, ids: Tensor, normalized: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the scores [M, k] to the queries [M, d] and keys [N, d]; ids have none.

    With u = x / |x|: d cos(q, k) / dq = (u_k - cos * u_q) / |q|. A query that found nothing has no gradient.

    Args:
        grad: [M, k], of the scores.
        queries: [M, d].
        keys: [N, d].
        ids: int64 [M, k], what the search found, -1: none.
        normalized: the keys are unit rows already.
    """
    if len(keys) == 0:
        return torch.zeros_like(queries), torch.zeros_like(keys)
    wide = torch.promote_types(queries.dtype, torch.float32)
    found = ids >= 0
    q, table = torch.where(found.any(-1, keepdim=True), queries.to(wide), 0.0), keys.to(wide)
    chosen = table[ids.clamp(min=0)]
    grad = torch.where(found, grad.to(wide), 0.0).unsqueeze(-1)

    def unit(x: Tensor) -> tuple[Tensor, Tensor]:
        norm = x.norm(dim=-1, keepdim=True)
        inverse = torch.where(norm > 0, 1 / norm, 0.0)
        return x * inverse, inverse

    u_q, inverse_q = unit(q)
    u_k, inverse_k = (chosen, torch.ones_like(chosen[..., :1])) if normalized else unit(chosen)
    u_q = u_q.unsqueeze(1)
    cosine = (u_q * u_k).sum(-1, keepdim=True)
    grad_q = (grad * (u_k - cosine * u_q)).sum(1) * inverse_q
    per_key = grad * (u_q if normalized else (u_q - cosine * u_k) * inverse_k)
    grad_k = torch.zeros_like(table).index_add(0, ids.clamp(min=0).flatten(), per_key.flatten(0, 1))
    return grad_q.to(queries.dtype), grad_k.to(keys.dtype)
