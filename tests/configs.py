"""The configuration that most tests are about."""

from __future__ import annotations

from typing import Any

from unike_kernels.config import Config


def every_token(**switches: Any) -> Config:
    """All tokens are shifted, with the paper's 1 / sqrt(width), unless the switches say otherwise."""
    return Config(**{"tokens": "all", "scale": None, **switches})
