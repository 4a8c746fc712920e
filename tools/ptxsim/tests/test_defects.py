"""Deliberately broken kernels: each kind of defect must be reported, under every schedule."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

import numpy as np
import pytest
import sample_launches
from ptxsim import (
    AsyncCopyError,
    DeadlockError,
    DivergentBarrierError,
    LoadedModule,
    MisalignedError,
    MissingLanesError,
    OutOfBoundsError,
    RaceError,
    Session,
    SimulationError,
    UninitialisedReadError,
    UnsupportedInstructionError,
    load,
)

needs_nvcc = pytest.mark.skipif(not sample_launches.has_nvcc(), reason="nvcc is not on the PATH")
SCHEDULES = [pytest.param("lockstep", marks=pytest.mark.smoke), "reversed", "random:0"]


@functools.cache
def broken() -> LoadedModule:
    source = Path(__file__).with_name("broken.cu")
    command = ["nvcc", "-ptx", "-arch=sm_80", "-std=c++17", str(source), "-o", "/dev/stdout"]
    return load(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def floats(n: int) -> np.ndarray:
    return np.arange(n, dtype="f4")


# kernel -> error, a part of the message, blocks, dynamic shared memory, arguments ("out": 64 elements, poisoned)
BROKEN = {
    "load_past_the_end": (OutOfBoundsError, r"x \+ 256, which has 256", 1, 0, [floats(64), "out"]),
    "store_before_the_start": (OutOfBoundsError, r"\+ -4", 1, 0, ["out"]),
    "wild_pointer": (OutOfBoundsError, "which has", 1, 0, [np.array([64], "u8"), "out"]),
    "shared_past_the_end": (OutOfBoundsError, r"shared \+ 128", 1, 128, ["out"]),
    "misaligned": (MisalignedError, "4 bytes", 1, 0, [np.zeros(300, "u1"), "out"]),
    "shared_nobody_wrote": (UninitialisedReadError, "thread 58", 1, 0, ["out"]),
    "reads_its_output": (UninitialisedReadError, "thread", 1, 0, ["out"]),
    "shuffle_of_half_a_warp": (MissingLanesError, "0x0000ffff are here, 0xffffffff are named", 1, 0, ["out"]),
    "shuffle_from_outside": (MissingLanesError, "reads lane 20", 1, 0, ["out"]),
    "barrier_in_a_branch": (DivergentBarrierError, "warp", 1, 0, ["out"]),
    "two_barriers": (DivergentBarrierError, "different barriers", 1, 0, ["out"]),
    "copy_without_wait": (AsyncCopyError, "has not landed", 1, 0, [floats(64), "out"]),
    "waits_for_too_few": (AsyncCopyError, "has not landed", 1, 0, [floats(128), "out"]),
    "copy_without_barrier": ((RaceError, UninitialisedReadError, AsyncCopyError), "shared", 1, 0, [floats(64), "out"]),
    "lanes_write_one_place": (RaceError, "lanes disagree", 1, 0, ["out"]),
    "warps_write_one_place": (RaceError, "block", 1, 0, ["out"]),
    "blocks_write_one_place": (RaceError, "was written by warp", 2, 0, ["out"]),
    "warps_write_one_shared_place": (RaceError, "block", 1, 0, ["out"]),
    "reads_before_the_barrier": ((RaceError, UninitialisedReadError), "shared", 1, 0, ["out"]),
    "overwrites_what_is_read": (RaceError, "no barrier since", 1, 0, ["out"]),
    "no_fence": (RaceError, "was written by warp 0", 4, 0, [np.zeros(1, "u4"), "out", "out"]),
    "waits_for_ever": (DeadlockError, "spins", 2, 0, [np.zeros(1, "u4"), "out"]),
    "trips": (SimulationError, "trap", 1, 0, ["out"]),
}


@needs_nvcc
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", BROKEN)
def test_broken_kernels(name, schedule):
    error, message, blocks, shared, arguments = BROKEN[name]
    session = Session(schedule)
    given = [session.empty(64, "f4") if isinstance(a, str) else a.copy() for a in arguments]
    names = ["x", *(f"out{i}" for i in range(len(given) - 1))]
    with pytest.raises(error, match=message):
        session.launch(broken()[name], (blocks,), (64,), given, names=names, shared=shared)


@needs_nvcc
def test_the_list_is_complete():
    assert set(broken().names) == set(BROKEN)


@needs_nvcc
def test_a_grid_barrier_of_more_blocks_than_fit_is_a_deadlock():
    session = Session(resident=5)
    with pytest.raises(DeadlockError, match="1 blocks have not started"):
        sample_launches.spin(session)
    sample_launches.spin(Session(resident=6))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("frobnicate.b32 $d0, $a0;", "opcode frobnicate"),
        ("add.wrong.u32 $d0, $a0, $a0;", r"modifier \.wrong of: add\.wrong\.u32"),
        ("mma.sync.aligned.m8n8k128.row.col.s32.b1.b1.s32 $d0, $a0, $a0, $a0;", "mma"),
        ("ld.shared::cluster.b32 $d0, [$a0];", "shared::cluster"),
        ("mov.u32 $d0, %envreg3;", "%envreg3"),
        ("shfl.down.b32 $d0, $a0, 1, 31;", "only shfl.sync"),
        ("ldmatrix.sync.aligned.m16n16.x3.shared.b16 {$d0}, [$a0];", "form of: ldmatrix"),
        ("lop3.b32 $d0, $a0, $a0, $a0, $a0;", "form of: lop3"),
        ("call.uni helper, ($a0);", "opcode call"),
    ],
)
def test_what_is_unknown_is_named(text, named):
    from one_instruction import execute

    with pytest.raises(UnsupportedInstructionError, match=named):
        execute(text, [np.zeros(32, "u4")], ["u4"])


def test_an_unknown_instruction_is_refused_even_if_it_is_never_reached():
    from one_instruction import execute

    with pytest.raises(UnsupportedInstructionError, match="frobnicate"):
        execute("@$a0 bra past;\nfrobnicate.b32 $d0, 0;\npast:\nmov.b32 $d0, 0;", [np.ones(32, bool)], ["u4"])


def test_a_view_is_bounded_by_its_own_extent(on_gpu):
    """A launch may touch what its arguments span, not the rest of the memory that they are cut from."""
    import torch
    import triton_samples

    whole = torch.zeros(1024)
    with on_gpu() as session:
        triton_samples.scan[(1,)](whole[:512], whole[512:], 512)
        with pytest.raises(OutOfBoundsError, match="x "):
            triton_samples.scan[(1,)](whole[:500], torch.empty(512), 512)
    assert len(session.launches) == 1


PASS_ON = """
.version 8.7
.target sm_80
.address_size 64
.visible .entry pass_on(.param .u64 data, .param .u64 flag, .param .u64 out)
{
.reg .pred %p<3>; .reg .b32 %r<4>; .reg .b64 %rd<4>;
ld.param.u64 %rd0, [data]; ld.param.u64 %rd1, [flag]; ld.param.u64 %rd2, [out];
mov.u32 %r0, %tid.x; setp.ne.b32 %p0, %r0, 0; @%p0 exit;
mov.u32 %r1, %ctaid.x; setp.ne.b32 %p1, %r1, 0; @%p1 bra consumer;
st.global.b32 [%rd0], 42;
STORE.b32 [%rd1], 1;
exit;
consumer:
LOAD.b32 %r2, [%rd1]; setp.eq.b32 %p2, %r2, 0; @%p2 bra consumer;
ld.global.b32 %r3, [%rd0]; st.global.b32 [%rd2], %r3;
ret;
}
"""


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("store", "load_", "ordered"),
    [
        ("st.release.gpu.global", "ld.acquire.gpu.global", True),
        ("fence.acq_rel.gpu; st.relaxed.gpu.global", "ld.acquire.gpu.global", True),
        ("st.release.gpu", "ld.acquire.gpu", True),  # generic addresses
        ("st.relaxed.gpu", "ld.acquire.gpu", False),
        ("membar.gl; st.volatile.global", "ld.acquire.gpu.global", True),
        ("st.relaxed.gpu.global", "ld.acquire.gpu.global", False),
        ("st.release.gpu.global", "ld.relaxed.gpu.global", False),
        ("membar.cta; st.volatile.global", "ld.acquire.gpu.global", False),
    ],
)
def test_a_message_from_block_to_block(store, load_, ordered, schedule):
    kernel = load(PASS_ON.replace("STORE", store).replace("LOAD", load_))["pass_on"]
    session = Session(schedule)
    data, flag, out = session.empty(1, "u4"), np.zeros(1, "u4"), session.empty(1, "u4")
    if ordered:
        session.launch(kernel, (2,), (32,), [data, flag, out])
        assert out[0] == 42
    else:
        with pytest.raises(RaceError, match="was written by warp 0 of block 0"):
            session.launch(kernel, (2,), (32,), [data, flag, out])


NAMED = """
.version 8.7
.target sm_80
.address_size 64
.visible .entry named(.param .u64 out)
{
.reg .pred %p<3>; .reg .b32 %r<4>; .reg .b64 %rd<4>;
.shared .align 4 .b8 tile[512];
mov.u32 %r0, %tid.x; mov.u32 %r1, tile; mad.lo.u32 %r1, %r0, 4, %r1; st.shared.b32 [%r1], %r0;
setp.ge.u32 %p0, %r0, 64; @%p0 bra second;
BARRIER 1, 64; bra done;
second: BARRIER 2, 64;
done:
xor.b32 %r2, %r0, OTHER; mov.u32 %r1, tile; mad.lo.u32 %r1, %r2, 4, %r1; ld.shared.b32 %r3, [%r1];
ld.param.u64 %rd0, [out]; mad.wide.u32 %rd0, %r0, 4, %rd0; st.global.b32 [%rd0], %r3;
ret;
}
"""


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_barriers_of_a_part_of_the_block_order_that_part(schedule):
    """Two pairs of warps, each with a barrier of its own."""
    session = Session(schedule)
    out = session.empty(128, "u4")
    ptx = NAMED.replace("BARRIER", "bar.sync").replace("OTHER", "32")
    session.launch(load(ptx)["named"], (1,), (128,), [out])
    assert (out == np.arange(128) ^ 32).all()
    with pytest.raises(DeadlockError, match="waits at a barrier"):
        session.launch(load(ptx.replace("2, 64", "2, 96"))["named"], (1,), (128,), [out])


@needs_nvcc
def test_memory_behind_a_pointer_in_memory_has_to_be_exposed():
    """The broken kernel `wild_pointer` follows a table of pointers; a table of good ones makes it a good kernel."""
    x = floats(64)
    table = np.array([x.ctypes.data], "u8")
    session = Session()
    out = session.empty(64, "f4")
    with pytest.raises(OutOfBoundsError):
        session.launch(broken()["wild_pointer"], (1,), (64,), [table, out])
    session.expose("x", x)
    launch = session.launch(broken()["wild_pointer"], (1,), (64,), [table, out])
    assert (out == x).all() and launch.loads["x"].bytes == 256
