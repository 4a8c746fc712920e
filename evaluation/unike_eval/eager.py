"""UniKE in plain eager torch, the way others write it: what the fused modules are timed against.

`cached=False` clones and concatenates base and extra FFN weights in every forward pass, as the authors' code does;
`cached=True` concatenates once. The memory is the same in both: matmul, topk, gather, softmax, gate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unike_kernels.artifacts.edit import Edit, EditLayer
from unike_kernels.artifacts.memory import MemoryBank, MemoryLayer
from unike_kernels.backbones import find_decoder
from unike_kernels.config import Config
from unike_kernels.ops import FFNWeights
from unike_kernels.ops.patched_ffn.reference import activate


class EagerFFN(nn.Module):
    """[o o_extra] [W_V; W_V^extra + beta zeta'] + b_V (Eq. 6, plain neurons) with the weights concatenated."""

    def __init__(self, base: FFNWeights, extra: Sequence[EditLayer], activation: str, cached: bool) -> None:
        super().__init__()
        self.base, self.extra, self.activation = base, extra, activation
        self.cache = self._concatenate() if cached else None

    def _concatenate(self) -> FFNWeights:
        base, dtype = self.base, self.base.w_in.dtype
        keys = torch.cat([e.keys for e in self.extra]).to(dtype)
        bias = torch.cat([e.key_bias for e in self.extra]).to(dtype)
        values = torch.cat([e.values + e.beta * e.zeta for e in self.extra]).to(dtype)
        own_bias = torch.zeros_like(base.w_in[:, 0]) if base.b_in is None else base.b_in
        return FFNWeights(
            torch.cat([base.w_in, keys]), torch.cat([own_bias, bias]), base.w_up, base.b_up,
            torch.cat([base.w_out, values.T], 1), base.b_out,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """The edited FFN's output, [..., d] -> [..., d]."""
        w = self._concatenate() if self.cache is None else self.cache
        hidden = activate(self.activation, F.linear(x, w.w_in, w.b_in))
        if w.w_up is not None:
            up = F.linear(x, w.w_up, w.b_up)
            hidden = hidden * F.pad(up, (0, hidden.shape[-1] - up.shape[-1]), value=1.0)
        return F.linear(hidden, w.w_out, w.b_out)


def shift(hidden: Tensor, out: Tensor, memory: MemoryLayer, index: Tensor, config: Config) -> Tensor:
    """The memory's shift of the attention output [B, T, d], token by token. index: the normalised retrieval keys."""
    ids = (F.normalize(hidden.float(), dim=-1) @ index.T).topk(min(config.k, len(index)), dim=-1).indices
    return attend(hidden, out, memory, ids, config)


def attend(hidden: Tensor, out: Tensor, memory: MemoryLayer, ids: Tensor, config: Config) -> Tensor:
    """The shift of the attention output [B, T, d] towards the entries ids [B, T, k], in the dtype of the memory."""
    q = hidden.to(memory.keys.dtype)
    keys = memory.keys[ids].squeeze(-2)
    values = keys if memory.values is None else memory.values[ids].squeeze(-2)
    scale: Any = config.scale or q.shape[-1] ** -0.5
    if scale == "cosine":
        q, keys, scale = F.normalize(q, dim=-1), F.normalize(keys, dim=-1), 1 / config.tau
    weights = torch.softmax(scale * torch.einsum("btd,btkd->btk", q, keys), -1)
    know = torch.einsum("btk,btkd->btd", weights, values)
    h = out.to(memory.keys.dtype)
    e = memory.encoder
    if config.alpha == "token":
        sem = F.linear(F.gelu(F.linear(know, e.w1, e.b1)), e.w2, e.b2)
        alpha = F.cosine_similarity(sem, h, dim=-1).clamp(0, 1).unsqueeze(-1)
    else:
        alpha = torch.tensor(float(config.alpha))
    if config.norm == "match":
        know = F.normalize(know, dim=-1) * h.norm(dim=-1, keepdim=True)
    share = alpha if config.convention == "inclusion" else 1 - alpha
    return ((1 - share) * h + share * know).to(out.dtype)


@contextmanager
def eager(model: nn.Module, edits: Sequence[Edit], memory: MemoryBank | None, *, cached: bool) -> Iterator[None]:
    """Within the block the unpatched `model` runs the edits and the memory in eager torch.

    With tokens="answer" a pass shifts its last token, which is where prompts of one length, or padded on the left, end.

    Raises:
        NotImplementedError: retrieval="sequence", alpha="last", values="projected", tokens="text", scope="memory", or
            gated neurons.
    """
    config = memory.config if memory else Config(tokens="all")
    gated = any(layer.up is not None for e in edits for layer in e.layers.values())
    unknown = config.needs_whole_prompts or config.scope == "memory" or config.tokens == "text"
    if unknown or config.values == "projected" or gated:
        raise NotImplementedError(
            "the eager baseline knows plain neurons, and retrieval and gate that are the same for every token"
        )
    decoder = find_decoder(model)
    undo: list[Any] = []
    try:
        for layer in decoder.layers:
            extra = [e.layers[layer.index] for e in edits if layer.index in e.layers]
            if extra:
                old = [(site, site.module) for site in layer.ffn]
                stand_in = EagerFFN(layer.weights(), extra, layer.activation, cached)
                for site, module in zip(layer.ffn, (stand_in, *map(nn.Identity, layer.ffn[1:])), strict=True):
                    site.put(module)
                undo.append(lambda old=old: [site.put(module) for site, module in old])
            if memory is not None and layer.index in memory.layers:
                undo.append(_hook(layer.attention.module, memory.layers[layer.index], config).remove)
        yield
    finally:
        for restore in undo:
            restore()


def _hook(attention: nn.Module, memory: MemoryLayer, config: Config) -> Any:
    index, first = F.normalize(memory.index.float(), dim=-1), -1 if config.tokens == "answer" else 0

    def after(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        out = output[0] if isinstance(output, tuple) else output
        shifted = shift(hidden[:, first:], out[:, first:], memory, index, config)
        if first:
            shifted = torch.cat([out[:, :first], shifted], 1)
        return (shifted, *output[1:]) if isinstance(output, tuple) else shifted

    return attention.register_forward_hook(after, with_kwargs=True)
