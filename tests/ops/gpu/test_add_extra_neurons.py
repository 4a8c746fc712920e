"""The extra neurons on a GPU, forward and backward: what is computed, and with which loads, blocks and launches."""

from __future__ import annotations

import itertools

import pytest
import torch
from ops.gpu.running_error import Approx, given
from ops.test_patched_ffn import as_csr, make_pool
from ptxsim import OutOfBoundsError

from unike_kernels import BackendUnavailableError, ops
from unike_kernels.ops import _backend, _triton
from unike_kernels.ops.patched_ffn import triton as forward
from unike_kernels.ops.patched_ffn import triton_backward as backward
from unike_kernels.ops.patched_ffn.reference import ExtraOperands, activate, activate_slope, token_slots

# Edit 3 takes two steps of 16 neurons.
SIZES, ROWS = (3, 1, 0, 18), ([3, 2, 0], [], [1, 0])
HALVES = (torch.bfloat16, torch.float16)


def dot(a: Approx, b: Approx, x: torch.Tensor, table: torch.Tensor) -> Approx:
    return a.exact_dot(b) if x.dtype == table.dtype and x.dtype in HALVES else a @ b


def gates(x, pool) -> tuple[Approx, Approx | None]:
    """Pre-activations and factors, [M, P]."""
    gate = dot(given(x), given(pool.keys).T, x, pool.keys) + given(pool.key_bias)
    return gate, None if pool.up is None else dot(given(x), given(pool.up).T, x, pool.up) + given(pool.up_bias)


def times(x, pool) -> torch.Tensor:
    """How often each token's list names each edit: [M, E]."""
    slots = token_slots(pool, len(x))
    return torch.stack([(slots == e).sum(1) for e in range(len(pool.beta))], 1)


def edit_of(pool) -> torch.Tensor:
    return torch.arange(len(pool.beta)).repeat_interleave(pool.indptr.diff())


def with_extra(total: Approx, x, pool, activation) -> Approx:
    """Every edit's output for every token, added as often as the token's list names the edit."""
    gate, factor = gates(x, pool)
    o = gate.apply(lambda v: activate(activation, v), 1.13, ulps=8 + gate.value.abs())
    o = o if factor is None else o * factor
    named, owner = times(x, pool), edit_of(pool)
    for e in range(len(pool.beta)):
        own = o[:, owner == e]
        along = own.sum(1, keepdim=True) * given(pool.beta[e]) * given(pool.zeta[e])
        output = own @ given(pool.values[owner == e]) + along
        for count in range(int(named[:, e].max())):
            total = total + output.where((named[:, e] > count).unsqueeze(1))
    return total


def expected(x, base, pool, activation) -> Approx:
    return with_extra(given(base), x, pool, activation).rounded(base.dtype)


def expected_gradients(g, x, pool, activation) -> list[Approx | None]:
    """In the order of ExtraGradients."""
    gate, factor = gates(x, pool)
    named, owner = times(x, pool)[:, edit_of(pool)], edit_of(pool)
    steered = given(pool.values) + given(pool.beta[owner].unsqueeze(1)) * given(pool.zeta[owner])
    to_o = given(g) @ steered.T
    act = gate.apply(lambda v: activate(activation, v), 1.13, ulps=8 + gate.value.abs())
    slope = gate.apply(lambda v: activate_slope(activation, v), 1.6, ulps=8 + gate.value.abs())
    if activation == "relu":  # its slope jumps: where the sign is in doubt, so is the slope
        slope = Approx(slope.value, torch.where(gate.value.abs() <= gate.error, 1.0, 0.0))
    o, to_gate = act, to_o * slope
    count = Approx(named.double(), torch.zeros_like(named, dtype=torch.float64))
    to_up, to_up_bias = None, None
    if factor is not None:
        to_factor = (to_o * act) * count
        o, to_gate = act * factor, to_gate * factor
        to_up, to_up_bias = to_factor.T @ given(x), to_factor.sum(0)
    to_gate, o = to_gate * count, o * count
    sums = to_gate @ given(pool.keys) if factor is None else to_gate @ given(pool.keys) + to_factor @ given(pool.up)
    to_values = o.T @ given(g)
    steps = [to_values[owner == e].sum(0) for e in range(len(pool.beta))]
    along = Approx(torch.stack([s.value for s in steps]), torch.stack([s.error for s in steps]))
    to_zeta, to_beta = given(pool.beta.unsqueeze(1)) * along, (given(pool.zeta) * along).sum(1)
    raw = [sums, to_gate.T @ given(x), to_gate.sum(0), to_up, to_up_bias, to_values, to_zeta, to_beta]
    like = (x, *pool[:7])
    return [None if a is None else a.rounded(t.dtype) for a, t in zip(raw, like, strict=True)]


def case(d, per_row, kind, dtype, rows=ROWS, sizes=SIZES, token_rows=None):
    tokens = per_row * len(rows) if token_rows is None else len(token_rows)
    x, base = torch.randn(tokens, d).to(dtype), torch.randn(tokens, d).to(dtype)
    return x, base, make_pool(d, sizes=sizes, rows=rows, kind=kind, dtype=dtype, token_rows=token_rows)


# One token a row and tiles of 16, columns that fill no step and more than a slice, each kind of neuron.
MATRIX = [
    pytest.param(70, 1, "plain", "relu", torch.float32, id="float32"),
    pytest.param(150, 17, "gated", "silu", torch.bfloat16, id="bfloat16"),
    pytest.param(33, 2, "mixed", "gelu", torch.float16, id="float16"),
]
MORE = [
    pytest.param(d, t, kind, act, dtype, marks=pytest.mark.slow, id=f"{d}-{t}-{kind}-{act}-{dtype}")
    for (d, t), kind, (act, dtype) in itertools.product(
        [(1, 1), (96, 3), (300, 16)],
        ["plain", "gated"],
        [("gelu_tanh", torch.float32), ("silu", torch.float16), ("gelu", torch.bfloat16)],
    )
]


@pytest.mark.parametrize(("d", "per_row", "kind", "activation", "dtype"), MATRIX + MORE)
def test_forward(d, per_row, kind, activation, dtype, everywhere):
    x, base, pool = case(d, per_row, kind, dtype)
    out = everywhere(lambda: forward.add_extra_neurons(x, base, pool, activation))
    assert out.dtype == dtype
    expected(x, base, pool, activation).admits(out)
    unedited = times(x, pool).sum(1) == 0
    assert unedited.any() and torch.equal(out[unedited], base[unedited])


@pytest.mark.parametrize(("d", "per_row", "kind", "activation", "dtype"), MATRIX + MORE)
def test_backward(d, per_row, kind, activation, dtype, everywhere):
    x, g, pool = case(min(d, 70), min(per_row, 3), kind, dtype)
    grads = everywhere(lambda: backward.add_extra_neurons_backward(g, x, pool, activation))
    for name, got, wanted in zip(grads._fields, grads, expected_gradients(g, x, pool, activation), strict=True):
        assert (got is None) == (wanted is None), name
        if wanted is not None:
            wanted.admits(got)
            assert got.any()


def test_rows_of_tokens_in_any_order(launched):
    x, base, pool = case(40, None, "plain", torch.float32, token_rows=torch.tensor([2, 1, 0, 2, 0]))
    out, _ = launched(lambda: forward.add_extra_neurons(x, base, pool, "gelu"))
    expected(x, base, pool, "gelu").admits(out)
    grads, _ = launched(lambda: backward.add_extra_neurons_backward(base, x, pool, "gelu"))
    for got, wanted in zip(grads, expected_gradients(base, x, pool, "gelu"), strict=True):
        assert got is None or wanted.admits(got) is None


def test_every_operand_in_a_dtype_of_its_own(launched):
    x, base, pool = case(40, 2, "gated", torch.float32)
    pool = pool._replace(keys=pool.keys.bfloat16(), up_bias=pool.up_bias.half(), values=pool.values.half())
    out, _ = launched(lambda: forward.add_extra_neurons(x.bfloat16(), base.half(), pool, "silu"))
    assert out.dtype == torch.float16
    expected(x.bfloat16(), base.half(), pool, "silu").admits(out)
    grads, _ = launched(lambda: backward.add_extra_neurons_backward(base.half(), x.bfloat16(), pool, "silu"))
    wanted = expected_gradients(base.half(), x.bfloat16(), pool, "silu")
    for got, bound, t in zip(grads, wanted, (x.bfloat16(), *pool), strict=False):
        assert got.dtype == t.dtype
        bound.admits(got)


def test_strided_rows_far_apart_are_read_in_place(launched):
    """The last rows begin more than 2^31 elements after the first: offsets have 64 bits."""
    d, far = 24, 2**30
    x = torch.empty(3 * far, dtype=torch.bfloat16).as_strided(
        (3, d), (far, 1)
    )  # pages that nobody touches cost nothing
    base = torch.empty(3 * far, dtype=torch.bfloat16).as_strided((3, d), (far, 1))
    x.copy_(torch.randn(3, d))
    base.copy_(torch.randn(3, d))
    pool = make_pool(d, sizes=(4,), rows=([0],), dtype=torch.bfloat16)
    out, _ = launched(lambda: forward.add_extra_neurons(x, base, pool, "gelu"))
    expected(x, base, pool, "gelu").admits(out)
    grads, _ = launched(lambda: backward.add_extra_neurons_backward(base, x, pool, "gelu"))
    for got, wanted in zip(grads, expected_gradients(base, x, pool, "gelu"), strict=True):
        assert got is None or wanted.admits(got) is None


def test_columns_that_are_not_contiguous(launched):
    x, base, pool = case(24, 2, "plain", torch.float32)
    wanted, _ = launched(lambda: forward.add_extra_neurons(x, base, pool, "relu"))
    turned = [t.T.contiguous().T for t in (x, base)]
    spread = pool._replace(keys=pool.keys.T.contiguous().T, values=pool.values.T.contiguous().T)
    got, _ = launched(lambda: forward.add_extra_neurons(*turned, spread, "relu"))
    assert torch.equal(got, wanted)


def test_no_row_depends_on_another(launched):
    """Bit for bit: the others' edits removed from their lists, changed into NaN, or taken out of the pool."""
    x, base, pool = case(40, 2, "gated", torch.bfloat16, rows=([1], [3, 0], [], [1, 2]))
    mine = slice(2, 4)

    def run(pool):
        return launched(lambda: forward.add_extra_neurons(x, base, pool, "silu"))[0][mine]

    wanted = run(pool)
    indptr, row_edits = as_csr([[], [3, 0], [1, 2, 3], []])
    assert torch.equal(run(pool._replace(row_indptr=indptr, row_edits=row_edits)), wanted)
    spoilt = pool._replace(**{name: getattr(pool, name).clone() for name in ("keys", "values", "zeta", "beta")})
    spoilt.keys[3], spoilt.values[3], spoilt.zeta[1:3], spoilt.beta[1] = float("nan"), float("inf"), float("nan"), 1e30
    assert torch.equal(run(spoilt), wanted)
    kept = torch.cat([torch.arange(3), torch.arange(4, 22)])  # without edits 1 and 2
    names = ("keys", "key_bias", "up", "up_bias", "values")
    own = pool._replace(
        **{name: getattr(pool, name)[kept] for name in names}, zeta=pool.zeta[[0, 3]], beta=pool.beta[[0, 3]],
        indptr=torch.tensor([0, 3, 21]), row_indptr=torch.tensor([0, 0, 2, 2, 2]), row_edits=torch.tensor([1, 0]),
    )  # fmt: skip
    assert torch.equal(run(own), wanted)


@pytest.mark.parametrize(("tokens", "neurons"), [(0, 4), (6, 0)])
def test_no_tokens_and_no_neurons(tokens, neurons, launched):
    pool = make_pool(24, sizes=(neurons, 0), rows=([0], [], [1]))
    x, base = torch.randn(tokens, 24), torch.randn(tokens, 24)
    out, _ = launched(lambda: forward.add_extra_neurons(x, base, pool, "relu"))
    assert torch.equal(out, base)
    grads, _ = launched(lambda: backward.add_extra_neurons_backward(base, x, pool, "relu"))
    assert not any(g.any() for g in grads if g is not None)
    assert [None if g is None else g.shape for g in grads] == [None if t is None else t.shape for t in (x, *pool[:7])]


def test_the_operator_and_its_gradients(on_gpu):
    x, base, pool = case(24, 2, "gated", torch.float32)
    trained = [name for name, t in pool._asdict().items() if t is not None and t.is_floating_point()]
    leaves = {name: getattr(pool, name).clone().requires_grad_() for name in trained}
    results = {}
    for backend in ("triton", "reference"):
        at, under = x.clone().requires_grad_(), base.clone().requires_grad_()
        _triton._workspaces.clear()
        with ops.backend(backend), on_gpu() as session:
            out = ops.patched_ffn(at, under, pool._replace(**leaves), activation="silu")
            (out * torch.arange(24.0)).sum().backward()
        assert len(session.launches) == (2 if backend == "triton" else 0)
        results[backend] = [out.detach(), at.grad, under.grad, *(t.grad for t in leaves.values())]
        for t in leaves.values():
            t.grad = None
    for got, wanted in zip(results["triton"], results["reference"], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_what_it_does_not_take_is_refused(on_gpu):
    x, base, pool = case(24, 2, "plain", torch.float64)
    with ops.backend("triton"), pytest.raises(BackendUnavailableError, match="there is no GPU"):
        ops.patched_ffn(x, base, pool, activation="relu")
    with on_gpu(), ops.backend("triton"):
        with pytest.raises(BackendUnavailableError, match="works in float32, the tensors are float64"):
            ops.patched_ffn(x, base, pool, activation="relu")
        with pytest.raises(BackendUnavailableError, match="runs on cpu, the tensors are on meta"):
            _backend.dispatch(
                "add_extra_neurons", ExtraOperands(x.float().to("meta"), base.float().to("meta"), pool, "relu")
            )


def test_nothing_is_allocated_where_memory_is_given(allocates_nothing):
    x, base, pool = case(24, 2, "plain", torch.float32)
    allocates_nothing(forward, lambda **given: forward.add_extra_neurons(x, base, pool, "relu", **given))


def test_writing_over_the_base(launched):
    x, base, pool = case(24, 17, "plain", torch.bfloat16)
    wanted, _ = launched(lambda: forward.add_extra_neurons(x, base, pool, "relu"))
    over = base.clone()
    launched(lambda: forward.add_extra_neurons(x, over, pool, "relu", out=over))
    assert torch.equal(over, wanted)


def test_lists_that_lead_outside_the_pool_are_noticed(launched):
    """What the interpreter is for: the same would be a wild read on a GPU."""
    x, base, pool = case(24, 2, "plain", torch.float32)
    pool.row_edits[0] = 7
    with pytest.raises(OutOfBoundsError):
        launched(lambda: forward.add_extra_neurons(x, base, pool, "relu"))


def sectors(*tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors) // 32


@pytest.mark.parametrize(("tokens", "blocks"), [(1, 32), (48, 48)])
def test_traffic_on_132_multiprocessors(tokens, blocks, launched, monkeypatch):
    """One token: 32 blocks share it, each an equal part of the bytes. 48 tokens of a row: 3 tiles, 16 blocks each."""
    monkeypatch.setattr(forward, "multiprocessors", lambda: 132)
    x, base, pool = case(4096 if tokens == 1 else 2048, tokens, "plain", torch.bfloat16, rows=([0],), sizes=(10,))
    _, session = launched(lambda: forward.add_extra_neurons(x, base, pool, "relu"))
    (launch,) = session.launches
    tiles = -(-tokens // 16)
    assert launch.grid == (blocks, 1, 1)
    for name, t in (("x", x), ("base", base), ("keys", tiles * [pool.keys]), ("values", tiles * [pool.values])):
        assert launch.loads[name].sectors <= 1.02 * sectors(*(t if isinstance(t, list) else [t])), name
    assert all(launch.loads[name].sectors_per_request >= 15 for name in ("keys", "values"))  # 16 bytes a lane
    total = sum(traffic.bytes for traffic in (*launch.loads.values(), *launch.stores.values()))
    assert launch.largest_block_bytes <= 1.1 * total / blocks
    assert launch.shared.bank_conflicts <= 0.25 * launch.shared.ideal
