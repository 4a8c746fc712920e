"""What all tests share: a fixed seed, and hypothesis without time limits (a shared machine can be slow)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

settings.register_profile("unike", deadline=None, print_blob=True)
settings.load_profile("unike")


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)
