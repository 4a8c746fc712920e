"""Keys and queries of retrieval."""

from __future__ import annotations

import torch
from torch import Tensor

from . import hidden

KINDS = ("isotropic", "clumped", "hidden")


def keys_and_queries(kind: str, n: int, b: int, d: int) -> tuple[Tensor, Tensor]:
    """Keys, float32 [n, d], and queries, float32 [b, d], of one distribution; the same ones in every call.

    Args:
        kind: "isotropic": normal. "clumped": normal around a mean that is twice as long as the spread. "hidden": states
            of a language model, n + b different ones, with d its hidden size.
        n: keys.
        b: queries.
        d: width of both.

    Raises:
        ValueError: an unknown kind; hidden states of another width, or more than there are.
    """
    generator = torch.Generator().manual_seed(0)
    if kind == "hidden":
        states = hidden.states()
        pre = states[max(states)].pre
        if pre.shape[1] != d or len(pre) < n + b:
            raise ValueError(f"hidden: expected {n + b} states of width {d}, there are {list(pre.shape)}")
        rows = pre[torch.randperm(len(pre), generator=generator)]
        return rows[:n].clone(), rows[n : n + b].clone()
    keys, queries = (torch.randn(m, d, generator=generator) for m in (n, b))
    if kind == "clumped":
        mean = 2 * torch.randn(d, generator=generator)
        keys += mean
        queries += mean
    elif kind != "isotropic":
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}; got {kind!r}")
    return keys, queries
