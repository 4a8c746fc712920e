"""The patched FFN in plain torch: the definition.

    FFN_edit(q) = FFN(q) + sum over the edits e of q's row: o_e (V_e + beta_e * zeta'_e)        (paper, Eq. 3 and 6)
    o_e = Act(q K_e^T + b_e)                                  plain neurons
    o_e = Act(q K_e^T + b_e) * (q U_e^T + c_e)                gated neurons

zeta' reaches the values only, as the rank-one term beta * (sum o_e) zeta', so that beta and zeta' stay live tensors.
A token's edits are summed in the order of its row's list, each edit computed for every token alike: no token's
rounding depends on which edits the other rows select.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "relu2")


def activate(name: str, x: Tensor) -> Tensor:
    """Act(x): "relu", "gelu" (exact, erf), "gelu_tanh", "silu" or "relu2" (the square of relu)."""
    if name == "relu":
        return F.relu(x)
    if name == "gelu":
        return F.gelu(x)
    if name == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if name == "silu":
        return F.silu(x)
    if name == "relu2":
        return F.relu(x).square()
    raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}; got {name!r}")


def activate_slope(name: str, x: Tensor) -> Tensor:
    """Act'(x)."""
    if name == "relu":
        return (x > 0).to(x.dtype)
    if name == "gelu":
        return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    if name == "gelu_tanh":
        c = math.sqrt(2 / math.pi)
        t = torch.tanh(c * (x + 0.044715 * x**3))
        return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x)
    if name == "silu":
        s = torch.sigmoid(x)
        return s * (1 + x * (1 - s))
    if name == "relu2":
        return 2 * F.relu(x)
    raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}; got {name!r}")


class EditPool(NamedTuple):
    """The extra neurons of all edits of one layer, and which row of the batch uses which edits (CSR)."""

    keys: Tensor  # [P, d]  K, a neuron a row; P neurons of E edits, one after the other
    key_bias: Tensor  # [P]  b
    up: Tensor | None  # [P, d]  U of gated neurons (0 for a plain neuron among them)
    up_bias: Tensor | None  # [P]  c (1 for a plain neuron)
    values: Tensor  # [P, d]  V
    zeta: Tensor  # [E, d]  zeta'
    beta: Tensor  # [E]
    indptr: Tensor  # int64 [E + 1]: edit e owns neurons indptr[e] : indptr[e + 1]
    row_indptr: Tensor  # int64 [R + 1]: row r uses edits row_edits[row_indptr[r] : row_indptr[r + 1]]
    row_edits: Tensor  # int64 [S]
    token_rows: Tensor | None = None  # int64 [M]; None: the M tokens belong to the R rows in R equal runs


class FFNWeights(NamedTuple):
    """A base FFN: w_out Act(w_in q + b_in) + b_out, times (w_up q + b_up) before w_out where it is gated."""

    w_in: Tensor  # [f, d]  (the gate projection of a gated FFN)
    b_in: Tensor | None  # [f]
    w_up: Tensor | None  # [f, d]
    b_up: Tensor | None  # [f]
    w_out: Tensor  # [d, f]
    b_out: Tensor | None  # [d]


class ExtraOperands(NamedTuple):
    """What `add_extra_neurons` is called with, here and in every kernel."""

    x: Tensor  # [M, d]
    base: Tensor  # [M, d], the output of the base FFN
    pool: EditPool
    activation: str

    @property
    def like(self) -> Tensor:
        """Its device and dtype choose the backend: a float64 base keeps its bits where there is no edit."""
        return self.base if self.base.dtype == torch.float64 else self.x


class ExtraBackwardOperands(NamedTuple):
    """What `add_extra_neurons_backward` is called with, here and in every kernel."""

    grad: Tensor  # [M, d]
    x: Tensor  # [M, d]
    pool: EditPool
    activation: str

    @property
    def like(self) -> Tensor:
        """Its device and dtype choose the backend."""
        return self.grad if self.grad.dtype == torch.float64 else self.x


class FusedOperands(NamedTuple):
    """What `patched_ffn` is called with, here and in every kernel."""

    x: Tensor  # [M, d]
    base: FFNWeights
    pool: EditPool
    activation: str

    @property
    def like(self) -> Tensor:
        """Its device and dtype choose the backend."""
        return self.x


class ExtraGradients(NamedTuple):
    """Gradients of the trainable part of an EditPool, and of the FFN's input."""

    x: Tensor
    keys: Tensor
    key_bias: Tensor
    up: Tensor | None
    up_bias: Tensor | None
    values: Tensor
    zeta: Tensor
    beta: Tensor


def check_distinct(pool: EditPool) -> None:
    """Raises ValueError for a row that names an edit more than once: kernels have room for each edit once."""
    starts, edits = pool.row_indptr.tolist(), pool.row_edits.tolist()
    for r in range(len(starts) - 1):
        row = edits[starts[r] : starts[r + 1]]
        if len(set(row)) != len(row):
            raise ValueError(
                f"pool.row_edits: row {r} names an edit more than once; expected distinct edits, got {row}"
            )


def token_slots(pool: EditPool, tokens: int) -> Tensor:
    """int64 [M, longest list]: the edits of each token in the order of its row's list, then -1."""
    check_distinct(pool)
    starts, lengths = pool.row_indptr[:-1], pool.row_indptr.diff()
    rows = pool.token_rows
    if rows is None:
        per_row = tokens // len(lengths)
        rows = torch.arange(len(lengths), dtype=torch.int64, device=lengths.device).repeat_interleave(per_row)
    longest = int(lengths.max()) if len(lengths) else 0
    step = torch.arange(longest, dtype=torch.int64, device=lengths.device)
    position = (starts.unsqueeze(1) + step).clamp(max=max(len(pool.row_edits) - 1, 0))
    slots = torch.where(step < lengths.unsqueeze(1), pool.row_edits[position], -1)
    return slots[rows]


def widen(x: Tensor, pool: EditPool) -> tuple[Tensor, EditPool]:
    """Everything that is computed, in float32 at least."""
    wide = torch.promote_types(torch.promote_types(x.dtype, torch.float32), pool.keys.dtype)
    parts = {f: t.to(wide) for f, t in pool._asdict().items() if t is not None and t.is_floating_point()}
    return x.to(wide), pool._replace(**parts)


def _neurons(x: Tensor, pool: EditPool, of: slice) -> tuple[Tensor, Tensor | None]:
    """Pre-activations [M, n] and, for gated neurons, the factors [M, n]."""
    gate = x @ _aligned(pool.keys[of]).T + pool.key_bias[of]
    if pool.up is None or pool.up_bias is None:
        return gate, None
    return gate, x @ _aligned(pool.up[of]).T + pool.up_bias[of]


def _aligned(block: Tensor) -> Tensor:
    """A copy at an address of its own: BLAS may round by alignment, which depends on the edits before in the pool."""
    return block.clone()


def add_extra_neurons(x: Tensor, base_out: Tensor, pool: EditPool, activation: str) -> Tensor:
    """base_out + the extra neurons' output, [M, d]; a token without edits keeps the bits of base_out.

    Args:
        x: [M, d], the FFN's input.
        base_out: [M, d], the FFN's output.
        pool: the extra neurons of all edits, and the edits of each row.
        activation: one of `ACTIVATIONS`.
    """
    slots = token_slots(pool, x.shape[0])
    wide_x, wide_pool = widen(x, pool)
    extra = torch.zeros_like(wide_x)
    ends = pool.indptr.tolist()
    outputs = []
    for e in range(len(ends) - 1):
        of = slice(ends[e], ends[e + 1])
        gate, up = _neurons(wide_x, wide_pool, of)
        o = activate(activation, gate)
        o = o if up is None else o * up
        outputs.append(
            o @ _aligned(wide_pool.values[of]) + wide_pool.beta[e] * o.sum(-1, keepdim=True) * wide_pool.zeta[e]
        )
    for slot in slots.T:
        for e, output in enumerate(outputs):
            extra = torch.where((slot == e).unsqueeze(-1), extra + output, extra)
    edited = (slots >= 0).any(-1, keepdim=True)
    return torch.where(edited, (base_out.to(extra.dtype) + extra).to(base_out.dtype), base_out)


def add_extra_neurons_backward(grad: Tensor, x: Tensor, pool: EditPool, activation: str) -> ExtraGradients:
    """Gradients of `add_extra_neurons`, except for base_out's, which is `grad` itself.

    Args:
        grad: [M, d], of the output.
        x: [M, d], the FFN's input.
        pool: the extra neurons of all edits, and the edits of each row.
        activation: one of `ACTIVATIONS`.
    """
    slots = token_slots(pool, x.shape[0])
    wide_x, p = widen(x, pool)
    ends = pool.indptr.tolist()
    grad_x = torch.zeros_like(wide_x)
    grad_keys, grad_bias, grad_values = (torch.zeros_like(t) for t in (p.keys, p.key_bias, p.values))
    grad_up = None if p.up is None else torch.zeros_like(p.up)
    grad_up_bias = None if p.up_bias is None else torch.zeros_like(p.up_bias)
    grad_zeta, grad_beta = torch.zeros_like(p.zeta), torch.zeros_like(p.beta)
    for e in range(len(ends) - 1):
        of = slice(ends[e], ends[e + 1])
        g = grad.to(wide_x.dtype) * (slots == e).sum(-1, keepdim=True)
        gate, up = _neurons(wide_x, p, of)
        act = activate(activation, gate)
        o = act if up is None else act * up
        total = o.sum(-1, keepdim=True)
        along_zeta = g @ p.zeta[e].unsqueeze(-1)
        grad_o = g @ p.values[of].T + p.beta[e] * along_zeta
        grad_values[of] = o.T @ g
        grad_zeta[e] = p.beta[e] * (total * g).sum(0)
        grad_beta[e] = (total * along_zeta).sum()
        grad_gate = grad_o * activate_slope(activation, gate)
        if up is not None and grad_up is not None and grad_up_bias is not None and p.up is not None:
            grad_gate = grad_gate * up
            grad_factor = grad_o * act
            grad_up[of] = grad_factor.T @ wide_x
            grad_up_bias[of] = grad_factor.sum(0)
            grad_x = grad_x + grad_factor @ p.up[of]
        grad_keys[of] = grad_gate.T @ wide_x
        grad_bias[of] = grad_gate.sum(0)
        grad_x = grad_x + grad_gate @ p.keys[of]
    grads = ExtraGradients(grad_x, grad_keys, grad_bias, grad_up, grad_up_bias, grad_values, grad_zeta, grad_beta)
    like = ExtraGradients(x, pool.keys, pool.key_bias, pool.up, pool.up_bias, pool.values, pool.zeta, pool.beta)
    back = (None if g is None or t is None else g.to(t.dtype) for g, t in zip(grads, like, strict=True))
    return ExtraGradients(*back)  # type: ignore[arg-type]


def ffn(x: Tensor, w: FFNWeights, activation: str) -> Tensor:
    """FFN(q) of Eq. 1 in the one dtype of its operands, as models themselves compute it.

    Args:
        x: [M, d].
        w: the weights.
        activation: one of `ACTIVATIONS`.

    Returns:
        [M, d].
    """
    hidden = activate(activation, F.linear(x, w.w_in, w.b_in))
    if w.w_up is not None:
        hidden = hidden * F.linear(x, w.w_up, w.b_up)
    return F.linear(hidden, w.w_out, w.b_out)


def base_ffn(x: Tensor, base: FFNWeights, activation: str) -> Tensor:
    """FFN(q) of Eq. 1, in float32 at least, rounded once to x's dtype.

    Args:
        x: [M, d].
        base: the weights, of any float dtype.
        activation: one of `ACTIVATIONS`.

    Returns:
        [M, d].
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    w = FFNWeights(*(None if t is None else t.to(wide) for t in base))  # type: ignore[arg-type]
    return ffn(x.to(wide), w, activation).to(x.dtype)


def base_ffn_backward(grad: Tensor, x: Tensor, base: FFNWeights, activation: str) -> tuple[Tensor, FFNWeights]:
    """Gradients of `base_ffn` with respect to x and to each weight that there is.

    Args:
        grad: [M, d], of the output.
        x: [M, d].
        base: the weights.
        activation: one of `ACTIVATIONS`.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    w = FFNWeights(*(None if t is None else t.to(wide) for t in base))  # type: ignore[arg-type]
    wide_x, g = x.to(wide), grad.to(wide)
    gate = F.linear(wide_x, w.w_in, w.b_in)
    act = activate(activation, gate)
    up = None if w.w_up is None else F.linear(wide_x, w.w_up, w.b_up)
    hidden = act if up is None else act * up
    grad_hidden = g @ w.w_out
    grad_gate = grad_hidden * activate_slope(activation, gate)
    grad_up = None
    if up is not None:
        grad_gate, grad_up = grad_gate * up, grad_hidden * act
    grad_x = grad_gate @ w.w_in
    if grad_up is not None and w.w_up is not None:
        grad_x = grad_x + grad_up @ w.w_up
    grads = FFNWeights(
        w_in=grad_gate.T @ wide_x,
        b_in=None if w.b_in is None else grad_gate.sum(0),
        w_up=None if grad_up is None else grad_up.T @ wide_x,
        b_up=None if w.b_up is None or grad_up is None else grad_up.sum(0),
        w_out=g.T @ hidden,
        b_out=None if w.b_out is None else g.sum(0),
    )
    back = (None if g is None or t is None else g.to(t.dtype) for g, t in zip(grads, base, strict=True))
    return grad_x.to(x.dtype), FFNWeights(*back)  # type: ignore[arg-type]
