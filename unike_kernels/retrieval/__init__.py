"""Indexes that are searched by cosine: exact, exact over several processes, and approximate; all are `Retriever`s."""

from __future__ import annotations

from .approximate import ApproximateIndex
from .exact import CosineIndex
from .index import Index
from .retriever import Retriever

__all__ = ["ApproximateIndex", "CosineIndex", "Index", "Retriever"]
