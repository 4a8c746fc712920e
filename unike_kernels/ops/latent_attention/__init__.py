"""Attention over the retrieved memory, the alpha gate and the blend into the attention output (paper, Eq. 2, 7, 8).

`unike::latent_attention(...) -> (out, alpha)`
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ... import _native
from .. import _backend, _check, _library
from . import reference
from .reference import CONVENTIONS, NORMS, Blend, SemanticEncoder

__all__ = ["SemanticEncoder", "latent_attention"]

_SCHEMA = (
    "Tensor queries, Tensor inputs, Tensor keys, Tensor values, Tensor ids, Tensor w1, Tensor b1, Tensor w2, "
    "Tensor b2, Tensor? alpha, Tensor? anchor, float scale, str convention, str norm"
)

_backend.register("latent_attention", "reference", reference.latent_attention)


def _run_native(
    queries: Tensor,
    inputs: Tensor,
    keys: Tensor,
    values: Tensor,
    ids: Tensor,
    encoder: SemanticEncoder,
    alpha: Tensor | None,
    anchor: Tensor | None,
    blend: Blend,
) -> tuple[Tensor, Tensor]:
    keys_wide = keys.float()
    out, gate = _native.latent_attention(
        queries.float(),
        inputs.float(),
        keys_wide,
        keys_wide if values is keys else values.float(),
        ids,
        [t.float() for t in encoder],
        None if alpha is None else alpha.float(),
        None if anchor is None else anchor.float(),
        blend.scale,
        eq7=blend.convention == "eq7",
        match_norm=blend.norm == "match",
    )
    return out.to(inputs.dtype), gate


_backend.register_native("latent_attention", _run_native)


def pack(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The flat arguments of the operator's schema -> those of the reference."""
    return (*args[:5], SemanticEncoder(*args[5:9]), args[9], args[10], Blend(*args[11:]))


def _run(*args: Any) -> tuple[Tensor, Tensor]:
    inputs = args[1]
    out, alpha = _backend.dispatch("latent_attention", inputs)(*pack(args))
    return out, alpha


def alpha_dtype(inputs: Tensor) -> torch.dtype:
    return torch.promote_types(inputs.dtype, torch.float32)


def _fake(queries: Tensor, inputs: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(inputs), inputs.new_empty(inputs.shape[0], dtype=alpha_dtype(inputs))


def _run_backward(grad: Tensor, grad_alpha: Tensor, *args: Any) -> list[Tensor]:
    grads = reference.latent_attention_backward(grad, grad_alpha, *pack(args))
    return [grad.new_empty(0) if g is None else g for g in grads]


def _fake_backward(grad: Tensor, grad_alpha: Tensor, *args: Any) -> list[Tensor]:
    trained = (args[0], args[1], args[9], args[10])
    return [grad.new_empty(0) if t is None else torch.empty_like(t) for t in trained]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:11])
    ctx.switches = inputs[11:]


def _backward(ctx: Any, grad: Tensor, grad_alpha: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    grads = torch.ops.unike.latent_attention_backward(grad, grad_alpha, *saved, *ctx.switches)
    grad_q, grad_h, given, anchor = grads
    none = (None,) * 7
    return (
        grad_q,
        grad_h,
        *none,
        None if saved[9] is None else given,
        None if saved[10] is None else anchor,
        None,
        None,
        None,
    )


_library.define(
    f"latent_attention({_SCHEMA}) -> (Tensor, Tensor)", _run, _fake, setup_context=_setup, backward=_backward
)
_library.define(
    f"latent_attention_backward(Tensor grad, Tensor grad_alpha, {_SCHEMA}) -> Tensor[]", _run_backward, _fake_backward
)


def check_tables(
    inputs: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    encoder: SemanticEncoder,
    alpha: Tensor | None,
    anchor: Tensor | None,
    convention: str,
    norm: str,
) -> None:
    """The checks that latent_attention and memory_attention share."""
    _check.one_of("convention", convention, CONVENTIONS)
    _check.one_of("norm", norm, NORMS)
    _check.floating("inputs", inputs, (None, None))
    m, d = inputs.shape
    _check.floating("queries", queries, (m, None, None))
    heads, width = queries.shape[1:]
    _check.floating("keys", keys, (None, heads, width))
    _check.floating("values", values, (keys.shape[0], heads, d))
    _check.instance("encoder", encoder, SemanticEncoder)
    _check.floating("encoder.w1", encoder.w1, (None, d))
    r = encoder.w1.shape[0]
    _check.floating("encoder.b1", encoder.b1, (r,))
    _check.floating("encoder.w2", encoder.w2, (d, r))
    _check.floating("encoder.b2", encoder.b2, (d,))
    if alpha is not None:
        _check.floating("alpha", alpha, (None,))
        if alpha.shape[0] not in (1, m):
            raise ValueError(f"alpha: expected shape [1] or [{m}], got {_check.shape_of(alpha)}")
    if anchor is not None:
        _check.floating("anchor", anchor, (None, d))
        divides("anchor", anchor.shape[0], m)
    _check.frozen(keys=keys, values=values, **{f"encoder_{n}": t for n, t in encoder._asdict().items()})
    _check.same_device(
        "inputs", inputs, queries=queries, keys=keys, values=values, alpha=alpha, anchor=anchor, **encoder._asdict()
    )


def divides(name: str, rows: int, tokens: int) -> None:
    if tokens % rows if rows else tokens:
        raise ValueError(f"{name}: {tokens} tokens cannot be split evenly among its {rows} rows")


def with_heads(t: Tensor) -> Tensor:
    """[N, d] -> [N, 1, d]; anything else as it is, for the checks to judge."""
    return t.unsqueeze(1) if isinstance(t, Tensor) and t.dim() == 2 else t


def latent_attention(
    queries: Tensor,
    inputs: Tensor,
    keys: Tensor,
    values: Tensor,
    ids: Tensor,
    encoder: SemanticEncoder,
    *,
    scale: float | None = None,
    alpha: Tensor | None = None,
    anchor: Tensor | None = None,
    convention: str = "inclusion",
    norm: str = "match",
) -> tuple[Tensor, Tensor]:
    """Shift the attention output towards the retrieved memory entries (paper, Eq. 2 and 7).

    A token whose ids are all -1 keeps the bits of `inputs`, with alpha 0. Computed in float32 at least, rounded once.
    Differentiable in queries, inputs, alpha and anchor.

    Args:
        queries: [M, d], the attention module's input h_pre; or [M, H, c] where keys were projected per head.
        inputs: [M, d], the attention module's output h_input.
        keys: [N, d] or [N, H, c]; what the queries attend to.
        values: [N, d] or [N, H, d]; with several heads their outputs are summed.
        ids: int64 [M, k], the retrieved entries of each token, -1: none; or [R, k], shared by each row's M / R tokens.
        encoder: Enc_sem.
        scale: of the logits; None: 1 / sqrt(c).
        alpha: [1] or [M], a given gate instead of the computed one.
        anchor: [R, d], compared with Enc_sem(h_know) instead of `inputs` (the paper's h_input[-1]).
        convention: "inclusion" or "eq7"; norm: "match" or "none". See `Config`.

    Returns:
        The shifted output, [M, d] in the dtype of `inputs`, and alpha, [M] in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or switch; the memory or the encoder asks for gradients.
    """
    queries, keys, values = (with_heads(t) for t in (queries, keys, values))
    check_tables(inputs, queries, keys, values, encoder, alpha, anchor, convention, norm)
    _check.integer("ids", ids, (None, None))
    _check.same_device("inputs", inputs, ids=ids)
    divides("ids", ids.shape[0], inputs.shape[0])
    factor = 1 / math.sqrt(queries.shape[-1]) if scale is None else float(scale)
    out, gate = torch.ops.unike.latent_attention(
        queries, inputs, keys, values, ids, *encoder, alpha, anchor, factor, convention, norm
    )
    return out, gate
