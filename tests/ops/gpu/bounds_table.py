"""The table of docs/gpu-bounds.md: what each GPU kernel must move, what it asks for, and the bound that follows.

    PYTHONPATH=tests:tools/ptxsim python -m ops.gpu.bounds_table > docs/gpu-bounds.md

What must move is counted at the shapes of LLaMA-7B. What is asked for is counted by executing the compiled kernels on
the interpreter, at shapes that it can run in a minute, and given as a multiple of what must move there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from cuda_tests import harness
from ops.gpu.test_latent_attention import Case
from ops.gpu.test_memory_attention import Memory
from ops.test_patched_ffn import make_base, make_pool
from ptxsim import Launch, Session
from ptxsim.triton_driver import interpreting

from unike_kernels.ops import _triton
from unike_kernels.ops.cosine_topk import triton as search
from unike_kernels.ops.cosine_topk.reference import normalize_rows
from unike_kernels.ops.patched_ffn import triton as side
from unike_kernels.ops.patched_ffn import triton_fused as fused

BANDWIDTH = {"A100": 2.039e12, "H100": 3.35e12, "B200": 8.0e12}  # bytes a second, of the makers' data sheets
D, F, R, K, N, NEURONS = 4096, 11008, 512, 40, 15_000, 10
SECTOR = 32
# What kernels have to themselves: scratch and counters, not the operands.
WORKSPACE = {
    "hidden", "extra", "everybody", "counters", "scratch", "scores", "weights", "know", "squares", "cosines",
    "units", "lists", *harness.PARTS,
} - {"codes"}  # fmt: skip


class Entry(NamedTuple):
    """A line of the table.

    Attributes:
        op, shape: in words.
        must: bytes that must move, at the real shape and at that of the run.
        run: launches it, on fewer multiprocessors.
    """

    op: str
    shape: str
    must: tuple[float, float]
    run: Callable[[], object]


def ffn_bytes(tokens: int, d: int, f: int, rows: int) -> float:
    """bfloat16: three matrices, the neurons of each row, x and out."""
    return 2.0 * (3 * d * f + rows * (2 * NEURONS * d + d) + 2 * tokens * d)


def extra_bytes(tokens: int, d: int) -> float:
    return 2.0 * (2 * NEURONS * d + d + 3 * tokens * d)


def attention_bytes(tokens: int, d: int, r: int, k: int, *, shared: bool) -> float:
    """bfloat16 keys and values, float32 projected values, w2; queries, inputs and out."""
    rows = k if shared else tokens * k
    return 2.0 * (2 * rows * d + r * d + 3 * tokens * d) + 4.0 * rows * r


def _fused(tokens: int, rows: int) -> None:
    x, base = torch.randn(tokens, 512).bfloat16(), make_base(512, True, torch.bfloat16, 1024)
    pool = make_pool(512, (NEURONS,) * rows, [[i] for i in range(rows)], "plain", torch.bfloat16)
    fused.patched_ffn(x, base, pool, "silu")


def _beside(tokens: int) -> None:
    x = torch.randn(tokens, D).bfloat16()
    side.add_extra_neurons(x, x.clone(), make_pool(D, (NEURONS,), ([0],), "plain", torch.bfloat16), "silu")


def _attention(tokens: int, rows: int | None) -> None:
    case = Case(tokens, 1, 1024, 1024, 128, K, torch.bfloat16, rows=rows, n=K)
    case.ids[:] = torch.arange(K)
    case.run()


def _memory() -> None:
    Memory(1, 1, 256, 256, 32, K, torch.bfloat16, n=1024, bounded=False).run()


def _search() -> None:
    keys = normalize_rows(torch.randn(1024, 256))
    search.cosine_topk(torch.randn(1, 256), keys, K, True)


def _native_search() -> Launch:
    keys = normalize_rows(torch.randn(2048, 256))
    return harness.search(Session(), torch.randn(1, 256), keys, K, scan="int8", device=(4, 1)).launch


FP32, INT8 = 4.0, 1.0
ENTRIES = [
    Entry(
        "patched_ffn, fused", f"T=1, d={D}, d'={F}, one edit of 10",
        (ffn_bytes(1, D, F, 1), ffn_bytes(1, 512, 1024, 1)), lambda: _fused(1, 1),
    ),
    Entry(
        "patched_ffn, fused", f"T=64 rows with an edit each, d={D}, d'={F}",
        (ffn_bytes(64, D, F, 64), ffn_bytes(64, 512, 1024, 64)), lambda: _fused(64, 64),
    ),
    Entry("patched_ffn, beside the base", f"T=1, d={D}", (extra_bytes(1, D), extra_bytes(1, D)), lambda: _beside(1)),
    Entry(
        "patched_ffn, beside the base", f"T=128 of one row, d={D}", (extra_bytes(128, D), extra_bytes(32, D)),
        lambda: _beside(32),
    ),
    Entry(
        "latent_attention", f"T=1, k={K}, d={D}, r={R}",
        (attention_bytes(1, D, R, K, shared=False), attention_bytes(1, 1024, 128, K, shared=False)),
        lambda: _attention(1, None),
    ),
    Entry(
        "latent_attention", f"T=128 that share their entries, k={K}, d={D}, r={R}",
        (attention_bytes(128, D, R, K, shared=True), attention_bytes(32, 1024, 128, K, shared=True)),
        lambda: _attention(32, 1),
    ),
    Entry(
        "memory_attention", f"T=1, N={N} of float32, k={K}, d={D}",
        (
            FP32 * N * D + attention_bytes(1, D, R, K, shared=False),
            FP32 * 1024 * 256 + attention_bytes(1, 256, 32, K, shared=False),
        ),
        _memory,
    ),
    Entry("cosine_topk, Triton", f"B=1, N={N} of float32, d={D}", (FP32 * N * D, FP32 * 1024 * 256), _search),
    Entry(
        "cosine_topk, CUDA, int8 scan", f"B=1, N={N}, d={D}", (N * (INT8 * D + 16), 2048 * (INT8 * 256 + 16)),
        _native_search,
    ),
]  # fmt: skip


def launches(entry: Entry) -> list[Launch]:
    """Of one call, on four multiprocessors."""
    torch.manual_seed(0)
    _triton._workspaces.clear()
    session, before = Session(), _triton._multiprocessors
    _triton._multiprocessors = lambda device: 4
    try:
        with interpreting(session):
            own = entry.run()
    finally:
        _triton._multiprocessors = before
    return [own] if isinstance(own, Launch) else session.launches


def asked(found: list[Launch]) -> tuple[float, float]:
    """Bytes of all sectors that the operands were asked for, and that scratch was."""
    sums = {True: 0.0, False: 0.0}
    for launch in found:
        for name, traffic in [*launch.loads.items(), *launch.stores.items()]:
            sums[name in WORKSPACE] += SECTOR * traffic.sectors
    return sums[False], sums[True]


def amount(count: float) -> str:
    return f"{count / 1e6:.3g} MB" if count >= 1e6 else f"{count / 1e3:.3g} KB"


def line(entry: Entry) -> str:
    real, small = entry.must
    found = launches(entry)
    operands, scratch = asked(found)
    ratios = [f"{asked_for / small:.2f}" for asked_for in (operands, scratch)]
    bounds = [f"{1e6 * real / speed:.3g}" for speed in BANDWIDTH.values()]
    cells = [entry.op, entry.shape, str(len(found)), amount(real), *ratios, *bounds]
    return "| " + " | ".join(cells) + " |"


_SPEEDS = ", ".join(f"{name} {speed / 1e12:.3g} TB/s" for name, speed in BANDWIDTH.items())
HEAD = f"""# What the GPU kernels must move

No GPU was at hand: these are bounds, not times. A bound is the bytes that must move over the memory bandwidth of the
maker's data sheet ({_SPEEDS}); launch, meetings of blocks and arithmetic
come on top. `unike bench --device cuda` measures the kernels and the bandwidth on a GPU.

*Asked for* is what the operands' sectors of 32 bytes add up to when the compiled PTX is executed, as a multiple of what
must move, at smaller shapes and on four multiprocessors; what is asked for more than once can come from a cache.
*Scratch* is the same for what blocks exchange: its share falls with d and grows with the number of blocks.
Made by `PYTHONPATH=tests:tools/ptxsim python -m ops.gpu.bounds_table > docs/gpu-bounds.md`.

| operator | shape | launches | must move | asked for | scratch | A100, us | H100, us | B200, us |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


def table() -> str:
    return "\n".join([HEAD, *(line(entry) for entry in ENTRIES)]) + "\n"


if __name__ == "__main__":
    print(table(), end="")
