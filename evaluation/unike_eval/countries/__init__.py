"""A world of real facts for a real language model: countries, in many wordings."""

from __future__ import annotations

from .facts import RELATIONS, Fact, codes, facts
from .suite import countries_suite, split_facts
from .wordings import prompts

__all__ = ["RELATIONS", "Fact", "codes", "countries_suite", "facts", "prompts", "split_facts"]
