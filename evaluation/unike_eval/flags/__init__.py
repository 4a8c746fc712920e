"""A world of pictures for a real language model: flags, as several vendors draw them, and facts about countries."""

from __future__ import annotations

from .model import load as load_flags
from .suite import flag_facts, flags_suite, look_alikes

__all__ = ["flag_facts", "flags_suite", "load_flags", "look_alikes"]
