"""The launches of the GPU kernels at the shapes of LLaMA-7B, for the cost model: memory of the real size, of which only
what steers a kernel holds values.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from cuda_tests import harness
from ops.test_patched_ffn import make_pool
from ptxsim.cost import Cost, Machine, Recorder, cost
from ptxsim.triton_driver import interpreting

from unike_kernels import ops
from unike_kernels.ops import _triton
from unike_kernels.ops.cosine_topk import triton as search
from unike_kernels.ops.latent_attention import triton as latent
from unike_kernels.ops.latent_attention import triton_backward as latent_backward
from unike_kernels.ops.latent_attention.reference import Blend, SemanticEncoder
from unike_kernels.ops.memory_attention import triton as memory
from unike_kernels.ops.patched_ffn import triton as side
from unike_kernels.ops.patched_ffn import triton_backward as side_backward
from unike_kernels.ops.patched_ffn import triton_fused as fused
from unike_kernels.ops.patched_ffn.reference import FFNWeights

D, F, R, K, N, NEURONS = 4096, 11008, 512, 40, 15_000, 10
# What kernels have to themselves: scratch and counters, not the operands.
SCRATCH = {
    "hidden", "extra", "everybody", "counters", "scratch", "scores", "know", "squares", "cosines", "units", "halves",
    "estimates", "maxima", "thresholds", "found", "known", "state",
    *(f"workspace.{part}" for part in harness.PARTS),
}  # fmt: skip


class Real(NamedTuple):
    """A launch at a real shape.

    Attributes:
        op, shape: in words.
        must: bytes that must move.
        flops: that must be done, of bfloat16 products.
        run: launches it, on a device of so many multiprocessors.
        peer: seconds that others take on a machine.
        blocks: of the launch, that are walked: 1 where all do the same.
        passing: lanes of a warp for which a ballot finds a condition on floats to hold.
        turns: of loops whose end hangs on floats, by source line.
    """

    op: str
    shape: str
    must: float
    flops: float
    run: Callable[[Machine, Recorder], object]
    peer: Callable[[Machine], float]
    blocks: int = 1
    passing: int = 0
    turns: Mapping[str, int] | None = None

    @property
    def name(self) -> str:
        """Operator and shape."""
        return f"{self.op}, {self.shape}"

    def cost(self, machine: Machine) -> Cost:
        """By the model."""
        _triton._workspaces.clear()
        before = _triton._multiprocessors
        _triton._multiprocessors = lambda device: machine.multiprocessors
        try:
            with interpreting(Recorder(), machine.arch) as recorder:
                self.run(machine, recorder)
        finally:
            _triton._multiprocessors = before
        (launch,) = recorder.recorded
        found = cost(launch, machine, sorted(SCRATCH), self.blocks, self.passing, self.turns)
        if found.seconds < self.bound(machine):  # a guess of the model may leave a loop out
            raise AssertionError(f"{self.name}: {1e6 * found.seconds:.0f} us, less than its bound")
        return found

    def bound(self, machine: Machine) -> float:
        """Seconds that no kernel can beat."""
        return max(self.must / machine.bandwidth, self.flops / machine.flops)


EAGER = 5e-6  # seconds between two launches of torch, whose host is slower than small kernels
GEMM_REACHES = 0.75  # of the flops


def eager(machine: Machine, *sizes: float) -> float:
    """Kernels of torch, one after the other, that move so many bytes each."""
    return sum(max(EAGER, machine.launch + size / (machine.reached * machine.bandwidth)) for size in sizes)


def ffn_peer(machine: Machine, tokens: int, d: int, f: int) -> float:
    """Three products of a vendor's library, the activation, and a side product of two launches, in a CUDA graph."""
    weights = 3 * (machine.launch + 2 * d * f / (machine.reached * machine.bandwidth))
    return max(weights, 6 * tokens * d * f / (GEMM_REACHES * machine.flops)) + 3 * machine.launch


def side_peer(machine: Machine, tokens: int, d: int) -> float:
    """Shrink and expand, each a launch, with the output read and written by the second."""
    return eager(machine, 2 * tokens * d, 6 * tokens * d)


def attention_peer(machine: Machine, tokens: int, d: int, r: int, k: int, *, own: bool) -> float:
    """torch: two gathers, two products, softmax, the encoder, two norms, a cosine and the blend, a launch each."""
    rows = tokens * k if own else k
    gathered = [6 * rows * d] * 2 if own else [4 * rows * d] * 2  # read, written, read
    small = [4 * tokens * k] * 3 + [2 * tokens * d] * 8
    return eager(machine, *gathered, 4 * rows * r, 2 * r * d, *small)


def search_peer(machine: Machine, queries: int, n: int, d: int) -> float:
    """A float32 product of a vendor's library, and a selection."""
    flops = 2 * queries * n * d / (GEMM_REACHES * machine.flops / 15)  # float32 without tensor cores
    product = max(4 * n * d / (machine.reached * machine.bandwidth), flops)
    return eager(machine, 8 * queries * d) + machine.launch + product + 10e-6 + eager(machine, 8 * queries * n)


def ffn_bytes(tokens: int, d: int, f: int, rows: int) -> float:
    """bfloat16: three matrices, the neurons of each row, x and out."""
    return 2.0 * (3 * d * f + rows * (2 * NEURONS * d + d) + 2 * tokens * d)


def extra_bytes(tokens: int, d: int) -> float:
    """bfloat16: the neurons of one row, x, base and out."""
    return 2.0 * (2 * NEURONS * d + d + 3 * tokens * d)


def attention_bytes(tokens: int, d: int, r: int, k: int, *, own: bool) -> float:
    """bfloat16 keys and values, float32 projected values, w2; queries, inputs and out. An entry moves once for all."""
    rows = N * (1 - (1 - k / N) ** tokens) if own else k  # different ones of k at random for each token, on average
    return 2.0 * (2 * rows * d + r * d + 3 * tokens * d) + 4.0 * rows * r


def _pool(d: int, rows: int, tokens: int) -> ops.EditPool:
    token_rows = torch.arange(tokens) if rows == tokens > 1 else None
    return make_pool(d, (NEURONS,) * rows, [[i] for i in range(rows)], "plain", torch.bfloat16, token_rows)


def _zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Of which only what is touched takes memory."""
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).reshape(shape)


def _half(*shape: int) -> torch.Tensor:
    return _zeros(*shape, dtype=torch.bfloat16)


def _fused(tokens: int, rows: int, d: int, f: int) -> None:
    base = FFNWeights(_half(f, d), None, _half(f, d), None, _half(d, f), None)
    fused.patched_ffn(_half(tokens, d), base, _pool(d, rows, tokens), "silu")


def _beside(tokens: int) -> None:
    side.add_extra_neurons(_half(tokens, D), _half(tokens, D), _pool(D, 1, tokens), "silu")


def _beside_backward(tokens: int) -> None:
    side_backward.add_extra_neurons_backward(_half(tokens, D), _half(tokens, D), _pool(D, 1, tokens), "silu")


def _attended(tokens: int, own: bool) -> dict[str, object]:
    """The operands of attention over a memory of N entries."""
    ids = torch.stack([torch.randperm(N)[:K] for _ in range(tokens if own else 1)])
    encoder = SemanticEncoder(_half(R, D), _half(R), _half(D, R), _half(D))
    return {
        "queries": _half(tokens, 1, D), "inputs": _half(tokens, D), "keys": _half(N, 1, D), "values": _half(N, 1, D),
        "ids": ids, "encoder": encoder, "alpha": None, "anchor": None,
        "blend": Blend(D**-0.5, "inclusion", "match"), "projected": _zeros(N, 1, R),
    }  # fmt: skip


def _attention(tokens: int, own: bool) -> None:
    latent.latent_attention(**_attended(tokens, own))


def _attention_backward(tokens: int) -> None:
    latent_backward.latent_attention_backward(_half(tokens, D), _zeros(tokens), **_attended(tokens, True))


def _memory(tokens: int) -> None:
    given = _attended(tokens, True)
    out = _half(tokens, D), _zeros(tokens), given.pop("ids")  # which the launch would find
    memory.memory_attention(_half(tokens, D), _zeros(N, D), K, None, **given, out=out)


def _search(queries: int) -> None:
    search.cosine_topk(_zeros(queries, D), _zeros(N, D), K, True)


CANDIDATE = np.dtype([("score", np.float32), ("error", np.float32), ("id", np.int64)])
# By how much scores of a scan may be wrong, for rows and queries of independent normal numbers: by ops.pack_keys.
ERRORS = {"int8": 9.1e-3, "float16": 7e-4, "bfloat16": 3.3e-3, "float32": 7e-4}
# Of 32 keys, the suspects: two of 32 for int8 codes (750 to 920 of 15,000), and less than one for others.
PASSING = {"int8": 2}
CODES = {"int8": torch.uint8, "float16": torch.float16, "bfloat16": torch.bfloat16}


def _native(queries: int, scan: str, machine: Machine, recorder: Recorder) -> None:
    packed = None
    if scan != "float32":
        packed = ops.PackedKeys(_zeros(N, D, dtype=CODES[scan]), _zeros(N, 4), _zeros(D))
    device = machine.multiprocessors, 2
    found = harness.search(
        recorder, _zeros(queries, D), _zeros(N, D), K, scan=scan, packed=packed, device=device,
        arch=machine.arch,
    )  # fmt: skip
    recorder.recorded[-1].function.cubin = harness.binary(scan, bool(found.shape["many"]), machine.arch)
    _fill(found, queries, scan)


def _fill(found: harness.Found, queries: int, scan: str) -> None:
    """What blocks tell one another, as keys and queries of independent normal numbers have it."""
    groups, capacity, slots = (found.shape[name] for name in ("groups", "capacity", "slots"))
    error = ERRORS[scan]
    of = torch.arange(N) * groups // N
    slot = of * slots + torch.arange(N) % slots
    for query in range(queries):
        scores = D**-0.5 * torch.randn(N, generator=torch.Generator().manual_seed(query))
        best = torch.full((groups * slots,), -1.0).scatter_reduce(0, slot, scores - error, "amax")
        suspects = (scores >= best.topk(K).values[-1]).nonzero()[:, 0]  # by their canonical scores
        lower = found.parts["lower"].view(np.float32).reshape(-1, groups, slots)[query]
        lower[:] = best.reshape(groups, slots).numpy()
        counts = torch.bincount(of[suspects], minlength=groups).clamp(max=capacity)
        found.parts["counts"].view(np.int32).reshape(-1, groups)[query] = counts.numpy()
        own = found.parts["candidates"].view(CANDIDATE).reshape(-1, groups, capacity)[query]
        own["error"], own["id"] = error, N * np.arange(groups)[:, None] // groups + np.arange(capacity)
        for group, n in enumerate(counts.tolist()):
            own["score"][group, :n] = scores[suspects[of[suspects] == group][:n]].numpy()


def _ffn(tokens: int, rows: int, d: int = D, f: int = F) -> Real:
    edits = "one edit of 10" if rows == 1 else "rows with an edit each"
    return Real(
        "patched_ffn, fused", f"T={tokens}, {edits}, d={d}, d'={f}", ffn_bytes(tokens, d, f, rows),
        6.0 * tokens * d * f, lambda *_: _fused(tokens, rows, d, f), lambda m: ffn_peer(m, tokens, d, f),
    )  # fmt: skip


def _extra(tokens: int) -> Real:
    return Real(
        "patched_ffn, beside the base", f"T={tokens}, d={D}", extra_bytes(tokens, D), 0.0,
        lambda *_: _beside(tokens), lambda m: side_peer(m, tokens, D),
    )  # fmt: skip


def _latent(tokens: int, own: bool = True) -> Real:
    ids = "ids of their own" if own else "shared ids"
    return Real(
        "latent_attention", f"T={tokens}, {ids}, k={K}, d={D}, r={R}", attention_bytes(tokens, D, R, K, own=own),
        2.0 * tokens * R * D, lambda *_: _attention(tokens, own),
        lambda m: attention_peer(m, tokens, D, R, K, own=own), blocks=5,
    )  # fmt: skip


LEFT = 90  # keys of each query that its threshold leaves, of independent normal numbers


def _pieces(queries: int) -> dict[str, int]:
    """How often a block of an H100 goes through the loops over pairs of a query and a key that is left."""
    turns = math.ceil(LEFT * queries / 132 / search.PAIRS.value)
    found = {}
    for function in (search.score.fn, search.rank.fn):
        lines, first = inspect.getsourcelines(function)
        (loop,) = (n for n, line in enumerate(lines, first) if "range(0, total, PAIRS)" in line)
        found[f"triton.py:{loop}"] = turns
    return found


def _triton_search(queries: int) -> Real:
    return Real(
        "cosine_topk, Triton", f"B={queries}, N={N} of float32, d={D}", 4.0 * N * D, 2.0 * queries * N * D,
        lambda *_: _search(queries), lambda m: search_peer(m, queries, N, D), blocks=3, turns=_pieces(queries),
    )  # fmt: skip


def _cuda(queries: int, scan: str) -> Real:
    size = {"float32": 4, "int8": 1}.get(scan, 2)
    return Real(
        f"cosine_topk, CUDA, {scan} scan", f"B={queries}, N={N}, d={D}", N * (size * D + 16.0 * (scan != "float32")),
        2.0 * queries * N * D, lambda machine, recorder: _native(queries, scan, machine, recorder),
        lambda m: search_peer(m, queries, N, D), blocks=3 if queries == 1 else 1,
        passing=PASSING.get(scan, 1) if queries == 1 else 0,
    )  # fmt: skip


REAL = {
    real.name: real
    for real in [
        _ffn(1, 1), _ffn(8, 1), _ffn(64, 64), _extra(1), _extra(128), _latent(1), _latent(8), _latent(64), _latent(512),
        _latent(128, own=False),
        Real(
            "memory_attention", f"T=1, N={N} of float32, k={K}, d={D}",
            4.0 * N * D + attention_bytes(1, D, R, K, own=True), 0.0, lambda *_: _memory(1),
            lambda m: search_peer(m, 1, N, D) + attention_peer(m, 1, D, R, K, own=True), blocks=3,
        ),
        _triton_search(1), _triton_search(64),
        _cuda(1, "int8"), _cuda(1, "float16"), _cuda(1, "bfloat16"), _cuda(1, "float32"),
        _cuda(64, "float32"), _cuda(512, "float32"),
        Real(
            "patched_ffn, gradients of extra neurons", f"T=128, d={D}", extra_bytes(128, D) + 2.0 * 128 * D, 0.0,
            lambda *_: _beside_backward(128), lambda m: 3 * side_peer(m, 128, D), blocks=5,
        ),
        Real(
            "latent_attention, gradients", f"T=8, k={K}, d={D}, r={R}", attention_bytes(8, D, R, K, own=True), 0.0,
            lambda *_: _attention_backward(8), lambda m: 2 * attention_peer(m, 8, D, R, K, own=True), blocks=3,
        ),
    ]
}  # fmt: skip
