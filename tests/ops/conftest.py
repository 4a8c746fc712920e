"""What the tests of the operators share."""

from __future__ import annotations

import pytest
import torch

from unike_kernels import ops


@pytest.fixture(params=["default", "reference"])
def each_backend(request, monkeypatch):
    """Once with the backend that is chosen unasked, once with the definition (for float64 they are the same)."""
    monkeypatch.setenv("UNIKE_BACKEND", "" if request.param == "default" else request.param)


@pytest.fixture(scope="session")
def assert_near():
    """The two differ by no more than the rounding of `terms` additions in the wide dtype, and of one to a half type."""

    def check(actual, expected, terms):
        expected = torch.as_tensor(expected, dtype=torch.float64)
        wide = torch.promote_types(actual.dtype, torch.float32)
        largest = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
        atol = terms * torch.finfo(wide).eps * largest
        rtol = 0.0 if actual.dtype == wide else torch.finfo(actual.dtype).eps / 2
        torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=atol)

    return check


@pytest.fixture(scope="session")
def opcheck():
    """torch.library.opcheck of `unike::name`, without gradients and with gradients to the arguments `trained`.

    Most of its time goes into traces, which only some combinations need: traced=False leaves them out.
    """

    def check(name, args, trained=(), traced=True):
        tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
        tests += ["test_aot_dispatch_dynamic"] if traced else []
        operator = getattr(torch.ops.unike, name).default
        for chosen in {(), tuple(trained)}:
            ready = [
                a.detach().requires_grad_(i in chosen) if isinstance(a, torch.Tensor) else a for i, a in enumerate(args)
            ]
            torch.library.opcheck(
                operator, tuple(ready), test_utils=(*tests, "test_aot_dispatch_dynamic") if traced else tests
            )

    return check


@pytest.fixture(scope="session")
def assert_compiles():
    """f compiled as one graph gives the bits of f, in its outputs and in all gradients to `tensors`."""

    def run(f, tensors):
        leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]
        out = f(*leaves)
        outputs = [out] if isinstance(out, torch.Tensor) else list(out)
        sum((o * o).sum() for o in outputs if o.is_floating_point()).backward()
        gradients = [t.grad for t in leaves if t.is_floating_point()]
        assert all(g is not None and g.any() for g in gradients)
        return outputs + gradients

    def check(f, *tensors):
        torch._dynamo.reset()
        compiled = run(torch.compile(f, fullgraph=True, backend="aot_eager"), tensors)
        for got, wanted in zip(compiled, run(f, tensors), strict=True):
            assert torch.equal(got, wanted)

    return check


@pytest.fixture(scope="session")
def gradcheck():
    """torch.autograd.gradcheck of f in float64 for every floating tensor of `tensors`, each replaced by keyword."""

    def check(f, tensors):
        names = list(tensors)
        leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors.values()]
        assert torch.autograd.gradcheck(lambda *args: f(**dict(zip(names, args, strict=True))), leaves)

    return check


@pytest.fixture(scope="session")
def encoder():
    """(d, r, dtype) -> a random Enc_sem."""

    def make(d, r=5, dtype=torch.float32):
        shapes = ((r, d), (r,), (d, r), (d,))
        return ops.SemanticEncoder(*((torch.randn(s, dtype=torch.float64) / s[-1] ** 0.5).to(dtype) for s in shapes))

    return make
