"""Whole kernels of Triton and nvcc, on every architecture and schedule, and what the interpreter counts of them."""

from __future__ import annotations

import cProfile
import pstats

import numpy as np
import pytest
import sample_launches
from ptxsim import Session, UnsupportedInstructionError
from sample_launches import CUDA, TRITON

SCHEDULES = [pytest.param("lockstep", marks=pytest.mark.smoke), "reversed", "random:0"]
needs_nvcc = pytest.mark.skipif(not sample_launches.has_nvcc(), reason="nvcc is not on the PATH")


@needs_nvcc
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", CUDA)
def test_cuda_kernels(name, schedule):
    CUDA[name](Session(schedule))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", TRITON)
def test_triton_kernels(name, schedule, on_gpu):
    with on_gpu(schedule=schedule) as session:
        TRITON[name](session)
    assert len(session.launches) == 1


@pytest.mark.parametrize("arch", [90, 100, 120])
@pytest.mark.parametrize("name", TRITON)
def test_triton_kernels_on_newer_architectures(name, arch, on_gpu):
    with on_gpu(arch=arch) as session:
        TRITON[name](session)


@pytest.mark.parametrize("arch", [80, 120])
def test_functions_of_triton_and_of_libdevice(arch, on_gpu):
    import torch
    import triton_samples

    x = torch.rand(256) * 4 + 0.5
    v = x.double()
    expected = v.exp() + v.log() + v.sin() * v.cos() + v.sqrt() + v.rsqrt() + v.sigmoid() + v.floor()
    expected += v.tanh() + v.pow(2.5) + v.expm1() + v.log1p() + v / 3
    whole = torch.randint(-1000, 1000, (256,), dtype=torch.int32)
    quotient = torch.div(whole, 7, rounding_mode="trunc")
    with on_gpu(arch=arch):
        out, counted = torch.empty(256), torch.empty(256, dtype=torch.int32)
        triton_samples.functions[(1,)](x, out, 256)
        triton_samples.integers[(1,)](whole, counted, 7, 256)
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=0)
    assert (counted == quotient + (whole - 7 * quotient) + (whole >> 3) + whole.abs()).all()


@pytest.mark.parametrize("arch", [80, 100])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_attention_over_rows_that_ids_name(schedule, arch, on_gpu):
    import torch
    import triton_samples

    ids = torch.stack([torch.randperm(100)[:40] for _ in range(4)])
    ids[1, 5:9] = -1
    table, q = torch.randn(100, 64).bfloat16(), torch.randn(4, 64).bfloat16()
    with on_gpu(schedule=schedule, arch=arch):
        out = torch.empty(4, 64)
        triton_samples.gathered_attention[(4,)](q, table, ids, out, 40, 64, 64)
    for token in range(4):
        rows = table[ids[token][ids[token] >= 0]].double()
        expected = (rows @ q[token].double()).softmax(0) @ rows
        torch.testing.assert_close(out[token].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_lock_in_global_memory(schedule, on_gpu):
    import torch
    import triton_samples

    with on_gpu(schedule=schedule):
        out = torch.zeros(1)
        triton_samples.locked_sum[(5,)](torch.zeros(1, dtype=torch.int32), out)
    assert out.item() == 0 + 1 + 2 + 3 + 4


def test_large_dots_of_sm_90_are_refused_by_name(on_gpu):
    import torch
    import triton_samples

    x = torch.zeros(64, 64, dtype=torch.bfloat16)
    with on_gpu(arch=90), pytest.raises(UnsupportedInstructionError, match=r"wgmma|fence\.proxy"):
        triton_samples.matmul[(1, 1)](x, x, torch.zeros(64, 64), 64, 64, 64, 64, 64, 32, "tf32")


def ffn_launch():
    import torch
    import triton_samples

    x, up, down = (torch.randn(*s).bfloat16() / 16 for s in ((16, 256), (256, 512), (512, 256)))
    out = torch.zeros(16, 256)
    triton_samples.fused_ffn[(16,)](x, up, down, out, 256, 512, 16, 32, 64)


def test_speed_and_traffic_of_a_fused_ffn(on_gpu):
    with on_gpu() as session:
        ffn_launch()  # compiles
        with cProfile.Profile() as profile:
            ffn_launch()
    launch = session.launches[-1]
    # An instruction of a warp is some calls of numpy, not some for each of its 32 lanes: 18.5 calls of any function.
    # Seconds would tell how fast the machine is.
    assert pstats.Stats(profile).total_calls < 24 * sum(launch.instructions.values())
    # 16 x 256, 256 x 512 and 512 x 256 numbers of 2 bytes, 16 to a sector
    assert {name: traffic.unique_sectors for name, traffic in launch.loads.items()} == {
        "x": 256,
        "up": 8192,
        "down": 8192,
    }
    assert launch.loads["up"].sectors_per_request == 16  # 16 bytes for each lane
    assert launch.loads["up"].bytes == 256 * 512 * 2 and launch.loads["x"].bytes == 16 * (16 * 256 * 2)
    assert launch.stores["out"].unique_sectors == 16 * 256 * 4 // 32
    assert launch.shared.bank_conflicts == 0
    # 16 blocks x (256 x 32 up and 32 x 256 down) over 16 x 8 x 16 products, 16 rows
    assert launch.instructions["mma"] == 16 * 2 * (256 // 16) * (32 // 8)
    # Per block: its slice of both weights, x, and the atomics
    assert launch.largest_block_bytes == 2 * 256 * 32 * 2 + 16 * 256 * 2 + 16 * 256 * 4
    assert launch.largest_block_instructions == sum(launch.instructions.values()) // 16


@needs_nvcc
def test_counts_of_coalesced_and_padded_accesses():
    session = Session()
    sample_launches.transpose(session)
    (launch,) = session.launches
    assert launch.shared.bank_conflicts == 0  # 33 columns for 32
    assert launch.loads["x"].bytes == 50 * 70 * 4 and launch.stores["out"].bytes == 50 * 70 * 4
    assert launch.loads["x"].unique_sectors == -(-50 * 70 * 4 // 32)
    assert launch.instructions["bar"] == 3 * 2 * 8  # blocks x warps


def test_bank_conflicts_and_scattered_sectors():
    """Column accesses of a 32 x 32 tile in shared memory, rows 128 bytes apart in global memory."""
    from ptxsim.counters import SharedTraffic, Traffic

    lanes = np.arange(32)
    for stride, size, passes in ((4, 4, 1), (8, 4, 2), (128, 4, 32), (0, 4, 1), (8, 8, 2), (16, 16, 4), (256, 16, 32)):
        shared = SharedTraffic()
        shared.count(lanes, lanes * stride, size)
        assert (shared.passes, shared.ideal) == (passes, max(size // 4, 1)), (stride, size)
    scattered = Traffic(0, 4096)
    scattered.count(lanes, lanes * 128, 4)
    scattered.count(lanes, lanes * 4, 4)
    assert (scattered.requests, scattered.sectors, scattered.unique_sectors, scattered.bytes) == (2, 36, 35, 256)


def test_launches_are_counted_for_each_operator(on_gpu):
    with on_gpu() as session:
        with session.counting() as first:
            TRITON["triton_scan"](session)
        with session.counting() as second:
            TRITON["triton_sort"](session)
            TRITON["triton_scan"](session)
    assert [launch.kernel for launch in first] == ["scan"]
    assert [launch.kernel for launch in second] == ["sort", "scan"]
