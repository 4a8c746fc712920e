"""Edits in serving engines: a batch of flat tokens in which each request has its own edits, and plugins of engines."""

from __future__ import annotations

from .bank import EditBank
from .ragged import RaggedRuntime, RequestSlice
from .repository import EditRepository, Version

__all__ = ["EditBank", "EditRepository", "RaggedRuntime", "RequestSlice", "Version"]
