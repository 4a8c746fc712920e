"""What each kernel takes of each architecture, read from its binary at the shapes of real models: no spills."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from ops.gpu.test_latent_attention import Case
from ops.gpu.test_latent_attention_backward import Gradients
from ops.gpu.test_memory_attention import Memory
from ops.test_patched_ffn import make_base, make_pool
from ptxsim import static
from ptxsim.triton_driver import compiling
from triton.backends.compiler import GPUTarget

from unike_kernels.ops import _triton
from unike_kernels.ops.cosine_topk import triton as search
from unike_kernels.ops.latent_attention import triton as latent
from unike_kernels.ops.latent_attention import triton_backward as latent_backward
from unike_kernels.ops.memory_attention import triton as memory
from unike_kernels.ops.patched_ffn import triton as forward
from unike_kernels.ops.patched_ffn import triton_backward as backward
from unike_kernels.ops.patched_ffn import triton_fused as fused

D = 4096


class Budget(NamedTuple):
    """A launch and what its kernel may take.

    Attributes:
        module, kernel: where it is.
        launch: makes the arguments of a real shape.
        occupancy: at least, of sm_80 and sm_90.
        wide: at least so many loads of 16 bytes, or copies: one for each stream of weights or memory entries.
        tensor_cores: whether it has their instructions.
        ahead: at least so many groups of copies to shared memory, of sm_90, are on their way while one is awaited; a
            step of the FFN has one for x and one for each matrix.
    """

    module: Any
    kernel: str
    launch: Callable[[], object]
    occupancy: float
    wide: int
    tensor_cores: bool
    ahead: int = 0


def extra(tokens: int, gated: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, Any]:
    return torch.zeros(tokens, D, dtype=dtype), torch.zeros(tokens, D, dtype=dtype), make_pool(
        D, sizes=(10,), rows=([0],), kind=gated, dtype=dtype
    )  # fmt: skip


def whole(tokens: int, gated: bool, dtype: torch.dtype, f: int = 11008) -> tuple[torch.Tensor, Any, Any]:
    x, _, pool = extra(tokens, "gated" if gated else "plain", dtype)
    return x, make_base(D, gated, dtype, f), pool


def attention(tokens: int, rows: int | None, projected: bool, dtype: torch.dtype) -> Case:
    return Case(tokens, 1, D, D, 512, 40, dtype, rows=rows, projected=projected)


def gradients(tokens: int, rows: int | None, projected: bool, dtype: torch.dtype) -> Gradients:
    return Gradients(tokens, 1, D, D, 512, 40, dtype, rows=rows, projected=projected)


def retrieving(tokens: int, projected: bool, dtype: torch.dtype) -> Memory:
    return Memory(tokens, 1, D, D, 512, 40, dtype, n=200, projected=projected, bounded=False)


def searching(queries: int) -> object:
    return search.cosine_topk(torch.zeros(queries, D), torch.zeros(200, D), 40, True)


BUDGETS = {
    "extra neurons, one token, float32": Budget(
        forward, "add_extra_neurons_kernel",
        lambda: forward.add_extra_neurons(*extra(1, "plain", torch.float32), "relu"), 0.12, 2, True,
    ),
    "extra neurons, a prompt, bfloat16": Budget(
        forward, "add_extra_neurons_kernel",
        lambda: forward.add_extra_neurons(*extra(128, "gated", torch.bfloat16), "silu"), 0.12, 4, True,
    ),
    "gradients of extra neurons, bfloat16": Budget(
        backward, "add_extra_neurons_backward_kernel",
        lambda: backward.add_extra_neurons_backward(*extra(128, "gated", torch.bfloat16), "silu"), 0.12, 4, True,
    ),
    "patched FFN, one token, bfloat16": Budget(
        fused, "patched_ffn_kernel",
        lambda: fused.patched_ffn(*whole(1, True, torch.bfloat16), "silu"), 0.12, 6, True, ahead=12,
    ),
    "patched FFN, 64 tokens, bfloat16": Budget(
        fused, "patched_ffn_kernel",
        lambda: fused.patched_ffn(*whole(64, True, torch.bfloat16), "silu"), 0.12, 6, True, ahead=9,
    ),
    "patched FFN, 32 tokens, bfloat16": Budget(
        fused, "patched_ffn_kernel",
        lambda: fused.patched_ffn(*whole(32, True, torch.bfloat16), "silu"), 0.12, 6, True, ahead=12,
    ),
    "patched FFN, 32 tokens, float32": Budget(
        fused, "patched_ffn_kernel", lambda: fused.patched_ffn(*whole(32, False, torch.float32), "relu"), 0.12, 4, True
    ),
    "patched FFN, 64 tokens, wide, bfloat16": Budget(
        fused, "patched_ffn_kernel",
        lambda: fused.patched_ffn(*whole(64, True, torch.bfloat16, 28672), "gelu"), 0.12, 6, True,
    ),
    "patched FFN, 16 tokens, not gated, float16": Budget(
        fused, "patched_ffn_kernel",
        lambda: fused.patched_ffn(*whole(16, False, torch.float16, 16384), "gelu_tanh"), 0.12, 4, True,
    ),
    "patched FFN, one token, float32": Budget(
        fused, "patched_ffn_kernel", lambda: fused.patched_ffn(*whole(1, True, torch.float32), "silu"), 0.12, 6, True
    ),
    "latent attention, one token, bfloat16": Budget(
        latent, "latent_attention_kernel", lambda: attention(1, None, True, torch.bfloat16).run(), 0.12, 4, False
    ),
    "latent attention, one token, w1, float32": Budget(
        latent, "latent_attention_kernel", lambda: attention(1, None, False, torch.float32).run(), 0.12, 4, False
    ),
    "latent attention, ids of each token, bfloat16": Budget(
        latent, "latent_attention_kernel", lambda: attention(128, None, True, torch.bfloat16).run(), 0.12, 4, True
    ),
    "latent attention, 512 tokens, bfloat16": Budget(
        latent, "latent_attention_kernel", lambda: attention(512, None, True, torch.bfloat16).run(), 0.12, 4, True
    ),
    "gradients of latent attention, ids of each token, bfloat16": Budget(
        latent_backward, "latent_attention_backward_kernel",
        lambda: gradients(128, None, True, torch.bfloat16).run(), 0.12, 4, True,
    ),
    "gradients of latent attention, ids of each token, w1, float32": Budget(
        latent_backward, "latent_attention_backward_kernel",
        lambda: gradients(128, None, False, torch.float32).run(), 0.12, 4, True,
    ),
    "gradients of latent attention, ids of the sequence, bfloat16": Budget(
        latent_backward, "latent_attention_backward_kernel",
        lambda: gradients(128, 1, True, torch.bfloat16).run(), 0.12, 4, True,
    ),
    "search, one query, float32": Budget(search, "cosine_topk_kernel", lambda: searching(1), 0.12, 5, True),
    "search, 8 queries, not normalised": Budget(
        search, "cosine_topk_kernel",
        lambda: search.cosine_topk(torch.zeros(8, D), torch.zeros(200, D), 40), 0.12, 5, True,
    ),
    "search, 64 queries, float32": Budget(search, "cosine_topk_kernel", lambda: searching(64), 0.12, 5, True),
    "memory attention, one token, bfloat16": Budget(
        memory, "memory_attention_kernel", lambda: retrieving(1, True, torch.bfloat16).run(), 0.12, 5, True
    ),
    "memory attention, 64 tokens, float32": Budget(
        memory, "memory_attention_kernel", lambda: retrieving(64, False, torch.float32).run(), 0.12, 5, True
    ),
    "latent attention, ids of the sequence, bfloat16": Budget(
        latent, "latent_attention_kernel", lambda: attention(128, 1, True, torch.bfloat16).run(), 0.12, 4, True
    ),
}  # fmt: skip


class Captured:
    """In the place of a kernel: keeps what it would be launched with."""

    def __init__(self) -> None:
        self.arguments: tuple[Any, ...] = ()
        self.options: dict[str, Any] = {}

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            self.arguments, self.options = arguments, options

        return launch


@pytest.fixture
def resources(monkeypatch):
    """(budget, target) -> what the kernel takes there."""

    def find(budget: Budget, target: GPUTarget) -> static.Resources:
        kernel, captured = getattr(budget.module, budget.kernel), Captured()
        monkeypatch.setattr(budget.module, budget.kernel, captured)
        monkeypatch.setattr(_triton, "_multiprocessors", lambda device: MULTIPROCESSORS[target.arch])
        _triton._workspaces.clear()
        with compiling(target):
            budget.launch()
        monkeypatch.undo()
        return static.resources(static.compile_for(kernel, target, captured.arguments, **captured.options))

    return find


# Of an A100, H100, B200, RTX PRO 6000, MI300X and MI355X.
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148, 120: 188, "gfx942": 304, "gfx950": 256}
# The rest are slow tests: the default ones look at each forward kernel once.
USUAL = {
    "extra neurons, a prompt, bfloat16", "patched FFN, one token, bfloat16", "memory attention, one token, bfloat16",
    "search, one query, float32",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "target"),
    [
        pytest.param(
            name,
            t,
            marks=[] if t.arch == 90 and name in USUAL else [pytest.mark.slow],
            id=f"{name}-{t.backend}-{t.arch}",
        )
        for t in static.TARGETS
        for name in BUDGETS
    ],
)
def test_budget(name, target, resources):
    budget = BUDGETS[name]
    found = resources(budget, target)
    print(name, found)
    assert not found.spills, found
    assert found.shared <= found.shared_limit
    if target.backend == "cuda":
        assert found.occupancy >= budget.occupancy, found
        assert found.wide_loads >= budget.wide, found
        assert bool(found.tensor_core) == budget.tensor_cores, found
    if target.arch == 90:
        assert found.ahead >= budget.ahead, found
