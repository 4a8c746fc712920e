"""Indexes that are searched by cosine: exact, exact over several devices, and approximate."""

from __future__ import annotations

from .approximate import ApproximateIndex
from .exact import CosineIndex

__all__ = ["ApproximateIndex", "CosineIndex"]
