"""Latent attention against Eq. 2, 7 and 8 written as loops over tokens, heads and entries in float64."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unike_kernels import ops

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NAN = float("nan")

each_backend = pytest.mark.usefixtures("each_backend")
same_backend_in_all_examples = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
blends = pytest.mark.parametrize(
    ("convention", "norm"), list(itertools.product(("inclusion", "eq7"), ("match", "none")))
)


def gelu(x):
    return np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x])


def cosine(a, b):
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / norms) if norms else 0.0


def expected(queries, inputs, keys, values, ids, encoder, *, scale=None, alpha=None, anchor=None, convention, norm):
    """out [M, d] and alpha [M] in float64."""
    q, h, k, v, w1, b1, w2, b2 = (t.double().numpy() for t in (queries, inputs, keys, values, *encoder))
    q, k, v = (t[:, None] if t.ndim == 2 else t for t in (q, k, v))
    tokens = len(h)
    out, gates = h.copy(), np.zeros(tokens)
    for t in range(tokens):
        found = [i for i in ids[t * len(ids) // tokens].tolist() if i >= 0]
        if not found:
            continue
        know = np.zeros(h.shape[1])
        for head in range(q.shape[1]):
            factor = 1 / math.sqrt(q.shape[2]) if scale is None else scale
            weights = [math.exp(factor * (q[t, head] @ k[i, head])) for i in found]
            for i, weight in zip(found, weights, strict=True):
                know += weight / sum(weights) * v[i, head]
        if alpha is None:
            with_ = h[t] if anchor is None else anchor[t * len(anchor) // tokens].double().numpy()
            gate = min(max(cosine(w2 @ gelu(w1 @ know + b1) + b2, with_), 0.0), 1.0)
        else:
            gate = float(alpha[t % len(alpha)])
        if norm == "match" and np.linalg.norm(know):
            know = know * np.linalg.norm(h[t]) / np.linalg.norm(know)
        share = gate if convention == "inclusion" else 1 - gate
        out[t], gates[t] = (1 - share) * h[t] + share * know, gate
    return out, gates


def make(encoder, m=6, n=9, d=8, heads=None, k=4, dtype=torch.float32):
    """Arguments of the operator: token 0 finds all but one entry, token 1 none, token 2 one, the others k."""

    def rand(*shape):
        return torch.randn(shape, dtype=torch.float64).to(dtype)

    ids = torch.randint(0, n, (m, k))
    ids[0, :1], ids[1], ids[2, :-1] = -1, -1, -1
    shape = () if heads is None else (heads,)
    width = d if heads is None else 5
    return {
        "queries": rand(m, *shape, width), "inputs": rand(m, d), "keys": rand(n, *shape, width),
        "values": rand(n, *shape, d), "ids": ids, "encoder": encoder(d, dtype=dtype),
    }  # fmt: skip


def gate_of(mode, m, d, dtype):
    """The arguments of each way to come to alpha."""
    return {
        "token": {},
        "anchor": {"anchor": torch.randn(2, d).to(dtype)},
        "anchors": {"anchor": torch.randn(m, d).to(dtype)},
        "given": {"alpha": torch.tensor([0.3], dtype=dtype)},
        "given each": {"alpha": torch.linspace(0, 1, m).to(dtype)},
    }[mode]


MODES = ("token", "anchor", "anchors", "given", "given each")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize("mode", MODES)
@blends
@each_backend
def test_against_the_definition(convention, norm, mode, heads, dtype, encoder, assert_near):
    a = make(encoder, heads=heads, dtype=dtype)
    switches = {"convention": convention, "norm": norm} | gate_of(mode, 6, 8, dtype)
    out, alpha = ops.latent_attention(**a, **switches)
    wanted, gates = expected(**a, **switches)
    assert out.dtype == dtype
    assert alpha.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_near(out, wanted, terms=64)
    assert_near(alpha, gates, terms=64)
    assert torch.equal(out[1], a["inputs"][1]) and alpha[1] == 0


@pytest.mark.parametrize("rows", [1, 2, 3])
@each_backend
def test_ids_shared_by_the_tokens_of_a_row(rows, encoder, assert_near):
    a = make(encoder)
    a["ids"] = a["ids"][[0, 1, 3][:rows]]
    shared = ops.latent_attention(**a)
    assert_near(shared[0], expected(**a, convention="inclusion", norm="match")[0], terms=64)
    a["ids"] = a["ids"].repeat_interleave(6 // rows, 0)
    for got, wanted in zip(shared, ops.latent_attention(**a), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("scale", [None, 0.01, 3.0])
@each_backend
def test_scale(scale, encoder, assert_near):
    a = make(encoder)
    out, _ = ops.latent_attention(**a, scale=scale, norm="none")
    assert_near(out, expected(**a, scale=scale, convention="inclusion", norm="none")[0], terms=64)


@each_backend
def test_the_gate_stays_between_0_and_1(encoder):
    a = make(encoder, m=200)
    _, alpha = ops.latent_attention(**a)
    assert (alpha == 0).sum() > 10 and ((alpha > 0) & (alpha <= 1)).sum() > 10
    # Parallel vectors: in float32 the cosine of some is a little more than 1.
    constant = a["encoder"]._replace(w2=torch.zeros(8, 5), b2=torch.randn(8))
    parallel = constant.b2 * torch.rand(200, 1)
    assert torch.cosine_similarity(parallel, constant.b2.expand(200, 8)).max() > 1
    a["encoder"], found = constant, (a["ids"] >= 0).any(-1)
    _, alpha = ops.latent_attention(**a, anchor=parallel)
    assert alpha.max() == 1 and alpha[found].min() > 0.999
    assert not ops.latent_attention(**a, anchor=-parallel)[1].any()


def test_the_conventions_are_each_other_with_the_complement_of_alpha(encoder):
    a, alpha = make(encoder), torch.tensor([0.3])
    one, _ = ops.latent_attention(**a, alpha=alpha)
    other, _ = ops.latent_attention(**a, alpha=1 - alpha, convention="eq7")
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    assert (one - ops.latent_attention(**a, alpha=alpha, convention="eq7")[0])[[0, 2, 3]].abs().max(-1)[0].min() > 0.1


@blends
@pytest.mark.parametrize("zero", ["inputs", "values", "queries", "keys", "anchor", "encoder"])
@each_backend
def test_zero_rows(convention, norm, zero, encoder, assert_near):
    a, anchor = make(encoder), torch.randn(6, 8)
    if zero == "encoder":
        a["encoder"] = ops.SemanticEncoder(*map(torch.zeros_like, a["encoder"]))
    elif zero == "anchor":
        anchor[3:] = 0.0
    else:
        a[zero] = a[zero].clone()
        a[zero][3:] = 0.0
        if zero == "values":
            a["ids"][2:4] = 5
    for gate in ({}, {"anchor": anchor}, {"alpha": torch.full((1,), 0.25)}):
        switches = {"convention": convention, "norm": norm} | gate
        out, alpha = ops.latent_attention(**a, **switches)
        wanted, gates = expected(**a, **switches)
        assert_near(out, wanted, terms=64)
        assert_near(alpha, gates, terms=64)


@pytest.mark.parametrize(("m", "rows"), [(0, 0), (0, 3), (0, 1)])
@pytest.mark.parametrize("mode", ["token", "anchor", "given", "given each"])
@each_backend
def test_no_tokens(m, rows, mode, encoder):
    a = make(encoder)
    a |= {name: a[name][:0] for name in ("queries", "inputs")} | {"ids": a["ids"][:rows]}
    gates = gate_of(mode, 0, 8, torch.float32)
    leaves = {name: t[:rows].clone().requires_grad_() for name, t in gates.items() if name == "anchor"}
    leaves |= {name: t.clone().requires_grad_() for name, t in gates.items() if name == "alpha"}
    leaves |= {"inputs": a.pop("inputs").requires_grad_(), "queries": a.pop("queries").requires_grad_()}
    out, alpha = ops.latent_attention(**a, **leaves)
    assert out.shape == (0, 8) and alpha.shape == (0,)
    (out.sum() + alpha.sum()).backward()
    assert all(t.grad.shape == t.shape and not t.grad.any() for t in leaves.values())


@pytest.mark.parametrize("k", [0, 3])
@each_backend
def test_no_entries(k, encoder):
    a = make(encoder, k=4)
    a |= {name: a[name][:0] for name in ("keys", "values")}
    a["ids"] = torch.full((6, k), -1)
    a["inputs"].requires_grad_()
    out, alpha = ops.latent_attention(**a)
    out.sum().backward()
    assert torch.equal(out, a["inputs"]) and not alpha.any()
    assert torch.equal(a["inputs"].grad, torch.ones(6, 8))


@given(
    m=st.integers(3, 6),
    n=st.integers(1, 8),
    d=st.integers(2, 20),
    heads=st.sampled_from([None, 1, 2]),
    k=st.integers(1, 6),
    convention=st.sampled_from(["inclusion", "eq7"]),
    norm=st.sampled_from(["match", "none"]),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_mask(m, n, d, heads, k, convention, norm, seed, encoder, assert_near):
    torch.manual_seed(seed)
    a = make(encoder, m=m, n=n, d=d, heads=heads, k=k, dtype=torch.float64)
    a["ids"] = torch.randint(-1, n, (m, k))
    out, alpha = ops.latent_attention(**a, convention=convention, norm=norm)
    wanted, gates = expected(**a, convention=convention, norm=norm)
    # Where values cancel, the norm match and the cosine divide what is left by little.
    assert_near(out, wanted, terms=2**16)
    assert_near(alpha, gates, terms=2**16)
    untouched = (a["ids"] < 0).all(-1)
    assert torch.equal(out[untouched], a["inputs"][untouched]) and not alpha[untouched].any()


def test_the_order_of_the_entries_and_masked_ones_among_them_do_not_matter(encoder):
    a = make(encoder, dtype=torch.float64)
    expected_out, _ = ops.latent_attention(**a)
    a["ids"] = torch.cat([a["ids"], torch.full((6, 3), -1)], 1)[:, torch.randperm(7)]
    torch.testing.assert_close(ops.latent_attention(**a)[0], expected_out, rtol=0, atol=1e-13)


@given(m=st.integers(3, 8), d=st.integers(2, 40), seed=st.integers(0, 2**31), value=st.sampled_from([1.0, NAN]))
@same_backend_in_all_examples
@each_backend
def test_no_token_depends_on_another(m, d, seed, value, encoder):
    """Bit for bit: the others' ids, queries and inputs are replaced, or taken away by ids of -1."""
    torch.manual_seed(seed)
    a = make(encoder, m=m, d=d)
    out, alpha = ops.latent_attention(**a)
    mine, others = 0, slice(1, None)
    for ids in (torch.full_like(a["ids"], -1), torch.randint(0, 9, (m, 4))):
        b = {name: t.clone() if isinstance(t, torch.Tensor) else t for name, t in a.items()}
        b["ids"][others], b["queries"][others], b["inputs"][others] = ids[others], value, value
        changed, gates = ops.latent_attention(**b)
        assert torch.equal(changed[mine], out[mine]) and gates[mine] == alpha[mine]


@each_backend
def test_any_strides(encoder):
    a = make(encoder, heads=3)
    wanted = ops.latent_attention(**a)
    for name, t in a.items():
        if isinstance(t, torch.Tensor):
            a[name] = t.transpose(0, -1).contiguous().transpose(0, -1)
    for got, exact in zip(ops.latent_attention(**a), wanted, strict=True):
        torch.testing.assert_close(got, exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("heads", [None, 2])
@blends
def test_gradients(convention, norm, heads, mode, encoder, gradcheck):
    a = make(encoder, m=4, d=3, heads=heads, dtype=torch.float64)
    tensors = {name: a.pop(name) for name in ("queries", "inputs")} | gate_of(mode, 4, 3, torch.float64)
    _, alpha = ops.latent_attention(**a, **tensors)
    assert mode.startswith("given") or (alpha > 0).sum() >= 1
    gradcheck(lambda **t: ops.latent_attention(**a, **t, convention=convention, norm=norm), tensors)


def test_no_gradient_where_the_gate_is_clamped(encoder):
    a = make(encoder, m=60)
    anchor = torch.randn(60, 8).requires_grad_()
    _, alpha = ops.latent_attention(**a, anchor=anchor)
    alpha.sum().backward()
    closed = alpha == 0
    assert 10 < closed.sum() < 50
    assert not anchor.grad[closed].any() and anchor.grad[~closed].any(-1).all()


@pytest.mark.parametrize("value", [NAN, float("inf")])
@pytest.mark.parametrize("mode", ["token", "anchor", "given"])
def test_an_untouched_token_passes_the_gradient_and_spoils_none(mode, value, encoder):
    """Padding may hold anything: token 1 finds nothing."""
    a, gates = make(encoder), gate_of(mode, 6, 8, torch.float32)
    gradients = []
    for spoilt in (False, True):
        leaves = {name: a[name].clone() for name in ("queries", "inputs")} | {n: t.clone() for n, t in gates.items()}
        if spoilt:
            leaves["queries"][1], leaves["inputs"][1] = value, value
        for t in leaves.values():
            t.requires_grad_()
        out, alpha = ops.latent_attention(**a | leaves)
        assert not alpha[1]
        ((out * torch.arange(8)).sum() + alpha.sum()).backward()
        gradients.append([t.grad for t in leaves.values()])
    for got, wanted in zip(*reversed(gradients), strict=True):
        assert torch.equal(got, wanted)
    assert torch.equal(gradients[1][1][1], torch.arange(8.0))


@pytest.mark.parametrize("mode", MODES)
def test_gradients_come_in_the_dtype_of_each_tensor(mode, encoder, assert_near):
    a, gates = make(encoder, dtype=torch.bfloat16), gate_of(mode, 6, 8, torch.bfloat16)
    gradients = {}
    for dtype in (torch.bfloat16, torch.float64):
        leaves = {
            n: t.detach().to(dtype).requires_grad_() for n, t in (gates | a).items() if n in (*gates, *list(a)[:2])
        }
        out, _ = ops.latent_attention(**a | leaves)
        out.double().sum().backward()
        gradients[dtype] = [t.grad for t in leaves.values()]
    for got, wanted in zip(gradients[torch.bfloat16], gradients[torch.float64], strict=True):
        assert got.dtype == torch.bfloat16
        assert_near(got, wanted, terms=256)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(opcheck, encoder, mode, dtype):
    traced = (mode, dtype) in [("token", torch.float32), ("anchors", torch.bfloat16), ("given each", torch.float32)]
    a, gates = make(encoder, heads=2, dtype=dtype), gate_of(mode, 6, 8, dtype)
    inputs, queries = a["inputs"].T.contiguous().T, a["queries"].transpose(0, 1).contiguous().transpose(0, 1)
    tail = (
        a["keys"],
        a["values"],
        None if mode == "token" else ops.project_values(a["values"], a["encoder"]).to(dtype),
        a["ids"],
        *a["encoder"],
        gates.get("alpha"),
        gates.get("anchor"),
        0.5,
        "eq7",
        "match",
    )
    opcheck("latent_attention", (queries, inputs, *tail), trained=(0, 1, 10, 11), traced=traced)
    grads = (torch.randn(8, 6).to(dtype).T, torch.randn(6))
    opcheck("latent_attention_backward", (*grads, queries, inputs, *tail), traced=traced)


def test_compiles(assert_compiles, encoder):
    a = make(encoder)
    queries, inputs = a.pop("queries"), a.pop("inputs")

    def run(queries, inputs, anchor):
        return ops.latent_attention(queries, inputs, **a, anchor=anchor)

    anchor = a["encoder"].b2 + 0.1 * inputs[::3]  # near to what Enc_sem returns: the gate is open
    assert_compiles(run, queries, inputs, anchor)


def encoder_with(**changes):
    return lambda a: a | {"encoder": a["encoder"]._replace(**changes)}


def grown(name):
    return lambda a: a | {name: a[name].clone().requires_grad_()}


META = torch.zeros(6, 8, device="meta")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a: a | {"convention": "eq8"}, ValueError, "convention: expected one of inclusion, eq7; got 'eq8'"),
        (lambda a: a | {"norm": None}, ValueError, "norm: expected one of match, none; got None"),
        (lambda a: a | {"inputs": [0.0]}, TypeError, "inputs: expected a tensor, got list"),
        (lambda a: a | {"inputs": torch.zeros(8)}, ValueError, "inputs: expected shape"),
        (lambda a: a | {"queries": [0.0]}, TypeError, "queries: expected a tensor, got list"),
        (lambda a: a | {"queries": torch.zeros(5, 8)}, ValueError, r"queries: expected shape \[6, \*, \*\]"),
        (lambda a: a | {"queries": META}, ValueError, "queries: expected device cpu"),
        (lambda a: a | {"keys": torch.zeros(9, 7)}, ValueError, r"keys: expected shape \[\*, 1, 8\]"),
        (lambda a: a | {"keys": torch.zeros(9, 8).long()}, TypeError, "keys: expected float32"),
        (lambda a: a | {"values": torch.zeros(8, 8)}, ValueError, r"values: expected shape \[9, 1, 8\]"),
        (lambda a: a | {"values": torch.zeros(9, 2, 8)}, ValueError, r"values: expected shape \[9, 1, 8\]"),
        (lambda a: a | {"ids": torch.zeros(6, 2)}, TypeError, "ids: expected an int64 tensor"),
        (lambda a: a | {"ids": torch.zeros(6).long()}, ValueError, "ids: expected shape"),
        (lambda a: a | {"ids": torch.zeros(4, 2).long()}, ValueError, "ids: 6 tokens cannot be split .* 4 rows"),
        (lambda a: a | {"ids": torch.zeros(0, 2).long()}, ValueError, "ids: 6 tokens cannot be split .* 0 rows"),
        (lambda a: a | {"ids": META.long()}, ValueError, "ids: expected device cpu"),
        (lambda a: a | {"encoder": None}, TypeError, "encoder: expected SemanticEncoder, got NoneType"),
        (encoder_with(w1=torch.zeros(5, 7)), ValueError, r"encoder.w1: expected shape \[\*, 8\]"),
        (encoder_with(b1=torch.zeros(4)), ValueError, r"encoder.b1: expected shape \[5\]"),
        (encoder_with(w2=torch.zeros(5, 8)), ValueError, r"encoder.w2: expected shape \[8, 5\]"),
        (encoder_with(b2=torch.zeros(5)), ValueError, r"encoder.b2: expected shape \[8\]"),
        (encoder_with(b2=torch.zeros(8, device="meta")), ValueError, "b2: expected device cpu"),
        (lambda a: a | {"alpha": 0.3}, TypeError, "alpha: expected a tensor, got float"),
        (
            lambda a: a | {"alpha": torch.zeros(2)},
            ValueError,
            r"alpha: expected shape \[1\] or \[6\], got float32\[2\]",
        ),
        (lambda a: a | {"anchor": torch.zeros(2, 7)}, ValueError, r"anchor: expected shape \[\*, 8\]"),
        (lambda a: a | {"anchor": torch.zeros(4, 8)}, ValueError, "anchor: 6 tokens cannot be split .* 4 rows"),
        (lambda a: a | {"anchor": META}, ValueError, "anchor: expected device cpu"),
        (grown("keys"), ValueError, "keys: requires_grad is set"),
        (grown("values"), ValueError, "values: requires_grad is set"),
        (encoder_with(w2=torch.zeros(8, 5, requires_grad=True)), ValueError, "encoder_w2: requires_grad is set"),
    ],
)
def test_wrong_arguments_are_errors(change, error, message, encoder):
    arguments = make(encoder)
    with pytest.raises(error, match=message):
        ops.latent_attention(**change(arguments))
