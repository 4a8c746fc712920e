"""GRACE (Hartvigsen et al., NeurIPS 2023): a codebook at one layer, of keys with radii and trained values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from unike_kernels.backbones import find_decoder
from unike_kernels.training.samples import Batch, Sample, evaluating

from .base import answer_loss, descend, only
from .routed import RoutedEditor, late_layer


class GRACE(RoutedEditor):
    """The FFN's output at a prompt's last token is a value of the codebook, if its input is within that key's radius.

    A request that no radius reaches gets an entry of its own. One that reaches an entry with the same answer widens it,
    and one that reaches an entry with another answer halves both radii to where they meet (the paper's Algorithm 1).

    Args:
        lr: of Adam, for the value.
        steps: at most.
        stop_loss: of the answer, in nats a token.
        radius: of a new key, as a share of the key's norm: states of models differ in size.
        layer: whose FFN; None: the 28th of 32, as usual for LLaMA, or in proportion.
        seed: of a value's beginning.
    """

    name = "GRACE"

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        *,
        lr: float = 1.0,
        steps: int = 100,
        stop_loss: float = 0.05,
        radius: float = 0.3,
        layer: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(model, processor)
        self.lr, self.steps, self.stop_loss, self.radius, self.seed = lr, steps, stop_loss, radius, seed
        self.layer = late_layer(model) if layer is None else layer
        self._forget()

    def _forget(self) -> None:
        width = find_decoder(self.model).hidden_size
        self.keys, self.values, self.radii = torch.empty(0, width), list[Tensor](), list[float]()
        self._answers: list[str] = []

    @override
    def modules(self) -> tuple[nn.Module, nn.Module]:
        sites = find_decoder(self.model).layers[self.layer].ffn
        return sites[0].module, sites[-1].module

    @override
    def changed(self, inputs: Tensor, out: Tensor) -> Tensor:
        assert self._batch is not None
        if not self._first or not self.values:
            return out
        rows, ends = torch.arange(len(out), device=out.device), self._batch.ends
        self._query = inputs[rows, ends].detach()
        distance, nearest = torch.cdist(
            self._query.float(), self.keys.to(out.device), compute_mode="donot_use_mm_for_euclid_dist"
        ).min(1)
        reached = distance <= torch.tensor(self.radii, device=out.device)[nearest]
        if not reached.any():
            return out
        value = torch.stack(self.values).to(out)[nearest]
        at_end = torch.where(reached.unsqueeze(1), value, out[rows, ends])
        return out.index_put((rows, ends), at_end)

    @override
    def edit(self, request: Sample) -> None:
        batch = self.targets([request])

        def loss(_: int) -> Tensor:
            with self.within(batch):
                return answer_loss(self.model, batch)

        with evaluating(self.model), only(self.model, []), self.hooked():
            chosen = self._entry(self._key(batch), request.answer)
            value = self.values[chosen].requires_grad_()
            descend([value], self.lr, self.steps, self.stop_loss, loss)
            self.values[chosen] = value.detach()

    @override
    def reset(self) -> None:
        self._forget()

    @torch.no_grad()
    def _key(self, batch: Batch) -> Tensor:
        """The FFN's input at the end of the prompt, float32 [d]."""
        seen: list[Tensor] = []
        handle = self.modules()[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            answer_loss(self.model, batch)
        finally:
            handle.remove()
        return seen[0].reshape(-1, seen[0].shape[-1])[int(batch.ends[0])].float().cpu()

    def _entry(self, key: Tensor, answer: str) -> int:
        """Which entry is to be trained, after the codebook has made room for this key."""
        radius = self.radius * float(key.norm())
        if self.values:
            distances = (self.keys - key).norm(dim=1)
            nearest = int(distances.argmin())
            distance = float(distances[nearest])
            if distance <= self.radii[nearest] + radius:
                if self._answers[nearest] == answer:
                    self.radii[nearest] = max(self.radii[nearest], distance)
                    return nearest
                self.radii[nearest] = min(self.radii[nearest], distance / 2 * (1 - 1e-5))  # the new key has the middle
                radius = min(radius, distance / 2)
        generator = torch.Generator("cpu").manual_seed(self.seed + len(self.values))
        self.keys = torch.cat([self.keys, key.unsqueeze(0)])
        self.values.append(torch.rand(len(key), generator=generator))
        self.radii.append(radius)
        self._answers.append(answer)
        return len(self.values) - 1
