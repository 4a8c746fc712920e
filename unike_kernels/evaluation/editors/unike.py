"""UniKE: this library's own edits, with a memory of the training requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ...config import Config
from ...editing import EditTraining, EncoderTraining, build_memory, train_edit
from ...editing.samples import Sample
from ...edits import Edit
from ...memory import MemoryBank
from ...patching import patched
from ..metrics import Observation
from ..suite import Suite
from .base import Editor


class UniKE(Editor):
    """Extra neurons, a memory, and zeta' (paper, section 3).

    Args:
        config: the semantics.
        encoders, training: how the memory's encoders and an edit are trained.
        intrinsic: train neurons for each edit; False: the memory alone.
        latent: shift the attention by the memory; False: neurons alone, zeta' as ever.
    """

    name = "UniKE"

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        *,
        config: Config | None = None,
        encoders: EncoderTraining | None = None,
        training: EditTraining | None = None,
        intrinsic: bool = True,
        latent: bool = True,
    ) -> None:
        super().__init__(model, processor)
        self.config, self.encoders, self.training = config or Config(), encoders, training or EditTraining()
        self.intrinsic, self.latent = intrinsic, latent
        self._edits: list[Edit] = []
        self._preserve: Sequence[Sample] = ()
        self._memory: MemoryBank | None = None
        self._zeta: dict[int, Tensor] | None = None

    def fit(self, suite: Suite) -> None:
        triplets = [r.triplet for r in suite.train]
        made = build_memory(
            self.model, self.processor, triplets, config=self.config, training=self.encoders, progress=False
        )
        self._preserve = suite.preserve
        self._memory = made.memory if self.latent else None
        self._zeta = None if self.latent else {i: space.zeta_prime for i, space in made.spaces.items()}

    def edit(self, request: Sample) -> None:
        if not self.intrinsic:
            return
        result = train_edit(
            self.model,
            self.processor,
            request,
            self._memory,
            id=f"edit-{len(self._edits)}",
            previous=self._edits,
            preserve=self._preserve,
            config=self.config,
            zeta=self._zeta,
            training=replace(self.training, seed=self.training.seed + len(self._edits)),
            progress=False,
        )
        self._edits.append(result.edit)

    def reset(self) -> None:
        self._edits.clear()

    def observe(self, samples: Sequence[Sample]) -> list[Observation]:
        with patched(self.model, self._edits, self._memory, config=self.config):
            return super().observe(samples)
