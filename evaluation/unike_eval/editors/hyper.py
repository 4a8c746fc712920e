"""What KE and MEND share: a network that is trained to turn a request into a change of weights."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from unike_kernels.backbones import find_decoder
from unike_kernels.training.samples import Batch, Sample, evaluating, forward

from ..suite import Suite
from .base import Editor, answer_loss, only


class HyperEditor(Editor):
    """A trained editor of the weight matrices of the last FFNs.

    The loss of a training request is that of its answer under the changed weights, for the request as it stands, in
    other words or about another image, and the divergence from the unchanged model on a question that it shall keep.

    Args:
        layers: how many FFNs, from the last one.
        lr: of Adam, when the network is trained.
        steps: of that training; a request each.
        locality: weight of the divergence.
        seed: of the network and the order of requests.
    """

    learns = True
    network: nn.Module

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        *,
        layers: int = 3,
        lr: float = 1e-3,
        steps: int = 1500,
        locality: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(model, processor)
        self.lr, self.steps, self.locality, self.seed = lr, steps, locality, seed
        wanted = {
            id(t): t.shape
            for layer in find_decoder(model).layers[-layers:]
            for t in layer.weights()
            if t is not None and t.ndim == 2
        }
        self.linears = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and id(module.weight) in wanted
        }
        if len(self.linears) < len(wanted):
            raise ValueError(f"model: expected the FFNs of the last {layers} layers to be made of nn.Linear")
        self._before = {name: m.weight.detach().clone() for name, m in self.linears.items()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = self.build()

    @abstractmethod
    def build(self) -> nn.Module:
        """The untrained network."""

    @abstractmethod
    def changes(self, request: Sample) -> dict[str, Tensor]:
        """Name of a linear -> what is added to its weight; differentiable in the network's parameters."""

    @override
    def learn(self, suite: Suite) -> None:
        rng = Random(self.seed)
        optimizer = torch.optim.Adam(self.network.parameters(), self.lr)
        with evaluating(self.model), only(self.model, []):
            for _ in range(self.steps):
                case = rng.choice(suite.train).case
                target = rng.choice([case.request, *case.rephrasings, *case.images])
                optimizer.zero_grad()
                self.objective(case.request, target, rng.choice(suite.preserve)).backward()
                nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
                optimizer.step()

    def objective(self, request: Sample, target: Sample, unrelated: Sample) -> Tensor:
        """What the network learns to lower: the loss of the target and the divergence elsewhere, after the edit."""
        kept = self.encode([unrelated])
        with torch.no_grad():
            usual = self._log_probabilities(kept)
        with self._changed(self.changes(request)):
            loss = answer_loss(self.model, self.targets([target]))
            apart = F.kl_div(self._log_probabilities(kept), usual, reduction="batchmean", log_target=True)
        return loss + self.locality * apart

    @override
    def edit(self, request: Sample) -> None:
        with evaluating(self.model), only(self.model, []):
            changes = self.changes(request)
        with torch.no_grad():
            for name, change in changes.items():
                self.linears[name].weight += change

    @override
    @torch.no_grad()
    def reset(self) -> None:
        for name, before in self._before.items():
            self.linears[name].weight.copy_(before)

    def _log_probabilities(self, batch: Batch) -> Tensor:
        """[tokens, V]."""
        mask = batch.inputs["attention_mask"].bool()
        return forward(self.model, batch.inputs)[mask].float().log_softmax(-1)

    @contextmanager
    def _changed(self, changes: Mapping[str, Tensor]) -> Iterator[None]:
        """Within the block the linears compute with changed weights, and gradients reach the changes."""
        handles = [
            self.linears[name].register_forward_hook(
                lambda _, args, out, change=change: out + F.linear(args[0], change)
            )
            for name, change in changes.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def gradients(self, request: Sample) -> dict[str, tuple[Tensor, Tensor]]:
        """Name -> the inputs u [T, in] of a linear and the gradients delta [T, out] of the loss by its outputs.

        The gradient of its weight is delta^T u.
        """
        inputs: dict[str, Tensor] = {}
        probes: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
                inputs[name], probes[name] = args[0].detach(), torch.zeros_like(out, requires_grad=True)
                return out + probes[name]

            return hook

        handles = [m.register_forward_hook(keep(name)) for name, m in self.linears.items()]
        try:
            with torch.enable_grad():
                loss = answer_loss(self.model, self.targets([request]))
        finally:
            for handle in handles:
                handle.remove()
        found = torch.autograd.grad(loss, list(probes.values()))
        return {name: (inputs[name].flatten(0, -2), g.flatten(0, -2)) for name, g in zip(probes, found, strict=True)}
