"""Attention over the retrieved memory, the alpha gate and the blend into the attention output (paper, Eq. 2, 7, 8).

`unike::latent_attention(...) -> (out, alpha)`
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _backend, _check, _library
from . import cpu, reference
from .reference import CONVENTIONS, NORMS, Blend, LatentBackwardOperands, LatentOperands, SemanticEncoder

_SCHEMA = (
    "Tensor queries, Tensor inputs, Tensor keys, Tensor values, Tensor? projected, Tensor ids, Tensor w1, Tensor b1, "
    "Tensor w2, Tensor b2, Tensor? alpha, Tensor? anchor, float scale, str convention, str norm"
)
_TENSORS = 12  # in the schema, before the switches

for _op in ("latent_attention", "latent_attention_backward"):
    _backend.register(_op, "reference", getattr(reference, _op))
    _backend.register_native(_op, getattr(cpu, _op))
_backend.register_triton("latent_attention", f"{__package__}.triton")
_backend.register_triton("latent_attention_backward", f"{__package__}.triton_backward")


def _operands(args: tuple[Any, ...]) -> LatentOperands:
    """The flat arguments of the operator's schema as one."""
    queries, inputs, keys, values, projected, ids, *rest = args
    encoder, blend = SemanticEncoder(*rest[:4]), Blend(*rest[6:])
    return LatentOperands(queries, inputs, keys, values, ids, encoder, rest[4], rest[5], blend, projected)


def _run(*args: Any) -> tuple[Tensor, Tensor]:
    out, alpha = _backend.call("latent_attention", _operands(args))
    return out, alpha


def _composed(*args: Any) -> tuple[Tensor, Tensor]:
    return reference.latent_attention(*_operands(args))


def alpha_dtype(inputs: Tensor) -> torch.dtype:
    """Of the gate: float32, float64 for float64 inputs."""
    return torch.promote_types(inputs.dtype, torch.float32)


def _fake(queries: Tensor, inputs: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(inputs), inputs.new_empty(inputs.shape[0], dtype=alpha_dtype(inputs))


def _run_backward(grad: Tensor, grad_alpha: Tensor, *args: Any) -> list[Tensor]:
    operands = LatentBackwardOperands(grad, grad_alpha, *_operands(args))
    return _pack(_backend.call("latent_attention_backward", operands), grad)


def _composed_backward(grad: Tensor, grad_alpha: Tensor, *args: Any) -> list[Tensor]:
    return _pack(reference.latent_attention_backward(grad, grad_alpha, *_operands(args)), grad)


def _pack(grads: tuple[Tensor | None, ...], grad: Tensor) -> list[Tensor]:
    """An operator returns tensors only: an empty one stands for None."""
    return [grad.new_empty(0, dtype=grad.dtype) if g is None else g for g in grads]


def _fake_backward(grad: Tensor, grad_alpha: Tensor, *args: Any) -> list[Tensor]:
    trained = (args[0], args[1], args[10], args[11])
    return [grad.new_empty(0, dtype=grad.dtype) if t is None else torch.empty_like(t) for t in trained]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS])
    ctx.switches = inputs[_TENSORS:]


def backward_of(ctx: Any, grad: Tensor, grad_alpha: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients with respect to the arguments of the schema, from what `_setup` saved.

    Args:
        ctx: torch's, of the forward call.
        grad: [M, d], of the output.
        grad_alpha: [M], of alpha.
    """
    saved = ctx.saved_tensors
    grads = torch.ops.unike.latent_attention_backward(grad, grad_alpha, *saved, *ctx.switches)
    grad_q, grad_h, given, anchor = grads
    gates = (None if saved[10] is None else given, None if saved[11] is None else anchor)
    return (grad_q, grad_h, *(None,) * 8, *gates, None, None, None)


_library.define(
    f"latent_attention({_SCHEMA}) -> (Tensor, Tensor)",
    _run,
    _fake,
    _composed,
    setup_context=_setup,
    backward=backward_of,
)
_library.define(
    f"latent_attention_backward(Tensor grad, Tensor grad_alpha, {_SCHEMA}) -> Tensor[]",
    _run_backward,
    _fake_backward,
    _composed_backward,
)


def check_tables(
    inputs: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    projected: Tensor | None,
    encoder: SemanticEncoder,
    alpha: Tensor | None,
    anchor: Tensor | None,
    convention: str,
    norm: str,
) -> None:
    """The checks that latent_attention and memory_attention share; the tensors with heads, as in `LatentOperands`.

    Raises TypeError and ValueError as these two do.
    """
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
    if projected is not None:
        _check.floating("projected", projected, (keys.shape[0], heads, r))
    if alpha is not None:
        _check.floating("alpha", alpha, (None,))
        if alpha.shape[0] not in (1, m):
            raise ValueError(f"alpha: expected shape [1] or [{m}], got {_check.shape_of(alpha)}")
    if anchor is not None:
        _check.floating("anchor", anchor, (None, d))
        divides("anchor", anchor.shape[0], m)
    tables = {"keys": keys, "values": values, "projected": projected}
    _check.frozen(**tables, **{f"encoder_{n}": t for n, t in encoder._asdict().items()})
    _check.same_device("inputs", inputs, queries=queries, alpha=alpha, anchor=anchor, **tables, **encoder._asdict())


def divides(name: str, rows: int, tokens: int) -> None:
    """Raises ValueError where the tokens cannot be split evenly among the rows."""
    if tokens % rows if rows else tokens:
        raise ValueError(f"{name}: {tokens} tokens cannot be split evenly among its {rows} rows")


def blend_of(queries: Tensor, scale: float | None, convention: str, norm: str) -> Blend:
    """The switches as the kernels take them.

    Args:
        queries: [M, H, c], whose width gives the default scale.
        scale: of the logits; None: 1 / sqrt(c).
        convention: "inclusion" or "eq7".
        norm: "match" or "none".
    """
    return Blend(1 / math.sqrt(queries.shape[-1]) if scale is None else float(scale), convention, norm)


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
    projected: Tensor | None = None,
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
        convention: "inclusion" or "eq7"; see `Config`.
        norm: "match" or "none"; see `Config`.
        projected: [N, r] or [N, H, r], `project_values(values, encoder)`: a native kernel that has them does not read
            w1 for each token, as Enc_sem's first layer commutes with the average of the values.

    Returns:
        The shifted output, [M, d] in the dtype of `inputs`, and alpha, [M] in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or switch; the memory or the encoder asks for gradients.
    """
    queries, keys = with_heads(queries), with_heads(keys_given := keys)
    values = keys if values is keys_given else with_heads(values)
    projected = None if projected is None else with_heads(projected)
    check_tables(inputs, queries, keys, values, projected, encoder, alpha, anchor, convention, norm)
    _check.integer("ids", ids, (None, None))
    _check.same_device("inputs", inputs, ids=ids)
    divides("ids", ids.shape[0], inputs.shape[0])
    blend = blend_of(queries, scale, convention, norm)
    return attend(LatentOperands(queries, inputs, keys, values, ids, encoder, alpha, anchor, blend, projected))


def attend(o: LatentOperands) -> tuple[Tensor, Tensor]:
    """`latent_attention` unchecked and with heads: for callers that made the tables themselves."""
    out, gate = _library.call(
        "latent_attention", o.inputs, o.queries, o.inputs, o.keys, o.values, o.projected, o.ids, *o.encoder, o.alpha,
        o.anchor, *o.blend,
    )  # fmt: skip
    return out, gate


class PreparedAttention:
    """Entries and Enc_sem for many calls: what is launched for activations of a form is looked up once."""

    def __init__(self, keys: Tensor, values: Tensor, projected: Tensor | None, encoder: SemanticEncoder) -> None:
        """See `attend`.

        Args:
            keys: [N, H, c].
            values: [N, H, d].
            projected: [N, H, r]; None: the kernel multiplies.
            encoder: Enc_sem.
        """
        self._tables = keys, values, projected, encoder
        self._launches = _backend.Launches("latent_attention", (keys, values, projected, *encoder))

    def __call__(
        self, queries: Tensor, inputs: Tensor, ids: Tensor, alpha: Tensor | None, anchor: Tensor | None, blend: Blend
    ) -> tuple[Tensor, Tensor]:
        """The shifted output [M, d] and the gate [M].

        Args:
            queries: [M, H, c].
            inputs: [M, d], what is shifted.
            ids: int64 [M, k] or [R, k], as of `latent_attention`.
            alpha: [1] or [M], a given gate; None: it is computed.
            anchor: [R, d], compared with Enc_sem(h_know), R dividing M; None: the inputs are.
            blend: scale, convention and norm.
        """

        def operands() -> LatentOperands:
            keys, values, projected, encoder = self._tables
            return LatentOperands(queries, inputs, keys, values, ids, encoder, alpha, anchor, blend, projected)

        given = queries, inputs, ids, alpha, anchor
        form = _library.form(*given) if _library.direct(inputs) and inputs.shape[0] else None
        launch = None if form is None else self._launches.of((blend, form), operands)
        if launch is None:
            return attend(operands())
        out, gate = torch.empty_like(inputs), inputs.new_empty(inputs.shape[0], dtype=torch.float32)
        launch(*given, out, gate)
        return out, gate


def project_values(values: Tensor, encoder: SemanticEncoder) -> Tensor:
    """The first layer of Enc_sem on each value, without its bias: float32 [N, H, r] of values [N, H, d] or [N, d]."""
    return torch.nn.functional.linear(with_heads(values).float(), encoder.w1.float())
