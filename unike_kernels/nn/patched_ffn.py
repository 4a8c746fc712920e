"""A drop-in FFN with extra key-value neurons (paper, Eq. 3 and 6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import ACTIVATIONS, EditPool
from ..ops.patched_ffn import Plan, add_extra_neurons
from ._drop_in import DropIn, Tables

_PER_NEURON = ("keys", "key_bias", "up", "up_bias", "values")


class EditStore(Tables):
    """The extra neurons of all edits of one layer as a ragged pool, and the rows' selection of edits."""

    keys: Tensor
    key_bias: Tensor
    up: Tensor | None
    up_bias: Tensor | None
    values: Tensor
    zeta: Tensor
    beta: Tensor
    indptr: Tensor
    row_indptr: Tensor
    row_edits: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        for name in (*_PER_NEURON, "zeta", "beta", "indptr", "row_indptr", "row_edits"):
            self.table(name, None)
        self.selection: tuple[Tensor, Tensor] | None = None

    def set(self, edits: Mapping[str, Any]) -> None:
        """Replace all edits, given as id -> `EditLayer`.

        Tensors are concatenated, so gradients reach those that ask for them.
        """
        self.ids = list(edits)
        layers = list(edits.values())
        if not layers:
            for name in self._buffers:
                self._buffers[name] = None
            return
        gated = any(layer.up is not None for layer in layers)
        device = layers[0].keys.device
        self.keys = torch.cat([layer.keys for layer in layers])
        self.key_bias = torch.cat([layer.key_bias for layer in layers])
        self.values = torch.cat([layer.values for layer in layers])
        # A plain neuron among gated ones has the factor q 0 + 1.
        self.up = torch.cat([_or(layer.up, torch.zeros_like(layer.keys)) for layer in layers]) if gated else None
        self.up_bias = (
            torch.cat([_or(layer.up_bias, torch.ones_like(layer.key_bias)) for layer in layers]) if gated else None
        )
        self.zeta = torch.stack([layer.zeta for layer in layers])
        self.beta = torch.stack([layer.beta for layer in layers])
        sizes = torch.tensor([0, *(layer.keys.shape[0] for layer in layers)])
        self.indptr = sizes.cumsum(0).to(device)
        self.row_indptr, self.row_edits = csr([range(len(layers))], device)

    def select(self, rows: Sequence[Sequence[str]] | None) -> None:
        """Give each row of the batch its own edits, by id, ids of other layers ignored; None: every row uses all."""
        if rows is None or not self.ids:
            self.selection = None
            return
        position = {name: i for i, name in enumerate(self.ids)}
        self.selection = csr([[position[i] for i in row if i in position] for row in rows], self.indptr.device)

    def pool(self) -> EditPool:
        """The neurons, and the edits that each row selects."""
        row_indptr, row_edits = self.selection or (self.row_indptr, self.row_edits)
        return EditPool(
            self.keys, self.key_bias, self.up, self.up_bias, self.values, self.zeta, self.beta, self.indptr,
            row_indptr, row_edits,
        )  # fmt: skip

    def plan(self, activation: str) -> Plan:
        """The pool as the operator takes it for each token."""
        if self._plan is None:
            self._plan = Plan(self.pool(), activation)
        plan: Plan = self._plan
        return plan


def _or(t: Tensor | None, default: Tensor) -> Tensor:
    return default if t is None else t


def csr(rows: Sequence[Sequence[int]], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """(indptr int64 [R + 1], indices int64 [S]) of a list of lists."""
    lengths = torch.tensor([0, *(len(row) for row in rows)], dtype=torch.int64)
    flat = torch.tensor([i for row in rows for i in row], dtype=torch.int64)
    return lengths.cumsum(0).to(device), flat.to(device)


class PatchedFFN(DropIn):
    """The output of a base FFN plus extra neurons.

    Made from any FFN module, `PatchedFFN.from_module(mlp, activation="silu")`, or from the parts of an FFN that stands
    inline in its layer, `PatchedFFN.from_module(fc1, act, fc2, activation="relu")`: then it takes the place of the
    first and returns the output of all three, and `PassThrough.from_module` takes the place of the others.

    Attributes:
        edits: the `EditStore`; empty at first, and the output is then the base module's own.
        activation: of the extra neurons.
    """

    edits: EditStore
    activation: str

    @classmethod
    def from_module(cls, *base: nn.Module, activation: str) -> PatchedFFN:
        """Raises ValueError for an unknown activation, TypeError where `base` is not modules."""
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}; got {activation!r}")
        if not base or not all(isinstance(m, nn.Module) for m in base):
            raise TypeError(f"base: expected nn.Module, got {[type(m).__name__ for m in base]}")
        new = cls._adopt(*base)
        new.edits = EditStore()
        new.__dict__["activation"] = activation
        return new

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        first, *rest = self._originals
        out: Tensor = first(hidden_states, *args, **kwargs)
        for module in rest:
            out = module(out)
        if not self.edits.ids:
            return out
        # Tracing sees the operator; otherwise the shortest way that computes the same.
        if not torch.compiler.is_compiling() and self.edits.plan(self.activation).takes(hidden_states, out):
            return self.edits.plan(self.activation).run(hidden_states, out)
        return add_extra_neurons(hidden_states, out, self.edits.pool(), self.activation)


class PassThrough(DropIn):
    """Stands for a module whose work another one does; returns its input."""

    @classmethod
    def from_module(cls, base: nn.Module) -> PassThrough:
        return cls._adopt(base)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states
