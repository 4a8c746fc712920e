"""Registration of an operator: what every operator gets from it."""

from __future__ import annotations

import pytest
import torch

from unike_kernels.ops import _library


@pytest.mark.parametrize("kind", [tuple, list])
def test_results_are_contiguous_in_computing_and_in_tracing(kind):
    """A real result and its fake may come with any strides; a compiled graph must not see a difference."""
    name = f"test_strides_{kind.__name__}"
    result = "Tensor[]" if kind is list else "(Tensor, Tensor)"
    run = lambda x: kind((x.double().T, x.clone()))  # noqa: E731
    fake = lambda x: kind((x.new_empty(x.shape[::-1], dtype=torch.float64), torch.empty_like(x)))  # noqa: E731
    _library.define(f"{name}(Tensor x) -> {result}", run, fake, run)
    operator = getattr(torch.ops.unike, name)
    x = torch.randn(5, 3).T
    first, second = operator(x)
    assert first.is_contiguous() and second.is_contiguous()
    assert torch.equal(first, x.double().T) and torch.equal(second, x)
    torch.library.opcheck(operator.default, (x,))


def test_one_tensor():
    run = lambda x: (x + 1).T  # noqa: E731
    _library.define("test_one(Tensor x) -> Tensor", run, lambda x: x.new_empty(x.shape[::-1]), run)
    got = torch.ops.unike.test_one(torch.zeros(2, 3))
    assert got.is_contiguous() and torch.equal(got, torch.ones(3, 2))
