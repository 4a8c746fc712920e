"""Edits in serving engines: a batch of flat tokens in which each request has its own edits, and plugins of engines."""

from __future__ import annotations

from .flat import FlatModel, Share
from .folder import EditFolder, Version

__all__ = ["EditFolder", "FlatModel", "Share", "Version"]
