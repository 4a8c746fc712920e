"""Edits and memories: values, and values as files."""

from __future__ import annotations

from .edit import Edit, EditLayer, fresh_layer
from .fingerprint import fingerprint
from .memory import MemoryBank, MemoryLayer

__all__ = ["Edit", "EditLayer", "MemoryBank", "MemoryLayer", "fingerprint", "fresh_layer"]
