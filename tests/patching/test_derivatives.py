"""A patched model under what torch differentiates and maps with; `tests/ops/test_derivatives.py` has the operators."""

from __future__ import annotations

import pytest
import torch
from torch import func
from torch.autograd import forward_ad

import unike_kernels as uk


@pytest.fixture(params=["exact", "index"])
def prepared(request, make_model, make_memory, make_edit):
    """A patched model as a function of its embeddings, and an input with a direction."""
    model = make_model("llama")
    model.set_attn_implementation("eager")  # the other attention of torch has no second derivative itself
    memory = make_memory(model)
    retriever = uk.CosineIndex if request.param == "index" else None
    uk.patch(model, [make_edit(model, "a", memory)], memory, retriever=retriever)
    f = lambda x: model(inputs_embeds=x, use_cache=False).logits.square().sum()  # noqa: E731
    return model, f, 0.3 * torch.randn(1, 3, 64), torch.randn(1, 3, 64)


def slope(f, x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(f(x), x)[0]


def test_forward_mode(prepared):
    """It agrees with reverse mode; what is laid out for decoding in it is right for those that follow."""
    _, f, x, v = prepared
    with torch.no_grad():  # the first pass of all, so that everything is laid out in here
        through_func = func.jvp(f, (x,), (v,))[1]
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(f(forward_ad.make_dual(x, v))).tangent
        after = f(x)
    want = (slope(f, x) * v).sum()
    for got in (through_func, dual, func.jvp(f, (x,), (v,))[1]):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=0)
    torch.testing.assert_close(after, f(x), rtol=1e-5, atol=0)


def test_second_order(prepared):
    """A product with the Hessian, of the float32 kernels and by differences of float64 gradients."""
    model, f, x, v = prepared
    y = x.clone().requires_grad_()
    first = torch.autograd.grad(f(y), y, create_graph=True)[0]
    got = torch.autograd.grad((first * v).sum(), y)[0]
    model.double()
    x, v, e = x.double(), v.double(), 1e-3  # LLaMA norms in float32 whatever its dtype
    want = (slope(f, x + e * v) - slope(f, x - e * v)) / (2 * e)
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


def test_maps(prepared):
    model, f, x, v = prepared
    several = torch.stack([x, x + 0.1 * v])
    with torch.no_grad():
        torch.testing.assert_close(func.vmap(f)(several), torch.stack([f(each) for each in several]))
    got = func.vmap(func.grad(f))(several)
    torch.testing.assert_close(got, torch.stack([slope(f, each) for each in several]), rtol=1e-3, atol=1e-3)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    g = lambda w: func.functional_call(model, w, (), {"inputs_embeds": x, "use_cache": False}).logits.square().sum()  # noqa: E731
    found = func.grad(g)(weights)
    f(x).backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=1e-3 * float(p.grad.abs().max()))
