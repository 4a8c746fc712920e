"""The extra neurons of a layer's edits, changed in place without copying what stays."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import PatchError
from ..ops import EditPool
from ..ops._library import outside
from ..ops.patched_ffn import PreparedNeurons
from ._drop_in import Tables
from .routing import Routed, Rows


class LayerEdits(Tables):
    """The extra neurons of all edits of one layer as a ragged pool.

    `set` makes it anew. `with_edit`, `without` and `with_beta` give another store and leave this one as it is, though
    the two share tensors: neurons are only ever appended, behind those that an earlier store knows of, and room for
    them doubles when it is used up. So a change costs what it changes, and shapes stay what they are.

    All these are copies of what the edits hold. But the tensors of an edit that ask for gradients are being trained by
    somebody: from the first pass that sees it, they are what computes, in every pass as they then are.
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
        self.position: dict[str, int] = {}  # in the pool
        self.used = 0, 0  # neurons and edits of the pool, removed ones too
        self.given: dict[str, Any] = {}  # the edits as they came
        self._trained: _Trained | None = None
        self._views: dict[Any, PreparedNeurons] = {}
        self._of_router: tuple[list[str], dict[str, int], Tensor] | None = None

    @torch.no_grad()
    def set(self, edits: Mapping[str, Any], device: torch.device | None = None) -> None:
        """Replace all edits, given as id -> `EditLayer`, on a device; None: on that of the first."""
        self._views, self._trained, self.given = {}, None, dict(edits)
        self.ids, self.empty = list(edits), not edits
        self.position = {name: i for i, name in enumerate(edits)}
        layers = list(edits.values())
        if not layers:
            for name in self._buffers:
                self._buffers[name] = None
            self.used = 0, 0
            return
        gated = any(layer.up is not None for layer in layers)
        device = device or layers[0].keys.device
        layers = [_on(layer, device) for layer in layers]
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
        self._give(self.given)

    @torch.no_grad()
    def with_edit(self, name: str, layer: Any, device: torch.device | None = None) -> LayerEdits:
        """A new store that has this edit too, behind the others.

        Args:
            name: the edit's id, which the store does not have yet.
            layer: its `EditLayer`.
            device: where the neurons are kept if it is the first edit; None: where `layer` is.
        """
        new = self.copied()
        given = {**self.given, name: layer}
        layer = _on(layer, self.indptr.device if self.ids else device or layer.keys.device)
        if not self.ids or (layer.up is not None and self.up is None) or layer.keys.dtype != self.keys.dtype:
            new.set({**{each: self.layer(each) for each in self.ids}, name: layer})
            new._give(given, [name])
            return new
        neurons, edits = self.used
        n = layer.keys.shape[0]
        new._reserve(neurons + n, edits + 1)
        rows = slice(neurons, neurons + n)
        _write(new.keys, rows, layer.keys)
        _write(new.key_bias, rows, layer.key_bias)
        _write(new.values, rows, layer.values)
        if new.up is not None and new.up_bias is not None:
            _write(new.up, rows, _or(layer.up, torch.zeros_like(layer.keys)))
            _write(new.up_bias, rows, _or(layer.up_bias, torch.ones_like(layer.key_bias)))
        _write(new.zeta, edits, layer.zeta)
        _write(new.beta, edits, layer.beta)
        new.indptr = new.indptr.clone()  # whoever reads the other one at this moment sees it whole
        new.indptr[edits + 1 :] = neurons + n
        new.used = neurons + n, edits + 1
        new._name({**self.position, name: edits})
        new._give(given, [name])
        return new

    def without(self, name: str) -> LayerEdits:
        """A store without this edit. Where most of the pool is of removed edits, the others move together."""
        new = self.copied()
        left = {each: at for each, at in self.position.items() if each != name}
        if 2 * len(left) < self.used[1]:
            new.set({each: self.layer(each) for each in left})
        else:
            new._name(left)
        new._give({each: layer for each, layer in self.given.items() if each != name}, [])
        return new

    def with_beta(self, name: str, beta: float) -> LayerEdits:
        """A store in which this edit has another beta."""
        new = self.copied()
        new.beta = self.beta.clone()
        new.beta[self.position[name]] = beta
        changed = copy.copy(self.given[name])
        vars(changed)["beta"] = torch.full_like(changed.beta, beta)
        new._give({**self.given, name: changed}, [name])
        return new

    def layer(self, name: str) -> Any:
        """The edit's tensors, as `EditLayer` has them: views of the pool."""
        self._follow()
        at = self.position[name]
        rows = slice(int(self.indptr[at]), int(self.indptr[at + 1]))
        tables = {t: None if getattr(self, t) is None else getattr(self, t)[rows] for t in _PER_NEURON}
        return SimpleNamespace(**tables, zeta=self.zeta[at], beta=self.beta[at])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_views": {}, "_of_router": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerEdits:
        if self._trained is not None:
            raise PatchError(
                f"edits {list(self._trained.names)}: their tensors ask for gradients, and those of a copy of the model "
                "would be others, which nobody trains or averages: copy the model when they are trained "
                "(requires_grad_(False), then patch again)"
            )
        new = LayerEdits.__new__(LayerEdits)
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return new

    # --- edits that are being trained --------------------------------------------------------------------------------

    def _give(self, given: dict[str, Any], new: Sequence[str] | None = None) -> None:
        """Let these be the edits whose copies the pool has; somebody may train the `new` ones, None for all."""
        known = () if self._trained is None else self._trained.names
        names = given if new is None else [name for name in (*known, *new) if name in given]
        self.given = given
        self._note(tuple(name for name in names if _asks(given[name])))
        if self._trained is not None:
            self._trained.versions = self._versions(self._trained)

    def _versions(self, trained: _Trained) -> tuple[int, ...]:
        given = (t for name in trained.names for t in _tensors(self.given[name]))
        return tuple(0 if t.is_inference() else t._version for t in given)

    def _notice(self) -> None:
        """Look whose tensors ask for gradients. Once they did, the last step may come after they no longer do."""
        known = self._trained.names if self._trained is not None else ()
        names = tuple(name for name, layer in self.given.items() if name in known or _asks(layer))
        if names != known:
            self._note(names)

    def _note(self, names: tuple[str, ...]) -> None:
        """Let these be the edits whose tensors are trained."""
        self._trained = None
        if names:
            bounds = self.indptr.tolist()
            at = [self.position[name] for name in names]
            neurons = [n for i in at for n in range(bounds[i], bounds[i + 1])]
            places = [torch.tensor(i, dtype=torch.int64, device="cpu") for i in (neurons, at)]
            self._trained = _Trained(names, places[0], places[1])

    def _follow(self) -> None:
        """Let the copies be what the tensors that are trained are now."""
        trained = self._trained
        if trained is None or torch.compiler.is_compiling():
            return
        versions = self._versions(trained)
        if versions != trained.versions:
            with torch.no_grad():
                for name, t in self._joined(trained).items():
                    setattr(self, name, t)
            trained.versions = versions

    def _joined(self, trained: _Trained) -> dict[str, Tensor]:
        """The tables, with the tensors that are trained in their places: gradients reach them."""
        layers = [_on(self.given[name], self.indptr.device) for name in trained.names]
        neurons, edits = (i.to(self.indptr.device) for i in (trained.neurons, trained.edits))
        made = {"keys": [layer.keys for layer in layers], "key_bias": [layer.key_bias for layer in layers]}
        made["values"] = [layer.values for layer in layers]
        if self.up is not None:
            made["up"] = [_or(layer.up, torch.zeros_like(layer.keys)) for layer in layers]
            made["up_bias"] = [_or(layer.up_bias, torch.ones_like(layer.key_bias)) for layer in layers]
        wide = {"zeta": [layer.zeta for layer in layers], "beta": [layer.beta for layer in layers]}
        sources = {name: (neurons, torch.cat(parts)) for name, parts in made.items()}
        sources |= {name: (edits, torch.stack(parts)) for name, parts in wide.items()}
        tables = {name: getattr(self, name) for name in sources}
        return {name: tables[name].index_copy(0, at, new.to(tables[name].dtype)) for name, (at, new) in sources.items()}

    # --- what a pass computes with -----------------------------------------------------------------------------------

    def copied(self) -> LayerEdits:
        """Another store of the same tensors, which stays as it is when this one changes."""
        self._follow()
        new = LayerEdits.__new__(LayerEdits)
        new.__dict__.update(self.__dict__, _buffers=dict(self._buffers), _views={}, _plan=None, _of_router=None)
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

    def csr(self, rows: Sequence[Sequence[str]] | Routed | None) -> tuple[Tensor, Tensor]:
        """(row_indptr, row_edits) of rows that give the ids of their edits, ids of other layers ignored; None: all.
        Where a router has given them, nothing waits for the device.

        Raises ValueError for a row that names an edit more than once; so do `pool` and `view`.
        """
        if rows is None:
            return self.row_indptr, self.row_edits
        if isinstance(rows, Routed):
            at = self._numbered(rows.names)[rows.acts]  # the last one for -1
            indptr = F.pad((at >= 0).cumsum(0), (1, 0))
            behind = at.new_zeros(len(at) + 1, dtype=torch.int64)  # in its last place is what no row has
            return indptr, behind.scatter_(0, torch.where(at >= 0, indptr[:-1], len(at)), at)[:-1]
        check_distinct(rows)
        return csr([[self.position[i] for i in row if i in self.position] for row in rows], self.indptr.device)

    def _numbered(self, names: list[str]) -> Tensor:
        """int64 [n + 1]: where in the pool each of a router's edits is, -1 for one that is not, and at the end."""
        known = self._of_router
        if known is None or known[0] is not names or known[1] is not self.position:
            listed = [*(self.position.get(name, -1) for name in names), -1]
            known = names, self.position, torch.tensor(listed, dtype=torch.int64, device=self.indptr.device)
            self.__dict__["_of_router"] = known  # the plan stays
        return known[2]

    def pool(
        self, rows: Sequence[Sequence[str]] | Routed | None = None, *, selected: tuple[Tensor, Tensor] | None = None
    ) -> EditPool:
        """The neurons, and the edits of each row: by id, or as `csr` gives them; by default every row has all."""
        row_indptr, row_edits = selected or self.csr(rows)
        differentiable, compiling = torch.is_grad_enabled(), torch.compiler.is_compiling()
        if differentiable and not compiling:
            self._notice()
        self._follow()
        pool = EditPool(
            self.keys, self.key_bias, self.up, self.up_bias, self.values, self.zeta, self.beta, self.indptr,
            row_indptr, row_edits,
        )  # fmt: skip
        if self._trained is not None and (differentiable or compiling):
            return pool._replace(**self._joined(self._trained))
        return pool

    def view(
        self, activation: str, rows: Rows | Routed | None, tokens: tuple[int, ...] | None = None
    ) -> PreparedNeurons:
        """The neurons and edits of these rows, laid out for many calls; kept until the store changes.

        Args:
            activation: of the FFN.
            rows: see `pool`.
            tokens: how many of the tokens belong to each row; None: equal runs.
        """
        plan = self._laid_out(activation)
        view = self._views.get((rows, tokens))
        if view is None:
            if len(self._views) >= _VIEWS:
                self._views.clear()
            with outside():
                of_tokens = None if tokens is None else token_rows(tokens, self.indptr.device)
                view = self._views[rows, tokens] = plan.of_rows(*self.csr(rows), of_tokens)
        return view

    def of_tokens(self, activation: str, rows: Rows | Routed | None, row_of_each: Tensor) -> PreparedNeurons:
        """The same for tokens in any order, not kept.

        Args:
            activation: of the FFN.
            rows: see `pool`.
            row_of_each: int64 [M], the row of each token.
        """
        plan = self._laid_out(activation)
        if rows is not None and not isinstance(rows, Routed):  # copied to the device once, and not in each pass
            plan = self.view(activation, rows)
            return plan.of_rows(plan.pool.row_indptr, plan.pool.row_edits, row_of_each)
        with outside():
            return plan.of_rows(*self.csr(rows), row_of_each)

    def _laid_out(self, activation: str) -> PreparedNeurons:
        self._follow()
        if self._plan is None:  # an attribute has changed
            with outside():
                self._views, self._plan = {}, PreparedNeurons(self.pool(), activation)
        plan: PreparedNeurons = self._plan
        return plan


@dataclass(eq=False)
class _Trained:
    """Edits whose tensors are trained.

    Attributes:
        names: of the edits.
        neurons, edits: int64, their places in the pool.
        versions: of their tensors, that the copies are of.
    """

    names: tuple[str, ...]
    neurons: Tensor
    edits: Tensor
    versions: tuple[int, ...] | None = None


def _tensors(layer: Any) -> Iterator[Tensor]:
    return (t for t in vars(layer).values() if t is not None)


def _asks(layer: Any) -> bool:
    return any(t.requires_grad for t in _tensors(layer))


def _on(layer: Any, device: torch.device) -> Any:
    """An `EditLayer`, or the like, on a device."""
    return SimpleNamespace(**{name: None if t is None else t.to(device) for name, t in vars(layer).items()})


@functools.lru_cache(maxsize=16)
def token_rows(tokens: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 [sum of tokens]: the row of each token, where row r has tokens[r] of them, in this order.

    Kept, and not to be written to: a step asks for the same in each layer.
    """
    return torch.repeat_interleave(torch.tensor(tokens, dtype=torch.int64, device="cpu")).to(device)


_PER_NEURON = ("keys", "key_bias", "up", "up_bias", "values")


_TABLES = (*_PER_NEURON, "zeta", "beta", "indptr", "row_indptr", "row_edits")


_ROOM = 32  # neurons, and edits, that there is room for at least


_VIEWS = 64  # selections of rows that are kept


def _longer(t: Tensor, length: int) -> Tensor:
    """With zeros behind. [n, ...] -> [length, ...]."""
    return torch.cat([t, t.new_zeros(length - t.shape[0], *t.shape[1:], dtype=t.dtype)])


def _write(table: Tensor, at: slice | int, value: Tensor) -> None:
    """Fill rows that no pass reads yet; one whose backward is still to come may have saved the table."""
    table.data[at] = value


def _or(t: Tensor | None, default: Tensor) -> Tensor:
    return default if t is None else t


def check_distinct(rows: Sequence[Sequence[str]]) -> None:
    """Raises ValueError for a row that names an edit more than once."""
    for r, row in enumerate(rows):
        if len(set(row)) != len(row):
            raise ValueError(f"rows[{r}]: expected distinct edit ids, got {list(row)}")


def csr(rows: Sequence[Sequence[int]], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """(indptr int64 [R + 1], indices int64 [S]) of a list of lists."""
    indptr = [*itertools.accumulate(map(len, rows), initial=0)]
    start = len(indptr) + len(indptr) % 2  # at 16 bytes, for which Triton has compiled its code
    listed = [*indptr, *[0] * (start - len(indptr)), *itertools.chain(*rows)]
    both = torch.tensor(listed, dtype=torch.int64, device="cpu").to(device)
    return both[: len(indptr)], both[start:]
