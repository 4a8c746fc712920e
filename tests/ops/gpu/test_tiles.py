"""Tile sizes that `unike tune` may choose change how a kernel runs, not what it computes."""

from __future__ import annotations

import pytest
import torch
from ops.gpu import test_add_extra_neurons as extra
from ops.gpu import test_patched_ffn as whole
from ops.gpu.test_latent_attention import Case

from unike_kernels.ops import _tiles
from unike_kernels.ops.latent_attention import triton as latent
from unike_kernels.ops.patched_ffn import triton as side
from unike_kernels.ops.patched_ffn import triton_fused as fused


def sizes(module, end):
    """All of the smallest, or all of the largest candidates."""
    return module.Tiles(**{name: values[end] for name, values in module.CANDIDATES.items()})


@pytest.mark.parametrize(
    "end", [pytest.param(0, id="smallest", marks=pytest.mark.slow), pytest.param(-1, id="largest")]
)
@pytest.mark.parametrize("op", ["patched_ffn", "add_extra_neurons", "latent_attention"])
def test_the_ends_of_the_candidates(op, end, launched):
    module = {"patched_ffn": fused, "add_extra_neurons": side, "latent_attention": latent}[op]
    with _tiles.forced(op, sizes(module, end)):
        if op == "latent_attention":
            case = Case(3, 1, 70, 70, 70, 5, torch.bfloat16)
            case.check(*launched(case.run)[0])
        elif op == "patched_ffn":
            x, base, pool = whole.case(70, 90, 2, "gated", torch.bfloat16)
            whole.check(launched(lambda: fused.patched_ffn(x, base, pool, "silu"))[0], x, base, pool, "silu")
        else:
            x, base, pool = extra.case(70, 2, "gated", torch.bfloat16)
            out, _ = launched(lambda: side.add_extra_neurons(x, base, pool, "silu"))
            extra.expected(x, base, pool, "silu").admits(out)


def test_defaults_are_candidates():
    for module in (fused, side, latent):
        assert all(value in module.CANDIDATES[name] for name, value in module.Tiles()._asdict().items())
