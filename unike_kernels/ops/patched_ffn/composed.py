"""The extra neurons in operators of torch that look at no values: with all derivatives, under any map, in any trace.

The sums of the definition in another order: all edits at once, and for each token how often it uses which.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .reference import EditPool, ExtraGradients, activate, activate_slope, widen


class _Steps(NamedTuple):
    """What forward and backward both need, in the wide dtype."""

    x: Tensor  # [M, d], 0 for a token without edits: what it holds reaches no derivative
    pool: EditPool
    edited: Tensor  # bool [M, 1]
    owns: Tensor  # [P, E], 1 where the neuron is one of the edit's
    weight: Tensor  # [M, P], how often the token uses the neuron
    gate: Tensor  # [M, P]
    factor: Tensor | None  # [M, P]


def _between(starts: Tensor, n: int) -> Tensor:
    """bool [len(starts) - 1, n]: whether starts[i] <= j < starts[i + 1]."""
    j = torch.arange(n, dtype=torch.int64, device=starts.device)
    return (starts[:-1].unsqueeze(1) <= j) & (j < starts[1:].unsqueeze(1))


def _steps(x: Tensor, pool: EditPool) -> _Steps:
    tokens, edits = x.shape[0], pool.zeta.shape[0]
    slots = _between(pool.row_indptr, pool.row_edits.shape[0])
    named = pool.row_edits.unsqueeze(1) == torch.arange(edits, dtype=torch.int64, device=x.device)
    x, p = widen(x, pool)
    times = slots.to(x.dtype) @ named.to(x.dtype)  # [R, E]
    rows = pool.token_rows
    if rows is None:
        count = times.shape[0]
        rows = torch.arange(count, dtype=torch.int64, device=x.device).repeat_interleave(tokens // count)
    times = times[rows]
    owns = _between(pool.indptr, pool.keys.shape[0]).T.to(x.dtype)
    edited = (times > 0).any(-1, keepdim=True)
    x = torch.where(edited, x, 0.0)
    gate = x @ p.keys.T + p.key_bias
    factor = None if p.up is None or p.up_bias is None else x @ p.up.T + p.up_bias
    return _Steps(x, p, edited, owns, times @ owns.T, gate, factor)


def _outputs(s: _Steps, activation: str) -> Tensor:
    """[M, P], what each token's neurons put out."""
    o = activate(activation, s.gate)
    return torch.where(s.weight > 0, s.weight * (o if s.factor is None else o * s.factor), 0.0)


def add_extra_neurons(x: Tensor, base_out: Tensor, pool: EditPool, activation: str) -> Tensor:
    """See the function of this name in `reference`."""
    s = _steps(x, pool)
    o, p = _outputs(s, activation), s.pool
    extra = o @ p.values + (o @ s.owns * p.beta) @ p.zeta
    return torch.where(s.edited, (base_out.to(extra.dtype) + extra).to(base_out.dtype), base_out)


def add_extra_neurons_backward(grad: Tensor, x: Tensor, pool: EditPool, activation: str) -> ExtraGradients:
    """See the function of this name in `reference`."""
    s = _steps(x, pool)
    o, p = _outputs(s, activation), s.pool
    g = torch.where(s.edited, grad.to(o.dtype), 0.0)
    total, along = o @ s.owns, g @ p.zeta.T  # [M, E]
    to_o = torch.where(s.weight > 0, s.weight * (g @ p.values.T + (along * p.beta) @ s.owns.T), 0.0)
    to_gate = to_o * activate_slope(activation, s.gate)
    to_up = to_up_bias = None
    if s.factor is None or p.up is None:
        to_x = to_gate @ p.keys
    else:
        to_gate, to_factor = to_gate * s.factor, to_o * activate(activation, s.gate)
        to_up, to_up_bias = to_factor.T @ s.x, to_factor.sum(0)
        to_x = to_gate @ p.keys + to_factor @ p.up
    grads = (
        to_x, to_gate.T @ s.x, to_gate.sum(0), to_up, to_up_bias, o.T @ g, p.beta.unsqueeze(1) * (total.T @ g),
        (total * along).sum(0),
    )  # fmt: skip
    back = (
        None if t is None or like is None else t.to(like.dtype) for t, like in zip(grads, (x, *pool[:7]), strict=True)
    )
    return ExtraGradients(*back)  # type: ignore[arg-type]
