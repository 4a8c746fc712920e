"""Extra neurons and IKE's demonstrations side by side: the combination that the paper's ablation compares with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from typing_extensions import override

from unike_kernels.training.samples import Sample

from ..metrics import Observation
from ..suite import Suite
from .base import Editor
from .ike import IKE
from .unike import UniKE


class IntrinsicIKE(Editor):
    """UniKE's neurons without its memory, and the edits written into the prompt.

    Args:
        k: demonstrations, see `IKE`.
        intrinsic: settings of `UniKE`.
    """

    name = "Intrin + IKE"
    learns = True

    def __init__(self, model: nn.Module, processor: Any, *, k: int = 8, **intrinsic: Any) -> None:
        super().__init__(model, processor)
        self._neurons, self._prompts = UniKE(model, processor, latent=False, **intrinsic), IKE(model, processor, k=k)

    @override
    def learn(self, suite: Suite) -> None:
        self._neurons.fit(suite)
        self._prompts.fit(suite)

    @override
    def prepare(self, requests: Sequence[Sample]) -> None:
        self._neurons.prepare(requests)

    @override
    def edit(self, request: Sample) -> None:
        self._neurons.edit(request)
        self._prompts.edit(request)

    @override
    def reset(self) -> None:
        self._neurons.reset()
        self._prompts.reset()

    @override
    def observe(self, samples: Sequence[Sample]) -> list[Observation]:
        with self._neurons.in_force():
            return self._prompts.observe(samples)
