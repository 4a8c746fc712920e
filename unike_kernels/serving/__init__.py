"""Edits in serving engines: a batch of flat tokens in which each request has its own edits, and plugins of engines."""

from __future__ import annotations

from .bank import EditBank
from .flat import FlatModel, Share
from .folder import EditFolder, Version

__all__ = ["EditBank", "EditFolder", "FlatModel", "Share", "Version"]
