"""LoRA (Hu et al., ICLR 2022), by PEFT: low-rank changes of the attention, trained on one request after the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from typing_extensions import override

from unike_kernels.training.samples import Sample, evaluating

from .base import Editor, answer_loss, descend, only

_TARGETS = ["q_proj", "v_proj"]  # as the paper chose


class LoRA(Editor):
    """One adapter, which the edits of a sequence go on with. It needs PEFT.

    Args:
        lr: of Adam.
        steps: at most.
        stop_loss: of the answer, in nats a token.
        rank: r; alpha is four times that.
        seed: of the first matrix.
    """

    name = "LoRA"

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        *,
        lr: float = 5e-3,
        steps: int = 70,
        stop_loss: float = 0.05,
        rank: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__(model, processor)
        self.lr, self.steps, self.stop_loss, self.rank, self.seed = lr, steps, stop_loss, rank, seed
        self._adapted: Any = None

    @override
    def edit(self, request: Sample) -> None:
        if self._adapted is None:
            self._adapted = self._adapt()
        adapter = [p for name, p in self.model.named_parameters() if "lora_" in name]
        batch = self.targets([request])
        with evaluating(self.model), only(self.model, adapter):
            descend(adapter, self.lr, self.steps, self.stop_loss, lambda _: answer_loss(self.model, batch))

    @override
    def reset(self) -> None:
        if self._adapted is None:
            return
        self._adapted.unload()
        self._adapted = None
        for p, wanted in self._asked:
            p.requires_grad_(wanted)

    def _adapt(self) -> Any:
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise ImportError("LoRA needs PEFT: pip install 'unike-eval[peft]'") from error
        self._asked = [(p, p.requires_grad) for p in self.model.parameters()]
        settings = LoraConfig(r=self.rank, lora_alpha=4 * self.rank, target_modules=_TARGETS)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return get_peft_model(self.model, settings)
