"""The memory of a layer: the latent attention alone, and with its retrieval, against eager and compiled torch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from unike_eval import eager

from unike_kernels import ops
from unike_kernels.artifacts.memory import MemoryLayer
from unike_kernels.config import Config
from unike_kernels.ops.cosine_topk.reference import normalize_rows
from unike_kernels.ops.latent_attention import blend_of
from unike_kernels.ops.latent_attention.reference import latent_attention

from ..harness.case import Case, Run, Shape, System, check_close
from ..harness.optional import compiler
from ..harness.roofline import Bound
from .truth import Truth

K = 40
N = 15_000
_UNDECIDED = 1e-6  # between the last score and the next: float32 may then retrieve either


class Layer:
    """A memory of N random entries and T tokens.

    Attributes:
        memory: keys and values are tables of their own; r = d / 8.
        index: unit retrieval keys [N, d]; packed: for the scan.
        projected: the values by Enc_sem's first layer.
        hidden, out: [T, d], the attention's input and output.
        ids: [T, k], drawn at random, for the attention without retrieval.
    """

    def __init__(
        self, n: int, d: int, tokens: int, k: int, device: str = "cpu", dtype: torch.dtype | None = None
    ) -> None:
        """In float32 on a CPU, in bfloat16 on a GPU, where a model's memory is, or as it is said."""
        dtype = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
        generator = torch.Generator().manual_seed(0)
        normal = functools.partial(torch.randn, generator=generator)
        r, usual = d // 8, normal(d)
        # Enc_sem leans towards the usual output, so that the gate is open.
        encoder = ops.SemanticEncoder(normal(r, d) * d**-0.5, normal(r), normal(d, r) * r**-0.5, usual)
        tables = (normal(n, d), normal(n, 1, d), normal(n, 1, d))
        index = ops.normalize_rows(tables[0])
        packed = ops.pack_keys(index, "int8")
        hidden, out, ids = (
            normal(tokens, d),
            usual + normal(tokens, d),
            torch.randint(n, (tokens, k), generator=generator),
        )
        encoder = ops.SemanticEncoder(*(t.to(device, dtype) for t in encoder))
        last = normal(r).to(device, dtype), normal(d).to(device, dtype)
        keys, first, second = (t.to(device, dtype) for t in tables)
        self.memory = MemoryLayer(keys, first, second, encoder, *last)
        self.index, self.packed = (
            index.to(device),
            None if packed is None else type(packed)(*(t.to(device) for t in packed)),
        )
        self.projected = ops.project_values(self.values, encoder)
        self.hidden, self.out, self.ids = hidden.to(device, dtype), out.to(device, dtype), ids.to(device)
        self.k = k

    @property
    def values(self) -> Tensor:
        """[N, 1, d]."""
        assert self.memory.values is not None
        return self.memory.values

    @functools.cached_property
    def truth(self) -> Truth:
        """What is retrieved."""
        return Truth(self.index, normalize_rows(self.hidden), self.k)

    def expected(self, ids: Tensor) -> Tensor:
        """The shifted output in float64, float64 [T, d]."""
        queries, memory = self.hidden.unsqueeze(1), self.memory
        blend = blend_of(queries, None, "inclusion", "match")
        wide = (queries.double(), self.out.double(), memory.keys, self.values)
        return latent_attention(*wide, ids, memory.encoder, None, None, blend)[0]

    def bound(self, ids: Tensor, *scanned: Tensor) -> Bound:
        """Of the attention over ids, after a scan of some tables for it."""
        rows, (tokens, d), r = ids.unique(), self.hidden.shape, self.projected.shape[-1]
        gathered = (t[rows] for t in (self.memory.keys, self.values, self.projected))
        reads = (*scanned, *gathered, self.memory.encoder.w2, self.hidden, self.out)
        products = {self.hidden.dtype: float(tokens * (2 * self.k * d + self.k * r + r * d))}
        if scanned:
            products[torch.int8] = float(tokens * self.index.numel())
        return Bound(reads, products)


def fused(layer: Layer) -> Run:
    """Attention, gate and blend by one operator."""

    def call() -> Tensor:
        memory = layer.memory
        out, _ = ops.latent_attention(
            layer.hidden, layer.out, memory.keys, layer.values, layer.ids, memory.encoder, projected=layer.projected
        )
        return out

    return Run(call, lambda out: check_close(out, layer.expected(layer.ids)), layer.bound(layer.ids))


def _torch(wrap: Callable[[Any], Any], layer: Layer) -> Run:
    attend, config = wrap(eager.attend), Config(k=layer.k, tokens="all", scale=None)
    hidden, out, ids = (t.unsqueeze(0) for t in (layer.hidden, layer.out, layer.ids))
    return Run(
        lambda: attend(hidden, out, layer.memory, ids, config)[0],
        lambda found: check_close(found, layer.expected(layer.ids)),
    )


def _compile(attend: Any) -> Any:
    torch.compiler.reset()  # of other shapes, which count against what is compiled of one function
    return torch.compile(attend, dynamic=False)


def _fused_with_retrieval(layer: Layer) -> Run:
    def call() -> tuple[Tensor, Tensor, Tensor]:
        memory = layer.memory
        return ops.memory_attention(
            layer.hidden, layer.out, layer.index, memory.keys, layer.values, memory.encoder,
            k=layer.k, packed=layer.packed, projected=layer.projected,
        )  # fmt: skip

    def check(found: tuple[Tensor, Tensor, Tensor]) -> None:
        out, _, ids = found
        layer.truth.check_ids(ids)
        check_close(out, layer.expected(ids))

    assert layer.packed is not None
    return Run(call, check, layer.bound(layer.truth.ids, layer.packed.codes, layer.packed.error_bounds))


def _torch_with_retrieval(layer: Layer) -> Run:
    hidden, out, config = layer.hidden.unsqueeze(0), layer.out.unsqueeze(0), Config(k=layer.k, tokens="all", scale=None)

    def check(found: Tensor) -> None:
        same = layer.truth.scores[:, -1] - layer.truth.next > _UNDECIDED
        check_close(found[same], layer.expected(layer.truth.ids)[same])

    return Run(lambda: eager.shift(hidden, out, layer.memory, layer.index, config)[0], check)


def latent(n: int, d: int, tokens: int, device: str = "cpu") -> Case:
    """Attention, gate and blend for entries that were retrieved before."""
    systems = {
        "unike latent_attention": System("ours", fused),
        "torch eager": System("peer", functools.partial(_torch, lambda attend: attend)),
    }
    if compiler():
        systems["torch.compile"] = System("peer", functools.partial(_torch, _compile))
    title = f"latent attention over k={K} of N={n}, gate and blend, d={d}, T={tokens}"
    shape: Shape = {"kind": "latent", "N": n, "d": d, "T": tokens, "k": K}
    return Case("attention", title, shape, functools.partial(Layer, n, d, tokens, K, device), systems, device)


def with_retrieval(n: int, d: int, tokens: int, device: str = "cpu") -> Case:
    """The same after the retrieval, in float32: torch's products want one dtype."""
    systems = {
        "unike memory_attention": System("ours", _fused_with_retrieval),
        "torch eager": System("peer", _torch_with_retrieval),
    }
    title = f"memory attention: retrieval of k={K} from N={n}, attention, gate and blend, d={d}, T={tokens}"
    shape: Shape = {"kind": "memory", "N": n, "d": d, "T": tokens, "k": K}
    return Case(
        "attention", title, shape, functools.partial(Layer, n, d, tokens, K, device, torch.float32), systems, device
    )


def quick(device: str = "cpu") -> list[Case]:
    """At the width of LLaMA-7B."""
    attention, memory = ((latent, t) for t in (1, 128)), ((with_retrieval, t) for t in (1, 16, 128))
    return [make(N, 4096, t, device) for make, t in (*attention, *memory)]


def full(device: str = "cpu") -> list[Case]:
    """All widths."""
    shapes = [(N, d, t, device) for d in (576, 768, 2560, 4096) for t in (1, 16, 128)]
    return [make(*shape) for shape in shapes for make in (latent, with_retrieval)]
