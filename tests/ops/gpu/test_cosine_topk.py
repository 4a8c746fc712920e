"""The Triton kernel of cosine_topk against the definition, bit for bit: a canonical score admits no error."""

from __future__ import annotations

import pytest
import torch

from unike_kernels import ops
from unike_kernels.ops import _backend, _triton
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
def few_multiprocessors(with_multiprocessors):
    with_multiprocessors(3, kernel)


@pytest.mark.parametrize(
    ("m", "n", "d", "k", "dtype", "normalized"),
    [
        (1, 150, 64, 7, torch.float32, True),
        (1, 33, 37, 40, torch.float32, False),  # k > n
        (3, 200, 48, 5, torch.bfloat16, False),
        (9, 300, 20, 33, torch.float16, False),
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
    """The meetings leave the counter as the launch after it can use it."""
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
    # The best eight and a few more are read again.
    assert launch.loads["keys"].sectors <= 1.02 * (n + 12) * d * 4 / 32
    assert launch.grid[0] == 3


@pytest.mark.parametrize(
    ("ranges", "read"),
    [
        pytest.param([[0, 0]] * 20, 0, id="nothing is seen"),
        pytest.param([[0, 0]] * 18 + [[130, 150], [2**40, 2**62]], 20, id="one sees some"),
        pytest.param([[9, 3], [300, 310]] + [[0, 0]] * 16 + [[290, 300], [-5, 0]], 20, id="on both sides of a hole"),
        pytest.param([[384, 2**62]] * 19 + [[-(2**62), 1]], 1, id="the first key"),
        pytest.param([[383, 384]] * 20, 1, id="the last key"),
    ],
)
def test_keys_that_nobody_sees_are_not_read(launched, ranges, read):
    """The one group of the queries reads what lies between the first and the last key that one of them sees."""
    n, d, k = 384, 64, 3
    queries, keys = case(20, n, d, torch.float32)
    given, clipped = torch.tensor(ranges), torch.tensor(ranges).clamp(0, n)
    clipped[clipped[:, 0] >= clipped[:, 1]] = 0
    result, session = launched(lambda: kernel.cosine_topk(queries, keys, k, True, given))
    same(result, reference.cosine_topk(queries, keys, k, True, clipped))
    (launch,) = session.launches
    sectors = launch.loads["keys"].sectors if "keys" in launch.loads else 0
    seen = int((clipped[:, 1] - clipped[:, 0]).sum())  # whose rows may be read again
    assert read * d * 4 / 32 <= sectors <= (read + seen) * d * 4 / 32


def test_what_the_kernel_does_not_take(launched):
    queries, keys = case(2, 300, 8, torch.float32)
    result, session = launched(lambda: kernel.cosine_topk(queries, keys, kernel.MOST_RESULTS.value + 1))
    assert not session.launches
    same(result, reference.cosine_topk(queries, keys, kernel.MOST_RESULTS.value + 1))


def test_ranges_outside_of_the_keys_are_clipped(launched):
    """As nothing waits for a device to find them."""
    queries, keys = case(5, 40, 8, torch.float32)
    ranges = torch.tensor([[0, 99], [-7, 2], [38, 41], [9, 3], [40, 50]])
    clipped = torch.tensor([[0, 40], [0, 2], [38, 40], [0, 0], [0, 0]])
    result, _ = launched(lambda: kernel.cosine_topk(queries, keys, 3, ranges=ranges))
    same(result, reference.cosine_topk(queries, keys, 3, ranges=clipped))


def estimates(m: int, n: int, d: int, workspace: _triton.Workspace) -> torch.Tensor:
    """Those that the last search left in its workspace: [m, n]."""
    scratch = workspace.floats(*kernel.scratch_of(kernel.tiling(m, n, 1), m, n, d))
    return kernel.typed(scratch)[2].reshape(m, n)


@pytest.mark.parametrize(
    ("rows", "least"),
    [
        pytest.param(lambda d: torch.randn(30, d), 0.02, id="random"),
        pytest.param(lambda d: torch.ones(2, d), 0.5, id="91 ** -0.5 is half way between two numbers of float16"),
        pytest.param(lambda d: torch.randn(30, d) * torch.logspace(0, -7, d), 0.02, id="small"),
    ],
)
def test_estimates_are_within_their_bound(rows, least, launched):
    d, workspace = 91, _triton.Workspace("cpu")
    rows = rows(d)
    rows = torch.cat([rows, -rows])
    units = reference.normalize_rows(rows)
    launched(lambda: kernel.cosine_topk(rows, units, 1, True, workspace=workspace))
    scores = reference.canonical_dot(units.unsqueeze(1), units.unsqueeze(0)).float()
    off = (estimates(len(rows), len(rows), d, workspace) - scores).abs().max()
    assert off <= kernel.error_bound(d)
    assert off >= least * kernel.error_bound(d)


def test_keys_that_estimates_do_not_tell_apart(launched):
    """All are scored, several at a time, and the order is that of the scores."""
    torch.manual_seed(0)
    base = torch.randn(1, 24)
    keys = reference.normalize_rows(base + 1e-4 * torch.randn(150, 24))
    queries = torch.cat([base, -base, base + 1e-4 * torch.randn(1, 24)])
    workspace = _triton.Workspace("cpu")
    result, _ = launched(lambda: kernel.cosine_topk(queries, keys, 20, True, workspace=workspace))
    same(result, reference.cosine_topk(queries, keys, 20, True))


def test_few_keys_are_scored_where_estimates_tell_them_apart(launched):
    """At most twice as many as are wanted, though the best lie side by side."""
    torch.manual_seed(0)
    n, d, k = 600, 32, 12
    query = torch.randn(1, d)
    keys = reference.normalize_rows(torch.randn(n, d) + torch.linspace(0, 0.5, n)[:, None] * query)
    result, session = launched(lambda: kernel.cosine_topk(query, keys, k, True))
    same(result, reference.cosine_topk(query, keys, k, True))
    (launch,) = session.launches
    scored = launch.loads["keys"].bytes / (4 * d) - n
    assert k <= scored <= 2 * k


def test_two_groups(launched, monkeypatch):
    """The second one is of two queries."""
    monkeypatch.setattr(kernel, "multiprocessors", lambda: 17)
    queries, keys = case(66, 200, 20, torch.float32)
    result, session = launched(lambda: kernel.cosine_topk(queries, keys, 5))
    assert [launch.grid[0] for launch in session.launches] == [16]
    same(result, reference.cosine_topk(queries, keys, 5))


def test_groups_that_share_their_code_with_fewer(launched, monkeypatch):
    """It has room for more slices than they have."""
    monkeypatch.setattr(kernel, "multiprocessors", lambda: 12)
    monkeypatch.setattr(kernel, "QUERIES", 16)
    monkeypatch.setattr(kernel, "SPLITS", 3)
    m, n, k = 49, 80, 5
    three, four = kernel.tiling(48, n, k), kernel.tiling(m, n, k)
    assert (three.splits, four.splits, four.room) == (4, 3, 4)
    assert three.shapes == four.shapes
    queries, keys = case(m, n, 8, torch.float32)
    result, session = launched(lambda: kernel.cosine_topk(queries, keys, k))
    assert [launch.grid[0] for launch in session.launches] == [12]
    same(result, reference.cosine_topk(queries, keys, k))


def test_many_queries_take_several_launches(launched, monkeypatch):
    monkeypatch.setattr(kernel, "MOST_ESTIMATES", 1000)
    queries, keys = case(12, 200, 20, torch.float32)
    ranges = torch.tensor([[i, 200 - 7 * i] for i in range(12)])
    result, session = launched(lambda: kernel.cosine_topk(queries, keys, 4, ranges=ranges))
    assert len(session.launches) == 3
    same(result, reference.cosine_topk(queries, keys, 4, ranges=ranges))
