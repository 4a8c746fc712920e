"""A drop-in FFN with extra key-value neurons (paper, Eq. 3 and 6)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import ACTIVATIONS, EditPool, FFNWeights, patched_ffn
from ..ops._backend import forced_backend, takes
from ..ops.patched_ffn import FUSED_TOKENS, Plan, add_extra_neurons
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


@dataclass(frozen=True)
class Dense:
    """How a base FFN's matrices are read.

    Attributes:
        matrices: modules with a weight and perhaps a bias, in the order of their registration: one or two that lead
            in, and one that leads back. A single one that leads in and is twice as wide holds gate and factor.
        gate_first: whether the gate comes before the factor.
    """

    matrices: tuple[nn.Module, ...]
    gate_first: bool = True

    def weights(self) -> FFNWeights:
        """Views of what the modules hold now."""
        *first, (w_out, b_out) = map(_oriented, self.matrices)
        if len(first) == 1 and first[0][0].shape[0] == 2 * w_out.shape[1]:
            weight, bias = first[0]
            biases = (None, None) if bias is None else bias.chunk(2)
            first = list(zip(weight.chunk(2), biases, strict=True))
        if len(first) == 1:
            return FFNWeights(*first[0], None, None, w_out, b_out)
        gate, up = first if self.gate_first else first[::-1]
        return FFNWeights(*gate, *up, w_out, b_out)


def _oriented(matrix: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight as [out, in], and the bias; GPT-2's Conv1D holds it the other way round."""
    weight: Any = matrix.weight
    bias: Any = matrix.bias
    return (weight if isinstance(matrix, nn.Linear) else weight.T), bias


class PatchedFFN(DropIn):
    """The output of a base FFN plus extra neurons.

    Made from any FFN module, `PatchedFFN.from_module(mlp, activation="silu")`, or from the parts of an FFN that stands
    inline in its layer, `PatchedFFN.from_module(fc1, act, fc2, activation="relu")`: then it takes the place of the
    first and returns the output of all three, and `PassThrough.from_module` takes the place of the others.

    Attributes:
        edits: the `EditStore`; empty at first, and the output is then the base module's own.
        activation: of the extra neurons.
        dense: how the base's matrices are read, where it computes just what they say: then base and neurons of a batch
            of decode size are one launch on a GPU.
    """

    edits: EditStore
    activation: str
    dense: Dense | None

    @classmethod
    def from_module(cls, *base: nn.Module, activation: str, dense: Dense | None = None) -> PatchedFFN:
        """Raises ValueError for an unknown activation, TypeError where `base` is not modules."""
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}; got {activation!r}")
        if not base or not all(isinstance(m, nn.Module) for m in base):
            raise TypeError(f"base: expected nn.Module, got {[type(m).__name__ for m in base]}")
        new = cls._adopt(*base)
        new.edits = EditStore()
        new.__dict__.update(activation=activation, dense=dense)
        return new

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.edits.ids and self._fuses(hidden_states):
            assert self.dense is not None
            return patched_ffn(hidden_states, self.dense.weights(), self.edits.pool(), activation=self.activation)
        first, *rest = self._originals
        result: Any = first(hidden_states, *args, **kwargs)
        for module in rest:
            result = module(result)
        if not self.edits.ids:
            return result
        if isinstance(result, tuple):  # experts: and what the router said
            out: Tensor = result[0]
            return (self._add(hidden_states.reshape(out.shape), out), *result[1:])
        return self._add(hidden_states, result)

    def _fuses(self, hidden_states: Tensor) -> bool:
        """Whether base and neurons are computed together: on a GPU, for few tokens, where nobody looks in between."""
        if self.dense is None or not _on_gpu(hidden_states) or hidden_states.shape[:-1].numel() > FUSED_TOKENS:
            return False
        if torch.is_grad_enabled() or any(m._forward_hooks or m._forward_pre_hooks for m in self._parts()):
            return False
        return forced_backend() in (None, "triton") and takes("patched_ffn", "triton", hidden_states)

    def _parts(self) -> Iterator[nn.Module]:
        return (part for module in self._originals for part in module.modules())

    def _add(self, hidden_states: Tensor, out: Tensor) -> Tensor:
        # Tracing sees the operator; otherwise the shortest way that computes the same.
        if not torch.compiler.is_compiling() and self.edits.plan(self.activation).takes(hidden_states, out):
            return self.edits.plan(self.activation).run(hidden_states, out)
        return add_extra_neurons(hidden_states, out, self.edits.pool(), self.activation)


def _on_gpu(t: Tensor) -> bool:
    return t.is_cuda


class PassThrough(DropIn):
    """Stands for a module whose work another one does; returns its input."""

    @classmethod
    def from_module(cls, base: nn.Module) -> PassThrough:
        return cls._adopt(base)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states
