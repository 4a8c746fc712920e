"""SERAC (Mitchell et al., ICML 2022): edits are kept aside, a classifier says which inputs one of them concerns, and a
second model answers those."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from unike_kernels.backbones import find_decoder
from unike_kernels.training.samples import Sample, batches, evaluating, forward

from ..metrics import Observation, observe
from ..suite import Request, Suite
from .base import Editor, answer_loss

_WIDTH = 64


class SERAC(Editor):
    """Scope classifier and counterfactual model.

    The classifier compares what an encoder makes of the base model's last states at the ends of both prompts. The
    counterfactual model is a copy of the base model, trained to answer in the light of the edit, which is written
    before the prompt.

    Args:
        lr, steps: of the classifier's training.
        counterfactual_lr, counterfactual_steps: of the counterfactual model's.
        batch_size: requests in a step.
        seed: of the encoder and the order of requests.
    """

    name = "SERAC"
    learns = True

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        *,
        lr: float = 1e-3,
        steps: int = 600,
        counterfactual_lr: float = 1e-4,
        counterfactual_steps: int = 300,
        batch_size: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__(model, processor)
        self.lr, self.steps, self.batch_size, self.seed = lr, steps, batch_size, seed
        self.counterfactual_lr, self.counterfactual_steps = counterfactual_lr, counterfactual_steps
        self.counterfactual = copy.deepcopy(model)
        d = find_decoder(model).hidden_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = nn.Sequential(nn.Linear(d, 2 * _WIDTH), nn.GELU(), nn.Linear(2 * _WIDTH, _WIDTH))
        self.sharpness, self.threshold = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(0.0))
        self._edits: list[Sample] = []

    @override
    def learn(self, suite: Suite) -> None:
        with evaluating(self.model):
            self._fit_classifier(suite)
            self._fit_counterfactual(suite)

    @override
    def edit(self, request: Sample) -> None:
        self._edits.append(request)

    @override
    def reset(self) -> None:
        self._edits.clear()

    @override
    @torch.no_grad()
    def observe(self, samples: Sequence[Sample]) -> list[Observation]:
        if not self._edits:
            return super().observe(samples)
        with evaluating(self.model):
            scores = self._scores(self._states(samples), self._states(self._edits))
        best, which = scores.max(1)
        found = super().observe(samples)
        concerned = [i for i in range(len(samples)) if best[i] > 0]
        asked = [_in_the_light_of(self._edits[int(which[i])], samples[i]) for i in concerned]
        for i, seen in zip(concerned, observe(self.counterfactual, self.processor, asked), strict=True):
            n = len(found[i].best)
            found[i] = replace(seen, best=seen.best[-n:], answer=seen.answer[-n:])
        return found

    def _scores(self, states: Tensor, edits: Tensor) -> Tensor:
        """Logits [inputs, edits] that an edit concerns an input."""
        x, e = self.encoder(states), self.encoder(edits)
        return self.threshold - self.sharpness * torch.cdist(x, e).square()

    @torch.no_grad()
    def _states(self, samples: Sequence[Sample]) -> Tensor:
        """The last layer's output at the end of each prompt, [N, d]."""
        seen: list[Tensor] = []
        layer = find_decoder(self.model).layers[-1].module
        handle = layer.register_forward_hook(
            lambda _, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        found = torch.empty(len(samples), find_decoder(self.model).hidden_size)
        try:
            for group in batches(samples, 64):
                batch = self.encode([replace(samples[i], answer="") for i in group])
                forward(self.model, batch.inputs, torch.tensor([0]))  # logits of one place: none are wanted
                found[group] = seen.pop()[torch.arange(len(group)), batch.ends].float().cpu()
        finally:
            handle.remove()
        return F.normalize(found, dim=-1) * found.shape[1] ** 0.5

    def _fit_classifier(self, suite: Suite) -> None:
        """On edits and inputs that they concern, against unrelated inputs and those of other edits."""
        rng = Random(self.seed)
        edits = self._states([r.case.request for r in suite.train])
        inside = [self._states([r.case.request, *r.case.rephrasings, *r.case.images]) for r in suite.train]
        outside = [self._states([*r.case.text_locality, *r.case.image_locality]) for r in suite.train]
        answers = [(r.case.request.prompt, r.case.request.answer) for r in suite.train]
        trained = [*self.encoder.parameters(), self.sharpness, self.threshold]
        optimizer = torch.optim.Adam(trained, self.lr)
        for _ in range(self.steps):
            chosen = rng.sample(range(len(suite.train)), min(self.batch_size, len(suite.train)))
            inputs = torch.stack([inside[i][rng.randrange(len(inside[i]))] for i in chosen])
            others = torch.stack([outside[i][rng.randrange(len(outside[i]))] for i in chosen])
            scores = self._scores(torch.cat([inputs, others]), edits[chosen])
            # Another request with the same question and answer concerns the input just as well.
            same = torch.tensor([[answers[i] == answers[j] for j in chosen] for i in chosen])
            wanted = torch.cat([same, torch.zeros_like(same)]).float()
            loss = F.binary_cross_entropy_with_logits(scores, wanted, pos_weight=torch.tensor(float(len(chosen))))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def _fit_counterfactual(self, suite: Suite) -> None:
        rng = Random(self.seed)
        self.counterfactual.requires_grad_(True)
        optimizer = torch.optim.Adam(self.counterfactual.parameters(), self.counterfactual_lr)
        for _ in range(self.counterfactual_steps):
            chosen: list[Request] = rng.sample(list(suite.train), min(self.batch_size, len(suite.train)))
            concerned = [rng.choice([r.case.request, *r.case.rephrasings, *r.case.images]) for r in chosen]
            batch = [_in_the_light_of(r.case.request, sample) for r, sample in zip(chosen, concerned, strict=True)]
            loss = answer_loss(self.counterfactual, self.targets(batch))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def _in_the_light_of(edit: Sample, sample: Sample) -> Sample:
    return replace(sample, prompt=f"{edit.prompt} {edit.answer}\n{sample.prompt}")
