"""The native kernels of the operators, each instruction set that this CPU has, against the definition in float64."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Thread

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernels import kernels_of

from unike_kernels import _native, ops
from unike_kernels.ops import _library
from unike_kernels.ops.patched_ffn import EditPool, PreparedNeurons, cpu


@pytest.fixture(params=_native.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with kernels_of(request.param):
        yield request.param


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

    for level in _native.isas():
        with kernels_of(level):
            (got, gate), (wanted, wanted_gate) = both(run)
        # A cosine of vectors that nearly cancel is as uncertain as the vectors: an absolute bound for alpha.
        torch.testing.assert_close(gate.double(), wanted_gate, rtol=0, atol=5e-4)
        scale = 1 + float(wanted.abs().max()) if m else 1.0
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-3 * scale)
        assert torch.equal(got[: m // 3], tables[1][: m // 3])


def attention(m: int, d: int = 96, shared: bool = True):
    """rows -> the latent attention of these rows of m tokens; `wide`: of their values in `dtype`, but in float32."""
    n, r = torch.randn, 12
    encoder = ops.SemanticEncoder(n(r, d), n(r), n(d, r), n(d))
    ids = torch.randint(0, 50, (m, 20))
    keys = n(50, d).bfloat16().float()
    values = keys if shared else n(50, d).bfloat16().float()
    hidden, inputs = n(m, d), n(m, d)

    def run(rows, dtype=torch.float32, wide=False, tables=None, fold=False):
        q, h = ((t[rows].to(dtype).float() if wide else t[rows].to(dtype)) for t in (hidden, inputs))
        k, v = (t if tables is None else t.to(tables) for t in (keys, values))
        projected = ops.project_values(values, encoder) if fold else None
        return ops.latent_attention(q, h, k, k if shared else v, ids[rows], encoder, projected=projected)

    return run


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
def test_half_precision_is_computed_in_float32_and_rounded_once(isa: str, dtype: torch.dtype) -> None:
    d = 67
    pool, x, base = make_pool(d, True, 1), torch.randn(4, d).to(dtype), torch.randn(4, d).to(dtype)
    with ops.backend("native"):
        got = ops.patched_ffn(x, base, pool, activation="relu")
        wide = ops.patched_ffn(x.float(), base.float(), pool, activation="relu")
    assert torch.equal(got, wide.to(dtype))
    run = attention(5, d)
    with ops.backend("native"):
        out, alpha = run(slice(0, 5), dtype)
        wide_out, wide_alpha = run(slice(0, 5), dtype, wide=True)
    assert out.dtype == dtype and torch.equal(out, wide_out.to(dtype)) and torch.equal(alpha, wide_alpha)


def test_tables_in_bfloat16_are_read_as_they_are(isa: str) -> None:
    d = 67
    narrow = ops.EditPool(*cast(make_pool(d, True, 3), torch.bfloat16))
    wide = ops.EditPool(*cast(narrow, torch.float32))
    x, base = torch.randn(4, d), torch.randn(4, d)
    with ops.backend("native"):
        assert torch.equal(*(ops.patched_ffn(x, base, p, activation="silu") for p in (narrow, wide)))
        for shared in (False, True):
            run = attention(5, d, shared)
            assert torch.equal(*(run(slice(0, 5), tables=t)[0] for t in (torch.bfloat16, None)))


@given(
    st.integers(1, 40),
    st.integers(0, 6),
    st.booleans(),
    st.sampled_from(ops.ACTIVATIONS),
    st.integers(0, 2**31),
    st.data(),
)
def test_gradients_of_extra_neurons(
    d: int, per_row: int, gated: bool, activation: str, seed: int, data: st.DataObject
) -> None:
    """Against the definition in float64, which gradcheck has checked."""
    g = torch.Generator().manual_seed(seed)
    pool, m = make_pool(d, gated, seed), 4 * per_row
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    x, base, grad = (torch.randn(m, d, generator=g).to(dtype) for _ in range(3))
    if data.draw(st.booleans()):
        pool = pool._replace(token_rows=torch.randint(0, 4, (m,), generator=g))

    def run(wide: torch.dtype) -> list[torch.Tensor]:
        leaves = [
            t if t is None or not t.is_floating_point() else t.to(wide).requires_grad_() for t in (x, base, *pool)
        ]
        out = ops.patched_ffn(leaves[0], leaves[1], ops.EditPool(*leaves[2:]), activation=activation)
        trained = [t for t in leaves if t is not None and t.requires_grad]
        return list(torch.autograd.grad(out, trained, grad.to(wide)))

    level = data.draw(st.sampled_from(_native.isas()))
    with kernels_of(level), ops.backend("native"):
        got = run(torch.float32)
    with ops.backend("reference"):
        wanted = run(torch.float64)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4 * (1 + float(b.abs().max()) if b.numel() else 1))


def test_one_token_of_many_columns(isa: str) -> None:
    """Its columns are shared by the threads, forward and backward."""
    d = 1403
    pool, grad = make_pool(d, True, 2)._replace(token_rows=torch.tensor([3])), torch.randn(1, d)

    def run(dtype):
        leaves = [t.to(dtype).requires_grad_() if t.is_floating_point() else t for t in pool]
        out = ops.patched_ffn(grad.to(dtype), grad.to(dtype), ops.EditPool(*leaves), activation="silu")
        return out.detach(), *torch.autograd.grad(out, [t for t in leaves if t.requires_grad], grad.to(dtype))

    for got, wanted in zip(*both(run), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=2e-5, atol=2e-5 * float(wanted.abs().max()))


@given(
    st.integers(1, 70),
    st.integers(0, 9),
    st.integers(1, 40),
    st.integers(1, 3),
    st.integers(0, 2**31),
    st.data(),
)
def test_gradients_of_latent_attention(d: int, m: int, k: int, heads: int, seed: int, data: st.DataObject) -> None:
    g = torch.Generator().manual_seed(seed)
    n = lambda *size: torch.randn(*size, generator=g)  # noqa: E731
    entries, r, width = 11, 5, d if heads == 1 else 3
    ids = torch.randint(-1, entries, (m, k), generator=g)
    ids[: m // 3] = -1
    # No vector vanishes: the gradient of a direction goes with the inverse of its length.
    whole = lambda *size: torch.nn.functional.normalize(n(*size), dim=-1) * d**0.5  # noqa: E731
    encoder = [n(r, d) * d**-0.5, n(r), n(d, r), 3 * whole(d)]
    keys, values = n(entries, heads, width), n(entries, heads, d) + 2
    gate = data.draw(st.sampled_from(["token", "given", "given each", "anchor"]))
    gates = {"given": torch.rand(1, generator=g), "given each": torch.rand(m, generator=g), "anchor": whole(1, d)}
    name = {"given": "alpha", "given each": "alpha", "anchor": "anchor"}.get(gate)
    if gate == "anchor" and not m:
        name = None
    fold = data.draw(st.booleans())
    switches = {
        "convention": data.draw(st.sampled_from(["inclusion", "eq7"])),
        "norm": data.draw(st.sampled_from(["match", "none"])),
    }
    queries, inputs, grad, grad_alpha = n(m, heads, width), whole(m, d), n(m, d), n(m)

    def run(wide: torch.dtype) -> list[torch.Tensor]:
        enc = ops.SemanticEncoder(*cast(encoder, wide))
        v = values.to(wide)
        q, h = (t.to(wide).requires_grad_() for t in (queries, inputs))
        given_gate = {} if name is None else {name: gates[gate].to(wide).requires_grad_()}
        projected = ops.project_values(v, enc) if fold else None
        out, alpha = ops.latent_attention(
            q, h, keys.to(wide), v, ids, enc, projected=projected, **given_gate, **switches
        )
        trained = [q, h, *given_gate.values()]
        grads = torch.autograd.grad([out, alpha], trained, [grad.to(wide), grad_alpha.to(wide)])
        return [alpha.detach(), *grads]

    level = data.draw(st.sampled_from(_native.isas()))
    with kernels_of(level), ops.backend("native"):
        got = run(torch.float32)
    with ops.backend("reference"):
        wanted = run(torch.float64)
    # At the clamp of alpha the gradient jumps, and float32 may be on its other side.
    alphas = torch.stack([got[0].double(), wanted[0]])
    inside = ((alphas > 1e-3) & (alphas < 1 - 1e-3)).all(0)
    sure = torch.ones(m, dtype=torch.bool) if name == "alpha" else inside | (alphas[0] == alphas[1])
    for a, b in zip(got[1:], wanted[1:], strict=True):
        if len(b) == m:  # of each token
            a, b = a[sure], b[sure]
        elif not sure.all():  # a sum over tokens
            continue
        scale = 1 + float(b.abs().max()) if b.numel() else 1.0
        torch.testing.assert_close(a.double(), b, rtol=0, atol=2e-3 * scale)


def test_gradients_of_many_tokens_and_threads() -> None:
    """More tokens than a block, so that sums over tokens go on from block to block."""
    d, m = 96, 400
    pool = make_pool(d, True, 5)
    x, base, grad = torch.randn(m, d), torch.randn(m, d), torch.randn(m, d)

    def run(wide: torch.dtype) -> list[torch.Tensor]:
        leaves = [t if not t.is_floating_point() else t.to(wide).requires_grad_() for t in (x, *pool[:-1])]
        out = ops.patched_ffn(leaves[0], base.to(wide), ops.EditPool(*leaves[1:]), activation="gelu")
        return list(torch.autograd.grad(out, [t for t in leaves if t.requires_grad], grad.to(wide)))

    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(run(torch.float32))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    for a, b in zip(results[0], run(torch.float64), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


@pytest.mark.parametrize("shared", [False, True])
def test_the_first_layer_of_the_encoder_folded_into_the_memory_changes_nothing(isa: str, shared: bool) -> None:
    run = attention(50, 96, shared)
    (out, alpha), (folded, folded_alpha) = run(slice(0, 50)), run(slice(0, 50), fold=True)
    torch.testing.assert_close(folded_alpha, alpha, rtol=0, atol=1e-5)
    torch.testing.assert_close(folded, out, rtol=0, atol=1e-4)


def test_memory_attention_is_its_two_halves(isa: str) -> None:
    d, n, r = 96, 500, 12
    x = lambda *size: torch.randn(*size)  # noqa: E731
    encoder = ops.SemanticEncoder(x(r, d), x(r), x(d, r), x(d))
    keys, hidden, inputs, index = x(n, d), x(7, d), x(7, d), ops.normalize_rows(x(n, d))
    for scan in ("int8", "float32"):
        with ops.backend("native"):
            packed = ops.pack_keys(index, scan)
            out, alpha, ids = ops.memory_attention(hidden, inputs, index, keys, keys, encoder, k=20, packed=packed)
            found = ops.cosine_topk(hidden, index, 20, normalized=True)[1]
            shifted, gate = ops.latent_attention(hidden, inputs, keys, keys, found, encoder)
        assert torch.equal(ids, found) and torch.equal(out, shifted) and torch.equal(alpha, gate)


def test_few_tokens_are_shared_by_the_threads_to_the_same_bits(isa: str) -> None:
    """One token: the threads split its entries and columns; many: each thread takes some. The bits are the same."""
    run, before = attention(40, 1100), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        out, alpha = run(slice(0, 40))
        for t in (0, 17, 39):
            one, gate = run(slice(t, t + 1))
            assert torch.equal(one, out[t : t + 1]) and torch.equal(gate, alpha[t : t + 1])
    finally:
        torch.set_num_threads(before)


def test_prepared_neurons_compute_what_the_operator_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without gradients, forced to another backend, under a mode: one result, by the way that fits."""
    dispatched: list[str] = []
    call = _library.call
    monkeypatch.setattr(_library, "call", lambda name, *args: (dispatched.append(name), call(name, *args))[1])
    pool, x, base = make_pool(48, True, 0), torch.randn(8, 48), torch.randn(8, 48)
    prepared = PreparedNeurons(pool, "silu")

    def check(x, base, direct: bool, prepared=prepared) -> None:
        wanted = ops.patched_ffn(x, base, prepared.pool, activation="silu")
        dispatched.clear()
        found = prepared(x, base)
        assert (not dispatched) == direct
        tolerance = 0 if direct else 1e-5
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)

    with torch.no_grad():
        check(x, base, True)
        check(x.view(2, 4, 48), base.view(2, 4, 48), True)
        check(x.double(), base, False)
        check(x, base.half(), False)
        with ops.backend("reference"):
            check(x, base, False)
        monkeypatch.setenv("UNIKE_BACKEND", "reference")
        check(x, base, False)
        monkeypatch.delenv("UNIKE_BACKEND")
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
            assert prepared(torch.empty(8, 48), torch.empty(8, 48)).shape == (8, 48)
        lazy = torch.complex(torch.zeros(8, 48), -x).conj().imag  # reads as x, holds -x
        assert lazy.is_neg()
        check(lazy, base, True)
        check(x, torch.randn(8, 60)[:, :48], True)
        before = prepared(x, base)
        pool.beta.mul_(2)  # a live tensor: it is seen
        check(x, base, True)
        assert not torch.equal(prepared(x, base), before)
        check(x, base, False, PreparedNeurons(pool._replace(keys=pool.keys.bfloat16()), "silu"))
    check(x, base, False)  # gradients may be wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prepared_neurons_write_where_they_are_told(dtype: torch.dtype) -> None:
    pool, x = make_pool(48, True, 0), torch.randn(8, 48)
    base = torch.randn(8, 60).to(dtype)[:, :48]
    with torch.no_grad():
        for backend in ("native", "reference"):
            with ops.backend(backend):
                prepared, given = PreparedNeurons(pool, "silu"), base.clone()
                wanted = prepared(x, base)
                assert prepared(x, given, given) is given
                assert torch.equal(given, wanted) and not torch.equal(wanted, base)
        with pytest.raises(ValueError, match="out must be"):
            PreparedNeurons(pool, "silu")(x, base, torch.empty(8, 48, dtype=torch.float64))


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


def test_a_pool_that_grows_in_place_finds_its_workspace() -> None:
    """What a thread keeps of memory is too small then; the tables are read at each call."""
    d, rows = 40, 64
    generator = torch.Generator().manual_seed(1)
    n = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    indptr = torch.arange(0, 1001, 10)
    pool = EditPool(n(1000, d), n(1000), None, None, n(1000, d), n(100, d), n(100), indptr,
                    torch.zeros(rows + 1).long(), torch.arange(100).repeat(rows), None)  # fmt: skip
    laid_out, x, base = cpu.Pool(pool, "relu"), n(rows, d), n(rows, d)
    results = []

    def calls() -> None:
        for edits in (0, 1, 100, 3):
            pool.row_indptr.copy_(torch.arange(rows + 1) * edits)
            results.append((laid_out.add(x, base), cpu.Pool(pool, "relu").add(x, base)))
        pool.row_edits[0] = 100
        with pytest.raises(ValueError, match="row_edits must name edits of the pool"):
            laid_out.add(x, base)
        results.append("refused")

    thread = Thread(target=calls)  # of its own: it keeps no memory yet
    thread.start()
    thread.join()
    assert results.pop() == "refused"
    assert len(results) == 4
    for one, another in results:
        assert torch.equal(one, another)
    assert torch.equal(results[0][0], base) and not torch.equal(results[1][0], results[2][0])
