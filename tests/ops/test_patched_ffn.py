"""The patched FFN against Eq. 3 and 6 written as loops over tokens, edits and neurons in Python floats."""

from __future__ import annotations

import itertools
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unike_kernels import ops
from unike_kernels.ops import EditPool, FFNWeights

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SIZES = (3, 1, 0, 4)  # neurons of each edit
ROWS = ([0], [], [2, 0], [3, 1, 0], [1], [0, 1, 2, 3])  # edits of each row, in order

each_backend = pytest.mark.usefixtures("each_backend")
same_backend_in_all_examples = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])

ACT = {
    "relu": lambda x: max(x, 0.0),
    "gelu": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "relu2": lambda x: max(x, 0.0) ** 2,
}


def as_csr(rows):
    return torch.tensor([0, *np.cumsum([len(r) for r in rows])]), torch.tensor([e for r in rows for e in r]).long()


def make_pool(d, sizes=SIZES, rows=ROWS, kind="plain", dtype=torch.float32, token_rows=None):
    """`kind`: "plain", "gated", or "mixed": the neurons of edit 0 are plain among gated ones."""
    p = sum(sizes)

    def rand(*shape, scale=1.0):
        return (torch.randn(shape, dtype=torch.float64) * scale).to(dtype)

    up, up_bias = (None, None) if kind == "plain" else (rand(p, d, scale=d**-0.5), rand(p))
    if kind == "mixed":
        up[: sizes[0]], up_bias[: sizes[0]] = 0.0, 1.0
    return EditPool(
        rand(p, d, scale=d**-0.5), rand(p), up, up_bias, rand(p, d), rand(len(sizes), d), rand(len(sizes)),
        torch.tensor([0, *np.cumsum(sizes)]), *as_csr(rows), token_rows,
    )  # fmt: skip


def make_base(d, gated, dtype=torch.float32, f=9):
    shapes = ((f, d), (f,), (f, d), (f,), (d, f), (d,)) if gated else ((f, d), None, None, None, (d, f), None)
    return FFNWeights(*(None if s is None else torch.randn(s).div(s[-1] ** 0.5).to(dtype) for s in shapes))


def lists(pool):
    ends = pool.row_indptr.tolist()
    return [pool.row_edits[a:b].tolist() for a, b in pairwise(ends)]


def expected_extra(x, pool, activation):
    """sum over the row's edits of o (W_V + beta zeta'), float64 [M, d]."""
    q, k, b, v, zeta, beta = (
        t.double().numpy() for t in (x, pool.keys, pool.key_bias, pool.values, pool.zeta, pool.beta)
    )
    rows, ends = lists(pool), pool.indptr.tolist()
    out = np.zeros(x.shape)
    for t in range(len(x)):
        row = t * len(rows) // len(x) if pool.token_rows is None else int(pool.token_rows[t])
        for e in rows[row]:
            for n in range(ends[e], ends[e + 1]):
                o = ACT[activation](float(np.dot(q[t], k[n])) + b[n])
                if pool.up is not None:
                    o *= np.dot(q[t], pool.up[n].double().numpy()) + float(pool.up_bias[n])
                out[t] += o * (v[n] + beta[e] * zeta[e])
    return out


def expected_base(x, base, activation):
    w = [None if t is None else t.double().numpy() for t in base]
    out = np.zeros(x.shape)
    for t, q in enumerate(x.double().numpy()):
        out[t] = 0.0 if base.b_out is None else w[5]
        for j in range(len(w[0])):
            o = ACT[activation](float(np.dot(w[0][j], q)) + (0.0 if w[1] is None else w[1][j]))
            if w[2] is not None:
                o *= np.dot(w[2][j], q) + (0.0 if w[3] is None else w[3][j])
            out[t] += w[4][:, j] * o
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["plain", "gated", "mixed"])
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@each_backend
def test_neurons_on_a_given_base(activation, kind, dtype, assert_near):
    d, tokens = 11, 2 * len(ROWS)
    x, base = torch.randn(tokens, d).to(dtype), torch.randn(tokens, d).to(dtype)
    pool = make_pool(d, kind=kind, dtype=dtype)
    out = ops.patched_ffn(x, base, pool, activation=activation)
    assert out.dtype == dtype
    assert_near(out, base.double().numpy() + expected_extra(x, pool, activation), terms=d + sum(SIZES) + 4)
    assert torch.equal(out[2:4], base[2:4])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("gated", "kind"), [(False, "plain"), (True, "plain"), (True, "gated"), (True, "mixed")])
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_neurons_and_base_together(activation, gated, kind, dtype, assert_near):
    d, tokens = 11, 2 * len(ROWS)
    x, base, pool = torch.randn(tokens, d).to(dtype), make_base(d, gated, dtype), make_pool(d, kind=kind, dtype=dtype)
    out = ops.patched_ffn(x, base, pool, activation=activation)
    wanted = expected_base(x, base, activation)
    assert out.dtype == dtype
    assert_near(out, wanted + expected_extra(x, pool, activation), terms=2 * d + sum(SIZES) + 9)
    nothing = pool._replace(row_indptr=torch.zeros(2).long(), row_edits=torch.zeros(0).long())
    plain = ops.patched_ffn(x, base, nothing, activation=activation)
    assert_near(plain, wanted, terms=2 * d + 9)
    assert torch.equal(out[2:4], plain[2:4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_base_of_a_half_dtype_is_rounded_before_the_neurons_are_added(dtype, assert_near):
    x, base, pool = torch.randn(12, 8).to(dtype), make_base(8, True, dtype), make_pool(8, dtype=dtype)
    base_out = ops.patched_ffn(x, base, pool._replace(row_indptr=torch.zeros(2).long()), activation="silu")
    assert_near(base_out, expected_base(x, base, "silu"), terms=32)
    fused = ops.patched_ffn(x, base, pool, activation="silu")
    assert torch.equal(fused, ops.patched_ffn(x, base_out, pool, activation="silu"))


@each_backend
def test_float32_neurons_in_a_bfloat16_model(assert_near):
    x, base = torch.randn(12, 8).bfloat16(), torch.randn(12, 8).bfloat16()
    pool = make_pool(8)
    out = ops.patched_ffn(x, base, pool, activation="gelu")
    assert out.dtype == torch.bfloat16
    assert_near(out, base.double().numpy() + expected_extra(x, pool, "gelu"), terms=24)


@each_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_output_has_the_dtype_of_the_base_and_its_bits_where_there_is_no_edit(dtype):
    base = torch.randn(6, 4, dtype=torch.float64).to(dtype)
    out = ops.patched_ffn(torch.randn(6, 4), base, make_pool(4), activation="relu")
    assert out.dtype == dtype
    assert torch.equal(out[1], base[1])


@each_backend
def test_edits_are_summed_in_the_order_of_the_list():
    d = 64
    x, base = torch.randn(50, d), torch.randn(50, d)
    pool = make_pool(d, sizes=(5, 7, 6))

    def with_rows(rows, base=base):
        indptr, edits = as_csr(rows)
        with ops.backend("reference"):
            return ops.patched_ffn(x, base, pool._replace(row_indptr=indptr, row_edits=edits), activation="silu")

    alone = [with_rows([[e]], torch.zeros_like(base)) for e in range(3)]
    for order in ([0, 1, 2], [2, 0, 1]):
        a, b, c = (alone[e] for e in order)
        assert torch.equal(with_rows([order]), base + ((a + b) + c))
    assert not torch.equal(with_rows([[0, 1, 2]]), with_rows([[2, 0, 1]]))


def test_beta_steers_the_values_along_zeta():
    """Eq. 6: with beta, the edit does what it does with the values W_V + beta zeta'."""
    x, base = torch.randn(5, 6).double(), torch.randn(5, 6).double()
    pool = make_pool(6, sizes=(4,), rows=([0],), dtype=torch.float64)
    moved = pool._replace(values=pool.values + pool.beta * pool.zeta, beta=torch.zeros(1).double())
    got, wanted = (ops.patched_ffn(x, base, p, activation="gelu") for p in (pool, moved))
    torch.testing.assert_close(got, wanted, rtol=1e-14, atol=1e-14)
    still = ops.patched_ffn(x, base, pool._replace(beta=torch.zeros(1).double()), activation="gelu")
    assert (got - still).abs().max() > 1e-3


@each_backend
def test_a_fresh_edit_changes_no_bit():
    pool = make_pool(6, sizes=(4,), rows=([0],))
    fresh = pool._replace(values=torch.zeros(4, 6), beta=torch.zeros(1))
    base = torch.randn(5, 6)
    assert torch.equal(ops.patched_ffn(torch.randn(5, 6), base, fresh, activation="relu"), base)


@pytest.mark.parametrize("form", ["vendor", "fused"])
@each_backend
def test_leading_dimensions_strides_and_rows_of_tokens(form):
    d = 6
    x, base_out = torch.randn(6, 4, d), torch.randn(6, 4, d)
    pool, weights = make_pool(d), make_base(d, True)

    def run(x, base_out, pool):
        return ops.patched_ffn(x, weights if form == "fused" else base_out, pool, activation="silu")

    expected = run(x, base_out, pool)
    assert expected.shape == (6, 4, d)
    assert torch.equal(run(x.flatten(0, 1), base_out.flatten(0, 1), pool), expected.flatten(0, 1))
    strided = [t.permute(2, 1, 0).contiguous().permute(2, 1, 0) for t in (x, base_out)]
    torch.testing.assert_close(run(*strided, pool), expected, rtol=0, atol=1e-5)
    tokens = torch.arange(6).repeat_interleave(4)
    order = torch.randperm(24)
    shuffled = run(x.flatten(0, 1)[order], base_out.flatten(0, 1)[order], pool._replace(token_rows=tokens[order]))
    torch.testing.assert_close(shuffled, expected.flatten(0, 1)[order], rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 6), (6, 0, 6), (0, 3, 6)])
@pytest.mark.parametrize("form", ["vendor", "fused"])
@each_backend
def test_no_tokens(form, shape):
    x = torch.zeros(shape, requires_grad=True)
    base = torch.zeros(shape) if form == "vendor" else make_base(6, True)
    for token_rows in (None, torch.zeros(0).long()):
        pool = make_pool(6, token_rows=token_rows)
        pool.values.requires_grad_()
        out = ops.patched_ffn(x, base, pool, activation="silu")
        out.sum().backward()
        assert out.shape == x.grad.shape == shape
        assert not pool.values.grad.any()


@given(
    rows=st.lists(st.lists(st.integers(0, 3), max_size=4, unique=True), min_size=1, max_size=5),
    per_row=st.integers(1, 4),
    d=st.integers(1, 20),
    kind=st.sampled_from(["plain", "gated"]),
    seed=st.integers(0, 2**31),
)
@same_backend_in_all_examples
@each_backend
def test_any_selection(rows, per_row, d, kind, seed, assert_near):
    torch.manual_seed(seed)
    x, base = torch.randn(len(rows) * per_row, d), torch.randn(len(rows) * per_row, d)
    pool = make_pool(d, rows=rows, kind=kind)
    out = ops.patched_ffn(x, base, pool, activation="silu")
    extra = expected_extra(x, pool, "silu")
    assert_near(out, base.double().numpy() + extra, terms=d + 4 * len(rows) + sum(SIZES))
    empty = torch.tensor([not row for row in rows]).repeat_interleave(per_row)
    assert torch.equal(out[empty], base[empty])


@given(
    rows=st.lists(st.lists(st.integers(0, 3), max_size=4, unique=True), min_size=2, max_size=5),
    others=st.lists(st.lists(st.integers(0, 3), max_size=4, unique=True), min_size=5, max_size=5),
    mine=st.integers(0, 4),
    d=st.integers(1, 80),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
@same_backend_in_all_examples
@each_backend
def test_no_row_depends_on_the_edits_of_another(rows, others, mine, d, dtype, seed):
    """Design point 10, bit for bit: other rows' edits removed, replaced, changed in value, or taken from the pool."""
    torch.manual_seed(seed)
    mine %= len(rows)
    x, base = (torch.randn(len(rows) * 3, d).to(dtype) for _ in range(2))
    pool = make_pool(d, sizes=(3, 1, 2, 4), rows=rows)
    here = slice(3 * mine, 3 * mine + 3)

    def run(rows, pool=pool):
        indptr, edits = as_csr(rows)
        return ops.patched_ffn(x, base, pool._replace(row_indptr=indptr, row_edits=edits), activation="gelu")[here]

    expected = run(rows)
    assert torch.equal(run([row if r == mine else [] for r, row in enumerate(rows)]), expected)
    assert torch.equal(run([row if r == mine else others[r] for r, row in enumerate(rows)]), expected)
    unused = [e for e in range(4) if e not in rows[mine]]
    neurons = [n for e in unused for n in range(*pool.indptr[e : e + 2].tolist())]
    changed = pool._replace(**{f: getattr(pool, f).clone() for f in ("keys", "values", "zeta")})
    changed.keys[neurons], changed.values[neurons], changed.zeta[unused] = 1e38, float("nan"), float("inf")
    assert torch.equal(run(rows, changed), expected)


@pytest.mark.parametrize("sizes", [(3, 5, 1, 4), (3, 1, 2, 4)])
@pytest.mark.parametrize("kind", ["plain", "gated"])
@pytest.mark.parametrize("d", [17, 49, 63, 64, 90])
@each_backend
def test_no_row_depends_on_what_is_left_in_the_pool(d, kind, sizes):
    """Without the edits of others one's own neurons lie at another alignment, by which BLAS may round."""
    for tokens in (1, 2) * 10:
        x, base = torch.randn(2 * tokens, d), torch.zeros(2 * tokens, d)  # nothing that would swallow the last bit
        pool = make_pool(d, sizes=sizes, rows=([1], [0, 2]), kind=kind)
        neurons, edits = slice(*pool.indptr[1:3].tolist()), slice(1, 2)
        parts = dict.fromkeys(("keys", "key_bias", "up", "up_bias", "values"), neurons) | {"zeta": edits, "beta": edits}
        own = pool._replace(
            **{f: getattr(pool, f)[of].clone() for f, of in parts.items() if getattr(pool, f) is not None},
            indptr=torch.tensor([0, sizes[1]]), row_indptr=torch.tensor([0, 1, 1]), row_edits=torch.tensor([0]),
        )  # fmt: skip
        out = ops.patched_ffn(x, base, own, activation="silu")
        assert torch.equal(out[:tokens], ops.patched_ffn(x, base, pool, activation="silu")[:tokens])
        assert torch.equal(out[tokens:], base[tokens:])


TRAINED = ("keys", "key_bias", "up", "up_bias", "values", "zeta", "beta")


def rebuild(pool, tensors):
    return pool._replace(**{name: t for name, t in tensors.items() if name in TRAINED})


@pytest.mark.parametrize("kind", ["plain", "gated"])
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_gradients_on_a_given_base(activation, kind, gradcheck):
    rows = ([0], [], [1, 0], [0, 1])
    pool = make_pool(3, sizes=(2, 1), rows=rows, kind=kind, dtype=torch.float64)
    tensors = {"x": torch.randn(4, 3).double(), "base": torch.randn(4, 3).double()}
    tensors |= {name: getattr(pool, name) for name in TRAINED if getattr(pool, name) is not None}
    gradcheck(lambda x, base, **rest: ops.patched_ffn(x, base, rebuild(pool, rest), activation=activation), tensors)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_gradients_of_neurons_and_base_together(activation, gated, gradcheck):
    pool = make_pool(3, sizes=(2, 1), rows=([0], [], [1, 0]), kind="gated", dtype=torch.float64)
    base = make_base(3, gated, torch.float64, f=2)
    tensors = {"x": torch.randn(3, 3).double()} | {n: getattr(pool, n) for n in TRAINED}
    tensors |= {n: t for n, t in base._asdict().items() if t is not None}

    def run(x, **rest):
        weights = base._replace(**{n: t for n, t in rest.items() if n not in TRAINED})
        return ops.patched_ffn(x, weights, rebuild(pool, rest), activation=activation)

    gradcheck(run, tensors)


@pytest.mark.parametrize("form", ["vendor", "fused"])
def test_gradients_come_in_the_dtype_of_each_tensor(form, assert_near):
    pool = make_pool(8, kind="gated")
    if form == "fused":  # x gets two gradients, each rounded to its dtype: the test of one rounding takes float32
        x, base = torch.randn(6, 8), make_base(8, True, torch.bfloat16)
    else:
        x, base = torch.randn(6, 8).bfloat16(), torch.randn(6, 8).bfloat16()
    gradients = {}
    for wide in (None, torch.float64):

        def leaf(t, wide=wide):
            return t if t is None or not t.is_floating_point() else t.detach().to(wide or t.dtype).requires_grad_()

        at, neurons = leaf(x), EditPool(*map(leaf, pool))
        given = FFNWeights(*map(leaf, base)) if form == "fused" else leaf(base)
        ops.patched_ffn(at, given, neurons, activation="silu").sum().backward()
        leaves = [at, *(given if form == "fused" else [given]), *(getattr(neurons, n) for n in TRAINED)]
        gradients[wide] = [t.grad for t in leaves]
        if wide is None:
            assert all(t.grad.dtype == t.dtype for t in leaves)
    for got, wanted in zip(gradients[None], gradients[torch.float64], strict=True):
        assert_near(got, wanted, terms=64)


@pytest.mark.parametrize("kind", ["plain", "gated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(opcheck, kind, dtype):
    traced = (kind, dtype) in [("gated", torch.float32), ("plain", torch.bfloat16)]
    pool = make_pool(4, sizes=(2, 1), rows=([0], [1, 0]), kind=kind, dtype=dtype)
    x, base_out, grad = (torch.randn(4, 6).to(dtype).T for _ in range(3))
    base = make_base(4, kind == "gated", dtype)
    opcheck("add_extra_neurons", (x, base_out, *pool, "silu"), trained=range(9), traced=traced)
    opcheck("patched_ffn", (x, *base, *pool, "silu"), trained=range(14), traced=traced)
    opcheck("add_extra_neurons_backward", (grad, x, *pool, "silu"), traced=traced)
    opcheck("base_ffn_backward", (grad, x, *base, "silu"), traced=traced)


@pytest.mark.parametrize("form", ["vendor", "fused"])
def test_compiles(assert_compiles, form):
    pool = make_pool(4, sizes=(2, 1), rows=([0], [1, 0]), kind="gated")
    tensors = [torch.randn(4, 4), *(getattr(pool, n) for n in TRAINED)]
    tensors += make_base(4, True) if form == "fused" else [torch.randn(4, 4)]

    def run(x, *rest):
        base = FFNWeights(*rest[7:]) if form == "fused" else rest[7]
        return ops.patched_ffn(x, base, pool._replace(**dict(zip(TRAINED, rest, strict=False))), activation="gelu")

    assert_compiles(run, *tensors)


def replaced(**changes):
    return lambda a: a | {"pool": a["pool"]._replace(**changes)}


def weights(**changes):
    return lambda a: a | {"base": make_base(4, True)._replace(**changes)}


META, LONG = torch.zeros(6, 4, device="meta"), torch.zeros(6, 4).long()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a: a | {"activation": "tanh"}, ValueError, "activation: expected one of relu, gelu, .*got 'tanh'"),
        (lambda a: a | {"x": [[0.0]]}, TypeError, "x: expected Tensor, got list"),
        (lambda a: a | {"x": LONG}, TypeError, "x: expected float32"),
        (lambda a: a | {"x": torch.tensor(1.0)}, ValueError, r"x: expected shape \[..., d\] with d >= 1"),
        (lambda a: a | {"x": torch.zeros(6, 0)}, ValueError, r"x: expected shape \[..., d\] with d >= 1"),
        (lambda a: a | {"base": torch.zeros(6, 3)}, ValueError, r"base: expected shape \[6, 4\]"),
        (lambda a: a | {"base": None}, TypeError, "base: expected a tensor, got NoneType"),
        (lambda a: a | {"base": META}, ValueError, "base: expected device cpu"),
        (lambda a: a | {"pool": None}, TypeError, "pool: expected EditPool, got NoneType"),
        (lambda a: a | {"x": torch.zeros(7, 4)}, ValueError, "pool.row_indptr: 7 tokens .* evenly among 6 rows"),
        (replaced(row_indptr=torch.zeros(1).long()), ValueError, "pool.row_indptr: 6 tokens .* among 0 rows"),
        (replaced(keys=torch.zeros(8, 5)), ValueError, r"pool.keys: expected shape \[\*, 4\]"),
        (replaced(keys=LONG), TypeError, "pool.keys: expected float32"),
        (replaced(key_bias=torch.zeros(7)), ValueError, r"pool.key_bias: expected shape \[8\]"),
        (replaced(values=torch.zeros(7, 4)), ValueError, r"pool.values: expected shape \[8, 4\]"),
        (replaced(zeta=torch.zeros(4, 5)), ValueError, r"pool.zeta: expected shape \[\*, 4\]"),
        (replaced(beta=torch.zeros(3)), ValueError, r"pool.beta: expected shape \[4\]"),
        (replaced(up=torch.zeros(8, 4)), ValueError, "pool: gated neurons need both up and up_bias"),
        (replaced(up=torch.zeros(8, 3), up_bias=torch.zeros(8)), ValueError, r"pool.up: expected shape \[8, 4\]"),
        (replaced(up=torch.zeros(8, 4), up_bias=torch.zeros(1)), ValueError, r"pool.up_bias: expected shape \[8\]"),
        (replaced(indptr=torch.zeros(4).long()), ValueError, r"pool.indptr: expected shape \[5\]"),
        (replaced(indptr=torch.zeros(5)), TypeError, "pool.indptr: expected an int64 tensor"),
        (replaced(row_indptr=torch.zeros(7).int()), TypeError, "pool.row_indptr: expected an int64 tensor"),
        (replaced(row_edits=torch.zeros(2, 2).long()), ValueError, "pool.row_edits: expected shape"),
        (replaced(token_rows=torch.zeros(5).long()), ValueError, r"pool.token_rows: expected shape \[6\]"),
        (replaced(zeta=torch.zeros(4, 4, device="meta")), ValueError, "pool.zeta: expected device cpu"),
        (weights(w_in=torch.zeros(9, 5)), ValueError, r"base.w_in: expected shape \[\*, 4\]"),
        (weights(b_in=torch.zeros(8)), ValueError, r"base.b_in: expected shape \[9\]"),
        (weights(w_up=torch.zeros(9, 5)), ValueError, r"base.w_up: expected shape \[9, 4\]"),
        (weights(b_up=torch.zeros(8)), ValueError, r"base.b_up: expected shape \[9\]"),
        (weights(w_up=None), ValueError, "base.b_up: expected None without base.w_up"),
        (weights(w_out=torch.zeros(9, 4)), ValueError, r"base.w_out: expected shape \[4, 9\]"),
        (weights(w_out=None), TypeError, "base.w_out: expected a tensor, got NoneType"),
        (weights(b_out=torch.zeros(9)), ValueError, r"base.b_out: expected shape \[4\]"),
        (weights(b_out=torch.zeros(4, device="meta")), ValueError, "base.b_out: expected device cpu"),
    ],
)
def test_wrong_arguments_are_errors(change, error, message):
    arguments = {"x": torch.zeros(6, 4), "base": torch.zeros(6, 4), "pool": make_pool(4), "activation": "relu"}
    ops.patched_ffn(**arguments)
    with pytest.raises(error, match=message):
        ops.patched_ffn(**change(arguments))


def test_what_torch_has_put_off_is_computed():
    """Tensors that are marked as negated, for the activations and for the neurons; with gradients and without."""
    pool, lazy = make_pool(8), lambda *s: torch.complex(torch.randn(s), torch.randn(s)).conj().imag
    x, base, values = lazy(12, 8), lazy(12, 8), lazy(*pool.values.shape)
    assert x.is_neg() and values.is_neg()
    plain = [t.clone() for t in (x, base, values)]
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            wanted = ops.patched_ffn(*plain[:2], pool._replace(values=plain[2]), activation="silu")
            for some in itertools.product((False, True), repeat=3):
                a, b, v = (t if lazy_one else p for lazy_one, t, p in zip(some, (x, base, values), plain, strict=True))
                assert torch.equal(ops.patched_ffn(a, b, pool._replace(values=v), activation="silu"), wanted)
