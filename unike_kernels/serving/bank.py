"""`EditBank`: the edits of many requests at once, for engines that call the operators themselves."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from ..artifacts.compatibility import ModelDescription, check_compatibility
from ..artifacts.edit import Edit
from ..errors import PatchError
from ..nn import LayerEdits
from ..nn.layer_edits import check_distinct, token_rows
from ..ops import ACTIVATIONS, EditPool
from ..ops.patched_ffn import PreparedNeurons


class EditBank:
    """Edits by id, in one ragged pool for each layer; a batch's rows choose theirs.

    An edit is added in the time that copying it takes, and removed or replaced without touching the others. Tensors of
    a pool are kept until there is no room left; then they are copied into larger ones, and where most of a pool belongs
    to edits that were removed, the others move together. A pool is what the bank holds when it is asked for, and later
    changes leave it as it is: a batch at work goes on with its own.

    Args:
        layers: decoder layers that edits may have neurons in.
        hidden_size: d.
        activation: of the FFNs; see `ops.patched_ffn`.
        own: those of the layers whose neurons it keeps, where a pipeline's other stages compute the rest; None: all.
        device: where the pools are.

    Raises:
        ValueError: no layers, a width below 1, an unknown activation.
    """

    def __init__(
        self,
        layers: Sequence[int],
        hidden_size: int,
        activation: str,
        *,
        own: Collection[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if not layers or len(set(layers)) != len(layers):
            raise ValueError(f"layers: expected distinct layers, at least one, got {list(layers)}")
        if hidden_size < 1:
            raise ValueError(f"hidden_size: expected at least 1, got {hidden_size}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}; got {activation!r}")
        self.hidden_size, self.activation, self.device = hidden_size, activation, torch.device(device)
        self._own = frozenset(layers if own is None else own)
        self._stores = {layer: LayerEdits() for layer in layers}
        self._edits: dict[str, Edit] = {}

    def __len__(self) -> int:
        return len(self._edits)

    def __contains__(self, id: object) -> bool:
        return id in self._edits

    def __iter__(self) -> Iterator[str]:
        return iter(self._edits)

    @property
    def nbytes(self) -> int:
        """Bytes of the pools, room for edits to come and what removed ones left included."""
        return sum(t.nbytes for store in self._stores.values() for t in store.buffers())

    @property
    def layers(self) -> list[int]:
        """Those whose neurons it keeps."""
        return sorted(self._own & self._stores.keys())

    def add(self, edit: Edit) -> None:
        """Hold an edit.

        Raises:
            PatchError: there is an edit of this id.
            MismatchError: another hidden size or activation, or layers that the bank does not have.
        """
        if edit.id in self._edits:
            raise PatchError(f"edit: {edit.id!r} is in the bank already; replace it, or remove it first")
        self.check(edit)
        self._set(edit)

    def replace(self, edit: Edit) -> None:
        """Hold an edit in the place of the one of its id. Raises as `add` does, PatchError if there is none."""
        self._require(edit.id)
        self.check(edit)
        self.remove(edit.id)
        self._set(edit)

    def remove(self, id: str) -> None:
        """Let an edit go. Raises PatchError if there is none of this id."""
        for layer in self._own & self._require(id).layers.keys():
            self._stores[layer] = self._stores[layer].without(id)
        del self._edits[id]

    def has_neurons(self, layer: int) -> bool:
        """Whether an edit of the bank has any in this layer."""
        return not self._stores[layer].empty

    def used(self, layer: int) -> tuple[int, int]:
        """Neurons and edits of a layer's pool, removed ones that still take room included; behind them it is empty."""
        return self._stores[layer].used

    def pool(self, layer: int, rows: Sequence[Sequence[str]]) -> EditPool:
        """A layer's neurons, and those that each row of a batch selects, as `ops.patched_ffn` takes them.

        Args:
            layer: one of the bank's.
            rows: for each row the ids of its edits in their order, [] for none.

        Raises:
            ValueError: another layer, no rows, or a row that names an edit more than once.
            PatchError: an unknown id; the message names the row.
        """
        return self.prepared(layer, rows).pool

    def apply(self, layer: int, x: Tensor, base: Tensor, rows: Sequence[Sequence[str]]) -> Tensor:
        """base + the neurons of each row's edits on x (Eq. 3 and 6): [..., d], the tokens of the rows in equal runs.

        Args:
            layer: one of the bank's.
            x: [..., d], the FFN's input.
            base: [..., d], the FFN's output.
            rows: see `pool`.

        Raises ValueError and PatchError as `pool` does, ValueError for shapes that do not fit.
        """
        tokens = x.shape[:-1].numel()
        if x.shape != base.shape or x.shape[-1] != self.hidden_size or (rows and tokens % len(rows)):
            raise ValueError(
                f"x, base: expected two of one shape [..., {self.hidden_size}], the tokens split evenly among "
                f"{len(rows)} rows; got {list(x.shape)} and {list(base.shape)}"
            )
        return self.prepared(layer, rows)(x, base)

    def prepared(
        self, layer: int, rows: Sequence[Sequence[str]], tokens: Sequence[int] | None = None
    ) -> PreparedNeurons:
        """The neurons that `apply` calls, laid out once and kept for the same batch until the bank changes.

        Args:
            layer: one of the bank's.
            rows: for each row the ids of its edits in their order, [] for none.
            tokens: how many of the batch's tokens belong to each row, in the order of the rows; None: as many to each.

        Raises as `pool` does.
        """
        if layer not in self._stores:
            raise ValueError(f"layer: expected one of {sorted(self._stores)}, got {layer}")
        if not rows:
            raise ValueError("rows: expected at least one row")
        for r, row in enumerate(rows):
            if unknown := [id for id in row if id not in self._edits]:
                raise PatchError(f"rows[{r}]: unknown edit ids {unknown}")
        store, counts = self._stores[layer], None if tokens is None else tuple(tokens)
        if not store.empty:
            return store.view(self.activation, tuple(map(tuple, rows)), counts)
        check_distinct(rows)
        pool = self._nothing(len(rows))
        return PreparedNeurons(
            pool if counts is None else pool._replace(token_rows=token_rows(counts, self.device)), self.activation
        )

    def _require(self, id: str) -> Edit:
        if id not in self._edits:
            raise PatchError(f"id: {id!r} is no edit of the bank")
        return self._edits[id]

    def check(self, edit: Edit) -> None:
        """Raises MismatchError for another hidden size or activation, or layers that the bank does not have."""
        check_compatibility(edit, self.description)

    @property
    def description(self) -> ModelDescription:
        """What an edit must fit."""
        return ModelDescription(self.hidden_size, lambda _: self.activation, editable=self._stores.keys(), what="bank")

    def _set(self, edit: Edit) -> None:
        for layer in self._own & edit.layers.keys():
            neurons = edit.layers[layer]
            self._stores[layer] = self._stores[layer].with_edit(edit.id, neurons.to(self.device))
        self._edits[edit.id] = edit

    def _nothing(self, rows: int) -> EditPool:
        d, device = self.hidden_size, self.device
        none = torch.zeros(0, dtype=torch.float32, device=device)
        wide = none.reshape(0, d)
        starts = torch.zeros(rows + 1, dtype=torch.int64, device=device)
        return EditPool(wide, none, None, None, wide, wide, none, starts[:1], starts, starts[:0])
