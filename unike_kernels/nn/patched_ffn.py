"""A drop-in FFN with extra key-value neurons (paper, Eq. 3 and 6)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import ACTIVATIONS, EditPool
from ..ops.patched_ffn import FUSED_TOKENS, add_extra_neurons, fused_ffn, fuses
from ..ops.patched_ffn.reference import activate
from ._drop_in import DropIn
from .context import ModelContext, Pass
from .dense import Dense
from .edit_store import EditStore
from .trace import seconds_since


class PatchedFFN(DropIn):
    """The output of a base FFN plus extra neurons.

    Made from any FFN module, `PatchedFFN.from_module(mlp, activation="silu")`, or from the parts of an FFN that stands
    inline in its layer, `PatchedFFN.from_module(fc1, act, fc2, activation="relu")`: then it takes the place of the
    first and returns the output of all three, and `PassThrough.from_module` takes the place of the others.

    Attributes:
        edits: the `EditStore` of the current version; empty at first, and the output is then the base module's own.
        activation: of the extra neurons.
        dense: how the base's matrices are read, where it computes just what they say: then base and neurons of a batch
            of decode size are one launch on a GPU.
    """

    activation: str
    dense: Dense | None
    context: ModelContext
    layer: int

    @classmethod
    def from_module(
        cls,
        *base: nn.Module,
        activation: str,
        dense: Dense | None = None,
        context: ModelContext | None = None,
        layer: int = 0,
    ) -> PatchedFFN:
        """context, layer: of the model, whose versions have the edits; None: of this module alone, without any.

        Raises:
            ValueError: an unknown activation.
            TypeError: `base` is not modules.
        """
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}; got {activation!r}")
        if not base or not all(isinstance(m, nn.Module) for m in base):
            raise TypeError(f"base: expected nn.Module, got {[type(m).__name__ for m in base]}")
        new = cls._adopt(*base)
        context = context or ModelContext()
        if layer not in context.current.edits:
            context.install(layer, edits=EditStore())
        new.__dict__.update(activation=activation, dense=dense, context=context, layer=layer)
        return new

    @property
    def edits(self) -> EditStore:
        found: EditStore = self.context.current.edits[self.layer]
        return found

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.edits._apply(fn)
        return super()._apply(fn, recurse)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        now = self.context.now()
        edits: EditStore | None = now.version.edits.get(self.layer)
        if edits is not None and not edits.empty and now.trace is None and self._may_fuse(hidden_states):
            assert self.dense is not None
            operands = hidden_states, self.dense.weights(), self._pool(now, edits), self.activation
            if fuses(*operands):
                return fused_ffn(*operands)
        first, *rest = self._originals
        result: Any = first(hidden_states, *args, **kwargs)
        for module in rest:
            result = module(result)
        if edits is None or edits.empty:
            return result
        start = 0.0 if now.trace is None else time.perf_counter()
        if isinstance(result, tuple):  # experts: and what the router said
            out: Tensor = result[0]
            result = (self._add(now, edits, hidden_states.reshape(out.shape), out), *result[1:])
        else:
            result = self._add(now, edits, hidden_states, result)
        if now.trace is not None:
            record = now.trace.at(self.layer)
            record.neuron_seconds = seconds_since(start)
            found = self._activations(edits, now.selection.edits, hidden_states)
            record.neurons = {name: t.view(*now.trace.shape, -1) for name, t in found.items()}
        return result

    def _pool(self, now: Pass, edits: EditStore) -> EditPool:
        """The neurons, and the edits of each row of this pass."""
        if now.traced:
            return edits.pool(selected=None if now.selection.csr is None else now.selection.csr[self.layer])
        return edits.pool(now.selection.edits)

    @torch.no_grad()
    def _activations(
        self, edits: EditStore, rows: tuple[tuple[str, ...], ...] | None, hidden_states: Tensor
    ) -> dict[str, Tensor]:
        """Edit id -> what its neurons put out, [..., n]; 0 in rows that do not use it."""
        found = {}
        for name in edits.ids:
            layer = edits.layer(name)
            out = activate(self.activation, hidden_states.float() @ layer.keys.float().T + layer.key_bias.float())
            if layer.up is not None:
                out = out * (hidden_states.float() @ layer.up.float().T + layer.up_bias.float())
            if rows is not None:
                uses = torch.tensor([name in row for row in rows], dtype=torch.bool, device=out.device)
                tokens = out.shape[:-1].numel() // len(rows)
                out = out * uses.repeat_interleave(tokens).view(*out.shape[:-1], 1)
            found[name] = out.cpu()
        return found

    def _may_fuse(self, hidden_states: Tensor) -> bool:
        """Whether they may be one launch: on a GPU, for few tokens, where nobody looks at what lies between."""
        if self.dense is None or not _on_gpu(hidden_states) or hidden_states.shape[:-1].numel() > FUSED_TOKENS:
            return False
        return not torch.is_grad_enabled() and not any(m._forward_hooks or m._forward_pre_hooks for m in self._parts())

    def _parts(self) -> Iterator[nn.Module]:
        return (part for module in self._originals for part in module.modules())

    def _add(self, now: Pass, edits: EditStore, hidden_states: Tensor, out: Tensor) -> Tensor:
        if now.traced or torch.is_grad_enabled():
            return add_extra_neurons(hidden_states, out, self._pool(now, edits), self.activation)
        return edits.view(self.activation, now.selection.edits)(hidden_states, out)


def _on_gpu(t: Tensor) -> bool:
    return t.is_cuda


class PassThrough(DropIn):
    """Stands for a module whose work another one does; returns its input."""

    @classmethod
    def from_module(cls, base: nn.Module) -> PassThrough:
        return cls._adopt(base)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states
