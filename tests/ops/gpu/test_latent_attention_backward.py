"""The gradients of latent attention, gate and blend on a GPU: what is computed, in one launch."""

from __future__ import annotations

import pytest
import torch
from ops.gpu.running_error import Approx, given
from ops.gpu.test_latent_attention import Case

from unike_kernels import ops
from unike_kernels.ops import _triton
from unike_kernels.ops.latent_attention import reference
from unike_kernels.ops.latent_attention import triton as forward
from unike_kernels.ops.latent_attention import triton_backward as kernel
from unike_kernels.ops.latent_attention.reference import SemanticEncoder
from unike_kernels.ops.patched_ffn.reference import activate_slope


@pytest.fixture(autouse=True)
def few_multiprocessors(with_multiprocessors):
    with_multiprocessors(2, kernel)


class Gradients(Case):
    """A case whose gates are open where Enc_sem leans towards what it is compared with, closed for the first token."""

    def __init__(self, tokens, heads, c, d, r, k, dtype, **rest):
        super().__init__(tokens, heads, c, d, r, k, dtype, **rest)
        lean = torch.randn(d)
        compared = self.inputs if self.anchor is None else self.anchor
        compared.add_(2 * lean.to(dtype))
        if self.anchor is None:
            compared[0] *= -1
        self.encoder = self.encoder._replace(b2=(2 * lean).to(dtype))
        self.grad, self.grad_alpha = torch.randn(tokens, d).to(dtype), torch.randn(tokens)

    def run(self, **given):
        return kernel.latent_attention_backward(
            self.grad, self.grad_alpha, *self.operands(), self.projected, **given
        )  # fmt: skip

    def definition(self):
        wide = [t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in self.operands()]
        wide[5] = SemanticEncoder(*(t.double() for t in self.encoder))
        return reference.latent_attention_backward(self.grad.double(), self.grad_alpha.double(), *wide)

    def bounds(self):
        """The gradients, each with how far a kernel may be from it; before the sums over tokens that share a gate."""
        s = self.steps()
        m = len(self.inputs)
        on = s.shifted.unsqueeze(-1).expand_as(self.inputs)
        g = given(self.grad).where(on)
        on_know, on_host = (g * s.know).sum(-1), (g * s.host).sum(-1)
        to_gate = s.stretch * on_know - on_host
        if self.blend.convention == "eq7":
            to_gate = Approx(-to_gate.value, to_gate.error)
        to_gate = to_gate + given(self.grad_alpha).where(s.shifted)
        to_host = s.rest.unsqueeze(-1) * g
        to_know = (s.share * s.stretch).unsqueeze(-1) * g
        if self.blend.norm == "match":
            pull = s.share * on_know * s.of_know
            to_host = to_host + (pull * (s.host * s.host).sum(-1).sqrt().inverse()).unsqueeze(-1) * s.host
            to_know = to_know - (pull * s.of_know * s.stretch).unsqueeze(-1) * s.know
        to_anchor = None
        if self.alpha is None:
            near = (s.cosine.value.abs() <= s.cosine.error) | ((1 - s.cosine.value).abs() <= s.cosine.error)
            assert not (near & s.shifted).any()  # there the slope of the clamp is in doubt
            to_cosine = to_gate.where((s.cosine.value > 0) & (s.cosine.value < 1))
            both = s.of_sem * s.of_other
            pull = s.cosine * s.of_sem * s.of_sem
            to_sem = to_cosine.unsqueeze(-1) * (both.unsqueeze(-1) * s.other - pull.unsqueeze(-1) * s.sem)
            pull = s.cosine * s.of_other * s.of_other
            to_anchor = to_cosine.unsqueeze(-1) * (both.unsqueeze(-1) * s.sem - pull.unsqueeze(-1) * s.other)
            slope = s.hidden.apply(lambda v: activate_slope("gelu", v), 1.6, ulps=8 + s.hidden.value.abs())
            to_know = to_know + ((to_sem @ given(self.encoder.w2)) * slope) @ given(self.encoder.w1)
            if self.anchor is None:
                to_host = to_host + to_anchor
            else:
                rows = len(self.anchor)
                to_anchor = Approx(*(t.reshape(rows, m // rows, -1) for t in (to_anchor.value, to_anchor.error))).sum(1)
        # The heads share the gradient of h_know; [M, 1, 1, d] [M, H, d, k].
        values = Approx(s.values.value.transpose(2, 3), s.values.error.transpose(2, 3))
        to_p = to_know.unsqueeze(1).unsqueeze(1) @ values
        to_logits = s.p * (to_p - (s.p * to_p).sum(-1, keepdim=True))
        to_queries = ((to_logits @ s.keys) * s.scale)[:, :, 0]
        whole = torch.where(on, to_host.value, self.grad.double())
        to_host = Approx(whole, torch.where(on, to_host.error, 0.0))
        if self.alpha is not None and len(self.alpha) == 1:
            to_gate = Approx(to_gate.value.reshape(1, -1), to_gate.error.reshape(1, -1)).sum(1)
        return (
            to_queries.rounded(self.queries.dtype),
            to_host.rounded(self.inputs.dtype),
            None if self.alpha is None else to_gate.rounded(self.alpha.dtype),
            None if self.anchor is None else to_anchor.rounded(self.anchor.dtype),
        )

    def check(self, *found):
        s = self.steps()
        assert self.alpha is not None or (s.alpha.value[s.shifted] > 0).any()
        for got, bound, exact in zip(found, self.bounds(), self.definition(), strict=True):
            assert (got is None) == (bound is None) == (exact is None)
            if got is not None:
                torch.testing.assert_close(bound.value, exact, rtol=1e-9, atol=1e-9)
                bound.admits(got)


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(dict(tokens=5, heads=1, c=70, d=70, r=20, k=21, dtype=torch.float32), id="float32"),
        pytest.param(dict(tokens=4, heads=2, c=24, d=40, r=70, k=5, dtype=torch.float16, projected=False), id="w1"),
        pytest.param(dict(tokens=20, heads=1, c=40, d=70, r=20, k=5, dtype=torch.bfloat16), id="tiles"),
        pytest.param(
            dict(tokens=34, heads=2, c=24, d=40, r=20, k=5, dtype=torch.bfloat16, rows=2, anchor=2), id="shared"
        ),
        pytest.param(
            dict(tokens=6, heads=1, c=20, d=40, r=20, k=3, dtype=torch.float32, rows=2, alpha=6, norm="none"),
            id="few",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            dict(tokens=3, heads=1, c=20, d=40, r=20, k=3, dtype=torch.float32, alpha=1, convention="eq7"), id="eq7"
        ),
    ],
)
def test_backward(shape, everywhere):
    case = Gradients(**shape)
    case.check(*everywhere(case.run))


@pytest.mark.parametrize(
    ("shape", "blocks"),
    [
        pytest.param(
            dict(tokens=70, heads=1, c=24, d=140, r=12, k=3, dtype=torch.bfloat16, rows=1), 2, id="passes-shared"
        ),
        pytest.param(
            dict(tokens=3, heads=1, c=70, d=520, r=20, k=3, dtype=torch.bfloat16),
            1,
            id="passes",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            dict(tokens=3, heads=2, c=40, d=520, r=40, k=5, dtype=torch.bfloat16, projected=False),
            132,
            id="132",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_passes_and_real_grids(shape, blocks, everywhere, monkeypatch):
    monkeypatch.setattr(kernel, "multiprocessors", lambda: blocks)
    monkeypatch.setattr(forward, "PASS", 1)
    case = Gradients(**shape)
    case.ids[-1] = torch.arange(shape["k"]) % 9 - 1
    case.check(*everywhere(case.run))


def test_a_token_without_an_entry_hands_its_gradient_through(launched):
    """Whatever it holds."""
    case = Gradients(3, 1, 24, 40, 12, 4, torch.float32)
    case.ids[0], case.ids[-1] = torch.tensor([1, 2, 3, 4]), -1
    case.inputs[-1], case.queries[-1] = torch.nan, torch.inf
    (to_queries, to_inputs, _, _), _ = launched(case.run)
    assert torch.equal(to_inputs[-1], case.grad[-1])
    assert not to_queries[-1].any()
    assert to_inputs.isfinite().all()


def test_no_tokens(launched):
    case = Gradients(3, 1, 24, 24, 12, 4, torch.float32, anchor=1)
    case.queries, case.inputs, case.ids, case.grad = case.queries[:0], case.inputs[:0], case.ids[:0], case.grad[:0]
    case.anchor = case.anchor[:0]
    (to_queries, to_inputs, _, to_anchor), session = launched(case.run)
    assert (to_queries.shape, to_inputs.shape, to_anchor.shape) == ((0, 1, 24), (0, 24), (0, 24))
    assert not session.launches


def test_the_operator_is_trained_by_it(on_gpu):
    case = Gradients(3, 1, 24, 24, 12, 4, torch.float32)
    grads = {}
    for backend in ("triton", "reference"):
        _triton._workspaces.clear()
        queries, inputs = case.queries.clone().requires_grad_(), case.inputs.clone().requires_grad_()
        with ops.backend(backend), on_gpu() as session:
            out, alpha = ops.latent_attention(
                queries, inputs, case.keys, case.values, case.ids, case.encoder, projected=case.projected
            )
            grads[backend] = torch.autograd.grad((out * case.grad).sum() + alpha.sum(), (queries, inputs))
        assert len(session.launches) == (2 if backend == "triton" else 0)
    for got, wanted in zip(grads["triton"], grads["reference"], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
