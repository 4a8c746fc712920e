"""IKE (Zheng et al., EMNLP 2023): the new fact and its neighbours in the training set, written into the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from unike_kernels.retrieval.exact import CosineIndex
from unike_kernels.training.samples import Sample

from ..metrics import Observation, observe
from ..suite import Suite
from .base import Editor


class IKE(Editor):
    """In-context editing.

    A demonstration is a line "prompt answer". Those of the k training requests whose prompts are nearest to the one
    that is asked come first, then the edits in force.

    Args:
        k: demonstrations (the paper's 32).
    """

    name = "IKE"
    learns = True

    def __init__(self, model: nn.Module, processor: Any, *, k: int = 8) -> None:
        super().__init__(model, processor)
        self.k = k
        self._lines: list[str] = []
        self._edits: list[str] = []

    @override
    def learn(self, suite: Suite) -> None:
        samples = [r.case.request for r in suite.train]
        self._lines = [_line(s) for s in samples]
        self._index = CosineIndex(torch.stack([self._embed(s.prompt) for s in samples]))

    @override
    def edit(self, request: Sample) -> None:
        self._edits.append(_line(request))

    @override
    def reset(self) -> None:
        self._edits.clear()

    def observe(self, samples: Sequence[Sample]) -> list[Observation]:
        """Positions of the demonstrations are left out: nobody asks for them."""
        if not self._edits:
            return super().observe(samples)
        seen = observe(self.model, self.processor, [self._with_demonstrations(s) for s in samples], batch_size=8)
        plain = [self.encode([s]).inputs["input_ids"].shape[1] - 1 for s in samples]
        return [replace(o, best=o.best[-n:], answer=o.answer[-n:]) for o, n in zip(seen, plain, strict=True)]

    def _with_demonstrations(self, sample: Sample) -> Sample:
        _, ids = self._index.search(self._embed(sample.prompt).unsqueeze(0), self.k)
        nearest_last = [self._lines[i] for i in ids[0].flip(0).tolist() if i >= 0]
        return replace(sample, prompt="\n".join([*nearest_last, *self._edits, sample.prompt]))

    def _embed(self, prompt: str) -> Tensor:
        """The mean of the prompt's token embeddings, [d]."""
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        table = self.model.get_input_embeddings()  # type: ignore[operator]
        ids = tokenizer(prompt, return_tensors="pt").input_ids[0]
        return table(ids.to(table.weight.device)).detach().float().mean(0).cpu()


def _line(sample: Sample) -> str:
    return f"{sample.prompt} {sample.answer}"
