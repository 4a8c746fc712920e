"""The fixture `on_gpu`: operators called as a user calls them, and what is allocated inside its block."""

from __future__ import annotations

import pytest
from ptxsim import UninitialisedReadError

pytestmark = pytest.mark.smoke


def test_an_operator_runs_as_it_would_on_a_gpu(on_gpu):
    """A torch.library operator that allocates its result and launches a kernel, on tensors of the CPU."""
    import torch
    import triton_samples

    @torch.library.custom_op("ptxsim_tests::scan", mutates_args=(), schema="(Tensor x) -> Tensor")
    def scan(x):
        result = torch.empty_like(x)
        triton_samples.scan[(x.shape[0],)](x, result, x.shape[1])
        return result

    x = torch.randint(-9, 9, (3, 256)).float()
    for schedule in ("lockstep", "random:1"):
        with on_gpu(schedule=schedule) as session:
            result = torch.ops.ptxsim_tests.scan(x)
            with pytest.raises(UninitialisedReadError):
                torch.ops.ptxsim_tests.scan(torch.empty(3, 256))
        torch.testing.assert_close(result, x.cumsum(1), rtol=0, atol=0)
        assert [launch.grid for launch in session.launches] == [(3, 1, 1)]


def test_autotuned_kernels_run(on_gpu):
    import torch
    import triton
    import triton_samples

    configurations = [triton.Config({}, num_warps=warps) for warps in (1, 2)]
    tuned = triton.autotune(configurations, key=[])(triton_samples.scan)
    x = torch.randint(-9, 9, (256,)).float()
    with on_gpu() as session:
        out = torch.empty(256)
        tuned[(1,)](x, out, 256)
    assert (out == x.cumsum(0)).all() and len(session.launches) == 3


def test_allocations_inside_the_block_are_poisoned_until_somebody_writes(on_gpu):
    import torch
    import triton_samples

    with on_gpu():
        for allocate in (
            lambda: torch.empty(512),
            lambda: torch.empty_like(torch.zeros(512)),
            lambda: torch.zeros(1).new_empty(512),
            lambda: torch.empty_strided((512,), (1,)),
        ):
            assert torch.isnan(allocate()).all()
            with pytest.raises(UninitialisedReadError):
                triton_samples.scan[(1,)](allocate(), torch.zeros(512), 512)
        by_torch = torch.empty(512)
        by_torch.fill_(1.0)
        by_kernel = torch.empty(512)
        triton_samples.scan[(1,)](by_torch, by_kernel, 512)
        triton_samples.scan[(1,)](by_kernel, by_torch, 512)
        half = torch.empty(512)
        half[:256] = 1.0
        with pytest.raises(UninitialisedReadError, match=r"x \+ 1024"):
            triton_samples.scan[(1,)](half, by_torch, 512)
    assert torch.empty is not None and "call" not in torch.empty.__name__


def test_an_operator_sees_the_device_of_the_interpreter(on_gpu):
    triton = pytest.importorskip("triton")
    before = triton.runtime.driver._active
    with on_gpu(arch=90):
        assert triton.runtime.driver.active.get_active_torch_device().type == "cpu"
        assert triton.runtime.driver.active.get_current_target().arch == 90
    assert triton.runtime.driver._active is before
