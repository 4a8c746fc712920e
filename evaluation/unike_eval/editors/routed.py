"""What GRACE and WISE share: a prompt's own states decide, once, whether an edit acts on it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from typing_extensions import override

from unike_kernels.backbones import find_decoder
from unike_kernels.training.samples import Batch, Sample

from ..metrics import Observation
from .base import Editor


class RoutedEditor(Editor):
    """A system that changes the output of a module where a prompt is about an edit.

    The first pass over a batch sees its prompts, with answers behind them or without; what follows are single tokens of
    an answer, over a cache.
    """

    _batch: Batch | None = None
    _first = False

    @override
    @contextmanager
    def within(self, batch: Batch) -> Iterator[None]:
        self._batch, self._first = batch, True
        try:
            yield
        finally:
            self._batch = None

    @abstractmethod
    def changed(self, inputs: Tensor, out: Tensor) -> Tensor:
        """What the module gives in place of `out`, [B, T, d], for its inputs [B, T, ...]."""

    @abstractmethod
    def modules(self) -> tuple[nn.Module, nn.Module]:
        """The module whose inputs decide, and the one whose output is changed; they may be the same."""

    @override
    def observe(self, samples: Sequence[Sample]) -> list[Observation]:
        with self.hooked():
            return super().observe(samples)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Within the block edits act."""
        seen: list[Tensor] = []

        def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[:] = args[:1]

        def after(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
            if self._batch is None:
                return None
            rows = len(self._batch.ends)  # some models call an FFN with all rows flattened
            changed = self.changed(seen[0].view(rows, -1, seen[0].shape[-1]), out.view(rows, -1, out.shape[-1]))
            self._first = False
            return changed.view_as(out)

        first, last = self.modules()
        handles = [first.register_forward_pre_hook(before), last.register_forward_hook(after)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def late_layer(model: nn.Module) -> int:
    """Where these systems edit a LLaMA of 32 layers, its 28th, in proportion."""
    count = len(find_decoder(model).layers)
    return count * 27 // 32
