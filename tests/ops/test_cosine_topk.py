"""Cosine top-k on every backend of the CPU against the oracle, bit for bit."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unike_kernels import ops
from unike_kernels.ops.cosine_topk import reference

BACKENDS = ("reference", "native")
NAN, INF = float("nan"), float("inf")

backends = pytest.mark.parametrize("backend", BACKENDS)


def check(backend, queries, keys, k, ranges=None):
    """Raw rows are given, of any dtype."""
    with ops.backend(backend):
        scores, ids = ops.cosine_topk(queries, keys, k, ranges=ranges)
    rows = oracles.normalize_rows(keys.to(torch.promote_types(queries.dtype, torch.float32)))
    wanted, wanted_ids = oracles.cosine_topk(queries, rows.to(oracles.result_dtype(queries)), k, ranges)
    assert (scores.dtype, ids.dtype) == (wanted.dtype, torch.int64)
    assert torch.equal(ids, wanted_ids)
    assert torch.equal(scores, wanted)
    assert not (scores.signbit() & (scores == 0)).any()
    return scores, ids


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("d", [1, 15, 16, 17, 40])
def test_against_the_definition(backend, dtype, d):
    check(backend, torch.randn(7, d).to(dtype), torch.randn(30, d).to(dtype), 9)


def test_norms_of_float64_are_rounded_as_ieee_says():
    """Whatever torch's square root is on this CPU."""
    for scale in (1.0, 1e-140, 1e140, 1e-150, 3e-160, 1e-162):
        rows = torch.randn(5000, 3).double() * scale
        assert torch.equal(reference.normalize_rows(rows), oracles.normalize_rows(rows))
    assert reference.normalize_rows(torch.full((1, 2), 1e200, dtype=torch.float64)).tolist() == [[0.0, 0.0]]
    assert torch.autograd.gradcheck(reference.normalize_rows, torch.randn(3, 4).double().requires_grad_())


@pytest.mark.parametrize("d", [1, 17, 40])
def test_float64_stays_float64(d):
    check("reference", torch.randn(7, d).double() * 1e-40, torch.randn(30, d).double(), 9)


def test_scores_are_the_exact_cosines_of_the_unit_rows_rounded():
    q, keys = ops.normalize_rows(torch.randn(3, 50)), ops.normalize_rows(torch.randn(20, 50))
    scores, ids = ops.cosine_topk(q, keys, 20, normalized=True)
    for m in range(3):
        for score, n in zip(scores[m].tolist(), ids[m].tolist(), strict=True):
            # A query that is a unit row already may move by an ulp when normalised again.
            again = ops.normalize_rows(q[m : m + 1])[0]
            exact = sum(Fraction(a) * Fraction(b) for a, b in zip(again.tolist(), keys[n].tolist(), strict=True))
            assert abs(Fraction(score) - exact) <= Fraction(float(np.spacing(np.float32(abs(score))))) / 2


@backends
def test_ties_come_in_the_order_of_ids(backend):
    keys = torch.randn(5, 12)[torch.randint(0, 5, (60,))]
    _, ids = check(backend, torch.cat([keys[:3], -keys[:3]]), keys, 25)
    same = (keys == keys[0]).all(-1).nonzero().flatten()
    assert len(same) > 3
    assert ids[0, : len(same)].tolist() == same.tolist()


@backends
def test_scaling_a_key_by_two_leaves_the_score_alone(backend):
    keys = torch.randn(9, 6)
    check(backend, torch.randn(4, 6), torch.cat([keys * 2, keys, keys / 4]), 27)


@backends
@pytest.mark.parametrize(("m", "n", "k"), [(3, 2, 5), (3, 0, 4), (0, 5, 2), (0, 0, 1), (1, 1, 1)])
def test_few_or_none(backend, m, n, k):
    check(backend, torch.randn(m, 4), torch.randn(n, 4), k)


@backends
def test_bounds(backend):
    ranges = torch.tensor([[0, 20], [0, 0], [20, 20], [7, 8], [3, 19], [19, 20]])
    _, ids = check(backend, torch.randn(6, 5), torch.randn(20, 5), 6, ranges)
    assert ids[3].tolist() == [7, -1, -1, -1, -1, -1]


@backends
@pytest.mark.parametrize("bad", [[-1, 2], [0, 11], [3, 2], [11, 11]])
def test_bounds_outside_the_keys_are_an_error(backend, bad):
    ranges = torch.tensor([[0, 10], bad])
    with ops.backend(backend), pytest.raises(ValueError, match=r"ranges.*0 <= start <= stop <= n"):
        ops.cosine_topk(torch.randn(2, 4), torch.randn(10, 4), 2, ranges=ranges)


@backends
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("column", [0, 16, 18])
def test_a_query_that_is_not_finite_finds_nothing_and_disturbs_nobody(backend, column, value):
    queries, keys = torch.randn(4, 19), torch.randn(9, 19)
    queries[2, column] = value
    _, ids = check(backend, queries, keys, 3)
    assert ids[2].tolist() == [-1, -1, -1]
    assert (ids[[0, 1, 3]] >= 0).all()


@backends
def test_zero_rows_score_zero(backend):
    queries, keys = torch.randn(3, 6), torch.randn(10, 6)
    queries[1], keys[3], keys[7] = 0.0, -0.0, 0.0
    scores, ids = check(backend, queries, keys, 10)
    assert ids[1].tolist() == list(range(10))
    assert not scores[1].any()


@backends
@pytest.mark.parametrize("size", [1e-42, 1e-45, 3e38])
def test_very_small_and_very_large_rows(backend, size):
    queries, keys = torch.rand(3, 17).sub(0.5) * 2 * size, torch.rand(12, 17).sub(0.5) * 2 * size
    assert queries.abs().max() > 0
    scores, _ = check(backend, queries, keys, 12)
    assert scores.abs().max() <= 1 + 1e-6


@backends
def test_scores_that_underflow_tie_with_zero(backend):
    keys = torch.tensor([[1.0, -1e-46], [1.0, 1e-46], [1.0, 0.0], [1.0, -1e-46]], dtype=torch.float64).float()
    check(backend, torch.tensor([[0.0, 1.0]]), keys, 4)


@backends
def test_any_strides(backend):
    queries, keys = torch.randn(6, 40), torch.randn(90, 40)
    expected = check(backend, queries[:, 3:20].clone(), keys[::3, 3:20].clone(), 8)
    ranges = torch.tensor([[0, 30]] * 6).T.contiguous().T
    views = (
        (queries[:, 3:20], keys[::3, 3:20]),
        (queries[:, 3:20].T.contiguous().T, keys[::3, 3:20].T.contiguous().T),
    )
    with ops.backend(backend):
        for view in views:
            got = ops.cosine_topk(*view, 8, ranges=ranges)
            assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    check(backend, queries[:1].expand(3, 40), keys[:1].expand(5, 40), 3)


@backends
def test_normalized_keys_give_the_same(backend):
    queries, keys = torch.randn(4, 21), torch.randn(11, 21)
    keys[5] = 0.0
    with ops.backend(backend):
        expected = ops.cosine_topk(queries, keys, 11)
        for rows in (ops.normalize_rows(keys), ops.normalize_rows(keys).double()):
            got = ops.cosine_topk(queries, rows, 11, normalized=True)
            assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@backends
def test_keys_of_another_dtype(backend):
    check(backend, torch.randn(3, 9), torch.randn(8, 9).double(), 8)
    check(backend, torch.randn(3, 9).bfloat16(), torch.randn(8, 9), 8)
    check("reference", torch.randn(3, 9).double(), torch.randn(8, 9), 8)


# Values of a coarse grid collide often, so that ties and zeros are common.
@given(
    m=st.integers(0, 20),
    n=st.integers(0, 40),
    d=st.integers(1, 35),
    k=st.integers(1, 15),
    grid=st.sampled_from([1, 2, 1000]),
    seed=st.integers(0, 2**31),
    bounded=st.booleans(),
)
def test_both_backends_give_the_definition_of_anything(m, n, d, k, grid, seed, bounded):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-grid, grid + 1, (m + n, d), generator=generator) * torch.rand(d, generator=generator)
    ranges = torch.randint(0, n + 1, (m, 2), generator=generator).sort(-1).values if bounded else None
    for backend in BACKENDS:
        check(backend, x[:m], x[m:], k, ranges)


@given(n=st.integers(1, 30), d=st.integers(2, 40), seed=st.integers(0, 2**31))
def test_permuting_the_keys_permutes_the_ids(n, d, seed):
    generator = torch.Generator().manual_seed(seed)
    queries, keys = torch.randn(3, d, generator=generator), torch.randn(n, d, generator=generator)
    order = torch.randperm(n, generator=generator)
    scores, ids = ops.cosine_topk(queries, keys, n)
    moved_scores, moved_ids = ops.cosine_topk(queries, keys[order], n)
    assert torch.equal(moved_scores, scores)
    distinct = torch.stack([row.unique(return_counts=True)[1].max() == 1 for row in scores])
    assert torch.equal(order[moved_ids][distinct], ids[distinct])
    assert torch.equal(moved_ids.sort(-1).values, torch.arange(n).expand(3, n))


@given(m=st.integers(2, 9), d=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_a_query_does_not_depend_on_the_others(m, d, seed):
    generator = torch.Generator().manual_seed(seed)
    queries, keys = torch.randn(m, d, generator=generator), torch.randn(20, d, generator=generator)
    for backend in BACKENDS:
        with ops.backend(backend):
            together, alone = ops.cosine_topk(queries, keys, 5), ops.cosine_topk(queries[1:2], keys, 5)
        assert torch.equal(together[0][1:2], alone[0]) and torch.equal(together[1][1:2], alone[1])


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_normalize_rows(backend, dtype):
    x = torch.randn(5, 23).to(dtype)
    x[x.abs() < 0.5] *= 0.0  # zeros of both signs, which stay what they are
    x[3] = -0.0  # but for a row of them
    with ops.backend(backend):
        rows = ops.normalize_rows(x.T.contiguous().T)
    wanted = oracles.normalize_rows(x)
    assert rows.dtype == wanted.dtype and torch.equal(rows, wanted)
    assert torch.equal(rows.signbit(), wanted.signbit()) and rows[rows == 0].signbit().any()
    assert ops.normalize_rows(x[:0]).shape == (0, 23)


def small(dtype=torch.float64):
    return {"queries": torch.randn(3, 5, dtype=dtype), "keys": torch.randn(6, 5, dtype=dtype)}


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize(("k", "ranges"), [(3, None), (2, [[0, 6], [2, 2], [1, 6]])])
def test_gradients(gradcheck, normalized, k, ranges):
    tensors = small()
    if normalized:
        tensors["keys"] = ops.normalize_rows(tensors["keys"])
    ranges = None if ranges is None else torch.tensor(ranges)

    def found(queries, keys):
        scores, ids = ops.cosine_topk(queries, keys, k, normalized=normalized, ranges=ranges)
        assert not ids.requires_grad
        return torch.where(ids >= 0, scores, 0.0)

    gradcheck(found, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_narrow_dtypes(dtype, assert_near):
    tensors = {name: t.to(dtype) for name, t in small().items()}
    gradients = {}
    for wide in (dtype, torch.float64):
        leaves = {name: t.detach().to(wide).requires_grad_() for name, t in tensors.items()}
        ops.cosine_topk(**leaves, k=3)[0].sum().backward()
        gradients[wide] = [t.grad for t in leaves.values()]
    for got, wanted in zip(gradients[dtype], gradients[torch.float64], strict=True):
        assert got.dtype == dtype
        assert_near(got, wanted, terms=32)


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_query_that_is_not_finite_has_no_gradient_and_spoils_none(value):
    tensors = small(torch.float32)

    def gradients(queries):
        queries, keys = queries.clone().requires_grad_(), tensors["keys"].clone().requires_grad_()
        ops.cosine_topk(queries, keys, 2)[0].nan_to_num(neginf=0.0).sum().backward()
        return queries.grad, keys.grad

    spoilt = tensors["queries"].clone()
    spoilt[1, 2] = value
    queries, keys = gradients(spoilt)
    others, expected = gradients(tensors["queries"][[0, 2]])
    assert not queries[1].any()
    assert torch.equal(queries[[0, 2]], others)
    assert torch.equal(keys, expected)


def test_gradients_of_zero_rows_and_of_no_keys_are_zero():
    queries, keys = (t.requires_grad_() for t in small(torch.float32).values())
    ops.cosine_topk(queries * 0, keys, 2)[0].sum().backward()
    assert not queries.grad.any() and not keys.grad.any()
    queries.grad = None
    none = torch.zeros(0, 5, requires_grad=True)
    scores, _ = ops.cosine_topk(queries, none, 2)
    assert (scores == -INF).all()
    scores.backward(torch.ones_like(scores))
    assert not queries.grad.any() and none.grad.shape == (0, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(opcheck, dtype):
    queries, keys = small(dtype).values()
    opcheck("cosine_topk", (queries, keys, 3, False, None, None, None, None), trained=(0, 1))
    opcheck(
        "cosine_topk", (queries.T, keys[:, :3], 3, False, torch.tensor([[0, 4]] * 5), None, None, None), trained=(0, 1)
    )
    ids = torch.tensor([[0, 1], [5, -1], [2, 2]])
    opcheck("cosine_topk_backward", (torch.randn(3, 2).to(dtype), queries.T.contiguous().T, keys, ids, True))


def test_compiles(assert_compiles):
    assert_compiles(lambda q, keys: ops.cosine_topk(q, keys, 4), *small(torch.float32).values())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"queries": [[1.0]]}, TypeError, "queries: expected a tensor"),
        ({"queries": torch.zeros(2, 3).long()}, TypeError, "queries: expected float32"),
        ({"queries": torch.zeros(3)}, ValueError, "queries: expected shape"),
        (
            {"queries": torch.zeros(2, 0), "keys": torch.zeros(4, 0)},
            ValueError,
            "queries: expected at least one column",
        ),
        ({"keys": torch.zeros(4, 5)}, ValueError, r"keys: expected shape \[\*, 3\]"),
        ({"keys": torch.zeros(4, 3).int()}, TypeError, "keys: expected float32"),
        ({"keys": torch.zeros(4, 3, device="meta")}, ValueError, "keys: expected device cpu"),
        ({"keys": torch.zeros(4, 3).half(), "normalized": True}, TypeError, "keys: expected the float32 rows of norm"),
        ({"k": 0}, ValueError, "k: expected an integer of at least 1, got 0"),
        ({"k": 2.0}, ValueError, "k: expected an integer of at least 1, got 2.0"),
        ({"ranges": [[0, 1], [0, 1]]}, TypeError, "ranges: expected an int64 tensor, got list"),
        ({"ranges": torch.zeros(2, 2)}, TypeError, "ranges: expected an int64 tensor"),
        ({"ranges": torch.zeros(3, 2).long()}, ValueError, r"ranges: expected shape \[2, 2\]"),
        ({"ranges": torch.zeros(2, 2, device="meta").long()}, ValueError, "ranges: expected device cpu"),
    ],
)
def test_wrong_arguments_are_errors(change, error, message):
    arguments = {"queries": torch.zeros(2, 3), "keys": torch.zeros(4, 3), "k": 1} | change
    with pytest.raises(error, match=message):
        ops.cosine_topk(**arguments)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.tensor([[1.0], [NAN], [INF]]), ValueError, "x: expected finite values, row 1"),
        (torch.tensor([[1.0], [2.0], [-INF]]).half(), ValueError, "x: expected finite values, row 2"),
        (torch.zeros(2, 0), ValueError, "x: expected at least one column"),
        (torch.zeros(2, 0).double(), ValueError, "x: expected at least one column"),
        (torch.zeros(3), ValueError, "x: expected shape"),
        (torch.zeros(2, 3).int(), TypeError, "x: expected float32"),
    ],
)
def test_normalize_rows_refuses(x, error, message):
    with pytest.raises(error, match=message):
        ops.normalize_rows(x)
