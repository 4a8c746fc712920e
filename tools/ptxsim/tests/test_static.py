"""Static checks: what the binaries of the sample kernels say on every architecture."""

from __future__ import annotations

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed: it compiles the kernels")

import torch  # noqa: E402
import triton_samples  # noqa: E402
from ptxsim import static  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

ARCHITECTURES = ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950"]


def test_a_fused_ffn_everywhere():
    x, out = torch.zeros(64, dtype=torch.bfloat16), torch.zeros(64)
    found = static.everywhere(triton_samples.fused_ffn, (x, x, x, out, 256, 512, 16, 32, 64))
    assert [each.architecture for each in found] == ARCHITECTURES
    for each in found:
        assert not each.spills and 0 < each.registers < 128
        assert each.shared < each.shared_limit and each.occupancy >= 0.25
        # On gfx942 and gfx950 the two smaller tiles come in pieces of 8 bytes.
        assert each.wide_loads > 0 and (each.wide_loads == each.global_loads or each.architecture.startswith("gfx"))
        # Those of gfx950 multiply twice as many.
        assert each.tensor_core.total() >= (16 if each.architecture == "gfx950" else 32)


def test_without_alignment_there_are_no_wide_loads():
    x, out = torch.zeros(65, dtype=torch.bfloat16)[1:], torch.zeros(64)
    arguments = (x, x, x, out, 256, 512, 16, 32, 64)
    compiled = static.compile_for(triton_samples.fused_ffn, GPUTarget("cuda", 80, 32), arguments)
    assert static.resources(compiled).wide_loads == 0


TARGETS = [GPUTarget("cuda", 80, 32), GPUTarget("cuda", 120, 32), GPUTarget("hip", "gfx942", 64)]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target.arch))
def test_spills_are_found(target):
    """One warp holds a tile of sums for which it has no registers."""
    x, out = torch.zeros(64, dtype=torch.float16), torch.zeros(64)
    rows = 256 if target.backend == "hip" else 128
    arguments = (x, x, out, 512, 512, 512, rows, 128, 16, "tf32")
    found = static.resources(static.compile_for(triton_samples.matmul, target, arguments, num_warps=1))
    assert found.spills and found.stack > 0 and found.local_accesses > 10


def test_shared_memory_beyond_the_limit():
    x, out = torch.zeros(64, dtype=torch.bfloat16), torch.zeros(64)
    arguments = (x, x, out, 512, 512, 512, 128, 128, 128, "tf32")
    sizes = {}
    for arch in (80, 120):
        compiled = static.compile_for(triton_samples.matmul, GPUTarget("cuda", arch, 32), arguments)
        sizes[arch] = static.resources(compiled)
    assert sizes[120].shared > sizes[120].shared_limit and sizes[120].occupancy == 0
    assert sizes[80].shared <= sizes[80].shared_limit and sizes[80].occupancy > 0


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "expected"),
    [
        (128, 32, 0, 1.0),  # 16 blocks
        (256, 64, 0, 0.5),  # registers: 4 blocks
        (128, 255, 0, 0.125),  # registers: 8 warps, 2 blocks
        (32, 32, 0, 0.5),  # 32 blocks of one warp
        (128, 32, 40 * 1024, 0.25),  # shared memory: 4 blocks of 41 KiB
        (128, 32, 166_912, 0.0625),  # just one block
        (128, 32, 166_913, 0.0),
    ],
)
def test_occupancy_of_sm_80(threads, registers, shared, expected):
    """As NVIDIA's occupancy calculator gives it."""
    assert static.occupancy(80, threads, registers, shared) == expected
