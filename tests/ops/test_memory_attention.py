"""The memory attention is cosine_topk followed by latent_attention, each tested against its own definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unike_kernels import ops

NAN = float("nan")


def make(encoder, m=6, n=20, d=8, heads=None, dtype=torch.float32):
    def rand(*shape):
        return torch.randn(shape, dtype=torch.float64).to(dtype)

    shape = () if heads is None else (heads, 5)
    a = {
        "hidden": rand(m, d), "inputs": rand(m, d), "index": ops.normalize_rows(rand(n, d)),
        "keys": rand(n, *(shape or (d,))), "values": rand(n, *shape[:1], d), "encoder": encoder(d, dtype=dtype), "k": 4,
    }  # fmt: skip
    return a if heads is None else a | {"queries": rand(m, heads, 5)}


def composed(hidden, inputs, index, keys, values, encoder, *, k, ranges=None, queries=None, **switches):
    _, ids = ops.cosine_topk(hidden, index, k, normalized=True, ranges=ranges)
    queries = hidden if queries is None else queries
    return *ops.latent_attention(queries, inputs, keys, values, ids, encoder, **switches), ids


def assert_same(got, wanted):
    assert [t.dtype for t in got] == [t.dtype for t in wanted]
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


SWITCHES = (
    {},
    {"convention": "eq7", "norm": "none", "scale": 0.7},
    {"alpha": torch.tensor([0.25])},
    {"alpha": torch.linspace(0, 1, 6), "convention": "eq7"},
    {"anchor": torch.arange(16.0).reshape(2, 8).cos(), "norm": "none"},
    {"ranges": torch.tensor([[0, 20], [3, 5], [7, 7], [19, 20], [0, 4], [20, 20]])},
    {"k": 25},
    {"k": 1},
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("switches", SWITCHES)
def test_it_is_the_composition(switches, heads, dtype, encoder):
    a = make(encoder, heads=heads, dtype=dtype) | switches
    got = ops.memory_attention(**a)
    assert_same(got, composed(**a))
    with ops.backend("reference"):
        assert_same(ops.memory_attention(**a), composed(**a))
    shifted = (got[2] >= 0).any(-1)
    assert shifted.tolist() == [True, True, "ranges" not in switches, True, True, "ranges" not in switches]
    assert torch.equal(got[0][~shifted], a["inputs"][~shifted]) and not got[1][~shifted].any()


def test_an_index_of_float64_in_a_float32_model(encoder):
    a = make(encoder)
    assert_same(ops.memory_attention(**a | {"index": a["index"].double()}), ops.memory_attention(**a))


def test_each_token_reads_the_entry_that_it_retrieves(encoder):
    """With k = 1 and alpha = 1 the output is the value of the most similar key, in the length of the input."""
    a = make(encoder, m=20) | {"k": 1, "hidden": torch.eye(20), "index": torch.eye(20), "encoder": encoder(20)}
    a |= {"keys": torch.randn(20, 20), "values": torch.randn(20, 20), "inputs": torch.randn(20, 20)}
    out, _, ids = ops.memory_attention(**a, alpha=torch.ones(1))
    wanted = a["values"] * (a["inputs"].norm(dim=1) / a["values"].norm(dim=1)).unsqueeze(1)
    assert ids.flatten().tolist() == list(range(20))
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_a_token_that_is_not_finite_is_untouched(value, backend, encoder, monkeypatch):
    monkeypatch.setenv("UNIKE_BACKEND", backend or "")
    a = make(encoder)
    wanted = ops.memory_attention(**a)
    a["hidden"][2, 3] = value
    out, alpha, ids = ops.memory_attention(**a)
    assert torch.equal(out[2], a["inputs"][2])
    assert alpha[2] == 0 and (ids[2] == -1).all()
    others = [0, 1, 3, 4, 5]
    assert_same([t[others] for t in (out, alpha, ids)], [t[others] for t in wanted])


def test_no_tokens_and_no_entries(encoder):
    a = make(encoder)
    out, alpha, ids = ops.memory_attention(**a | {name: a[name][:0] for name in ("hidden", "inputs")})
    assert (out.shape, alpha.shape, ids.shape) == ((0, 8), (0,), (0, 4))
    out, alpha, ids = ops.memory_attention(**a | {name: a[name][:0] for name in ("index", "keys", "values")})
    assert torch.equal(out, a["inputs"]) and not alpha.any() and (ids == -1).all()


@given(m=st.integers(2, 8), n=st.integers(1, 30), d=st.integers(2, 40), seed=st.integers(0, 2**31))
def test_no_token_depends_on_another(m, n, d, seed, encoder):
    torch.manual_seed(seed)
    a = make(encoder, m=m, n=n, d=d)
    a["ranges"] = torch.randint(0, n + 1, (m, 2)).sort(-1).values
    wanted = ops.memory_attention(**a)
    for ranges in (torch.zeros(m, 2).long(), torch.randint(0, n + 1, (m, 2)).sort(-1).values):
        ranges[0] = a["ranges"][0]
        assert_same([t[0] for t in ops.memory_attention(**a | {"ranges": ranges})], [t[0] for t in wanted])


@given(n=st.integers(1, 20), seed=st.integers(0, 2**31))
def test_permuting_the_entries_permutes_the_ids(n, seed, encoder):
    torch.manual_seed(seed)
    a = make(encoder, n=n, dtype=torch.float64)
    order = torch.randperm(n)
    out, _, ids = ops.memory_attention(**a)
    moved, _, moved_ids = ops.memory_attention(**a | {t: a[t][order] for t in ("index", "keys", "values")})
    torch.testing.assert_close(moved, out, rtol=0, atol=1e-13)
    assert torch.equal(torch.where(moved_ids < 0, -1, order[moved_ids]), ids)


@pytest.mark.parametrize("gate", ["token", "alpha", "anchor"])
def test_gradients(gate, encoder, gradcheck):
    a = make(encoder, m=4, d=3, heads=2, dtype=torch.float64)
    a["ranges"] = torch.tensor([[0, 20], [4, 4], [3, 9], [0, 2]])
    tensors = {name: a.pop(name) for name in ("queries", "inputs")}
    tensors |= {"alpha": {"alpha": torch.rand(4).double()}, "anchor": {"anchor": torch.randn(2, 3).double()}}.get(
        gate, {}
    )
    gradcheck(lambda **t: ops.memory_attention(**a, **t)[:2], tensors)


def test_retrieval_has_no_gradient_and_hidden_one_as_the_queries(encoder):
    a = make(encoder)
    a["hidden"].requires_grad_()
    gradients = []
    for f in (ops.memory_attention, composed):
        out, _, ids = f(**a)
        assert not ids.requires_grad
        gradients += torch.autograd.grad(out.square().sum(), a["hidden"])
    assert torch.equal(*gradients) and gradients[0].any()
    out, _, _ = ops.memory_attention(**a, queries=torch.randn(6, 1, 8))
    assert torch.autograd.grad(out.sum(), a["hidden"], allow_unused=True) == (None,)


@pytest.mark.parametrize("given", ["nothing", "gates"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(opcheck, encoder, given, dtype):
    a = make(encoder, heads=2, dtype=dtype)
    gates = (None, None) if given == "nothing" else (torch.rand(6).to(dtype), torch.randn(2, 8).to(dtype))
    ranges = None if given == "nothing" else torch.tensor([[0, 20], [3, 3]] * 3)
    arguments = (
        a["hidden"].T.contiguous().T, a["index"], 4, ranges, *(ops.pack_keys(a["index"], "int8") or ()), a["queries"],
        a["inputs"].T.contiguous().T, a["keys"], a["values"], None, *a["encoder"], *gates, 0.5, "inclusion", "match",
    )  # fmt: skip
    opcheck("memory_attention", arguments, trained=(7, 8, 16, 17))


def test_compiles(assert_compiles, encoder):
    a = make(encoder)
    assert_compiles(
        lambda hidden, inputs: ops.memory_attention(**a | {"hidden": hidden, "inputs": inputs}),
        a["hidden"], a["inputs"],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": None}, TypeError, "hidden: expected a tensor, got NoneType"),
        ({"hidden": torch.zeros(6, 0)}, ValueError, "hidden: expected at least one column"),
        ({"hidden": torch.zeros(5, 8), "queries": torch.zeros(6, 8)}, ValueError, r"hidden: expected shape \[6, \*\]"),
        ({"index": torch.zeros(20, 7)}, ValueError, r"index: expected shape \[\*, 8\]"),
        ({"index": torch.zeros(19, 8)}, ValueError, r"index: expected shape \[20, \*\]"),
        ({"index": torch.zeros(20, 8).half()}, TypeError, "index: expected the float32 rows of normalize_rows"),
        ({"index": torch.zeros(20, 8, device="meta")}, ValueError, "index: expected device cpu"),
        ({"inputs": torch.zeros(6)}, ValueError, "inputs: expected shape"),
        ({"queries": "hidden"}, TypeError, "queries: expected a tensor, got str"),
        ({"queries": torch.zeros(6, 2, 8)}, ValueError, r"keys: expected shape \[\*, 2, 8\]"),
        ({"values": torch.zeros(20, 7)}, ValueError, r"values: expected shape \[20, 1, 8\]"),
        ({"encoder": 1}, TypeError, "encoder: expected SemanticEncoder, got int"),
        ({"k": 0}, ValueError, "k: expected an integer of at least 1, got 0"),
        ({"k": None}, ValueError, "k: expected an integer of at least 1, got None"),
        ({"ranges": [[0, 1]] * 6}, TypeError, "ranges: expected an int64 tensor, got list"),
        ({"ranges": torch.zeros(5, 2).long()}, ValueError, r"ranges: expected shape \[6, 2\]"),
        ({"ranges": torch.tensor([[0, 21]] * 6)}, ValueError, "ranges.*0 <= start <= stop <= n"),
        ({"convention": "other"}, ValueError, "convention: expected one of"),
        ({"norm": "other"}, ValueError, "norm: expected one of"),
        ({"alpha": torch.zeros(5)}, ValueError, r"alpha: expected shape \[1\] or \[6\]"),
        ({"anchor": torch.zeros(4, 8)}, ValueError, "anchor: 6 tokens cannot be split evenly among its 4 rows"),
        ({"keys": torch.zeros(20, 8, requires_grad=True)}, ValueError, "keys: requires_grad is set"),
    ],
)
def test_wrong_arguments_are_errors(change, error, message, encoder):
    arguments = make(encoder)
    with pytest.raises(error, match=message):
        ops.memory_attention(**arguments | change)
