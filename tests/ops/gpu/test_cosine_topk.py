"""The Triton kernel of cosine_topk against the definition, bit for bit: a canonical score admits no error."""

from __future__ import annotations

import pytest
import torch

from unike_kernels import ops
from unike_kernels.ops import _backend
from unike_kernels.ops.cosine_topk import reference
from unike_kernels.ops.cosine_topk import triton as kernel


def case(m: int, n: int, d: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys with ties in two slices, a zero row on each side, and keys that point away."""
    torch.manual_seed(1000 * m + n)
    queries, keys = torch.randn(m, d).to(dtype), torch.randn(n, d).to(dtype)
    keys[n // 2 :] = keys[: n - n // 2].clone()
    keys[n // 3] = 0
    if m > 1:
        queries[1] = 0
        queries[0] = keys[n - 1] * 3
    return queries, keys


def same(got: tuple[torch.Tensor, torch.Tensor], wanted: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert torch.equal(got[1], wanted[1])
    assert torch.equal(got[0].view(torch.int32), wanted[0].view(torch.int32))


@pytest.fixture(autouse=True)
def few_multiprocessors(monkeypatch):
    monkeypatch.setattr(kernel, "multiprocessors", lambda: 3)


@pytest.mark.parametrize(
    ("m", "n", "d", "k", "dtype", "normalized"),
    [
        (1, 150, 64, 7, torch.float32, True),
        (1, 33, 37, 40, torch.float32, False),  # k > n
        (3, 200, 48, 5, torch.bfloat16, False),
        (9, 300, 20, 33, torch.float16, False),  # two groups, the second of one query
        (2, 1, 1, 1, torch.float32, False),
    ],
)
def test_agrees_with_the_definition(m, n, d, k, dtype, normalized, everywhere):
    queries, keys = case(m, n, d, dtype)
    keys = reference.normalize_rows(keys) if normalized else keys
    same(
        everywhere(lambda: kernel.cosine_topk(queries, keys, k, normalized)),
        reference.cosine_topk(queries, keys, k, normalized),
    )


def test_bounds_strides_and_queries_that_are_not_finite(launched):
    queries, keys = case(4, 200, 40, torch.float32)
    queries, keys = queries.repeat(1, 2)[:, 3:40], keys.repeat(1, 2)[:, 5:42]
    queries[2, 36], queries[3, 0] = float("nan"), float("-inf")
    ranges = torch.tensor([[10, 190], [0, 3], [0, 200], [0, 200]])
    result, _ = launched(lambda: kernel.cosine_topk(queries, keys, 6, ranges=ranges))
    same(result, reference.cosine_topk(queries, keys, 6, ranges=ranges))
    assert (result[1][2:] == -1).all()


def test_the_operator_twice_in_one_workspace(launched):
    """The merge leaves the counters at zero for the launch after it."""
    queries, keys = case(2, 300, 32, torch.float32)

    def run():
        with _backend.backend("triton"):
            return ops.cosine_topk(queries, keys, 5), ops.cosine_topk(queries[:1], keys, 9)

    (first, second), session = launched(run)
    assert len(session.launches) == 2
    same(first, reference.cosine_topk(queries, keys, 5))
    same(second, reference.cosine_topk(queries[:1], keys, 9))


def test_nothing_is_allocated_where_memory_is_given(allocates_nothing):
    queries, keys = case(2, 300, 32, torch.float32)
    allocates_nothing(kernel, lambda **given: kernel.cosine_topk(queries, keys, 5, True, **given))


def test_the_keys_are_read_once_by_every_multiprocessor(launched):
    n, d = 384, 64
    queries, keys = case(1, n, d, torch.float32)
    _, session = launched(lambda: kernel.cosine_topk(queries, keys, 8, True))
    (launch,) = session.launches
    assert launch.loads["keys"].sectors <= 1.02 * n * d * 4 / 32
    assert launch.grid[0] == 3


def test_what_the_kernel_does_not_take(launched):
    queries, keys = case(2, 300, 8, torch.float32)
    result, session = launched(lambda: kernel.cosine_topk(queries, keys, kernel.MOST_RESULTS + 1))
    assert not session.launches
    same(result, reference.cosine_topk(queries, keys, kernel.MOST_RESULTS + 1))
    with pytest.raises(ValueError, match="ranges: expected 0 <= start <= stop"):
        kernel.cosine_topk(queries, keys, 3, ranges=torch.tensor([[0, 301], [0, 1]]))
