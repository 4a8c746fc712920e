"""The extra neurons by the native core: its calls on torch tensors (csrc/include/unike/extra_neurons.h)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from ... import _native
from .reference import ACTIVATIONS, EditPool, ExtraGradients


class Pool:
    """The extra neurons of a layer, checked and laid out once (unike_edit_pool); keeps the tensors alive.

    Tensors that the core takes as they are, it reads anew in each call; others are converted once, see `Pool.live`.
    """

    def __init__(self, pool: EditPool, activation: str) -> None:
        """
        Args:
            pool: the neurons, on the CPU, any float dtype but float64; shapes checked by the caller.
            activation: one of `ACTIVATIONS`.

        Raises:
            RuntimeError: without the compiled extension.
            ValueError: indices out of range, or a row that names an edit more than once.
        """
        tables = (pool.keys, pool.values, pool.zeta, *(() if pool.up is None else (pool.up,)))
        wide = torch.bfloat16 if all(t.dtype == torch.bfloat16 for t in tables) else torch.float32
        wanted = (wide, torch.float32, wide, torch.float32, wide, wide, torch.float32, *(torch.int64,) * 4)
        self.tensors = tuple(
            None if t is None else _native.aligned(t.detach().to(dtype)) for t, dtype in zip(pool, wanted, strict=True)
        )
        #: Whether what is written to the pool's tensors later is seen: nothing had to be converted.
        self.live = [_native.address(t) for t in pool] == [_native.address(t) for t in self.tensors]
        self.activation = ACTIVATIONS.index(activation)
        self._sizes, self._dtype = (pool.keys.shape[0], pool.zeta.shape[0]), _native.DTYPES[wide]
        self.anchor = _native.Anchor(self.tensors[7])  # indptr, which is never empty
        self._lay_out(pool.row_indptr.shape[0] - 1)

    def _lay_out(self, rows: int) -> None:
        addresses = [_native.address(t) for t in self.tensors]
        self.native = _native.core().Pool((*self._sizes, rows), self._dtype, addresses)

    def of_rows(self, row_indptr: Tensor, row_edits: Tensor, token_rows: Tensor | None) -> Pool:
        """The same neurons for another batch. All tensors are contiguous, on the CPU.

        Args:
            row_indptr: int64 [R + 1], row r uses edits row_edits[row_indptr[r] : row_indptr[r + 1]].
            row_edits: int64 [S].
            token_rows: int64 [m], the row of each token; None: the tokens belong to the rows in R equal runs.
        """
        new = copy.copy(self)
        new.tensors = (*self.tensors[:8], row_indptr, row_edits, token_rows)
        new._lay_out(row_indptr.shape[0] - 1)
        return new

    def add(self, x: Tensor, base: Tensor, out: Tensor | None = None) -> Tensor:
        """`base` plus the extra neurons of each token's edits.

        Args:
            x: float32 or bfloat16 [m, d] on the CPU, any strides; the FFN's input.
            base: likewise; the FFN's output.
            out: [m, d] in the dtype of base with contiguous rows, written; may be base. None: a new one.

        Returns:
            [m, d] in the dtype of base, contiguous where it is new.

        Raises:
            ValueError: for another device, dtype or shape.
        """
        x, base = _native.table(x, "x"), _native.table(base, "base")
        if x.shape != base.shape:
            raise ValueError(f"base must be {_native.describe(x)}, got {_native.describe(base)}")
        if out is None:
            out = _native.allocate(*base.shape, dtype=base.dtype)
        elif out.shape != base.shape or out.dtype != base.dtype or out.stride(-1) != 1 or out.device.type != "cpu":
            raise ValueError(f"out must be {_native.describe(base)} with contiguous rows, got {_native.describe(out)}")
        _native.core().add_extra_neurons(
            _native.rows(x), _native.rows(base), *x.shape, self.native, self.activation, _native.rows(out),
            torch.get_num_threads(),
        )  # fmt: skip
        return out

    def add_contiguous(self, x: Tensor, base: Tensor) -> Tensor:
        """`add` for [..., d] of one shape that are `as_it_reads`, as in decoding: no check, no view."""
        out, d = torch.empty_like(base), x.shape[-1]
        code = _native.DTYPES[base.dtype]
        _native.core().add_extra_neurons(
            (x.data_ptr(), _native.DTYPES[x.dtype], d), (base.data_ptr(), code, d), x.numel() // d, d, self.native,
            self.activation, (out.data_ptr(), code, d), torch.get_num_threads(),
        )  # fmt: skip
        return out

    def gradients(self, grad: Tensor, x: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of `add` with respect to x, and the pool's keys, key_bias, up, up_bias, values, zeta and beta.

        Args:
            grad: float32 or bfloat16 [m, d] on the CPU, any strides; of the output.
            x: likewise; the FFN's input.

        Returns:
            float32, None for what the pool lacks.
        """
        grad, x = _native.table(grad, "grad"), _native.table(x, "x")
        if x.shape != grad.shape:
            raise ValueError(f"grad must be {_native.describe(x)}, got {_native.describe(grad)}")
        outs = [
            _native.allocate(*x.shape),
            *(None if t is None else _native.allocate(*t.shape) for t in self.tensors[:7]),
        ]
        addresses = [_native.address(t) for t in outs]
        _native.core().add_extra_neurons_backward(
            _native.rows(grad), _native.rows(x), *x.shape, self.native, self.activation, addresses,
            torch.get_num_threads(),
        )  # fmt: skip
        return tuple(outs)


def as_it_reads(t: Tensor) -> bool:
    """Whether its memory holds it as it reads: contiguous, aligned, with no negation that torch has put off."""
    return t.is_contiguous() and not t.is_neg() and t.data_ptr() % 4 == 0


def add_extra_neurons(x: Tensor, base: Tensor, pool: EditPool, activation: str) -> Tensor:
    """See `ExtraOperands`."""
    return Pool(pool, activation).add(_native.native_dtype(x), _native.native_dtype(base)).to(base.dtype)


def add_extra_neurons_backward(grad: Tensor, x: Tensor, pool: EditPool, activation: str) -> ExtraGradients:
    """See `ExtraBackwardOperands`."""
    grads = Pool(pool, activation).gradients(_native.native_dtype(grad), _native.native_dtype(x))
    pairs = zip(grads, (x, *pool[:7]), strict=True)
    return ExtraGradients(*(None if g is None or t is None else g.to(t.dtype) for g, t in pairs))  # type: ignore[arg-type]
