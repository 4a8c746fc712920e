"""Latent attention, gate and blend on a GPU: what is computed, in one launch, and what is read for it."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from ops.gpu.running_error import ROUNDING, Approx, given

from unike_kernels import ops
from unike_kernels.ops import _triton
from unike_kernels.ops.latent_attention import reference
from unike_kernels.ops.latent_attention import triton as kernel
from unike_kernels.ops.latent_attention.reference import Blend, SemanticEncoder
from unike_kernels.ops.patched_ffn.reference import activate


class Case:
    """Random operands; the last token, or the last row of ids, has no entry."""

    def __init__(
        self, tokens, heads, c, d, r, k, dtype, *, rows=None, n=9, alpha=None, anchor=None, projected=True,
        convention="inclusion", norm="match",
    ):  # fmt: skip
        def normal(*shape):
            return torch.randn(*shape).to(dtype)

        self.queries, self.inputs = normal(tokens, heads, c), normal(tokens, d)
        self.keys, self.values = normal(n, heads, c), normal(n, heads, d)
        self.encoder = SemanticEncoder(normal(r, d) * d**-0.5, normal(r), normal(d, r) * r**-0.5, normal(d))
        self.ids = torch.randint(-1, n, (rows or tokens, k))
        self.ids[-1] = -1
        self.alpha = None if alpha is None else torch.rand(alpha)
        self.anchor = None if anchor is None else normal(anchor, d)
        self.blend = Blend(c**-0.5, convention, norm)
        exact = torch.einsum("nhd,rd->nhr", self.values.double(), self.encoder.w1.double())
        self.projected = exact.float() if projected else None

    def operands(self):
        return (
            self.queries, self.inputs, self.keys, self.values, self.ids, self.encoder, self.alpha, self.anchor,
            self.blend,
        )  # fmt: skip

    def run(self, **given):
        return kernel.latent_attention(*self.operands(), self.projected, **given)

    def definition(self):
        wide = [t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in self.operands()]
        wide[5] = SemanticEncoder(*(t.double() for t in self.encoder))
        return reference.latent_attention(*wide)

    def steps(self):
        """The definition once more, with how far a kernel may be from it: what forward and backward both need."""
        m = len(self.inputs)
        ids = self.ids.repeat_interleave(m // len(self.ids), 0)
        there = ids >= 0
        rows = ids.clamp(min=0)
        keys, values = self.keys[rows].transpose(1, 2), given(self.values[rows].transpose(1, 2))  # [M, H, k, c or d]
        logits = given(self.queries.unsqueeze(2)) @ given(keys.transpose(2, 3))  # [M, H, 1, k]
        scale = torch.tensor(self.blend.scale, dtype=torch.float64)
        scale = Approx(scale, scale.abs() * ROUNDING[torch.float32])
        logits = logits * scale
        masked = logits.value.masked_fill(~there[:, None, None], -torch.inf)
        largest = masked.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
        # Whatever is subtracted cancels in the quotient.
        lifted = Approx(logits.value - largest, logits.error + (logits.value - largest).abs() * 2.0**-23)
        weights = lifted.exp().where(there[:, None, None].expand_as(masked))
        rescaled = Approx(  # the mass, with each step
            torch.ones(()).double(), torch.tensor(4.0 * ids.shape[1] * 2.0**-23).double()
        )
        p = weights * (weights.sum(-1, keepdim=True) * rescaled).inverse()
        know = (p @ values)[:, :, 0].sum(1)
        host = given(self.inputs).where(there.any(-1, keepdim=True).expand_as(self.inputs))
        other = host if self.anchor is None else given(self.anchor.repeat_interleave(m // len(self.anchor), 0))
        found = SimpleNamespace(
            shifted=there.any(-1), keys=given(keys), values=values, scale=scale, p=p, know=know, host=host, other=other
        )
        if self.alpha is not None:
            found.alpha = given(self.alpha.expand(m))
        else:
            w1, b1, w2, b2 = map(given, self.encoder)
            if self.projected is None:
                hidden = know @ w1.T
            else:
                exact = torch.einsum("nhd,rd->nhr", self.values.double(), self.encoder.w1.double())
                table = Approx(exact, exact.abs() * ROUNDING[torch.float32])[rows]
                table = Approx(table.value.transpose(1, 2), table.error.transpose(1, 2))
                hidden = (p @ table)[:, :, 0].sum(1)
            found.hidden = hidden + b1
            g = found.hidden.apply(lambda v: activate("gelu", v), 1.13, ulps=8 + found.hidden.value.abs())
            found.sem = g @ w2.T + b2
            found.of_sem = (found.sem * found.sem).sum(-1).sqrt().inverse()
            found.of_other = (other * other).sum(-1).sqrt().inverse()
            found.cosine = (found.sem * other).sum(-1) * (found.of_sem * found.of_other)
            found.alpha = Approx(found.cosine.value.clamp(0, 1), found.cosine.error)
        rest = Approx(1 - found.alpha.value, found.alpha.error + 2.0**-23)
        found.share, found.rest = (found.alpha, rest) if self.blend.convention == "inclusion" else (rest, found.alpha)
        found.of_know = (know * know).sum(-1).sqrt().inverse()
        found.stretch = given(torch.ones(m))
        if self.blend.norm == "match":
            found.stretch = (host * host).sum(-1).sqrt() * found.of_know
        return found

    def bounds(self):
        """Out and alpha, and which tokens are shifted."""
        s = self.steps()
        out = s.rest.unsqueeze(-1) * s.host + (s.share * s.stretch).unsqueeze(-1) * s.know
        return out.rounded(self.inputs.dtype), s.alpha, s.shifted

    def check(self, out, alpha):
        bound, gate, shifted = self.bounds()
        for found, exact in zip((bound.value, gate.value), self.definition(), strict=True):
            torch.testing.assert_close(found[shifted], exact[shifted], rtol=1e-9, atol=1e-9)
        bound[shifted].admits(out[shifted])
        gate[shifted].admits(alpha[shifted])
        assert torch.equal(out[~shifted].view(torch.uint8), self.inputs[~shifted].view(torch.uint8))
        assert not alpha[~shifted].any()
        assert alpha.dtype == torch.float32
        assert out.dtype == self.inputs.dtype


# Columns that fill no step, several steps of entries, heads, tiles of one and of 16 tokens, ids of tokens and of rows.
MATRIX = [
    pytest.param(dict(tokens=3, heads=1, c=70, d=70, r=20, k=21, dtype=torch.float32), id="float32"),
    pytest.param(dict(tokens=2, heads=2, c=24, d=40, r=70, k=5, dtype=torch.float16, projected=False), id="w1"),
    pytest.param(dict(tokens=20, heads=1, c=40, d=70, r=20, k=5, dtype=torch.bfloat16), id="tiles"),
    pytest.param(dict(tokens=34, heads=2, c=24, d=40, r=20, k=21, dtype=torch.bfloat16, rows=2, anchor=2), id="shared"),
    pytest.param(
        dict(tokens=6, heads=1, c=20, d=40, r=20, k=3, dtype=torch.float32, rows=2, alpha=6, norm="none"), id="few"
    ),
    pytest.param(
        dict(tokens=520, heads=1, c=8, d=140, r=12, k=2, dtype=torch.bfloat16, rows=65),
        id="many",
        marks=pytest.mark.slow(minutes=3),
    ),
]
MORE = [
    pytest.param(
        dict(
            tokens=t, heads=h, c=24, d=d, r=12, k=5, dtype=dtype, rows=rows, projected=p, alpha=a, convention=c, norm=n
        ),
        marks=pytest.mark.slow,
        id=f"{t}-{rows}-{h}-{d}-{dtype}-{p}-{a}-{c}-{n}",
    )
    for (t, rows), (h, d, dtype), (p, a, c, n) in itertools.product(
        [(1, 1), (17, None), (32, 2)],
        [(1, 24, torch.float32), (3, 33, torch.float16), (1, 130, torch.bfloat16)],
        [(True, None, "eq7", "match"), (False, None, "inclusion", "none"), (True, 1, "eq7", "none")],
    )
]


def test_queries_are_read_where_they_are():
    wide = torch.randn(3, 2, 40)
    heads = wide[:, 0].unflatten(1, (5, 8))
    found = kernel.heads_in_rows(heads)
    assert torch.equal(found, heads) and found.data_ptr() == heads.data_ptr()
    apart = wide.transpose(1, 2)
    assert torch.equal(kernel.heads_in_rows(apart), apart)


@pytest.mark.parametrize("shape", MATRIX + MORE)
def test_forward(shape, everywhere):
    case = Case(**shape)
    case.check(*everywhere(case.run))


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(dict(tokens=3, heads=1, c=24, d=520, r=20, k=3, dtype=torch.bfloat16), id="slices"),
        pytest.param(
            dict(tokens=7, heads=2, c=24, d=40, r=20, k=5, dtype=torch.float32, projected=False),
            id="blocks",
            marks=pytest.mark.slow,
        ),
        pytest.param(dict(tokens=70, heads=1, c=24, d=140, r=12, k=3, dtype=torch.bfloat16, rows=1), id="shared"),
    ],
)
def test_more_tokens_than_a_pass_takes(shape, everywhere, monkeypatch):
    """Scratch is used again by the next pass."""
    monkeypatch.setattr(kernel, "multiprocessors", lambda: 2 if "rows" in shape else 1)
    monkeypatch.setattr(kernel, "PASS", 1)
    case = Case(**shape)
    case.ids[-1] = torch.arange(shape["k"]) % 9 - 1
    case.check(*everywhere(case.run))


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(dict(tokens=1, heads=1, c=40, d=1030, r=20, k=9, dtype=torch.bfloat16), id="own"),
        pytest.param(
            dict(tokens=1, heads=2, c=40, d=530, r=40, k=1, dtype=torch.float32, projected=False),
            id="one",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            dict(tokens=40, heads=1, c=40, d=140, r=20, k=5, dtype=torch.bfloat16, rows=1),
            id="shared",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_on_132_multiprocessors(shape, everywhere, monkeypatch):
    """Slices that are many, entries split between them, and blocks that have no team."""
    monkeypatch.setattr(kernel, "multiprocessors", lambda: 132)
    case = Case(**shape)
    case.ids[-1] = torch.arange(shape["k"]) % 9 - int(shape["k"] > 1)
    case.check(*everywhere(case.run))


def test_strided_rows_far_apart_are_read_in_place(launched):
    """Rows that begin more than 2^31 elements after the first: offsets have 64 bits."""
    case = Case(2, 1, 24, 24, 12, 3, torch.bfloat16, n=3)
    case.ids = torch.tensor([[2, 1, -1], [0, 2, 2]])
    for name in ("queries", "keys", "values"):
        t = getattr(case, name)
        far = torch.empty(3 * 2**30, dtype=t.dtype).as_strided(t.shape, (2**30, t.stride(1), 1))
        setattr(case, name, far.copy_(t))
    case.inputs = torch.empty(2**31 + 24, dtype=torch.bfloat16).as_strided((2, 24), (2**31, 1)).copy_(case.inputs)
    (out, alpha), _ = launched(case.run)
    case.check(out, alpha)


def test_no_token_depends_on_another(launched):
    """Bit for bit, whatever the others hold and retrieve."""
    case = Case(20, 1, 24, 40, 12, 5, torch.bfloat16)
    (wanted, gates), _ = launched(case.run)
    case.queries[4:], case.inputs[4:], case.ids[4:] = torch.nan, torch.inf, 3
    (out, alpha), _ = launched(case.run)
    assert torch.equal(out[:4], wanted[:4])
    assert torch.equal(alpha[:4], gates[:4])


def test_zero_rows_and_an_empty_memory(launched):
    case = Case(3, 1, 24, 24, 12, 4, torch.float32)
    case.inputs[0] = 0  # no direction: alpha 0, and nothing to match
    case.values[case.ids[1].clamp(min=0)] = 0
    case.encoder = case.encoder._replace(b1=torch.zeros(12), b2=torch.zeros(24))
    case.projected = torch.einsum("nhd,rd->nhr", case.values.double(), case.encoder.w1.double()).float()
    (out, alpha), _ = launched(case.run)
    wanted, gates = case.definition()
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(alpha.double(), gates, rtol=1e-5, atol=1e-6)
    assert alpha[0] == alpha[1] == 0
    empty = Case(3, 1, 24, 24, 12, 4, torch.float32)
    empty.keys, empty.values, empty.projected = empty.keys[:0], empty.values[:0], empty.projected[:0]
    empty.ids[:] = -1
    for ids in (empty.ids, empty.ids[:, :0]):
        empty.ids = ids
        (out, alpha), _ = launched(empty.run)
        assert torch.equal(out, empty.inputs)
        assert not alpha.any()


def test_no_tokens(launched):
    case = Case(3, 1, 24, 24, 12, 4, torch.float32)
    case.queries, case.inputs, case.ids = case.queries[:0], case.inputs[:0], case.ids[:0]
    (out, alpha), session = launched(case.run)
    assert out.shape == (0, 24)
    assert alpha.shape == (0,)
    assert not session.launches


def test_the_operator_chooses_it(on_gpu):
    case = Case(3, 1, 24, 24, 12, 4, torch.float32)
    results = {}
    for backend in ("triton", "reference"):
        _triton._workspaces.clear()
        with ops.backend(backend), on_gpu() as session:
            results[backend] = ops.latent_attention(
                *case.operands()[:6], scale=case.blend.scale, projected=case.projected
            )
        assert len(session.launches) == (1 if backend == "triton" else 0)
    for got, wanted in zip(results["triton"], results["reference"], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_nothing_is_allocated_where_memory_is_given(allocates_nothing):
    allocates_nothing(kernel, Case(3, 1, 24, 24, 12, 4, torch.float32).run)


def sectors(t, rows=1.0) -> float:
    return t.numel() * t.element_size() / 32 * rows


@pytest.mark.parametrize(("d", "blocks"), [(1024, 32), pytest.param(4096, 128, marks=pytest.mark.slow)])
def test_traffic_of_one_token_on_132_multiprocessors(d, blocks, launched, monkeypatch):
    """The token's bytes are read once, by blocks that share them evenly: 128 at d = 4096."""
    monkeypatch.setattr(kernel, "multiprocessors", lambda: 132)
    case = Case(1, 1, d, d, 64, 8, torch.bfloat16)
    case.ids = torch.arange(8).unsqueeze(0)
    (out, _), session = launched(case.run)
    torch.testing.assert_close(out.double(), case.definition()[0], rtol=2**-8, atol=1e-3)
    (launch,) = session.launches
    assert launch.grid == (blocks, 1, 1)
    for name, wanted in (
        ("keys", sectors(case.keys, 8 / 9)),
        ("values", sectors(case.values, 8 / 9)),
        ("w2", sectors(case.encoder.w2)),
        ("projected", sectors(case.projected, 8 / 9)),
    ):
        assert launch.loads[name].sectors <= 1.02 * wanted, name
    assert "w1" not in launch.loads
    total = sum(traffic.bytes for traffic in (*launch.loads.values(), *launch.stores.values()))
    assert launch.largest_block_bytes <= 1.3 * total / blocks
    assert launch.shared.bank_conflicts <= 0.5 * max(launch.shared.ideal, 1)
