"""What CUDA graphs read of a patched model: tables that stay where they are, into which later changes are written.

A replay reads the memory that it was captured with, and runs no Python. So a pass that is captured has row tables,
betas and ranges of its own, one set for each number of rows, which the pass before it has laid out. The `rows` block
that was entered last is written into them, and so are changes of edits, on the current stream. All else that a graph
reads, the memory above all, is kept for as long as the model is patched, and stays what it was.
"""

from __future__ import annotations

import threading
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import PatchError
from ..ops import EditPool
from ..ops.patched_ffn import PreparedNeurons
from .layer_edits import LayerEdits
from .routing import Rows

if TYPE_CHECKING:
    from .passes import Selection, Version

_ROOM = 8  # edits of a row that there is room for at least
_SHARED = ("keys", "key_bias", "up", "up_bias", "values", "zeta")  # with the store, which appends to them in place


class CapturedRows:
    """The edits of some rows in one layer, as graphs read them.

    Args:
        edits: of the layer.
        rows: the edits of each row; None: all of them in every row.
        pool: the neurons of these, and the edits of each row.

    Attributes:
        pool: the neurons, and the edits of each row.
        rows: that were written last.
        read: whether a graph reads it.
    """

    def __init__(self, edits: LayerEdits, rows: Rows | None, pool: EditPool) -> None:
        room = len(pool.row_edits) if rows is None else len(rows) * max(_ROOM, *map(len, rows), 0)
        self.pool = pool._replace(
            beta=pool.beta.clone(),
            indptr=pool.indptr.clone(),
            row_indptr=pool.row_indptr.clone(),
            row_edits=torch.zeros(room, dtype=torch.int64, device=pool.row_edits.device),
        )
        self.pool.row_edits[: len(pool.row_edits)] = pool.row_edits
        self._prepared: PreparedNeurons | None = None
        self._edits, self.rows, self.read = edits, rows, False

    def prepared(self, activation: str) -> PreparedNeurons:
        """Of an FFN with this activation."""
        if self._prepared is None:
            self._prepared = PreparedNeurons(self.pool, activation)
        return self._prepared

    def follows(self, edits: LayerEdits) -> bool:
        """Whether this store still has its neurons where they were."""
        return edits.empty or all(edits._buffers[name] is getattr(self.pool, name) for name in _SHARED)

    def holds(self, edits: LayerEdits, rows: Rows | None) -> bool:
        """Whether these were written last."""
        return edits is self._edits and rows == self.rows

    @torch.no_grad()
    def write(self, edits: LayerEdits, rows: Rows | None, pool: EditPool | None = None) -> None:
        """Let graphs compute with these, of which `follows` holds; `pool`: if it is known.

        Raises PatchError where there is no room.
        """
        if self.holds(edits, rows):
            return
        mine, named = self.pool, sum(map(len, rows or ()))
        if edits.empty:
            mine.row_indptr.zero_()
        elif rows is not None and named > len(mine.row_edits):
            raise PatchError(
                f"rows: a CUDA graph was captured with room for {len(mine.row_edits)} edits in {len(rows)} rows, not "
                f"for {named}: capture it anew in a uk.rows(...) block with that many"
            )
        else:
            new = edits.pool(rows) if pool is None else pool
            mine.row_edits[: len(new.row_edits)].copy_(new.row_edits)
            for name in ("row_indptr", "beta", "indptr"):
                getattr(mine, name).copy_(getattr(new, name))
        self._edits, self.rows = edits, rows


class Captured:
    """What the CUDA graphs of a model read."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._rows: dict[tuple[int, int], CapturedRows] = {}  # by layer and number of rows, 0 for all
        self._ranges: dict[int, Tensor] = {}  # by number of rows
        self._kept: list[tuple[Version, Selection]] = []  # what graphs read and Python would free
        self._lost: list[object] = []  # the same of graphs that no longer see changes

    def keep(self, version: Version, selection: Selection) -> None:
        """A graph reads these."""
        with self._lock:
            if not any(version is kept and selection is chosen for kept, chosen in self._kept):
                self._kept.append((version, selection))

    def lay_out(self, layer: int, edits: LayerEdits, rows: Rows | None, pool: EditPool) -> CapturedRows:
        """What a pass like this one would read if it were captured.

        Args:
            layer: its index.
            edits: of it.
            rows: see `CapturedRows`.
            pool: see `CapturedRows`.
        """
        key = layer, 0 if rows is None else len(rows)
        with self._lock:
            known = self._rows.get(key)
            if known is None or not (known.read or known.follows(edits)):
                known = self._rows[key] = CapturedRows(edits, rows, pool)
            elif not known.read:
                known.write(edits, rows, pool)
            return known

    def read(self, layer: int, edits: LayerEdits, rows: Rows | None) -> CapturedRows:
        """What a pass reads that is captured. Raises PatchError where none before has laid it out."""
        with self._lock:
            known = self._rows.get((layer, 0 if rows is None else len(rows)))
            if known is None or not known.holds(edits, rows):
                raise _never_run()
            known.read = True
            return known

    def lay_out_ranges(self, ranges: Tensor) -> None:
        """The same for the ranges of each row, int64 [R, 2]."""
        with self._lock:
            if len(ranges) not in self._ranges:
                self._ranges[len(ranges)] = ranges.clone()

    def read_ranges(self, ranges: Tensor) -> Tensor:
        """Those that graphs read in the place of these."""
        with self._lock:
            if len(ranges) not in self._ranges:
                raise _never_run()
            return self._ranges[len(ranges)]

    def select(self, selection: Selection, version: Version) -> None:
        """Write what the `rows` block selects that was entered last.

        Raises PatchError where a graph of as many rows was captured without edits or ranges of their own.
        """
        with self._lock:
            for _, captured in self._kept:
                if captured.rows == selection.rows is not None:
                    _check_same_kind(captured, selection)
            for (layer, count), known in self._rows.items():
                edits = version.edits.get(layer)
                same = known.read and selection.edits is not None and count == len(selection.edits)
                if same and edits is not None and known.follows(edits):
                    known.write(edits, selection.edits)
            if selection.rows in self._ranges:
                own, ranges = self._ranges[selection.rows], selection.memory_ranges
                own.fill_(-1) if ranges is None else own.copy_(ranges)

    def follow(self, version: Version) -> None:
        """Write what a new version changes; warn where that cannot be, and keep what graphs go on reading."""
        with self._lock:
            lost: list[object] = [pair for pair in self._kept if not _same_elsewhere(pair[0], version)]
            for key, known in list(self._rows.items()):
                edits = version.edits.get(key[0])
                if edits is not None and known.follows(edits):
                    known.write(edits, known.rows)
                else:
                    del self._rows[key]
                    lost += [known] if known.read else []
            if lost:
                self._kept = [pair for pair in self._kept if pair not in lost]
                self._lost += lost
                warnings.warn(
                    "CUDA graphs of this model go on with the memory, the scope or the edits that they were captured "
                    "with: of these, only edits without a scope can change, as far as there is room; capture them anew",
                    stacklevel=2,
                )


def _check_same_kind(captured: Selection, selection: Selection) -> None:
    if (captured.edits is None) != (selection.edits is None):
        kind = "without edits=" if captured.edits is None else "with edits="
    elif captured.memory_ranges is None and selection.memory_ranges is not None:
        kind = "without memory="
    else:
        return
    raise PatchError(
        f"rows: a CUDA graph of {captured.rows} rows was captured in a uk.rows(...) block {kind}, and would not see "
        "what this block selects: capture it in one like this"
    )


def _same_elsewhere(one: Version, other: Version) -> bool:
    """Whether they differ in their edits alone, and these without a router."""
    return one.memories is other.memories and one.router is other.router


def _never_run() -> PatchError:
    return PatchError(
        "a CUDA graph is captured of a pass that was never run, and its tables would be laid out inside of the graph: "
        "run it once in the same uk.rows(...) block first"
    )
