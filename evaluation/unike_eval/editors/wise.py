"""WISE (Wang et al., NeurIPS 2024): a side memory beside an FFN's last matrix, and an activation that routes to it."""

from __future__ import annotations

from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from unike_kernels.training.samples import Batch, Sample, evaluating

from ..suite import Suite
from .base import answer_loss, down_projection, only
from .routed import RoutedEditor, late_layer


class WISE(RoutedEditor):
    """The side memory W' starts as the matrix W. A prompt is routed to it by |A(x) (W' - W)|, the mean over its tokens.

    Edits are trained into shards: random masks of W', a new one after `shard` edits, which are merged by their elected
    signs (TIES). An edit's loss is its answer's and that of the routing activation of Eq. 6, whose three margins are
    the paper's in proportion: irrelevant prompts below half of `margin`, the edit's above twice, and that far apart.

    Args:
        lr: of gradient descent.
        steps: at most.
        stop_loss: of the answer, in nats a token; the routing loss must be zero as well.
        margin: gamma; the paper's 10 is for LLaMA's activations.
        density: share of W' that a mask leaves to a shard (the paper's rho, 0.2).
        shard: edits in one.
        slack: a prompt is routed above this share of the smallest activation that an edit had.
        layer: see `GRACE`.
        seed: of masks and of which questions are irrelevant.
    """

    name = "WISE"

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        *,
        lr: float = 1.0,
        steps: int = 70,
        stop_loss: float = 0.05,
        margin: float = 10.0,
        density: float = 0.2,
        shard: int = 50,
        slack: float = 0.88,
        layer: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(model, processor)
        self.lr, self.steps, self.stop_loss, self.margin = lr, steps, stop_loss, margin
        self.density, self.shard, self.slack, self.seed = density, shard, slack, seed
        self.layer = late_layer(model) if layer is None else layer
        self._linear = down_projection(model, self.layer)
        self._irrelevant: list[Sample] = []
        self.reset()

    @override
    def learn(self, suite: Suite) -> None:
        self._irrelevant = list(suite.preserve)

    @override
    def reset(self) -> None:
        self._shards: list[Tensor] = []
        self._masks: list[Tensor] = []
        self._side = torch.zeros_like(self._linear.weight, requires_grad=False)  # W' - W
        self.threshold, self._count, self._rng = float("inf"), 0, Random(self.seed)
        self._training = False

    @override
    def modules(self) -> tuple[nn.Module, nn.Module]:
        return self._linear, self._linear

    @override
    def changed(self, inputs: Tensor, out: Tensor) -> Tensor:
        assert self._batch is not None
        if not self._count and not self._training:
            return out
        beside = F.linear(inputs, self._side)
        if self._first:
            self._activations = self._mean(beside, self._batch)
            self._routed = self._activations > self.slack * self.threshold
        if self._training:
            return out + beside
        return torch.where(self._routed.view(-1, 1, 1), out + beside, out)

    def _mean(self, beside: Tensor, batch: Batch) -> Tensor:
        """The routing activations [B]: of the prompts' tokens alone, as answers are not known when they are routed."""
        at = torch.arange(beside.shape[1], device=beside.device)
        asked = (at <= batch.ends.unsqueeze(1)) & batch.inputs["attention_mask"].bool()
        # A norm of zeros has no gradient; the floor lets training begin.
        return ((beside.square().sum(-1) + 1e-12).sqrt() * asked).sum(1) / asked.sum(1)

    @override
    def edit(self, request: Sample) -> None:
        if self._count % self.shard == 0:
            generator = torch.Generator("cpu").manual_seed(self.seed + len(self._shards))
            weight = self._linear.weight
            self._masks.append(torch.rand(weight.shape, generator=generator).lt(self.density).to(weight))
            self._shards.append(torch.zeros_like(weight, requires_grad=False))
        batch, mask = self.targets([request]), self._masks[-1]
        self._side = self._shards[-1].detach().clone().requires_grad_()
        self._training = True
        try:
            with evaluating(self.model), only(self.model, []), self.hooked():
                for _ in range(self.steps):
                    loss, routing, activation = self._losses(batch)
                    if float(loss.detach()) < self.stop_loss and float(routing.detach()) == 0:
                        break
                    (gradient,) = torch.autograd.grad(loss + routing, self._side)
                    self._side = (self._side.detach() - self.lr * mask * gradient).requires_grad_()
                else:
                    activation = self._losses(batch)[2]
        finally:
            self._training = False
        self._shards[-1] = self._side.detach()
        self._side = merged(self._shards)
        self.threshold = min(self.threshold, float(activation.detach()))
        self._count += 1

    def _losses(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Of the answer and of the routing, and the edit's activation."""
        with self.within(batch):
            loss = answer_loss(self.model, batch)
        edited = self._activations[0]
        routing = F.relu(2 * self.margin - edited)
        if self._irrelevant:
            elsewhere = self.encode([self._rng.choice(self._irrelevant)])
            with self.within(elsewhere):
                answer_loss(self.model, elsewhere)
            other = self._activations[0]
            routing = routing + F.relu(other - self.margin / 2) + F.relu(self.margin - (edited - other))
        return loss, routing, edited


def merged(shards: list[Tensor]) -> Tensor:
    """TIES (Yadav et al., NeurIPS 2023) of masked changes: the mean of those that have the sign of their sum."""
    stacked = torch.stack(shards)
    agree = (stacked.sign() == stacked.sum(0).sign()) & (stacked != 0)
    return (stacked * agree).sum(0) / agree.sum(0).clamp(min=1)
