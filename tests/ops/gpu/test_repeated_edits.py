"""A row that names an edit more than once, given to the GPU kernels past `ops.patched_ffn`, which refuses it.

They cannot look without waiting for the GPU. What they write lies where the neurons lie, not where they are listed: it
stays within its memory, however long the lists are, and each naming counts.
"""

from __future__ import annotations

import pytest
import torch
from ops.test_patched_ffn import make_base, make_pool

from unike_kernels.ops.patched_ffn import composed, triton, triton_backward, triton_fused
from unike_kernels.ops.patched_ffn.reference import base_ffn

ROWS = [[1, 0, 1], [1] * 4]


@pytest.mark.parametrize("kernel", ["beside", "backward", "fused"])
def test_each_naming_counts(kernel, launched, monkeypatch):
    for module in (triton, triton_fused):
        monkeypatch.setattr(module, "multiprocessors", lambda: 1)
    d, kind = 8, "plain" if kernel == "fused" else "gated"
    x, base, pool = torch.randn(2, d), torch.randn(2, d), make_pool(d, sizes=(2, 1), rows=ROWS, kind=kind)
    weights = make_base(d, gated=False)
    if kernel == "beside":
        got, _ = launched(lambda: (triton.add_extra_neurons(x, base, pool, "gelu"),))
        want = (composed.add_extra_neurons(x, base, pool, "gelu"),)
    elif kernel == "fused":
        got, _ = launched(lambda: (triton_fused.patched_ffn(x, weights, pool, "gelu"),))
        want = (composed.add_extra_neurons(x, base_ffn(x, weights, "gelu"), pool, "gelu"),)
    else:
        got, _ = launched(lambda: triton_backward.add_extra_neurons_backward(base, x, pool, "gelu"))
        want = composed.add_extra_neurons_backward(base, x, pool, "gelu")
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
