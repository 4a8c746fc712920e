"""The torch.library namespace `unike`: one call that registers an operator completely, and one that calls it.

Kernels have the first reverse derivative. Where any other is asked for (forward mode, a derivative of a derivative,
`torch.func`), the operator is composed of torch's own, which has them all; whatever backend is forced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_lib = torch.library.Library("unike", "DEF")
_kernels: dict[str, Callable[..., Any]] = {}


def _contiguous(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` with contiguous results, so that the strides seen in tracing are those that come."""

    def wrapped(*args: Any) -> Any:
        result = run(*args)
        return result.contiguous() if isinstance(result, Tensor) else type(result)(t.contiguous() for t in result)

    return wrapped


def define(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    composed: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Register `unike::<schema>` with all that torch may ask of an operator.

    Args:
        schema: its name, arguments and results.
        run: its kernel for every device.
        fake: its shapes, for tracing.
        composed: `run` in operators of torch, for the derivatives that kernels do not have.
        setup_context: saves what `backward` needs, as `torch.library.register_autograd` takes it.
        backward: the gradients, of first order, in the same way; None: those of `composed`.
    """
    name = schema[: schema.index("(")]
    _lib.define(schema)
    _kernels[name] = _contiguous(run)
    _lib.impl(name, _kernels[name], "CompositeExplicitAutograd")
    torch.library.register_fake(f"unike::{name}", _contiguous(fake), lib=_lib)
    operator = getattr(torch.ops.unike, name).default
    differentiated = _differentiated(operator, _contiguous(composed), setup_context, backward)
    _lib.impl(name, differentiated, "Autograd", with_keyset=True)
    torch.library.register_vmap(f"unike::{name}", looped(operator), lib=_lib)
    _lib.impl(name, _looped_over_gradients(operator), "Batched")


def _differentiated(
    operator: Any,
    composed: Callable[..., Any],
    setup_context: Callable[..., None] | None,
    backward: Callable[..., Any] | None,
) -> Callable[..., Any]:
    """The operator as torch's autograd comes to it, whether or not a derivative is asked for."""

    def below(keyset: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    class Differentiated(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
            result = below(keyset, *args)
            assert setup_context is not None
            setup_context(ctx, args, result)
            return result

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            assert backward is not None
            return (None, *backward(ctx, *grads))

    def kernel(keyset: Any, *args: Any) -> Any:
        reverse = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
        if reverse and (backward is None or _transformed()):
            return composed(*args)
        if any(map(_has_tangent, args)):
            return composed(*args)
        return Differentiated.apply(keyset, *args) if reverse else below(keyset, *args)

    return kernel


def _transformed() -> bool:
    """Whether a transformation of `torch.func` is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _has_tangent(t: Any) -> bool:
    """Of forward mode, which `torch.func.jvp` enters, too."""
    if forward_ad._current_level < 0 or not isinstance(t, Tensor) or not t.is_floating_point():
        return False
    return torch._VF._unpack_dual(t, level=0).tangent is not None


def wrapped(t: Tensor) -> bool:
    """Whether `torch.func` has wrapped it: then there is no memory at an address of its own."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(t))


def differentiated(t: Tensor) -> bool:
    """Whether a derivative to `t` is asked for, of whatever kind, or `torch.func.vmap` has put examples into it."""
    if wrapped(t):
        return True
    return (torch.is_grad_enabled() and t.requires_grad) or _has_tangent(t)


def outside() -> AbstractContextManager[Any]:
    """Where no transformation of `torch.func` is at work, for what is laid out in one but outlives it."""
    if not _transformed():
        return nullcontext()
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    return temporarily_clear_interpreter_stack()


def batched(t: Tensor) -> bool:
    """Whether `torch.func.vmap` has put examples into it, which cannot be looked at as one."""
    while wrapped(t):
        if torch._C._functorch.is_batchedtensor(t):
            return True
        t = torch._C._functorch.get_unwrapped(t)
    return False


def plain(t: Tensor) -> Tensor:
    """What `torch.func` has wrapped."""
    while wrapped(t):
        t = torch._C._functorch.get_unwrapped(t)
    return t


def looped(operator: Any) -> Callable[..., Any]:
    """The rule of `torch.func.vmap` for an operator of flat arguments: its kernel for one example after the other."""

    def rule(info: Any, dims: Sequence[int | None], *args: Any) -> tuple[Any, int]:
        return _over_examples(operator, info.batch_size, dims, args), 0

    return rule


def _looped_over_gradients(operator: Any) -> Callable[..., Any]:
    """The same for `is_grads_batched`, which has a vmap of its own."""

    def kernel(*args: Any) -> Any:
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        dims: list[int | None] = []
        while not any(dim == 0 for dim in dims):  # the innermost level that an argument is batched at
            # One that is not comes back as no examples of it.
            exposed = [torch._remove_batch_dim(a, level, 0, 0) if isinstance(a, Tensor) else a for a in args]
            dims = [0 if isinstance(e, Tensor) and len(e) else None for e in exposed]
            level -= 1
        examples = max(len(e) for e, dim in zip(exposed, dims, strict=True) if dim == 0)
        args = tuple(a if dim is None else e for a, e, dim in zip(args, exposed, dims, strict=True))
        result = _over_examples(operator, examples, dims, args)
        if isinstance(result, Tensor):
            return torch._add_batch_dim(result, 0, level + 1)
        return type(result)(torch._add_batch_dim(t, 0, level + 1) for t in result)

    return kernel


def _over_examples(operator: Any, examples: int, dims: Sequence[int | None], args: Sequence[Any]) -> Any:
    """The results of all examples, stacked; `dims` tells which dimension of an argument counts them."""
    if examples == 0:  # of one, of which none is kept
        args = [a if dim is None else _of_one(a, dim) for a, dim in zip(args, dims, strict=True)]
    results = [
        operator(*(a if dim is None else a.select(dim, i) for a, dim in zip(args, dims, strict=True)))
        for i in range(max(examples, 1))
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results)[:examples]
    return type(results[0])(torch.stack(each)[:examples] for each in zip(*results, strict=True))


def _of_one(t: Tensor, dim: int) -> Tensor:
    return t.new_zeros([1 if i == dim else n for i, n in enumerate(t.shape)], dtype=t.dtype)


def direct(like: Tensor) -> bool:
    """Whether a kernel may be called past torch's dispatcher; `like` is one of the activations.

    The way through it takes longer than the kernel for one token. It is needed only where something on it has a part to
    play: gradients, forward mode, tracing, a transformation, a mode or a tensor subclass.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and type(like) is Tensor
        and forward_ad._current_level < 0
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
    )


def in_place(*tensors: Tensor | None) -> bool:
    """Whether the values of each are in its memory, one behind the other."""
    return all(t is None or (t.is_contiguous() and not t.is_neg()) for t in tensors)


def form(*tensors: Tensor | None) -> tuple[Any, ...] | None:
    """Shape and dtype of each, of tensors that are `in_place`; None: one is not."""
    found: list[Any] = []
    for t in tensors:
        if t is None:
            found.append(None)
        elif t.is_contiguous() and not t.is_neg():
            found += t.shape, t.dtype
        else:
            return None
    return tuple(found)


def call(name: str, like: Tensor, *args: Any) -> Any:
    """`torch.ops.unike.<name>(*args)`, past the dispatcher where nothing needs it.

    Args:
        name: the operator.
        like: one of its activations, which tells whether torch differentiates, traces or transforms the call.
        *args: those of its schema.
    """
    # The dispatcher computes what torch has put off.
    if direct(like) and not any(isinstance(t, Tensor) and t.is_neg() for t in args):
        return _kernels[name](*args)
    return getattr(torch.ops.unike, name)(*args)
