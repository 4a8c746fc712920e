"""What of the GPU benchmarks can be checked without one: bytes, and the check of answers."""

import pytest
import torch

from unike_kernels import _native
from unike_kernels.bench import gpu


def test_bytes_of_a_scan():
    assert gpu.scanned_bytes(10, 64, "int8") == 10 * (64 + 16)
    assert gpu.scanned_bytes(10, 65, "float16") == 10 * (192 + 16)
    assert gpu.scanned_bytes(10, 64, "float32") == 10 * 256


def test_wrong_answers_are_not_timed(monkeypatch):
    monkeypatch.setattr(gpu, "K", 5)
    keys, queries = (_native.normalize_rows(torch.randn(rows, 16)) for rows in (100, 3))
    gpu.check(gpu.with_torch(keys)(queries), keys, queries)
    scores, ids = gpu.with_torch(keys)(queries)
    with pytest.raises(AssertionError):
        gpu.check((scores, ids.flip(1)), keys, queries)
    with pytest.raises(AssertionError):
        gpu.check((scores + 0.1, ids), keys, queries)
