"""What the machine can do, measured."""

import pytest
import torch

from unike_kernels import _native
from unike_kernels.bench import bounds
from unike_kernels.bench.bounds import Bound, multiply_adds_per_second


def test_rates_are_measured_once_and_plausible(monkeypatch):
    monkeypatch.setattr(bounds, "_SAMPLE_SECONDS", 1e-3)
    multiply_adds_per_second.cache_clear()
    rates = {dtype: multiply_adds_per_second(dtype) for dtype in (torch.float32, torch.int8)}
    assert all(1e8 < rate < 1e14 for rate in rates.values())
    monkeypatch.setattr(_native, "multiply_add", lambda *_: pytest.fail("measured again"))
    assert multiply_adds_per_second(torch.int8) == rates[torch.int8]
    multiply_adds_per_second.cache_clear()


def test_multiply_adds_of_all_kinds_add_up(monkeypatch):
    monkeypatch.setattr(bounds, "multiply_adds_per_second", {torch.float32: 10.0, torch.int8: 100.0}.get)
    assert Bound((), {torch.float32: 5.0, torch.int8: 200.0}).arithmetic() == 2.5
    assert Bound(()).arithmetic() == 0


def test_reads_the_very_tensors(monkeypatch):
    read = []
    monkeypatch.setattr(_native, "read", lambda *tables: read.extend(tables))
    tables = (torch.zeros(3), torch.zeros(2))
    Bound(tables).read()
    assert all(a is b for a, b in zip(read, tables, strict=True))
