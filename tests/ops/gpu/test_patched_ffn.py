"""The whole patched FFN on a GPU: what is computed in one launch, that every weight is read once, and for whom."""

from __future__ import annotations

import pytest
import torch
from ops.gpu.running_error import given
from ops.gpu.test_add_extra_neurons import ROWS, SIZES, dot, with_extra
from ops.test_patched_ffn import as_csr, make_base, make_pool

from unike_kernels import ops
from unike_kernels.ops import _triton
from unike_kernels.ops.patched_ffn import fuses
from unike_kernels.ops.patched_ffn import triton as side
from unike_kernels.ops.patched_ffn import triton_fused as kernel
from unike_kernels.ops.patched_ffn.reference import activate, add_extra_neurons, base_ffn


@pytest.fixture(autouse=True)
def few_multiprocessors(with_multiprocessors):
    with_multiprocessors(3, kernel, side)


def unrounded(x, base, activation):
    """FFN(x) before its last rounding; the hidden activations are rounded to the dtype of the weights."""
    gate = dot(given(x), given(base.w_in).T, x, base.w_in)
    gate = gate if base.b_in is None else gate + given(base.b_in)
    hidden = gate.apply(lambda v: activate(activation, v), 1.13, ulps=8 + gate.value.abs())
    if base.w_up is not None:
        factor = dot(given(x), given(base.w_up).T, x, base.w_up)
        hidden = hidden * (factor if base.b_up is None else factor + given(base.b_up))
    hidden = hidden.rounded(base.w_out.dtype if x.dtype == base.w_out.dtype else torch.float32)
    out = dot(hidden, given(base.w_out).T, x, base.w_out)
    return out if base.b_out is None else out + given(base.b_out)


def check(out, x, base, pool, activation):
    assert out.dtype == x.dtype
    bound = with_extra(unrounded(x, base, activation), x, pool, activation).rounded(x.dtype)
    wide = [
        type(t)(*(None if u is None else u.double() if u.is_floating_point() else u for u in t)) for t in (base, pool)
    ]
    exact = add_extra_neurons(x.double(), base_ffn(x.double(), wide[0], activation), wide[1], activation)
    torch.testing.assert_close(bound.value, exact, rtol=1e-9, atol=1e-9)
    bound.admits(out)


def case(d, f, per_row, kind, dtype, *, gated=True, weights=None, rows=ROWS, token_rows=None):
    tokens = per_row * len(rows) if token_rows is None else len(token_rows)
    base = make_base(d, gated, weights or dtype, f)
    return torch.randn(tokens, d).to(dtype), base, make_pool(d, SIZES, rows, kind, dtype, token_rows)


# Widths that fill no step, more neurons than a step has, more than a group of tokens, each kind of neuron.
@pytest.mark.parametrize(
    ("given_case", "activation"),
    [
        pytest.param(dict(d=70, f=130, per_row=1, kind="plain", dtype=torch.float32), "relu", id="float32"),
        pytest.param(dict(d=150, f=70, per_row=6, kind="gated", dtype=torch.bfloat16), "silu", id="bfloat16"),
        pytest.param(dict(d=40, f=40, per_row=13, kind="mixed", dtype=torch.float16), "gelu", id="float16"),
        pytest.param(
            dict(d=33, f=21, per_row=1, kind="plain", dtype=torch.bfloat16, weights=torch.float32, gated=False),
            "gelu_tanh", id="mixed",
        ),
    ],
)  # fmt: skip
def test_forward(given_case, activation, everywhere):
    x, base, pool = case(**given_case)
    check(everywhere(lambda: kernel.patched_ffn(x, base, pool, activation)), x, base, pool, activation)


def test_tokens_that_choose_their_rows_and_strides(launched):
    x, base, pool = case(24, 40, 1, "gated", torch.float32, token_rows=torch.tensor([2, 0, 1, 2, 2]))
    x = torch.randn(24, 5).T
    out, _ = launched(lambda: kernel.patched_ffn(x, base, pool, "silu"))
    check(out, x, base, pool, "silu")


def test_without_an_edit_the_bits_are_those_of_the_same_kernel_without_edits(launched):
    """And an edited row's do not depend on the edits of the others."""
    x, base, pool = case(40, 70, 2, "gated", torch.bfloat16)
    out, _ = launched(lambda: kernel.patched_ffn(x, base, pool, "silu"))
    nobody = pool._replace(**dict(zip(("row_indptr", "row_edits"), as_csr(([], [], [])), strict=True)))
    unedited, _ = launched(lambda: kernel.patched_ffn(x, base, nobody, "silu"))
    assert torch.equal(out[2:4], unedited[2:4])
    assert not torch.equal(out[:2], unedited[:2])
    others = pool._replace(**dict(zip(("row_indptr", "row_edits"), as_csr(([1], [3], ROWS[2])), strict=True)))
    changed, _ = launched(lambda: kernel.patched_ffn(x, base, others, "silu"))
    assert torch.equal(out[4:], changed[4:])


def test_a_prompt_leaves_the_base_to_the_vendor(launched):
    x, base, pool = case(24, 40, 22, "plain", torch.float32)
    out, session = launched(lambda: kernel.patched_ffn(x, base, pool, "relu"))
    assert [launch.kernel for launch in session.launches] == ["add_extra_neurons_kernel"]
    torch.testing.assert_close(out, add_extra_neurons(x, base_ffn(x, base, "relu"), pool, "relu"), rtol=1e-5, atol=1e-5)
    assert kernel.patched_ffn(x[:0], base, pool, "relu").shape == (0, 24)


def test_weights_that_would_be_copied_are_left_to_the_vendor(launched):
    x, base, pool = case(24, 40, 2, "plain", torch.float32)
    turned = base._replace(w_in=base.w_in.T.contiguous().T, w_out=base.w_out.T.contiguous().T)
    with ops.backend("triton"):
        out, session = launched(lambda: ops.patched_ffn(x, turned, pool, activation="relu"))
        given = [(x, base), (x, turned), (torch.randn(32, 24), base), (torch.randn(33, 24), base)]
        taken, _ = launched(lambda: [fuses(*each, pool, "relu") for each in given])
    assert [launch.kernel for launch in session.launches] == ["add_extra_neurons_kernel"]
    assert taken == [True, False, True, False]
    torch.testing.assert_close(out, add_extra_neurons(x, base_ffn(x, base, "relu"), pool, "relu"), rtol=1e-5, atol=1e-5)


def test_the_operator_chooses_it(on_gpu):
    x, base, pool = case(24, 40, 2, "gated", torch.float32)
    results = {}
    for backend in ("triton", "reference"):
        _triton._workspaces.clear()
        with ops.backend(backend), on_gpu() as session:
            results[backend] = ops.patched_ffn(x, base, pool, activation="silu")
        assert len(session.launches) == (1 if backend == "triton" else 0)
    torch.testing.assert_close(results["triton"], results["reference"], rtol=1e-5, atol=1e-5)


def test_nothing_is_allocated_where_memory_is_given(allocates_nothing):
    x, base, pool = case(24, 40, 2, "gated", torch.float32)
    allocates_nothing(kernel, lambda **given: kernel.patched_ffn(x, base, pool, "silu", **given))


def test_blocks_take_turns_over_the_edits_of_a_list(launched):
    """Its second edit is the pool's first: a block that began before it would leave the pool."""
    x, base, pool = case(24, 40, 1, "plain", torch.float32, rows=([1, 0], [0]))
    out, session = launched(lambda: kernel.patched_ffn(x, base, pool, "silu"))
    check(out, x, base, pool, "silu")
    assert session.launches[0].stores["extra"].bytes == 4 * (SIZES[1] + 2 * SIZES[0])  # each neuron of a token once


def test_an_edit_that_is_not_finite_does_not_touch_rows_without_it(launched):
    x, base, pool = case(24, 40, 1, "plain", torch.float32, rows=([3, 0], [3], []))
    pool.zeta[0] = torch.inf
    out, _ = launched(lambda: kernel.patched_ffn(x, base, pool, "silu"))
    assert not out[0].isfinite().any() and out[1:].isfinite().all()


@pytest.mark.parametrize(
    ("tokens", "d", "f", "instructions"),
    [(1, 256, 512, 101_000), (64, 256, 512, 443_000), pytest.param(64, 320, 640, 557_000, id="several passes")],
)
def test_every_weight_is_read_once_by_blocks_that_share_them(tokens, d, f, instructions, launched, monkeypatch):
    monkeypatch.setattr(kernel, "multiprocessors", lambda: 4)
    x = torch.randn(tokens, d).bfloat16()
    base = make_base(d, True, torch.bfloat16, f)
    pool = make_pool(d, (10,), ([0],), "plain", torch.bfloat16)
    out, session = launched(lambda: kernel.patched_ffn(x, base, pool, "silu"))
    check(out, x, base, pool, "silu")
    (launch,) = session.launches
    assert launch.grid == (4, 1, 1)
    for name in ("w_in", "w_up", "w_out"):
        weights = getattr(base, name)
        assert launch.loads[name].sectors <= 1.02 * weights.numel() * 2 / 32, name
    total = sum(traffic.bytes for traffic in (*launch.loads.values(), *launch.stores.values()))
    assert launch.largest_block_bytes <= 1.2 * total / 4
    assert sum(launch.instructions.values()) <= 1.1 * instructions  # of warps, as counted when it was written
    assert launch.shared.bank_conflicts <= 0.02 * launch.shared.ideal
