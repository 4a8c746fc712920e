"""Exact batched cosine top-k: the retrieval of UniKE (section 3.2, "retrieve the top-K h_sem")."""

from __future__ import annotations

from .api import (
    SCANS,
    PackedKeys,
    PreparedSearch,
    check_retrieval,
    cosine_topk,
    normalize_rows,
    pack_keys,
    packed_of,
)
from .leading import Leading, leading_of

__all__ = [
    "SCANS",
    "Leading",
    "PackedKeys",
    "PreparedSearch",
    "check_retrieval",
    "cosine_topk",
    "leading_of",
    "normalize_rows",
    "pack_keys",
    "packed_of",
]
