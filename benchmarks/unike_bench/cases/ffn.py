"""The FFN with extra neurons: ours against the unpatched one, against eager torch with concatenated weights, and on a
GPU against vLLM's kernels for many LoRA adapters, where it is installed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from unike_eval.eager import EagerFFN

from unike_kernels import ops
from unike_kernels.artifacts.edit import EditLayer
from unike_kernels.nn import LayerEdits
from unike_kernels.ops.patched_ffn import reference

from ..harness.case import Case, Run, System, check_close
from ..harness.optional import compiler, installed
from ..harness.roofline import Bound

NEURONS = 10
_RANK = 16  # of an adapter of so many neurons: vLLM has ranks of 1, 8, 16 and more
_SIZES = {576: 1536, 768: 2048, 2560: 6912, 4096: 11008}  # d -> d' of the FFN; 576 and 4096 are SmolLM2's and LLaMA's


class Layer:
    """A gated FFN of random weights, and tokens in as many rows as there are edits, each row with its own.

    Attributes:
        base: its weights.
        edits: 10 neurons each.
        pool: the same as the operator takes them.
        x: [T, d].
    """

    def __init__(self, d: int, tokens: int, edits: int, device: str = "cpu", dtype: torch.dtype | None = None) -> None:
        """In float32 on a CPU, in bfloat16 on a GPU, or as it is said."""
        generator = torch.Generator().manual_seed(0)
        dtype = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype)

        f = _SIZES[d]
        self.base = ops.FFNWeights(
            normal(f, d) * d**-0.5, None, normal(f, d) * d**-0.5, None, normal(d, f) * f**-0.5, None
        )
        shared = (normal(d) * d**-0.5, torch.tensor(0.1, device=device, dtype=dtype))
        self.edits = [
            EditLayer(normal(NEURONS, d) * d**-0.5, normal(NEURONS), normal(NEURONS, d) * d**-0.5, *shared)
            for _ in range(edits)
        ]
        store = LayerEdits()
        store.set({str(i): edit for i, edit in enumerate(self.edits)})
        self.pool = store.pool([[str(i)] for i in range(edits)])
        self.x = normal(tokens, d)

    def unpatched(self) -> Tensor:
        """[T, d], as the model itself computes it."""
        w, x = self.base, self.x
        return F.linear(F.silu(F.linear(x, w.w_in)) * F.linear(x, w.w_up), w.w_out)  # type: ignore[arg-type]

    @functools.cached_property
    def expected_unpatched(self) -> Tensor:
        """In float64."""
        wide = self.base._replace(**{name: t.double() for name, t in self.base._asdict().items() if t is not None})
        return reference.base_ffn(self.x.double(), wide, "silu")

    @functools.cached_property
    def expected(self) -> Tensor:
        """In float64, with the neurons."""
        pool = self.pool._replace(**{n: t.double() for n, t in _floating(self.pool._asdict()).items()})
        return reference.add_extra_neurons(self.x.double(), self.expected_unpatched, pool, "silu")

    def bound(self) -> Bound:
        """Of the FFN and the neurons."""
        (tokens, d), f = self.x.shape, len(self.base.w_in)
        tables = (*self.base, self.pool.keys, self.pool.values, self.pool.zeta, self.x)
        per_token = 3 * d * f + 2 * NEURONS * d  # a token has one edit
        return Bound(tuple(t for t in tables if t is not None), {self.x.dtype: float(tokens * per_token)})


def _floating(tensors: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: t for name, t in tensors.items() if t is not None and t.is_floating_point()}


def fused(layer: Layer) -> Run:
    """Base and neurons by one operator."""
    return Run(
        lambda: ops.patched_ffn(layer.x, layer.base, layer.pool, activation="silu"),
        lambda out: check_close(out, layer.expected),
        layer.bound(),
    )


def beside(layer: Layer) -> Run:
    """The base by torch, the neurons added."""
    return Run(
        lambda: ops.patched_ffn(layer.x, layer.unpatched(), layer.pool, activation="silu"),
        lambda out: check_close(out, layer.expected),
        layer.bound(),
    )


def _unpatched(layer: Layer) -> Run:
    return Run(layer.unpatched, lambda out: check_close(out, layer.expected_unpatched))


def _concatenated(cached: bool, layer: Layer, wrap: Callable[[Any], Any] = lambda module: module) -> Run:
    eager = wrap(EagerFFN(layer.base, layer.edits, "silu", cached))
    return Run(lambda: eager(layer.x), lambda out: check_close(out, layer.expected))


def as_adapters(layer: Layer) -> Run:
    """The base by torch, the neurons by vLLM's kernels: an adapter's A has the keys, its B the values of an edit, and
    between the two stands an activation that adapters have none of."""
    from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink

    def padded(rows: list[Tensor]) -> Tensor:
        return torch.stack([F.pad(t, (0, 0) * (t.dim() - 1) + (0, _RANK - len(t))) for t in rows]).contiguous()

    x, edits, count = layer.x, layer.edits, len(layer.edits)
    a, bias = padded([e.keys for e in edits]), padded([e.key_bias for e in edits])
    b = padded([e.values + e.beta * e.zeta for e in edits]).mT.contiguous()  # [edits, d, rank]
    adapters = torch.arange(count, dtype=torch.int32, device=x.device).repeat_interleave(len(x) // count)
    meta = LoRAKernelMeta.make(count, len(x), x.device)
    meta.prepare_tensors(adapters)
    told = meta.meta_args(len(x), specialize_active_lora=True)
    bias, inner = bias[adapters].float(), torch.empty(1, len(x), _RANK, dtype=torch.float32, device=x.device)

    def call() -> Tensor:
        out = layer.unpatched()
        lora_shrink(x, [a], inner, *told, 1.0)
        lora_expand(F.silu(inner + bias), [b], out, *told, add_inputs=True)
        return out

    return Run(call, lambda out: check_close(out, layer.expected))


def case(d: int, tokens: int, edits: int, device: str = "cpu") -> Case:
    """T tokens, in as many rows as there are edits; the eager FFN knows one edit for all of them."""
    systems = {"unike patched_ffn": System("ours", beside), "unpatched": System("base", _unpatched)}
    if device == "cuda":  # base and neurons in one launch, for few tokens
        systems = {"unike fused": System("ours", fused), **systems}
    if edits == 1:
        systems["concatenated per call"] = System("peer", functools.partial(_concatenated, False))
        systems["concatenated once"] = System("peer", functools.partial(_concatenated, True))
        if device == "cuda" and compiler():
            systems["torch.compile"] = System("peer", functools.partial(_concatenated, True, wrap=torch.compile))
    if device == "cuda" and installed("vllm"):
        systems["vLLM's LoRA kernels"] = System("peer", as_adapters)
    title = f"FFN with {edits} x {NEURONS} extra neurons, d={d}, d'={_SIZES[d]}, T={tokens}"
    shape = {"d": d, "T": tokens, "edits": edits}
    return Case("ffn", title, shape, functools.partial(Layer, d, tokens, edits, device), systems, device)


def quick(device: str = "cpu") -> list[Case]:
    """At LLaMA-7B's size: one edit for a few tokens and for a prompt, and a batch of 64 requests with one edit each."""
    return [*(case(4096, t, 1, device) for t in (1, 16, 128)), case(4096, 64, 64, device)]


def full(device: str = "cpu") -> list[Case]:
    """All widths."""
    return [case(d, *shape, device) for d in _SIZES for shape in ((1, 1), (16, 1), (128, 1), (64, 64))]
