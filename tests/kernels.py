"""Which native kernels a test runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from unike_kernels import _native


@contextmanager
def kernels_of(level: str) -> Iterator[None]:
    """The kernels of an instruction set that this CPU has; those from before come back."""
    before = _native.isa()
    _native.set_isa(level)
    try:
        assert _native.isa() == level
        yield
    finally:
        _native.set_isa(before)
