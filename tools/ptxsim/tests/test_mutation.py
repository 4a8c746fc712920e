"""Delete each barrier, wait and fence of the sample kernels in turn: the bench must notice, or it is said why not."""

from __future__ import annotations

import pytest
import sample_launches
from ptxsim import SimulationError
from ptxsim.mutation import Mutating
from sample_launches import CUDA, TRITON

SCHEDULES = ["reversed", "random:0", "random:1", "lockstep"]

UNREACHED = "never executed: a trap in its place goes unnoticed too"
PROLOGUE = "before it there are only copies of this thread to places that nothing behind it touches"
# sample -> {position among its barriers, waits and fences: why its deletion changes nothing that is defined}.
# That no conflict is left without a barrier is what the happens-before check says, whatever the schedule.
SURVIVORS: dict[str, dict[int, str]] = {
    # `tile + 1 < tiles` always holds in the first three of the four copies of the loop body that nvcc makes.
    "pipelined_sum": dict.fromkeys((1, 5, 9), UNREACHED),
    "triton_matmul_tf32": {0: PROLOGUE},
    "triton_matmul_f32": {0: PROLOGUE},
    "triton_fused_ffn": {
        0: PROLOGUE,
        8: "every thread has waited for its own copies, and what others read is ordered by the barrier before",
        9: PROLOGUE,
        16: "the copies that are left fill with zeros what nothing reads any more",
        17: "no access of shared memory follows",
    },
    "triton_spin_barrier": {2: "the store before it and the atomic behind it are made by one and the same thread"},
}


def noticed(sample, run, victim: int, opcode: str = "pmevent") -> str | None:
    """What gave the mutant away: an error of the interpreter or a wrong result; None if nothing did."""
    for schedule in SCHEDULES:
        session = Mutating(schedule, victim, opcode)
        try:
            run(sample, session)
        except (SimulationError, AssertionError) as error:
            return f"{schedule}: {type(error).__name__}"
    return None


def check(name: str, sample, run) -> None:
    assert noticed(sample, run, -1) is None
    original = Mutating("lockstep", -1)
    run(sample, original)
    survivors = {}
    for victim, site in enumerate(original.sites):
        found = noticed(sample, run, victim)
        print(f"{name}[{victim}] {site}: {found or 'survives'}")
        if found is None:
            survivors[victim] = site
    explained = SURVIVORS.get(name, {})
    assert set(survivors) == set(explained), survivors
    for victim, reason in explained.items():
        assert (noticed(sample, run, victim, "trap") is None) == (reason is UNREACHED)


@pytest.mark.skipif(not sample_launches.has_nvcc(), reason="nvcc is not on the PATH")
@pytest.mark.parametrize("name", CUDA)
def test_cuda_kernels_without_one_barrier(name):
    # Device variables keep their values between launches: a stopped kernel leaves some behind.
    def run(sample, session) -> None:
        for array in sample_launches.cuda_kernels().variables.values():
            array[:] = 0
        sample(session)

    check(name, CUDA[name], run)


@pytest.mark.parametrize("name", TRITON)
def test_triton_kernels_without_one_barrier(name):
    pytest.importorskip("triton", reason="triton is not installed: it compiles the kernels")
    from ptxsim.triton_driver import interpreting

    def run(sample, session) -> None:
        with interpreting(session):
            sample(session)

    check(name, TRITON[name], run)
