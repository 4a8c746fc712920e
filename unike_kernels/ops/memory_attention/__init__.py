"""The memory of UniKE in one operator: top-K retrieval, latent attention, gate and blend (paper, section 3.2-3.3)."""

from __future__ import annotations

from .api import PreparedMemory, attend, memory_attention
from .reference import MemoryOperands

__all__ = ["MemoryOperands", "PreparedMemory", "attend", "memory_attention"]
