"""One edited layer of LLaMA-7B's size: the operators against the same in eager torch. Run with `python3 run.py bench`.

Each benchmark first checks what it computes. pytest-benchmark prints the medians (--benchmark-json: writes them too);
compare within a group only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from unike_kernels import Config, EditLayer, MemoryLayer, ops
from unike_kernels.evaluation.eager import EagerFFN, shift
from unike_kernels.nn import EditStore

D, FFN, NEURONS, ENTRIES = 4096, 11008, 10, 15_000
TOKENS = (1, 16)


@pytest.fixture(scope="module")
def ffn() -> tuple[ops.FFNWeights, EditLayer]:
    torch.manual_seed(0)
    base = ops.FFNWeights(
        torch.randn(FFN, D) * D**-0.5, None, torch.randn(FFN, D) * D**-0.5, None, torch.randn(D, FFN) * FFN**-0.5, None
    )
    n = torch.randn
    edit = EditLayer(n(NEURONS, D) * D**-0.5, n(NEURONS), n(NEURONS, D) * D**-0.5, n(D) * D**-0.5, torch.tensor(0.1))
    return base, edit


def check_then_time(benchmark: Any, run: Callable[[], torch.Tensor], expected: torch.Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(run(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
        benchmark.pedantic(run, rounds=15, warmup_rounds=2)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("system", ["unpatched", "patched", "concatenated per call", "concatenation cached"])
@pytest.mark.benchmark(group="ffn")
def test_ffn(benchmark: Any, ffn: tuple[ops.FFNWeights, EditLayer], system: str, tokens: int) -> None:
    benchmark.group = f"FFN with {NEURONS} extra neurons, d={D}, d'={FFN}, T={tokens}"
    base, edit = ffn
    x = torch.randn(tokens, D)
    store = EditStore()
    store.set({"edit": edit})

    def unpatched() -> torch.Tensor:
        return F.linear(F.silu(F.linear(x, base.w_in)) * F.linear(x, base.w_up), base.w_out)  # type: ignore[arg-type]

    def patched() -> torch.Tensor:
        return ops.patched_ffn(x, unpatched(), store.pool(), activation="silu")

    if system in ("unpatched", "patched"):
        run = unpatched if system == "unpatched" else patched
    else:
        eager = EagerFFN(base, [edit], "silu", cached=system == "concatenation cached")
        run = lambda: eager(x)  # noqa: E731
    check_then_time(benchmark, run, unpatched() if system == "unpatched" else patched())


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("system", ["memory_attention", "eager"])
@pytest.mark.benchmark(group="memory")
def test_memory(benchmark: Any, system: str, tokens: int) -> None:
    benchmark.group = f"memory of {ENTRIES} entries, k=40, d={D}, T={tokens}"
    n, r = torch.randn, D // 8
    encoder = ops.SemanticEncoder(n(r, D) * D**-0.5, n(r), n(D, r) * r**-0.5, n(D))
    memory = MemoryLayer(n(ENTRIES, D), n(ENTRIES, 1, D), None, encoder, n(r), n(D))
    index = ops.normalize_rows(memory.index)
    hidden, out = n(1, tokens, D), n(1, tokens, D)

    def fused() -> torch.Tensor:
        keys = memory.keys
        return ops.memory_attention(hidden[0], out[0], index, keys, keys, encoder, k=40)[0].unsqueeze(0)

    run = fused if system == "memory_attention" else lambda: shift(hidden, out, memory, index, Config())
    check_then_time(benchmark, run, fused())
