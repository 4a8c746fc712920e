"""The native kernels of the operators, each instruction set that this CPU has, against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unike_kernels import _native, ops

LEVELS = ("baseline", "avx2", "avx512", "avx512vnni")
AVAILABLE = LEVELS[: LEVELS.index(_native.isa()) + 1]


@pytest.fixture(params=AVAILABLE)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("UNIKE_ISA", request.param)
    assert _native.isa() == request.param
    return request.param


def both(run):
    """The result of the native backend, and that of the definition in float64."""
    with ops.backend("native"):
        got = run(torch.float32)
    with ops.backend("reference"):
        wanted = run(torch.float64)
    return got, wanted


def make_pool(d: int, gated: bool, seed: int) -> ops.EditPool:
    g = torch.Generator().manual_seed(seed)
    n = lambda *size: torch.randn(*size, generator=g)  # noqa: E731
    up = (n(8, d), n(8)) if gated else (None, None)
    return ops.EditPool(
        n(8, d) * d**-0.5, n(8), *up, n(8, d), n(3, d), n(3), torch.tensor([0, 5, 5, 8]),
        torch.tensor([0, 2, 2, 3, 6]), torch.tensor([2, 0, 1, 0, 1, 2]),
    )  # fmt: skip


def cast(values, dtype):
    return [v.to(dtype) if v is not None and v.is_floating_point() else v for v in values]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("d", [1, 3, 16, 67, 576])
def test_extra_neurons(isa: str, d: int, activation: str, gated: bool) -> None:
    pool, x, base = make_pool(d, gated, d), torch.randn(12, 2 * d)[:, ::2], torch.randn(12, d)

    def run(dtype):
        p = ops.EditPool(*cast(pool, dtype))
        return ops.patched_ffn(x.to(dtype), base.to(dtype), p, activation=activation)

    got, wanted = both(run)
    torch.testing.assert_close(got.double(), wanted, rtol=2e-5, atol=2e-5 * float(wanted.abs().max()))
    assert torch.equal(got[3:6], base[3:6])  # row 1 has no edits


@given(st.integers(1, 70), st.integers(0, 9), st.integers(1, 40), st.integers(1, 3), st.integers(0, 2**31), st.data())
def test_latent_attention(d: int, m: int, k: int, heads: int, seed: int, data: st.DataObject) -> None:
    g = torch.Generator().manual_seed(seed)
    n = lambda *size: torch.randn(*size, generator=g)  # noqa: E731
    entries, r, width = 11, 5, d if heads == 1 else 3
    ids = torch.randint(-1, entries, (m, k), generator=g)
    ids[: m // 3] = -1
    tables = [n(m, heads, width), n(m, d), n(entries, heads, width), n(entries, heads, d)]
    encoder = [n(r, d), n(r), n(d, r), n(d)]
    alpha = data.draw(st.sampled_from([None, torch.rand(1, generator=g), torch.rand(m, generator=g)]))
    anchor = data.draw(st.sampled_from([None, n(1, d)])) if m else None
    switches = {
        "convention": data.draw(st.sampled_from(["inclusion", "eq7"])),
        "norm": data.draw(st.sampled_from(["match", "none"])),
    }

    def run(dtype):
        q, h, keys, values = cast(tables, dtype)
        gates = dict(zip(("alpha", "anchor"), cast((alpha, anchor), dtype), strict=True))
        return ops.latent_attention(
            q, h, keys, values, ids, ops.SemanticEncoder(*cast(encoder, dtype)), **gates, **switches
        )

    for level in AVAILABLE:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("UNIKE_ISA", level)
            (got, gate), (wanted, wanted_gate) = both(run)
        # A cosine of vectors that nearly cancel is as uncertain as the vectors: an absolute bound for alpha.
        torch.testing.assert_close(gate.double(), wanted_gate, rtol=0, atol=5e-4)
        scale = 1 + float(wanted.abs().max()) if m else 1.0
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-3 * scale)
        assert torch.equal(got[: m // 3], tables[1][: m // 3])


def attention(m: int, d: int = 96):
    n, r = torch.randn, 12
    encoder = ops.SemanticEncoder(n(r, d), n(r), n(d, r), n(d))
    keys, ids = n(50, d), torch.randint(0, 50, (m, 20))
    hidden, inputs = n(m, d), n(m, d)
    return lambda rows: ops.latent_attention(hidden[rows], inputs[rows], keys, keys, ids[rows], encoder)


def test_a_token_is_the_same_alone_and_in_any_batch(isa: str) -> None:
    run = attention(23)
    out, alpha = run(slice(0, 23))
    for t in (0, 3, 21, 22):
        assert torch.equal(run(slice(t, t + 1))[0], out[t : t + 1])
        assert torch.equal(run(slice(t, t + 1))[1], alpha[t : t + 1])


def test_threads_do_not_matter(isa: str) -> None:
    run, before = attention(400, 512), torch.get_num_threads()
    x, base, pool = torch.randn(4000, 512), torch.randn(4000, 512), make_pool(512, True, 0)
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append((*run(slice(0, 400)), ops.patched_ffn(x, base, pool, activation="silu")))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    d = 64
    pool, x, base = make_pool(d, False, 1), torch.randn(4, d).to(dtype), torch.randn(4, d).to(dtype)
    with ops.backend("native"):
        got = ops.patched_ffn(x, base, pool, activation="relu")
        wide = ops.patched_ffn(x.float(), base.float(), pool, activation="relu")
    assert torch.equal(got, wide.to(dtype))


def test_indices_out_of_range_are_refused() -> None:
    run = attention(4)
    with ops.backend("native"):
        pool = make_pool(8, False, 0)
        x = torch.randn(4, 8)
        for field, bad in (("row_edits", torch.tensor([2, 0, 1, 0, 1, 3])), ("indptr", torch.tensor([0, 5, 4, 8]))):
            with pytest.raises(ValueError, match=field):
                ops.patched_ffn(x, x, pool._replace(**{field: bad}), activation="relu")
        with pytest.raises(ValueError, match="token_rows"):
            ops.patched_ffn(x, x, pool._replace(token_rows=torch.tensor([0, 1, 2, 4])), activation="relu")
        keys = torch.randn(3, 8)
        encoder = ops.SemanticEncoder(torch.randn(2, 8), torch.randn(2), torch.randn(8, 2), torch.randn(8))
        with pytest.raises(ValueError, match="ids"):
            ops.latent_attention(x, x, keys, keys, torch.tensor([[0, 3]] * 4), encoder)
    assert run(slice(0, 4))[0].isfinite().all()


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNIKE_ISA", "avx1024")
    with pytest.raises(ValueError, match="UNIKE_ISA"):
        attention(2)(slice(0, 2))
    assert _native.isa() == "invalid UNIKE_ISA"
