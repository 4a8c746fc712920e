"""The canonical arithmetic of the retrieval once more, in numpy: one addition at a time, in the order that is defined.

The definition in torch (`ops/cosine_topk/reference.py`) and every kernel are compared with this, bit for bit.
"""

from __future__ import annotations

import numpy as np
import torch

LANES = 16


def canonical_sum(products: np.ndarray) -> np.ndarray:
    """float64 [..., d] -> [...]: the sum that unike/cosine_topk.h defines."""
    lanes = np.zeros((*products.shape[:-1], LANES))
    for i in range(products.shape[-1]):
        lanes[..., i % LANES] += products[..., i]
    for width in (8, 4, 2, 1):
        lanes[..., :width] += lanes[..., width : 2 * width]
    return lanes[..., 0]


def normalize_rows(x: torch.Tensor) -> torch.Tensor:
    """Rows of unit length, float32 (float64 stays float64); zeros stay zeros, what is not finite becomes NaN."""
    wide = x.double().numpy()
    finite = np.isfinite(wide).all(-1, keepdims=True)
    norms = np.sqrt(canonical_sum(np.where(finite, wide, 0.0) ** 2))[:, None]
    # A zero row is zero whatever the signs of its zeros.
    unit = np.where(norms > 0, wide / np.where(norms > 0, norms, 1.0), 0.0)
    return torch.from_numpy(np.where(finite, unit, np.nan)).to(result_dtype(x))


def cosine_topk(
    queries: torch.Tensor, rows: torch.Tensor, k: int, bounds: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and ids [M, k] of any queries among rows that `normalize_rows` gave: by score, then by id."""
    dtype = result_dtype(queries)
    scores = torch.full((len(queries), k), -torch.inf, dtype=dtype)
    ids = torch.full((len(queries), k), -1)
    table = rows.double().numpy()
    for m, query in enumerate(normalize_rows(queries).double().numpy()):
        start, stop = (0, len(rows)) if bounds is None else bounds[m].tolist()
        if not np.isfinite(query).all():
            continue
        # + 0.0: a score that rounds to -0 ties with 0.
        exact = torch.from_numpy(canonical_sum(query * table[start:stop])).to(dtype) + 0.0
        best, order = exact.sort(descending=True, stable=True)
        found = min(k, stop - start)
        scores[m, :found], ids[m, :found] = best[:found], start + order[:found]
    return scores, ids


def result_dtype(x: torch.Tensor) -> torch.dtype:
    """Of unit rows and scores."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
