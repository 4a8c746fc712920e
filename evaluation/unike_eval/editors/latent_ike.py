"""A memory that edits without neurons: the requests themselves are its entries."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn
from typing_extensions import override

from unike_kernels.backbones import find_decoder
from unike_kernels.config import Config
from unike_kernels.training import EncoderTraining, ScopeTraining, Triplet, build_memory, extend_memory
from unike_kernels.training.samples import Sample

from ..answers import answers
from ..suite import Suite
from .unike import UniKE

_FIRST = 8  # training requests of the memory before any edit


class LatentIKE(UniKE):
    """Latent-IKE with entries of the requests.

    Args:
        config: of the memory; its alpha is a number, as the encoders are not trained.
        layers: how many of the decoder's last ones have the memory.
        scope: how a scope is trained: with values="context" the entries of a request act in the rows that ask for it,
            and alone; None: all rows retrieve among the entries of all.
        seed: of the scope.
    """

    name = "Latent-IKE"
    learns = True

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        *,
        config: Config | None = None,
        layers: int = 4,
        scope: ScopeTraining | None = None,
        seed: int = 0,
    ) -> None:
        config = config or Config(alpha=1.0, norm="none")
        super().__init__(model, processor, config=config, intrinsic=False, scope=scope, seed=seed)
        if isinstance(self.config.alpha, str):
            raise ValueError(f"config.alpha: expected a number, got {self.config.alpha!r}")
        self._last, self._before = layers, self._memory

    @override
    def learn(self, suite: Suite) -> None:
        count = len(find_decoder(self.model).layers)
        made = build_memory(
            self.model,
            self.processor,
            [request.triplet for request in suite.train[:_FIRST]],
            config=replace(self.config, scope="all"),
            layers=range(count - self._last, count),
            training=EncoderTraining(steps=1),
            progress=False,
        )
        scope = None if self.scope is None else self._scope(suite).scope
        self._memory = self._before = replace(made.memory, config=self.config, scope=scope)

    @override
    def edit(self, request: Sample) -> None:
        (said,) = answers(self.model, self.processor, [request])
        triplet = Triplet(request.prompt, request.answer, said, request.image)
        assert self._memory is not None
        self._memory = extend_memory(self.model, self.processor, self._memory, [triplet], progress=False)

    @override
    def reset(self) -> None:
        self._memory = self._before
