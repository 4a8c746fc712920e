"""What the machine can do at most."""

import pytest
import torch
from unike_bench.harness.roofline import Bound

from unike_kernels import _native


def test_multiply_adds_of_all_kinds_add_up():
    made = {dtype: Bound((), {dtype: 1.0}).probes()[str(dtype)]() for dtype in (torch.float32, torch.int8)}
    bound = Bound((), {torch.float32: made[torch.float32] / 2, torch.int8: made[torch.int8] * 2})
    assert bound.seconds({"read": 7.0, "torch.float32": 1.0, "torch.int8": 2.0}) == (7.0, 4.5)
    assert Bound(()).seconds({"read": 7.0}) == (7.0, 0)


def test_probes_are_what_is_needed(monkeypatch):
    read = []
    monkeypatch.setattr(_native, "read", lambda *tables: read.extend(tables))
    tables = (torch.zeros(3), torch.zeros(2))
    probes = Bound(tables, {torch.int8: 1.0}).probes()
    assert list(probes) == ["read", "torch.int8"]
    probes["read"]()
    assert all(a is b for a, b in zip(read, tables, strict=True))
    assert probes["torch.int8"]() > 1e6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
def test_a_probe_makes_more_in_more_rounds(dtype):
    assert _native.multiply_add(dtype, 200) == 2 * _native.multiply_add(dtype, 100) > 0
