"""The FFN with extra key-value neurons, steered by beta * zeta' (paper, Eq. 3 and 6).

Two operators: `unike::add_extra_neurons` adds the neurons to the output of any base FFN, computed elsewhere
(`base="vendor"`), and `unike::patched_ffn` computes base and neurons together (`base="fused"`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _native
from .. import _backend, _check, _library
from . import composed, cpu, reference
from .reference import (
    ACTIVATIONS,
    EditPool,
    ExtraBackwardOperands,
    ExtraOperands,
    FFNWeights,
    FusedOperands,
)

_POOL = (
    "Tensor keys, Tensor key_bias, Tensor? up, Tensor? up_bias, Tensor values, Tensor zeta, Tensor beta, "
    "Tensor indptr, Tensor row_indptr, Tensor row_edits, Tensor? token_rows"
)
_BASE = "Tensor w_in, Tensor? b_in, Tensor? w_up, Tensor? b_up, Tensor w_out, Tensor? b_out"
_BASE_SIZE = len(FFNWeights._fields)
FUSED_TOKENS = 64  # up to which reading the weights, and no arithmetic, bounds base and neurons on a GPU
FUSED_WIDE_TOKENS = 32  # of float32: its dots split their operands in registers, which suffice for so many

for _op in ("add_extra_neurons", "add_extra_neurons_backward"):
    _backend.register(_op, "reference", getattr(reference, _op))
    _backend.register_native(_op, getattr(cpu, _op))
_backend.register_triton("add_extra_neurons", f"{__package__}.triton")
_backend.register_triton("add_extra_neurons_backward", f"{__package__}.triton_backward")


def _fused_reference(x: Tensor, base: FFNWeights, pool: EditPool, activation: str) -> Tensor:
    return reference.add_extra_neurons(x, reference.base_ffn(x, base, activation), pool, activation)


_backend.register("patched_ffn", "reference", _fused_reference)
_backend.register_triton("patched_ffn", f"{__package__}.triton_fused")


def _run_add(x: Tensor, base_out: Tensor, *rest: Any) -> Tensor:
    out: Tensor = _backend.call("add_extra_neurons", ExtraOperands(x, base_out, EditPool(*rest[:-1]), rest[-1]))
    return out


def _run_fused(x: Tensor, *rest: Any) -> Tensor:
    base, pool = FFNWeights(*rest[:_BASE_SIZE]), EditPool(*rest[_BASE_SIZE:-1])
    out: Tensor = _backend.call("patched_ffn", FusedOperands(x, base, pool, rest[-1]))
    return out


def _composed_add(x: Tensor, base_out: Tensor, *rest: Any) -> Tensor:
    return composed.add_extra_neurons(x, base_out, EditPool(*rest[:-1]), rest[-1])


def _composed_fused(x: Tensor, *rest: Any) -> Tensor:
    base, pool = FFNWeights(*rest[:_BASE_SIZE]), EditPool(*rest[_BASE_SIZE:-1])
    return composed.add_extra_neurons(x, reference.base_ffn(x, base, rest[-1]), pool, rest[-1])


def _pack(grads: tuple[Tensor | None, ...], like: Tensor) -> list[Tensor]:
    """An operator returns tensors only: an empty one stands for None."""
    return [like.new_empty(0, dtype=like.dtype) if g is None else g for g in grads]


def _run_extra_backward(grad: Tensor, x: Tensor, *rest: Any) -> list[Tensor]:
    operands = ExtraBackwardOperands(grad, x, EditPool(*rest[:-1]), rest[-1])
    return _pack(_backend.call("add_extra_neurons_backward", operands), x)


def _composed_extra_backward(grad: Tensor, x: Tensor, *rest: Any) -> list[Tensor]:
    return _pack(composed.add_extra_neurons_backward(grad, x, EditPool(*rest[:-1]), rest[-1]), x)


def _fake_extra_backward(grad: Tensor, x: Tensor, *rest: Any) -> list[Tensor]:
    return [
        torch.empty_like(x),
        *(x.new_empty(0, dtype=x.dtype) if t is None else torch.empty_like(t) for t in rest[:7]),
    ]


def _run_base_backward(grad: Tensor, x: Tensor, *rest: Any) -> list[Tensor]:
    grad_x, grads = reference.base_ffn_backward(grad, x, FFNWeights(*rest[:-1]), rest[-1])
    return [grad_x, *_pack(grads, x)]


def _fake_base_backward(grad: Tensor, x: Tensor, *rest: Any) -> list[Tensor]:
    return [
        torch.empty_like(x),
        *(x.new_empty(0, dtype=x.dtype) if t is None else torch.empty_like(t) for t in rest[:-1]),
    ]


def _unpack(grads: list[Tensor], inputs: tuple[Any, ...]) -> list[Tensor | None]:
    return [None if t is None else g for g, t in zip(grads, inputs, strict=True)]


def _setup_add(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, *rest = inputs
    ctx.save_for_backward(x, *rest[:-1])
    ctx.activation = rest[-1]


def _backward_add(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, *pool = ctx.saved_tensors
    grads = torch.ops.unike.add_extra_neurons_backward(grad, x, *pool, ctx.activation)
    grad_x, *grad_pool = _unpack(grads, (x, *pool[:7]))
    return grad_x, grad, *grad_pool, None, None, None, None, None


def _setup_fused(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:-1])
    ctx.activation = inputs[-1]


def _backward_fused(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, *rest = ctx.saved_tensors
    base, pool = rest[:_BASE_SIZE], rest[_BASE_SIZE:]
    extra = torch.ops.unike.add_extra_neurons_backward(grad, x, *pool, ctx.activation)
    grad_x, *grad_pool = _unpack(extra, (x, *pool[:7]))
    through = torch.ops.unike.base_ffn_backward(grad, x, *base, ctx.activation)
    through_x, *grad_base = _unpack(through, (x, *base))
    assert grad_x is not None and through_x is not None
    return grad_x + through_x, *grad_base, *grad_pool, None, None, None, None, None


_library.define(
    f"add_extra_neurons(Tensor x, Tensor base_out, {_POOL}, str activation) -> Tensor",
    _run_add,
    lambda x, base_out, *_: torch.empty_like(base_out),
    _composed_add,
    setup_context=_setup_add,
    backward=_backward_add,
)
_library.define(
    f"add_extra_neurons_backward(Tensor grad, Tensor x, {_POOL}, str activation) -> Tensor[]",
    _run_extra_backward,
    _fake_extra_backward,
    _composed_extra_backward,
)
_library.define(
    f"patched_ffn(Tensor x, {_BASE}, {_POOL}, str activation) -> Tensor",
    _run_fused,
    lambda x, *_: torch.empty_like(x),
    _composed_fused,
    setup_context=_setup_fused,
    backward=_backward_fused,
)
_library.define(
    f"base_ffn_backward(Tensor grad, Tensor x, {_BASE}, str activation) -> Tensor[]",
    _run_base_backward,
    _fake_base_backward,
    _run_base_backward,
)


def _check_pool(x: Tensor, pool: EditPool) -> None:
    _check.instance("pool", pool, EditPool)
    d = x.shape[-1]
    _check.floating("pool.keys", pool.keys, (None, d))
    p = pool.keys.shape[0]
    _check.floating("pool.key_bias", pool.key_bias, (p,))
    _check.floating("pool.values", pool.values, (p, d))
    _check.floating("pool.zeta", pool.zeta, (None, d))
    edits = pool.zeta.shape[0]
    _check.floating("pool.beta", pool.beta, (edits,))
    if (pool.up is None) != (pool.up_bias is None):
        raise ValueError("pool: gated neurons need both up and up_bias, only one was given")
    if pool.up is not None and pool.up_bias is not None:
        _check.floating("pool.up", pool.up, (p, d))
        _check.floating("pool.up_bias", pool.up_bias, (p,))
    _check.integer("pool.indptr", pool.indptr, (edits + 1,))
    _check.integer("pool.row_indptr", pool.row_indptr, (None,))
    _check.integer("pool.row_edits", pool.row_edits, (None,))
    rows, tokens = pool.row_indptr.shape[0] - 1, x.shape[:-1].numel()
    if pool.token_rows is not None:
        _check.integer("pool.token_rows", pool.token_rows, (tokens,))
    elif rows < 1 or tokens % rows:
        raise ValueError(f"pool.row_indptr: {tokens} tokens cannot be split evenly among {rows} rows")
    _check.same_device("x", x, **{f"pool.{name}": t for name, t in pool._asdict().items()})


def add_extra_neurons(x: Tensor, base: Tensor, pool: EditPool, activation: str) -> Tensor:
    """`patched_ffn` for a base computed elsewhere, unchecked: for callers that made the pool themselves.

    Args:
        x: [..., d], the FFN's input.
        base: [..., d], the FFN's output.
        pool: the extra neurons of all edits, and the edits of each row.
        activation: one of `ACTIVATIONS`.
    """
    out: Tensor = _library.call("add_extra_neurons", x, _tokens(x), _tokens(base), *pool, activation)
    return out.reshape(x.shape)


def _tokens(x: Tensor) -> Tensor:
    """[..., d] -> [M, d]."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def fused_ffn(x: Tensor, base: FFNWeights, pool: EditPool, activation: str) -> Tensor:
    """`patched_ffn` for a base given as weights, unchecked: for callers that made the pool themselves.

    Args:
        x: [..., d], the FFN's input.
        base: the FFN's weights.
        pool: the extra neurons of all edits, and the edits of each row.
        activation: one of `ACTIVATIONS`.
    """
    out: Tensor = _library.call("patched_ffn", x, _tokens(x), *base, *pool, activation)
    return out.reshape(x.shape)


def one_launch(x: Tensor, base: FFNWeights) -> bool:
    """Whether the kernel of base and neurons is for these [..., d]: few tokens, and weights that need no copy."""
    narrow = x.dtype == base.w_in.dtype == base.w_out.dtype != torch.float32
    few = x.shape[:-1].numel() <= (FUSED_TOKENS if narrow else FUSED_WIDE_TOKENS)
    return few and all(t is None or t.is_contiguous() for t in base)


def fuses(x: Tensor, base: FFNWeights, pool: EditPool, activation: str) -> bool:
    """Whether a kernel on this machine computes `fused_ffn` of the same arguments in one launch.

    It does not where weights would have to be copied, such as those that GPT-2 keeps transposed. A trace, which may be
    run elsewhere, looks at the form alone.
    """
    if torch.compiler.is_compiling():
        return one_launch(x, base)
    operands = FusedOperands(x, base, pool, activation)
    return (
        one_launch(x, base)
        and _backend.forced_backend() in (None, "triton")
        and _backend.takes("patched_ffn", "triton", operands)
    )


class PreparedNeurons:
    """The extra neurons of a layer for many calls: laid out once for the native kernel, where that can be.

    Later changes of values in the pool's tensors are seen, changes of its rows are not.
    """

    def __init__(self, pool: EditPool, activation: str) -> None:
        """
        Args:
            pool: the neurons, and the edits of each row; shapes checked by the caller.
            activation: see `patched_ffn`.

        Raises:
            ValueError: indices out of range, or a row that names an edit more than once.
        """
        self.pool, self.activation = pool, activation
        self._native = self._laid_out()
        self._launches = _backend.Launches("add_extra_neurons", pool)
        self._fused = _backend.Launches("patched_ffn", pool)

    def _laid_out(self) -> cpu.Pool | None:
        given = [t for t in self.pool if t is not None]
        native = _native.available() and self.pool.keys.device.type == "cpu" and not any(map(_library.wrapped, given))
        if not native or any(t.dtype == torch.float64 for t in given):
            return None
        with _library.outside():
            pool = cpu.Pool(self.pool, self.activation)
        return pool if pool.live else None

    def __reduce__(self) -> Any:  # a copy is laid out anew, at addresses of its own
        return type(self), (self.pool, self.activation)

    def of_rows(self, row_indptr: Tensor, row_edits: Tensor, token_rows: Tensor | None) -> PreparedNeurons:
        """The same neurons for another batch, in a fraction of the time.

        Args:
            row_indptr: int64 [R + 1], row r uses edits row_edits[row_indptr[r] : row_indptr[r + 1]].
            row_edits: int64 [S].
            token_rows: int64 [M], the row of each token; None: the tokens belong to the rows in R equal runs.
        """
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)  # a copy would be laid out anew
        new.pool = self.pool._replace(row_indptr=row_indptr, row_edits=row_edits, token_rows=token_rows)
        new._launches = _backend.Launches("add_extra_neurons", new.pool)
        if self._native is not None:
            new._native = self._native.of_rows(row_indptr, row_edits, token_rows)
        return new

    def __call__(self, x: Tensor, base: Tensor, out: Tensor | None = None) -> Tensor:
        """base plus the extra neurons of each token, [..., d], by the shortest way that computes it.

        Args:
            x: [..., d], the FFN's input.
            base: [..., d], the FFN's output.
            out: [..., d] in the dtype of base with contiguous rows, written and returned; may be base. Not where
                gradients are asked for. None: a new one.
        """
        d = x.shape[-1]
        native = self._native
        if native is not None and native.anchor.moved():
            native = self._native = self._laid_out()
        if native is not None and _library.direct(x) and _backend.takes_native(x, base):
            if out is None:
                if x.shape == base.shape and cpu.as_it_reads(x) and cpu.as_it_reads(base):
                    return native.add_contiguous(x, base)
                return native.add(x.reshape(-1, d), base.reshape(-1, d)).view(x.shape)
            native.add(x.reshape(-1, d), base.reshape(-1, d), out.view(-1, d))
            return out
        launch = self._launch_of(x, base, out)
        if launch is not None:
            out = torch.empty_like(base) if out is None else out
            launch(x, base, out)
            return out
        result = add_extra_neurons(x, base, self.pool, self.activation)
        return result if out is None else out.copy_(result)

    def fused(self, x: Tensor, base: FFNWeights) -> Tensor | None:
        """An FFN of these weights and the neurons, [..., d]; None where no kernel computes both in one launch.

        Args:
            x: [..., d], the FFN's input.
            base: its weights.
        """
        operands = x, base, self.pool, self.activation
        if _library.direct(x) and x.numel() and _library.in_place(x):
            form = x.numel(), x.dtype, *map(_native.address, base)
            launch = self._fused.of(form, lambda: FusedOperands(_tokens(x), *operands[1:]))
            if launch is not None:
                out = torch.empty_like(x)
                launch(x, out)
                return out
        return fused_ffn(*operands) if fuses(*operands) else None

    def _launch_of(self, x: Tensor, base: Tensor, out: Tensor | None) -> Any | None:
        """Of a Triton kernel, where one computes activations of this form."""
        if not (_library.direct(x) and x.numel() and x.shape == base.shape and _library.in_place(x, base, out)):
            return None
        form = x.numel(), x.dtype, base.dtype
        return self._launches.of(form, lambda: ExtraOperands(_tokens(x), _tokens(base), self.pool, self.activation))


def patched_ffn(x: Tensor, base: Tensor | FFNWeights, pool: EditPool, *, activation: str) -> Tensor:
    """FFN_edit(x) = FFN(x) + o_extra (W_V^extra + beta * zeta')  (paper, Eq. 3 and 6).

    A token whose row selects no edit keeps the bits of the base FFN; of a base given as weights, those of the same
    kernel without edits. Base and sum are each computed in float32 at least and rounded once.
    Differentiable in x, the base and the neurons, zeta' and beta.

    Args:
        x: [..., d], any float dtype; the FFN's input.
        base: FFN(x), [..., d], computed elsewhere; or the weights, to compute both together.
        pool: the extra neurons of all edits, and the edits of each row; see `EditPool`.
        activation: "relu", "gelu", "gelu_tanh", "silu" or "relu2": the base FFN's own.

    Returns:
        [..., d] in the dtype of the base output.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or activation; a row that names an edit more than once, on a
            CPU: nothing waits for another device to find out.
    """
    _check.instance("pool", pool, EditPool)
    for name in ("row_indptr", "row_edits"):
        _check.integer(f"pool.{name}", getattr(pool, name), (None,))
    if _readable(pool.row_edits):
        reference.check_distinct(pool)
    _check.one_of("activation", activation, ACTIVATIONS)
    _check.instance("x", x, Tensor)
    _check.floating("x", x, x.shape)
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x: expected shape [..., d] with d >= 1, got {_check.shape_of(x)}")
    _check_pool(x, pool)
    d = x.shape[-1]
    if isinstance(base, FFNWeights):
        _check.floating("base.w_in", base.w_in, (None, d))
        f = base.w_in.shape[0]
        _check.floating("base.w_out", base.w_out, (d, f))
        for name, t, dims in (
            ("b_in", base.b_in, (f,)),
            ("w_up", base.w_up, (f, d)),
            ("b_up", base.b_up, (f,)),
            ("b_out", base.b_out, (d,)),
        ):
            if t is not None:
                _check.floating(f"base.{name}", t, dims)
        if base.b_up is not None and base.w_up is None:
            raise ValueError("base.b_up: expected None without base.w_up")
        _check.same_device("x", x, **{f"base.{name}": t for name, t in base._asdict().items()})
        return fused_ffn(x, base, pool, activation)
    _check.floating("base", base, x.shape)
    _check.same_device("x", x, base=base)
    return add_extra_neurons(x, base, pool, activation)


def _readable(t: Tensor) -> bool:
    """Whether Python can look at the values without waiting for a device, and may: not in a trace."""
    return t.device.type == "cpu" and not torch.compiler.is_compiling() and not _library.batched(t)
