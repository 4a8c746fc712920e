"""Edits and memories: values, and values as files."""

from __future__ import annotations

from .edit import Edit, EditLayer, fresh_layer
from .fingerprint import fingerprint
from .memory import MemoryBank, MemoryLayer
from .scope import Scope

__all__ = ["Edit", "EditLayer", "MemoryBank", "MemoryLayer", "Scope", "fingerprint", "fresh_layer"]
