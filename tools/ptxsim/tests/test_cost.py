"""The cost model: it walks what the interpreter executes, and tiny kernels come out where measurements put them."""

from __future__ import annotations

import math
import subprocess
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import sample_launches

triton = pytest.importorskip("triton", reason="triton is not installed: it compiles the kernels")

import torch  # noqa: E402
import triton_samples as samples  # noqa: E402
from ptxsim import Launch, OutOfBoundsError, Session  # noqa: E402
from ptxsim.cost import A100, B200, H100, LATENCY, MACHINES, ROUNDS, Cost, Recorder, cost, replay, site_of  # noqa: E402
from ptxsim.sass import SassInstruction  # noqa: E402
from ptxsim.scalars import effect  # noqa: E402
from ptxsim.triton_driver import interpreting  # noqa: E402
from ptxsim.walk import DRAM, L2, walk  # noqa: E402


def integers(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def on(machine, kernel, grid, *arguments, scratch=(), blocks=3, **options) -> Cost:
    with interpreting(Recorder(), machine.arch) as recorder:
        kernel[grid](*arguments, **options)
    return cost(recorder.recorded[0], machine, scratch, blocks)


def asked(launch: Launch) -> dict[str, int]:
    total: Counter = Counter()
    for traffic in (launch.loads, launch.stores):
        for name, each in traffic.items():
            total[name] += 32 * each.sectors
    return dict(total)


def walked(recorder: Recorder) -> dict[str, int]:
    site, total = site_of(recorder.recorded[0]), Counter()
    for block in range(math.prod(site.grid)):
        found = walk(site, block)
        assert not found.guesses
        total.update(found.asked())
    return dict(total)


BF16 = torch.bfloat16
IDS = torch.randint(-90, 90, (256,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
SAME = {
    "softmax": (samples.softmax, (3,), (numbers(3, 300), numbers(3, 300), 300, 512)),
    "matmul": (
        samples.matmul, (2, 3),
        (numbers(40, 72, dtype=BF16), numbers(72, 80, dtype=BF16), numbers(40, 80), 40, 80, 72, 32, 32, 32, "tf32"),
    ),
    "attention": (
        samples.gathered_attention, (2,),
        (numbers(2, 64), numbers(30, 64), torch.tensor([[3, 7, -1], [29, -1, 0]]), numbers(2, 64), 3, 64, 4),
    ),
    "scattered": (samples.scattered, (2,), (numbers(1000), IDS, numbers(256), 9, 128)),
    "rows": (samples.sum_of_rows, (1,), (numbers(37, 64), numbers(64), 37, 64)),
    "64 bits": (samples.scattered, (2,), (numbers(1000), IDS.long(), numbers(256), 9, 128)),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_the_walk_asks_for_what_the_interpreter_asks_for(name, arch):
    kernel, grid, arguments = SAME[name]
    with interpreting(Session(), 80) as session:
        kernel[grid](*arguments)
    with interpreting(Recorder(), arch) as recorder:
        kernel[grid](*arguments)
    found = walked(recorder)
    assert found == asked(session.launches[0])
    assert all(found.values())


@pytest.mark.skipif(not sample_launches.has_nvcc(), reason="nvcc is not here")
def test_so_does_that_of_a_kernel_of_nvcc(tmp_path):
    x, out = (numbers(*size).numpy() for size in ((50, 70), (70, 50)))  # which begin with a sector
    shape = np.array((50, 70, 2.0), dtype=[("rows", "i4"), ("columns", "i4"), ("scale", "f4")]).tobytes()
    loaded = sample_launches.cuda_kernels()["transpose"]
    binary = tmp_path / "samples.cubin"
    command = ["nvcc", "-cubin", "-arch=sm_80", "-std=c++17", str(sample_launches.SOURCE), "-o", str(binary)]
    subprocess.run(command, check=True, capture_output=True)
    loaded.cubin = binary.read_bytes()
    counts = []
    for session in (Session(), Recorder()):
        launch = session.launch(loaded, (3, 2), (32, 8), [x, out, shape], names=["x", "out", "shape"])
        counts.append(walked(session) if isinstance(session, Recorder) else asked(launch))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_a_launch_that_does_nothing(machine):
    """2 to 3 us from one kernel of a stream to the next."""
    assert 2e-6 < on(machine, samples.nothing, (1,), numbers(1)).seconds < 3e-6


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_a_copy_is_bound_by_memory(machine):
    """A good one reaches 85 to 93% of the data sheet; one with 512 bytes in flight what Little's law allows."""
    size = 1 << 26
    x, out = torch.empty(size), torch.empty(size)
    good = on(machine, samples.copy, (size // 4096,), x, out, 4096, 4096)
    assert 0.85 < 8 * size / good.seconds / machine.bandwidth < 0.93
    assert max(good.parts, key=good.parts.get) == "memory" and good.flight > 64 * 1024
    size = 1 << 23
    share = size // machine.multiprocessors // 128 * 128
    thin = on(machine, samples.copy, (machine.multiprocessors,), x, out, share, 128, blocks=1, num_warps=1)
    assert thin.flight == pytest.approx(512, rel=0.05)
    speed = 4 * size / thin.seconds  # of the loads
    assert speed == pytest.approx(512 * machine.multiprocessors * machine.clock / 700, rel=0.1)


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_a_chase_takes_a_latency_for_each_step(machine):
    following = ((torch.arange(1 << 22) + 33 * 1024) % (1 << 22)).to(torch.int32)
    found = on(machine, samples.chase, (1,), following, integers(0), 100)
    assert found.rounds == 101
    assert 700 < found.cycles / 101 < 720


def test_a_serial_sum_has_many_rounds_and_one_load_few():
    x, out = numbers(128, 64), numbers(64)
    serial = on(H100, samples.sum_of_rows, (1,), x, out, 128, 64, scratch=["x"])
    whole = on(H100, samples.sum_at_once, (1,), x, out, 128, 128, 64, scratch=["x"])
    assert serial.rounds == 32  # ptxas unrolls by four
    assert whole.rounds <= 4
    assert serial.cycles > 5 * whole.cycles
    assert serial.scratch == 2 * whole.scratch == 2 * x.nbytes  # two of its four warps repeat what the others do


def test_a_product_of_matrices_is_bound_by_the_tensor_cores():
    """Triton's tutorial reaches 60 to 75% of an A100 at this size and tile."""
    size = 4096
    a, b, c = (torch.empty(size, size, dtype=BF16) for _ in range(3))
    grid = (size // 128, size // 128)
    found = on(A100, samples.matmul, grid, a, b, c, size, size, size, 128, 128, 64, "tf32", blocks=1, num_stages=4)
    assert 0.55 < 2 * size**3 / found.seconds / A100.flops < 0.85
    assert found.instructions["HMMA.16816.F32.BF16"] == size**3 / (16 * 8 * 16)


def test_stages_are_bytes_in_flight():
    """A thin product: less in flight is slower."""
    x, w, out = numbers(16, 4096, dtype=BF16), torch.empty(4096, 132 * 32, dtype=BF16), numbers(16, 132 * 32)
    costs = [
        on(H100, samples.matmul, (1, 132), x, w, out, 16, 132 * 32, 4096, 16, 32, 128, "tf32", blocks=1, num_stages=n)
        for n in (2, 3, 5)
    ]
    assert costs[0].flight < 0.8 * costs[1].flight < 0.8 * costs[2].flight
    assert costs[0].seconds > costs[1].seconds > costs[2].seconds


def test_a_condition_on_floats_is_guessed_and_said():
    found = on(H100, samples.halve, (1,), numbers(1), numbers(1))
    assert list(found.guesses) and all(place.startswith("triton_samples.py") for place in found.guesses)
    assert "guessed" in str(found)


def test_a_loop_on_floats_turns_as_often_as_is_said():
    with interpreting(Recorder(), H100.arch) as recorder:
        samples.halve[(1,)](numbers(1), numbers(1))
    usual = cost(recorder.recorded[0], H100)
    more = [cost(recorder.recorded[0], H100, turns=dict.fromkeys(usual.guesses, n)) for n in (3, 5)]
    counts = [sum(each.instructions.values()) for each in (usual, *more)]
    assert counts[0] < counts[1] and counts[2] - counts[1] == counts[1] - counts[0]


def test_an_address_outside_of_all_arguments_is_an_error():
    with interpreting(Recorder(), 90) as recorder:
        samples.copy[(1,)](numbers(64), numbers(128), 128, 128)
    with pytest.raises(OutOfBoundsError, match="copy"):
        cost(recorder.recorded[0], H100)


@pytest.mark.parametrize(("last", "wanted"), [("!PT", False), ("PT", True), ("P1", True), ("!P1", False), ("P2", None)])
def test_a_predicate_of_lop3(last, wanted):
    """Whether a bit is set, or the last operand holds: ptxas writes conditions that are constant so."""
    operands = ("P4", "RZ", "RZ", "0xffffffff", "RZ", "0xc0", last)
    instruction = SassInstruction("LOP3", ("LUT",), operands, None, False, None, 1, 7, 7, (), "")
    found = dict(effect(instruction)(SimpleNamespace(get={"P1": True, "P2": None}.get, registers={})))
    assert found["P4"] is wanted


@pytest.mark.parametrize(("mask", "wanted"), [("0xfffffffd", 0), ("0xfffffff9", None)])
def test_predicates_in_a_register_of_unknown_bits(mask, wanted):
    """ptxas clears a bit of a register, sets it where a condition holds, and looks at this bit alone."""
    instruction = SassInstruction(
        "LOP3", ("LUT",), ("R1", "R1", mask, "RZ", "0xc0", "!PT"), None, False, None, 1, 7, 7, (), ""
    )
    assert dict(effect(instruction)(SimpleNamespace(get={}.get, registers={}))) == {"R1": wanted}


@pytest.mark.parametrize(("opcode", "kind"), [("P2R", "PR"), ("UP2UR", "UPR")])
@pytest.mark.parametrize(("flags", "wanted"), [((True, False), 0x11), ((False, True), 0x12), ((None, True), None)])
def test_predicates_in_a_register(opcode, kind, flags, wanted):
    held = {f"{kind[:-1]}{n}": flag for n, flag in enumerate(flags)}
    instruction = SassInstruction(opcode, (), ("R1", kind, "0x10", "0x3"), None, False, None, 1, 7, 7, (), "")
    assert dict(effect(instruction)(SimpleNamespace(get=held.get, registers={}))) == {"R1": wanted}


def test_what_is_fetched_ahead_comes_from_l2():
    x, out = numbers(128), numbers(128)
    plain, ahead = (on(H100, samples.fetched_ahead, (1,), x, out, 128, early) for early in (False, True))
    assert plain.cycles - ahead.cycles > 0.8 * (LATENCY[DRAM] - LATENCY[L2])
    assert ahead.dram == plain.dram and ahead.asked == plain.asked


def test_an_atomic_gives_what_was_there_once():
    """Behind it, only the device knows."""
    found = on(H100, samples.two_tickets, (1,), integers(0), numbers(4096), numbers(1), 1024)
    assert {"x", "?"} <= set(found.asked)


def test_blocks_take_tickets_in_order():
    """The last of four has the fourth."""
    for size, there in ((3 * 1024 + 1, True), (3 * 1024, False)):
        with nullcontext() if there else pytest.raises(OutOfBoundsError):
            on(H100, samples.two_tickets, (4,), integers(0), numbers(size), numbers(1), 1024)


@pytest.mark.parametrize(("passing", "wanted"), [(0, None), (2, 0b101)])
def test_a_ballot_on_floats(passing, wanted):
    """As many lanes pass as the launch is said to have; three lanes are there."""
    lanes = np.isin(np.arange(32), (0, 2, 5))
    block = SimpleNamespace(site=SimpleNamespace(passing=passing))
    warp = SimpleNamespace(get={"P1": None}.get, registers={}, lanes=lambda: lanes, block=block)
    instruction = SassInstruction("VOTE", ("ANY",), ("R1", "PT", "P1"), None, False, None, 1, 7, 7, (), "")
    assert dict(effect(instruction)(warp))["R1"] == wanted


def test_a_predicate_of_lop3_that_differs_by_lane():
    operands = ("P4", "RZ", "R1", "0xffffffff", "RZ", "0xc0", "P1")
    instruction = SassInstruction("LOP3", ("LUT",), operands, None, False, None, 1, 7, 7, (), "")
    held = {"R1": np.arange(32), "P1": np.arange(32) == 0}
    found = dict(effect(instruction)(SimpleNamespace(get=held.get, registers={})))
    assert found["P4"].all()


def test_meetings_and_atomics_are_rounds():
    found = on(H100, samples.spin_barrier, (4,), numbers(256), numbers(4), integers(0), numbers(256), 4, 64)
    assert found.rounds >= 3
    assert found.guesses


def test_the_binary_of_blackwell_waits_for_its_products():
    size = 1024
    a, b, c = (torch.zeros(size, size, dtype=BF16) for _ in range(3))
    found = on(B200, samples.matmul, (8, 8), a, b, c, size, size, size, 128, 128, 64, "tf32", blocks=1)
    assert any(name.startswith("UTCHMMA") for name in found.instructions)
    assert found.rounds == size // 64 // 2  # three stages: two steps in flight


def test_a_replay_counts_what_a_load_waits_for():
    """Rounds are those of the longest warp."""
    following = ((torch.arange(4096) + 512) % 4096).to(torch.int32)
    with interpreting(Recorder(), 90) as recorder:
        samples.chase[(1,)](following, integers(0), 5)
    site = site_of(recorder.recorded[0])
    assert replay(site.code, walk(site), ROUNDS).time == 6
