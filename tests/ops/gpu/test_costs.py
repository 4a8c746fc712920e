"""What each kernel costs at its real shape on an H100, by the cost model of tools/ptxsim: no more than it did.

BUDGETS is what `PYTHONPATH=.:tests:tools/ptxsim python -m ops.gpu.cost_report budgets` prints: paste its lines after a
kernel has become better. A kernel that has become worse in any of the numbers fails.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
from cuda_tests import harness
from ops.gpu.real_launches import REAL, Real
from ptxsim.cost import H100, Cost, Machine

from unike_kernels.ops.patched_ffn import triton_fused as fused


class Budget(NamedTuple):
    """What a launch took when this was written.

    Attributes:
        rounds: loads that wait for one another, in its longest warp.
        flight: KB on their way to a multiprocessor, in the loop that asks for most.
        asked: bytes asked for over those that must move; scratch: bytes of scratch, likewise.
        us: of the model.
    """

    rounds: int
    flight: float
    asked: float
    scratch: float
    us: float


SLACK = 1.03  # of all but whole rounds: another version of Triton schedules a little differently


def measure(real: Real, machine: Machine = H100) -> tuple[Budget, Cost]:
    """The numbers that budgets hold, and the whole."""
    found = real.cost(machine)
    operands = sum(found.asked.values()) - found.scratch
    figures = found.flight / 1024, operands / real.must, found.scratch / real.must, 1e6 * found.seconds
    return Budget(found.rounds, *(float(f"{figure:.3g}") for figure in figures)), found


def excess(found: Budget, budget: Budget) -> list[str]:
    """The numbers that are worse than the budget allows."""
    worse = ["rounds"] * (found.rounds > budget.rounds) + ["flight"] * (SLACK * found.flight < budget.flight)
    return worse + [n for n in ("asked", "scratch", "us") if getattr(found, n) > SLACK * getattr(budget, n) + 0.01]


BUDGETS = {
    "patched_ffn, fused, T=1, one edit of 10, d=4096, d'=11008": Budget(30, 76.7, 1.02, 0.0109, 90.3),
    "patched_ffn, fused, T=8, one edit of 10, d=4096, d'=11008": Budget(30, 70.0, 1.05, 0.0871, 90.4),
    "patched_ffn, fused, T=64, rows with an edit each, d=4096, d'=11008": Budget(51, 48.5, 1.28, 0.674, 102.0),
    "patched_ffn, beside the base, T=1, d=4096": Budget(18, 1.12, 1.21, 1.35, 9.93),
    "patched_ffn, beside the base, T=128, d=4096": Budget(18, 3.93, 1.46, 1.96, 10.2),
    "latent_attention, T=1, ids of their own, k=40, d=4096, r=512": Budget(18, 11.2, 1.18, 0.281, 14.5),
    "latent_attention, T=8, ids of their own, k=40, d=4096, r=512": Budget(19, 18.0, 1.16, 0.243, 17.0),
    "latent_attention, T=64, ids of their own, k=40, d=4096, r=512": Budget(28, 13.1, 1.23, 0.307, 28.4),
    "latent_attention, T=512, ids of their own, k=40, d=4096, r=512": Budget(123, 18.9, 2.13, 0.283, 112.0),
    "latent_attention, T=128, shared ids, k=40, d=4096, r=512": Budget(30, 4.96, 2.56, 6.25, 29.4),
    "memory_attention, T=1, N=15000 of float32, k=40, d=4096": Budget(93, 30.8, 1.34, 0.0128, 88.9),
    "cosine_topk, Triton, B=1, N=15000 of float32, d=4096": Budget(73, 30.4, 1.34, 0.00536, 82.2),
    "cosine_topk, Triton, B=64, N=15000 of float32, d=4096": Budget(95, 32.6, 2.03, 0.429, 107.0),
    "cosine_topk, CUDA, int8 scan, B=1, N=15000, d=4096": Budget(42, 30.6, 1.28, 0.34, 27.9),
    "cosine_topk, CUDA, float16 scan, B=1, N=15000, d=4096": Budget(50, 44.9, 1.06, 0.0954, 44.7),
    "cosine_topk, CUDA, bfloat16 scan, B=1, N=15000, d=4096": Budget(50, 45.1, 1.06, 0.0955, 44.7),
    "cosine_topk, CUDA, float32 scan, B=1, N=15000, d=4096": Budget(66, 40.6, 1.02, 0.0478, 81.1),
    "cosine_topk, CUDA, float32 scan, B=64, N=15000, d=4096": Budget(108, 20.9, 1.39, 0.33, 88.5),
    "cosine_topk, CUDA, float32 scan, B=512, N=15000, d=4096": Budget(370, 16.8, 4.95, 2.5, 335.0),
    "patched_ffn, gradients of extra neurons, T=128, d=4096": Budget(78, 1.89, 2.41, 5.86, 39.5),
    "latent_attention, gradients, T=8, k=40, d=4096, r=512": Budget(57, 9.62, 1.73, 0.255, 54.8),
}
USUAL = {  # the others are slow tests
    "patched_ffn, fused, T=1, one edit of 10, d=4096, d'=11008",
    "patched_ffn, fused, T=64, rows with an edit each, d=4096, d'=11008",
    "patched_ffn, beside the base, T=1, d=4096",
    "patched_ffn, beside the base, T=128, d=4096",
    "latent_attention, T=1, ids of their own, k=40, d=4096, r=512",
    "cosine_topk, CUDA, int8 scan, B=1, N=15000, d=4096",
    "patched_ffn, gradients of extra neurons, T=128, d=4096",
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in USUAL else [pytest.mark.slow]) for n in BUDGETS])
def test_no_kernel_has_become_worse(name):
    if "CUDA" in name and not harness.can_compile():
        pytest.skip("nvcc is not here")
    found, cost = measure(REAL[name])
    assert not excess(found, BUDGETS[name]), f"{found}\n{cost}"


T1 = "patched_ffn, fused, T=1, one edit of 10, d=4096, d'=11008"
T64 = "patched_ffn, fused, T=64, rows with an edit each, d=4096, d'=11008"


@pytest.mark.parametrize(
    ("name", "tiles", "worse"),
    [
        pytest.param(T1, fused.Tiles(width=64), {"rounds"}, id="a quarter of the columns in a step"),
        pytest.param(T1, fused.Tiles(neurons=32), {"flight"}, id="a quarter of the neurons in a step"),
        pytest.param(T64, fused.Tiles(neurons=64), {"asked", "us"}, id="x read twice as often"),
    ],
)
def test_a_worse_kernel_is_found(name, tiles, worse, monkeypatch):
    monkeypatch.setattr(fused, "tile_sizes", lambda *_: tiles)
    found, _ = measure(REAL[name])
    assert worse <= set(excess(found, BUDGETS[name])), found
