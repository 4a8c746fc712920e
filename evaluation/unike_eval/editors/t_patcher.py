"""T-Patcher (Huang et al., ICLR 2023): for each wrong token one neuron in the last FFN, the patch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from unike_kernels.artifacts.edit import Edit, fresh_layer
from unike_kernels.artifacts.fingerprint import fingerprint
from unike_kernels.backbones import find_decoder
from unike_kernels.config import Config
from unike_kernels.patching import patched, patched_ffns
from unike_kernels.training.samples import Batch, Sample, batches, evaluating, forward, with_prompt_dropout

from ..metrics import Observation
from ..suite import Suite
from .base import Editor, answer_loss, only


class TPatcher(Editor):
    """Patch neurons, trained to answer, to be active at the edit and to be silent elsewhere.

    A key starts as q / |q|^2 of the FFN's input q at a token of the answer, so that its first activation is 1.

    Args:
        lr: of Adam (the paper's 1e-2).
        steps: at most.
        stop_loss: of the answer, in nats a token.
        activation: weight of exp(-activation) at the edit, the paper's l_a.
        memory: weight of max(0, activation - margin) on remembered inputs, of the kind of the paper's l_m1.
        margin: see `memory`.
        remembered: questions whose inputs are kept.
        prompt_dropout: see `EditTraining`; 0: as in the paper, on the whole prompt.
        seed: of what is left out.
    """

    name = "T-Patcher"

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        *,
        lr: float = 1e-2,
        steps: int = 100,
        stop_loss: float = 0.05,
        activation: float = 0.1,
        memory: float = 1.0,
        margin: float = -3.0,
        remembered: int = 64,
        prompt_dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(model, processor)
        self.lr, self.steps, self.stop_loss = lr, steps, stop_loss
        self.activation, self.memory, self.margin, self.remembered = activation, memory, margin, remembered
        self.prompt_dropout, self.seed = prompt_dropout, seed
        decoder = find_decoder(model)
        self._layer, self._activation = len(decoder.layers) - 1, decoder.layers[-1].activation
        self._kept = torch.empty(0, decoder.hidden_size)
        self._edits: list[Edit] = []

    @override
    @torch.no_grad()
    def learn(self, suite: Suite) -> None:
        samples = suite.preserve[: self.remembered]
        with evaluating(self.model), patched(self.model, layers=[self._layer]):
            groups = [self._inputs(self.encode([samples[i] for i in group])) for group in batches(samples, 32)]
        self._kept = torch.cat([self._kept, *(q[mask] for q, mask in groups)])

    @override
    def edit(self, request: Sample) -> None:
        batch = self.targets([request])
        name = f"patch-{len(self._edits)}"
        model = patched(self.model, self._edits, layers=[self._layer])
        with evaluating(self.model), only(self.model, []), model:
            store = patched_ffns(self.model)[self._layer].edits
            in_force = {e.id: e.layers[self._layer] for e in self._edits}
            with torch.no_grad():
                q, _ = self._inputs(batch)
            at_answer = q[batch.answer_mask().roll(-1, 1)]
            keys = at_answer / (at_answer * at_answer).sum(-1, keepdim=True)
            patches = fresh_layer(keys, torch.zeros(len(keys)), torch.zeros_like(keys[0]), gated=False)
            trained = [t.requires_grad_() for t in (patches.keys, patches.key_bias, patches.values)]
            optimizer = torch.optim.Adam(trained, self.lr)
            for step in range(self.steps):
                store.set(in_force | {name: patches})
                seen = with_prompt_dropout(self.model, batch, self.prompt_dropout, self.seed + step)
                loss = answer_loss(self.model, seen)
                if float(loss.detach()) < self.stop_loss:
                    break
                at_edit = at_answer @ patches.keys.T + patches.key_bias
                elsewhere = self._kept @ patches.keys.T + patches.key_bias
                loss = loss + self.activation * (-at_edit.diagonal()).exp().mean()
                loss = loss + self.memory * F.relu(elsewhere - self.margin).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        layers = {self._layer: patches.detached()}
        self._edits.append(Edit(name, layers, self._activation, Config(), fingerprint(self.model), None, {}))

    @override
    def reset(self) -> None:
        self._edits.clear()

    @override
    def observe(self, samples: Sequence[Sample]) -> list[Observation]:
        with patched(self.model, self._edits, layers=[self._layer]):
            return super().observe(samples)

    def _inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The last FFN's inputs [B, T, d], and which of them are not padding [B, T]."""
        seen: list[Tensor] = []
        ffn = patched_ffns(self.model)[self._layer].modules[0]
        handle = ffn.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            forward(self.model, batch.inputs)
        finally:
            handle.remove()
        mask = batch.inputs["attention_mask"].bool()
        return seen[0].view(*mask.shape, -1), mask
