"""Delete each barrier, wait and fence of the compiled kernels in turn: noticed, or it is said why nothing can be.

All of them in the slow tests; by default one of each main kernel.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from ops.gpu import test_add_extra_neurons as extra
from ops.gpu import test_cosine_topk as search
from ops.gpu import test_latent_attention as latent
from ops.gpu import test_patched_ffn as whole
from ops.gpu.test_latent_attention_backward import Gradients
from ops.gpu.test_memory_attention import Memory
from ptxsim import SimulationError
from ptxsim.mutation import Mutating
from ptxsim.triton_driver import interpreting

from unike_kernels.ops import _triton
from unike_kernels.ops.cosine_topk import triton as retrieval
from unike_kernels.ops.latent_attention import triton as attention
from unike_kernels.ops.latent_attention import triton_backward as attention_backward
from unike_kernels.ops.memory_attention import triton as memory
from unike_kernels.ops.patched_ffn import triton as forward
from unike_kernels.ops.patched_ffn import triton_backward as backward
from unike_kernels.ops.patched_ffn import triton_fused as fused

SCHEDULES = ["lockstep", "reversed", "random:0", "random:1"]  # the fastest first


# Loops run three times where they can: a barrier may only matter between the first pass and the third.
def extra_neurons() -> None:
    x, base, pool = extra.case(1500, 1, "gated", torch.float16, rows=([3, 2, 0],), sizes=(3, 1, 0, 40))
    extra.expected(x, base, pool, "silu").admits(forward.add_extra_neurons(x, base, pool, "silu"))


def extra_neurons_backward() -> None:
    x, g, pool = extra.case(330, 2, "gated", torch.float32, rows=([3, 0], [3]), sizes=(40, 0, 0, 40))
    grads = backward.add_extra_neurons_backward(g, x, pool, "silu")
    for got, wanted in zip(grads, extra.expected_gradients(g, x, pool, "silu"), strict=True):
        wanted.admits(got)


# kernel -> a launch of it whose result is checked
def latent_attention() -> None:
    case = latent.Case(2, 2, 180, 180, 130, 37, torch.bfloat16, projected=False)
    case.check(*case.run())


def latent_attention_shared() -> None:
    case = latent.Case(48, 2, 200, 330, 70, 37, torch.bfloat16, rows=3, n=30)  # a team of two blocks has three tiles
    case.ids[-1] = torch.arange(37) - 8
    case.check(*case.run())


def cosine_topk() -> None:
    queries, keys = search.case(18, 280, 300, torch.float32)  # two tiles of keys a block, ten steps of columns
    keys = retrieval.reference.normalize_rows(keys)
    search.same(retrieval.cosine_topk(queries, keys, 5, True), retrieval.reference.cosine_topk(queries, keys, 5, True))


def memory_attention() -> None:
    case = Memory(3, 1, 100, 100, 70, 20, torch.bfloat16, n=200)
    case.check(*case.run())


def latent_attention_backward() -> None:
    case = Gradients(2, 2, 100, 180, 130, 20, torch.bfloat16, projected=False)
    case.ids[-1] = torch.arange(20) % 9 - 1  # the first token's gate is closed
    case.check(*case.run())


def patched_ffn() -> None:
    x, base, pool = whole.case(300, 1100, 2, "gated", torch.float16)
    whole.check(fused.patched_ffn(x, base, pool, "silu"), x, base, pool, "silu")


LAUNCHES: tuple[Callable[[], None], ...] = (
    extra_neurons, extra_neurons_backward, patched_ffn, latent_attention, latent_attention_shared, cosine_topk,
    memory_attention, latent_attention_backward,
)  # fmt: skip
PROLOGUE = "since the barrier before there are only copies to places that nothing behind it touches before the next one"
OWN = "a thread overwrites, or reads, only what it has itself read or written since the barrier before"
DISJOINT = "Triton's own: what is written behind it is not what was read before it"
TWICE = "the stores before it are followed by another barrier, of Triton's own, on every way here"
LAST = "it orders what is written for a team's next tile; a launch with several slices has one tile for each team"
FEW = "what is stored before it are the rows of two tokens, which the first warp has, as it has the atomic behind it"
REDUCED = "several parts are reduced in front of it, with barriers of Triton's own; it is for launches of one part"
ONCE = "it orders a turn of a loop against the next; a block has one query and one tile here, several in cosine_topk"
FIRST = "the first warp has all that is stored before it, as it has the atomic behind it; not so in cosine_topk"
# kernel -> {place among its barriers, waits and fences: why its deletion changes nothing}. That no conflict is left
# without it is what the happens-before check says, in launches that run its loop three times.
SURVIVORS: dict[str, dict[int, str]] = {
    "extra_neurons": {7: DISJOINT, 15: OWN},
    "extra_neurons_backward": {4: PROLOGUE, 12: PROLOGUE, 20: PROLOGUE, 24: TWICE, 38: TWICE},
    "latent_attention": {30: DISJOINT, 38: FEW, 43: DISJOINT, 53: DISJOINT},
    "latent_attention_shared": dict.fromkeys((23, 26, 31, 40, 43, 48, 69), DISJOINT),
    "latent_attention_backward": {
        0: LAST,
        30: DISJOINT,
        39: FEW,
        52: DISJOINT,
        77: DISJOINT,
        83: FEW,
        90: DISJOINT,
        93: DISJOINT,
        113: REDUCED,
    },
    "cosine_topk": {15: DISJOINT, 16: DISJOINT},
    "memory_attention": {0: ONCE, 4: FIRST, 9: ONCE, 15: DISJOINT, 16: DISJOINT, 96: DISJOINT, 123: DISJOINT},
}


def noticed(run: Callable[[], None], victim: int) -> str | None:
    for schedule in SCHEDULES:
        torch.manual_seed(0)
        _triton._workspaces.clear()
        session = Mutating(schedule, victim)
        try:
            with interpreting(session):
                run()
        except (SimulationError, AssertionError) as error:
            return f"{schedule}: {type(error).__name__}"
    return None


@pytest.fixture
def few_multiprocessors(monkeypatch):
    for module in (forward, fused, attention, retrieval, attention_backward):
        monkeypatch.setattr(module, "multiprocessors", lambda: 2)  # several slices, of several steps each
    monkeypatch.setattr(memory, "multiprocessors", lambda: 6)  # three tokens of two slices


def sites(run: Callable[[], None]) -> list[str]:
    """The barriers, waits and fences of a kernel, whose launch passes while all are there."""
    torch.manual_seed(0)
    _triton._workspaces.clear()
    original = Mutating("lockstep", -1)
    with interpreting(original):
        run()
    return original.sites


@pytest.mark.parametrize(
    "run", [extra_neurons, patched_ffn, latent_attention, cosine_topk], ids=lambda run: run.__name__
)
def test_a_kernel_without_its_middle_barrier(run, few_multiprocessors):
    explained = SURVIVORS.get(run.__name__, {})
    needed = [place for place in range(len(sites(run))) if place not in explained]
    assert noticed(run, needed[len(needed) // 2])


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(run, id=run.__name__, marks=pytest.mark.slow(minutes=30 if "attention" in run.__name__ else 3))
        for run in LAUNCHES
    ],
)
def test_kernels_without_one_barrier(run, few_multiprocessors):
    name = run.__name__
    assert noticed(run, -1) is None
    survivors = {}
    for victim, site in enumerate(sites(run)):
        found = noticed(run, victim)
        print(f"{name}[{victim}] {site}: {found or 'survives'}", flush=True)
        if found is None:
            survivors[victim] = site
    assert set(survivors) == set(SURVIVORS.get(name, {})), survivors
