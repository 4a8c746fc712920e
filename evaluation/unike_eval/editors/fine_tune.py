"""FT: gradient descent on the last layer's FFN until the model gives the answer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from unike_kernels.training.samples import Sample, evaluating, with_prompt_dropout

from .base import WeightEditor, answer_loss, descend, only


class FineTune(WeightEditor):
    """Fine-tuning of the last layer.

    Args:
        lr: of Adam.
        steps: at most.
        stop_loss: of the answer, in nats a token.
        prompt_dropout: see `EditTraining`; 0: as usual, on the whole prompt.
        seed: of what is left out.
    """

    name = "FT"

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        *,
        lr: float = 3e-3,
        steps: int = 50,
        stop_loss: float = 0.05,
        prompt_dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(model, processor)
        self.lr, self.steps, self.stop_loss = lr, steps, stop_loss
        self.prompt_dropout, self.seed = prompt_dropout, seed

    @override
    def edit(self, request: Sample) -> None:
        batch = self.targets([request])

        def loss(step: int) -> Tensor:
            seen = with_prompt_dropout(self.model, batch, self.prompt_dropout, self.seed + step)
            return answer_loss(self.model, seen)

        with evaluating(self.model), only(self.model, self.parameters):
            descend(self.parameters, self.lr, self.steps, self.stop_loss, loss)
