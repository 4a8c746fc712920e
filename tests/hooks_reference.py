"""The edited model once more, in plain forward hooks on the unpatched one: what the patched modules are compared with.

Nothing here is the library's: each token by itself, in the dtype of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Place(NamedTuple):
    """One layer: its attention, the modules whose input and output are the FFN's, and the FFN's activation.

    None for what the layer does not have.
    """

    attention: nn.Module | None
    first: nn.Module | None
    last: nn.Module | None
    act: Callable[[Tensor], Tensor]


def extra_neurons(q, edits, index, act):
    total = torch.zeros_like(q)
    for edit in edits:
        e = edit.layers[index]
        o = act(q @ e.keys.T + e.key_bias)
        if e.up is not None:
            o = o * (q @ e.up.T + e.up_bias)
        total = total + o @ (e.values + e.beta * e.zeta)
    return total


def nearest(m, q, k):
    cosine = (m.index @ q) / (m.index.norm(dim=1) * q.norm())
    return cosine.argsort(descending=True)[:k]


def shift(attention, m, config, q, h, ids, anchor):
    keys, values = m.keys[ids], (m.keys if m.values is None else m.values)[ids]
    heads = keys.shape[1]
    query = q.view(1, -1)
    if config.values == "projected":
        query = (attention.q_proj.weight @ q).view(heads, -1)
        if attention.q_proj.bias is not None:
            query = query + attention.q_proj.bias.view(heads, -1)
    scale = config.scale or query.shape[1] ** -0.5
    if scale == "cosine":
        query, keys, scale = F.normalize(query, dim=-1), F.normalize(keys, dim=-1), 1 / config.tau
    know = sum(torch.softmax(scale * keys[:, n] @ query[n], 0) @ values[:, n] for n in range(heads))
    if isinstance(config.alpha, str):
        e = m.encoder
        semantic = e.w2 @ F.gelu(e.w1 @ know + e.b1) + e.b2
        alpha = F.cosine_similarity(semantic, anchor, dim=0).clamp(0, 1)
    else:
        alpha = config.alpha
    if config.norm == "match":
        know = know * h.norm() / know.norm()
    return (1 - alpha) * h + alpha * know if config.convention == "inclusion" else alpha * h + (1 - alpha) * know


@contextmanager
def hooked(places, mask, *, edits, memory=None, config=None, remembers=None, ends=None):
    """Hooks that do what the patched modules shall do in one pass over whole sequences.

    places: of each layer; mask: bool [B, T], the tokens that may be shifted; edits: for each row; remembers: for each
    row whether it uses the memory; ends: position of each row's last prompt token.
    """
    batch, tokens = mask.shape
    handles = []

    def add_neurons(index, act):
        seen = {}

        def before(module, args, kwargs):
            q = args[0] if args else kwargs["hidden_states"]
            seen["q"] = q.reshape(batch, tokens, -1)

        def after(module, args, out):
            rows = [
                extra_neurons(seen["q"][b], [e for e in edits[b] if index in e.layers], index, act)
                for b in range(batch)
            ]
            if isinstance(out, tuple):
                return (out[0] + torch.stack(rows).reshape(out[0].shape), *out[1:])
            return out + torch.stack(rows).reshape(out.shape)

        return before, after

    def add_memory(attention, m):
        def after(module, args, kwargs, output):
            q = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            whole = output[0] if isinstance(output, tuple) else output
            residual = kwargs.get(
                "residual", args[1] if type(module).__name__ == "BloomAttention" and len(args) > 1 else 0
            )
            h = whole - residual
            shifted = h.clone()
            for b in range(batch):
                if remembers is not None and not remembers[b]:
                    continue
                for t in mask[b].nonzero().flatten().tolist():
                    if config.tokens == "answer" and t < ends[b]:
                        continue
                    asks = q[b, ends[b]] if config.retrieval == "sequence" else q[b, t]
                    anchor = h[b, ends[b]] if config.alpha == "last" else h[b, t]
                    shifted[b, t] = shift(attention, m, config, q[b, t], h[b, t], nearest(m, asks, config.k), anchor)
            shifted = shifted + residual
            return (shifted, *output[1:]) if isinstance(output, tuple) else shifted

        return after

    for index, place in enumerate(places):
        if place.first is not None:
            before, after = add_neurons(index, place.act)
            handles.append(place.first.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(place.last.register_forward_hook(after))
        if memory is not None and index in memory.layers:
            after = add_memory(place.attention, memory.layers[index])
            handles.append(place.attention.register_forward_hook(after, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
