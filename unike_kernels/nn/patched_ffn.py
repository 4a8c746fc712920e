"""A drop-in FFN with extra key-value neurons (paper, Eq. 3 and 6)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import ACTIVATIONS, EditPool, FFNWeights
from ..ops._backend import forced_backend, takes
from ..ops.patched_ffn import FUSED_TOKENS, Plan, add_extra_neurons, patched_ffn_of_distinct
from ..ops.patched_ffn.reference import activate
from ._drop_in import DropIn, Tables
from .context import Context
from .explanation import seconds_since


class EditStore(Tables):
    """The extra neurons of all edits of one layer as a ragged pool, and the rows' selection of edits.

    `set` makes it anew. `with_edit`, `without` and `with_beta` give another store and leave this one as it is, though
    the two share tensors: neurons are only ever appended, behind those that an earlier store knows of, and room for
    them doubles when it is used up. So a change costs what it changes, and shapes stay what they are.
    """

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
        self.empty = True  # what compiled code looks at, so that it need not know the ids
        for name in _TABLES:
            self.table(name, None)
        self.selection: tuple[Tensor, Tensor] | None = None
        self.position: dict[str, int] = {}  # in the pool
        self.used = 0, 0  # neurons and edits of the pool, removed ones too
        self.direct = False  # set by hand: then it counts, whatever version a pass has
        self._views: dict[Any, tuple[EditPool, Plan]] = {}

    def set(self, edits: Mapping[str, Any]) -> None:
        """Replace all edits, given as id -> `EditLayer`.

        Tensors are concatenated, so gradients reach those that ask for them.
        """
        self.direct = True
        self._views = {}
        self.ids, self.empty = list(edits), not edits
        self.position = {name: i for i, name in enumerate(edits)}
        layers = list(edits.values())
        if not layers:
            for name in self._buffers:
                self._buffers[name] = None
            self.used = 0, 0
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
        sizes = torch.tensor([0, *(layer.keys.shape[0] for layer in layers)], dtype=torch.int64, device="cpu")
        self.indptr = sizes.cumsum(0).to(device)
        self.row_indptr, self.row_edits = csr([range(len(layers))], device)
        self.used = self.keys.shape[0], len(layers)

    def with_edit(self, name: str, layer: Any) -> EditStore:
        """A store that has this edit too, behind the others."""
        new = self.copied()
        if not self.ids or (layer.up is not None and self.up is None) or layer.keys.dtype != self.keys.dtype:
            new.set({**{each: self.layer(each) for each in self.ids}, name: layer})
            return new
        neurons, edits = self.used
        n = layer.keys.shape[0]
        new._reserve(neurons + n, edits + 1)
        rows = slice(neurons, neurons + n)
        new.keys[rows], new.key_bias[rows], new.values[rows] = layer.keys, layer.key_bias, layer.values
        if new.up is not None and new.up_bias is not None:
            new.up[rows] = 0.0 if layer.up is None else layer.up
            new.up_bias[rows] = 1.0 if layer.up_bias is None else layer.up_bias
        new.zeta[edits], new.beta[edits] = layer.zeta, layer.beta
        new.indptr = new.indptr.clone()  # whoever reads the other one at this moment sees it whole
        new.indptr[edits + 1 :] = neurons + n
        new.used = neurons + n, edits + 1
        new._name({**self.position, name: edits})
        return new

    def without(self, name: str) -> EditStore:
        """A store without this edit. Where most of the pool is of removed edits, the others move together."""
        new = self.copied()
        left = {each: at for each, at in self.position.items() if each != name}
        if 2 * len(left) < self.used[1]:
            new.set({each: self.layer(each) for each in left})
        else:
            new._name(left)
        return new

    def with_beta(self, name: str, beta: float) -> EditStore:
        """A store in which this edit has another beta."""
        new = self.copied()
        new.beta = self.beta.clone()
        new.beta[self.position[name]] = beta
        return new

    def layer(self, name: str) -> Any:
        """The edit's tensors, as `EditLayer` has them: views of the pool."""
        at = self.position[name]
        rows = slice(int(self.indptr[at]), int(self.indptr[at + 1]))
        tables = {t: None if getattr(self, t) is None else getattr(self, t)[rows] for t in _PER_NEURON}
        return SimpleNamespace(**tables, zeta=self.zeta[at], beta=self.beta[at])

    def become(self, other: EditStore) -> None:
        """Hold what `other` holds, in the same object."""
        self.ids, self.empty, self.direct = other.ids, other.empty, False
        self.position, self.used = other.position, other.used
        self._views = {}
        self.__dict__["_buffers"] = dict(other._buffers)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.direct = True  # versions know nothing of another device
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_views": {}}

    def copied(self) -> EditStore:
        """Another store of the same tensors, which stays as it is when this one changes."""
        new = EditStore.__new__(EditStore)
        new.__dict__.update(self.__dict__, _buffers=dict(self._buffers), _views={}, _plan=None)
        new.__dict__.update(direct=False, selection=None)
        return new

    def spare(self) -> None:
        """Make room for edits to come, so that no shape changes with the next ones."""
        if self.ids:
            neurons, edits = self.used
            self._reserve(max(2 * neurons, _ROOM), max(2 * edits, _ROOM))
            self._name(self.position)

    def _reserve(self, neurons: int, edits: int) -> None:
        """Room for so many, in new tensors if there is none."""
        if neurons > self.keys.shape[0]:
            for name in _PER_NEURON:
                if (t := getattr(self, name)) is not None:
                    setattr(self, name, _longer(t, max(neurons, 2 * t.shape[0])))
        if edits > self.beta.shape[0]:
            room = max(edits, 2 * self.beta.shape[0])
            self.zeta, self.beta = _longer(self.zeta, room), _longer(self.beta, room)
            self.indptr = torch.cat([self.indptr, self.indptr[-1:].expand(room + 1 - self.indptr.shape[0])])

    def _name(self, position: dict[str, int]) -> None:
        """Let these be the edits, in this order, for every row."""
        self.ids, self.empty, self.position = list(position), not position, position
        room = self.beta.shape[0]
        listed = [*position.values(), *[0] * (room - len(position))]
        self.row_edits = torch.tensor(listed, dtype=torch.int64, device=self.keys.device)
        self.row_indptr = torch.tensor([0, len(position)], dtype=torch.int64, device=self.keys.device)

    def select(self, rows: Sequence[Sequence[str]] | None) -> None:
        """Give each row of the batch its own edits, by id, ids of other layers ignored; None: every row uses all.

        Raises ValueError for a row that names an edit more than once; so do `pool` and `view`.
        """
        if rows is not None:
            check_distinct(rows)
        self.selection = None if rows is None or not self.ids else self._csr(rows)

    def _csr(self, rows: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
        check_distinct(rows)
        return csr([[self.position[i] for i in row if i in self.position] for row in rows], self.indptr.device)

    def pool(self, rows: tuple[tuple[str, ...], ...] | None = None) -> EditPool:
        """The neurons, and the edits that each row selects: by `select`, or these."""
        row_indptr, row_edits = self.selection or (self.row_indptr, self.row_edits)
        if rows is not None:
            row_indptr, row_edits = self._csr(rows)
        return EditPool(
            self.keys, self.key_bias, self.up, self.up_bias, self.values, self.zeta, self.beta, self.indptr,
            row_indptr, row_edits,
        )  # fmt: skip

    def view(self, activation: str, rows: tuple[tuple[str, ...], ...] | None) -> tuple[EditPool, Plan]:
        """The pool for these rows, and as the operator takes it for each token; kept until the store changes."""
        if self._plan is None:  # an attribute has changed
            self._views, self._plan = {}, True
        if rows not in self._views:
            if len(self._views) >= _VIEWS:
                self._views.clear()
            pool = self.pool(rows)
            self._views[rows] = pool, Plan(pool, activation)
        return self._views[rows]


_PER_NEURON = ("keys", "key_bias", "up", "up_bias", "values")
_TABLES = (*_PER_NEURON, "zeta", "beta", "indptr", "row_indptr", "row_edits")
_ROOM = 32  # neurons, and edits, that there is room for at least
_VIEWS = 64  # selections of rows that are kept


def _longer(t: Tensor, length: int) -> Tensor:
    """With zeros behind. [n, ...] -> [length, ...]."""
    return torch.cat([t, t.new_zeros(length - t.shape[0], *t.shape[1:], dtype=t.dtype)])


def _or(t: Tensor | None, default: Tensor) -> Tensor:
    return default if t is None else t


def check_distinct(rows: Sequence[Sequence[str]]) -> None:
    """Raises ValueError for a row that names an edit more than once."""
    for r, row in enumerate(rows):
        if len(set(row)) != len(row):
            raise ValueError(f"rows[{r}]: expected distinct edit ids, got {list(row)}")


def csr(rows: Sequence[Sequence[int]], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """(indptr int64 [R + 1], indices int64 [S]) of a list of lists."""
    lengths = torch.tensor([0, *(len(row) for row in rows)], dtype=torch.int64, device="cpu")
    flat = torch.tensor([i for row in rows for i in row], dtype=torch.int64, device="cpu")
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

    def named(self, parts: Sequence[tuple[Tensor, Tensor | None]], names: Mapping[int, str]) -> dict[str, Tensor]:
        """Weights [out, in] and biases, as `weights` orders them, by the names that they have in a state_dict.

        Args:
            parts: of gate and factor, or of the only way in, and of the way back.
            names: id of a module -> its name.
        """
        *first, last = parts
        if len(first) == 2 and not self.gate_first:
            first.reverse()
        if len(first) == 2 and len(self.matrices) == 2:
            (gate, b_gate), (up, b_up) = first
            first = [(torch.cat([gate, up]), None if b_gate is None or b_up is None else torch.cat([b_gate, b_up]))]
        found = {}
        for module, (weight, bias) in zip(self.matrices, (*first, last), strict=True):
            name = names[id(module)]
            found[f"{name}.weight"] = weight if isinstance(module, nn.Linear) else weight.T.contiguous()
            if bias is not None:
                found[f"{name}.bias"] = bias
        return found


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
    context: Context
    layer: int

    @classmethod
    def from_module(
        cls,
        *base: nn.Module,
        activation: str,
        dense: Dense | None = None,
        context: Context | None = None,
        layer: int = 0,
    ) -> PatchedFFN:
        """context, layer: of the model; None: of this module alone.

        Raises:
            ValueError: an unknown activation.
            TypeError: `base` is not modules.
        """
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}; got {activation!r}")
        if not base or not all(isinstance(m, nn.Module) for m in base):
            raise TypeError(f"base: expected nn.Module, got {[type(m).__name__ for m in base]}")
        new = cls._adopt(*base)
        new.edits = EditStore()
        new.__dict__.update(activation=activation, dense=dense, context=context or Context(), layer=layer)
        return new

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        now = self.context.now()
        edits, rows = self.edits, None
        if not torch.compiler.is_compiling():
            rows = now.edits
            if now.version is not None and not edits.direct:
                edits = now.version.edits[self.layer]
        if not edits.empty and now.explanation is None and self._fuses(hidden_states):
            assert self.dense is not None
            pool = edits.pool(rows)
            return patched_ffn_of_distinct(hidden_states, self.dense.weights(), pool, activation=self.activation)
        first, *rest = self._originals
        result: Any = first(hidden_states, *args, **kwargs)
        for module in rest:
            result = module(result)
        if edits.empty:
            return result
        if not torch.compiler.is_compiling() and now.explanation is not None:
            told, start = now.explanation.at(self.layer), time.perf_counter()
            result = self._edited(edits, rows, hidden_states, result)
            told.neuron_seconds = seconds_since(start)
            found = self._activations(edits, rows, hidden_states)
            told.neurons = {name: t.view(*now.explanation.shape, -1) for name, t in found.items()}
            return result
        return self._edited(edits, rows, hidden_states, result)

    def _edited(
        self, edits: EditStore, rows: tuple[tuple[str, ...], ...] | None, hidden_states: Tensor, result: Any
    ) -> Any:
        """The base's result with the neurons added."""
        if isinstance(result, tuple):  # experts: and what the router said
            out: Tensor = result[0]
            return (self._add(edits, rows, hidden_states.reshape(out.shape), out), *result[1:])
        return self._add(edits, rows, hidden_states, result)

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

    def _fuses(self, hidden_states: Tensor) -> bool:
        """Whether base and neurons are computed together: on a GPU, for few tokens, where nobody looks in between."""
        if self.dense is None or not _on_gpu(hidden_states) or hidden_states.shape[:-1].numel() > FUSED_TOKENS:
            return False
        if torch.is_grad_enabled() or any(m._forward_hooks or m._forward_pre_hooks for m in self._parts()):
            return False
        return forced_backend() in (None, "triton") and takes("patched_ffn", "triton", hidden_states)

    def _parts(self) -> Iterator[nn.Module]:
        return (part for module in self._originals for part in module.modules())

    def _add(
        self, edits: EditStore, rows: tuple[tuple[str, ...], ...] | None, hidden_states: Tensor, out: Tensor
    ) -> Tensor:
        if torch.compiler.is_compiling() or edits.selection is not None or torch.is_grad_enabled():
            return add_extra_neurons(hidden_states, out, edits.pool(rows), self.activation)
        # The shortest way that computes the same.
        pool, plan = edits.view(self.activation, rows)
        if plan.takes(hidden_states, out):
            return plan.run(hidden_states, out)
        return add_extra_neurons(hidden_states, out, pool, self.activation)


def _on_gpu(t: Tensor) -> bool:
    return t.is_cuda


class PassThrough(DropIn):
    """Stands for a module whose work another one does; returns its input."""

    @classmethod
    def from_module(cls, base: nn.Module) -> PassThrough:
        return cls._adopt(base)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states
