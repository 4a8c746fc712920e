"""What lies below the edited layers computes the same in every step of training: once for each batch, then replayed.

A pass runs as usual, embeddings, masks and positions included; only the modules that it calls before the first edited
layer (an image tower, the embedding, the layers below) return what they returned in the batch's first pass. So a
replayed pass is the whole pass bit for bit, whatever the model.

Batches that are put together from rows of others are replayed from the recordings of these (`with_copy`): as the rows
of a pass do not depend on each other, up to the rounding of matrix products of another size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

_BUDGET = 1 << 30  # bytes that recordings may take together; a batch beyond it runs whole


class _Entered(Exception):  # noqa: N818 (not an error)
    """The pass has come to the first edited layer."""


class Recording:
    """Of one batch: what the modules below returned in its first pass.

    Attributes:
        beside: those that are no layers, in the order of their calls, each with its output.
        states: the output of the last layer below.
        complete: whether there was such a pass.
    """

    def __init__(self) -> None:
        self.beside: list[tuple[nn.Module, Any]] = []
        self.states: Any = None
        self.complete = False

    @property
    def size(self) -> int:
        """Bytes that it keeps."""
        kept = [t for t in tree_leaves([self.states, [out for _, out in self.beside]]) if isinstance(t, Tensor)]
        return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in kept}.values())

    def with_copy(self, copies: Recording, number: int, of: int) -> Recording | None:
        """The recording of this batch's rows and, behind them, of a copy of them that another recording is of.

        Args:
            copies: of a batch of so many copies of these rows (their tokens may differ) behind one another.
            number: of the copy, from 0.
            of: copies, two or more: what grows with them is of rows, along the dimension that does.

        Returns:
            None: what the modules returned does not tell its rows.
        """
        own, told = tree_flatten((self.states, [out for _, out in self.beside]))
        other, tells = tree_flatten((copies.states, [out for _, out in copies.beside]))
        modules = [module for module, _ in self.beside]
        if told != tells or modules != [module for module, _ in copies.beside]:
            return None
        found, leaves = Recording(), [_with_copy(one, many, number, of) for one, many in zip(own, other, strict=True)]
        if any(leaf is _UNTOLD for leaf in leaves):
            return None
        found.states, beside = tree_unflatten(leaves, told)
        found.beside = list(zip(modules, beside, strict=True))
        found.complete = self.complete and copies.complete
        return found


_UNTOLD = object()


def _with_copy(own: Any, copies: Any, number: int, of: int) -> Any:
    if not isinstance(own, Tensor) or not isinstance(copies, Tensor):
        plain = isinstance(own, (bool, int, float, str, type(None)))
        return own if plain and not isinstance(copies, Tensor) and own == copies else _UNTOLD
    if own.dim() == copies.dim():
        grown = [dim for dim, (n, m) in enumerate(zip(own.shape, copies.shape, strict=True)) if n != m]
        if len(grown) == 1 and copies.shape[grown[0]] == of * own.shape[grown[0]]:
            return torch.cat([own, copies.chunk(of, grown[0])[number]], grown[0])
    return own if torch.equal(own, copies) else _UNTOLD  # such as angles of positions


class Replay:
    """Replays what is below a layer, within `on`; there, nothing below may change or need a gradient.

    Args:
        model: in eval mode.
        layers: of its decoder, in order.
        first: index of the lowest one that runs in each pass.
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module], first: int) -> None:
        # One that stands below and above too is not below, nor is what comes after it.
        first = min(i for i, layer in enumerate(layers) if layer in layers[first:])
        self._below, self._entry = layers[:first], layers[first]
        path = [m for m in model.modules() if m is not self._entry and any(c is self._entry for c in m.modules())]
        inside = {*path, *layers}
        self._beside = list(dict.fromkeys(c for parent in path for c in parent.children() if c not in inside))
        self._recordings: WeakSet[Recording] = WeakSet()
        self._recording: Recording | None = None  # of the pass that runs below the entry; None: it runs whole
        self._played = 0  # of its calls beside the layers
        self._ends = False  # whether a pass ends at the entry

    @contextmanager
    def on(self) -> Iterator[None]:
        """Within the block passes can be replayed; see `of`."""
        replaced = [*self._beside, *self._below]
        own = [module.__dict__.get("forward") for module in replaced]
        handle = self._entry.register_forward_pre_hook(lambda *_: self._stop())
        try:
            for module in replaced:
                module.forward = self._replaying(module, module.forward)
            yield
        finally:
            handle.remove()
            for module, forward in zip(replaced, own, strict=True):
                module.__dict__.pop("forward", None)
                if forward is not None:
                    module.forward = forward

    @contextmanager
    def of(self, recording: Recording) -> Iterator[None]:
        """The one pass within the block is recorded, or replayed; it is always of the same batch."""
        if not recording.complete and sum(r.size for r in self._recordings) >= _BUDGET:
            yield
            return
        self._recording, self._played = recording, 0
        self._recordings.add(recording)
        try:
            yield
        finally:
            if not recording.complete:  # stopped before the entry: it must not be taken for a whole one
                recording.beside.clear()
            self._recording = None

    @torch.no_grad()
    def record(self, run: Callable[[], object]) -> Recording:
        """Of the pass that `run` makes, which ends at the entry; not complete if it is beyond the budget."""
        recording = Recording()
        self._ends = True
        try:
            with self.of(recording):
                run()
        except _Entered:
            pass
        finally:
            self._ends = False
        return recording

    def _stop(self) -> None:
        """From here on the pass runs as usual, or ends."""
        if self._recording is not None:
            self._recording.complete = True
        self._recording = None
        if self._ends:
            raise _Entered

    def _replaying(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        layer = any(module is each for each in self._below)

        def run(*args: Any, **kwargs: Any) -> Any:
            recording = self._recording
            if recording is None:
                return forward(*args, **kwargs)
            if recording.complete:
                return self._play(recording, module, layer)
            self._recording = None  # what this module calls is a part of it
            with torch.no_grad():
                out = forward(*args, **kwargs)
            self._recording = recording
            if layer:
                recording.states = _copied(out)
            else:
                recording.beside.append((module, _copied(out)))
            return out

        return run

    def _play(self, recording: Recording, module: nn.Module, layer: bool) -> Any:
        if layer:  # each hands on what the last one returned
            return _copied(recording.states)
        played, self._played = self._played, self._played + 1
        if played == len(recording.beside) or recording.beside[played][0] is not module:
            raise RuntimeError(f"replay: call {played} of {type(module).__name__} is none of the recorded pass")
        return _copied(recording.beside[played][1])


def _copied(out: Any) -> Any:
    """Of its own: who gets it may write to its tensors, and put other ones into it."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else copy.deepcopy(leaf), out)
