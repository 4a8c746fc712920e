"""What every editing system can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from unike_kernels.backbones import device_of, find_decoder
from unike_kernels.training.samples import Batch, Sample, encode, forward

from ..metrics import Observation, observe
from ..suite import Suite


class Editor(ABC):
    """An editing system on a model.

    Args:
        model: a Hugging Face model, not patched; it is as it was after `reset`.
        processor: its processor or tokenizer.

    Attributes:
        independent: whether an edit is what it is whatever others are in force, so that those of a sequence may be
            prepared, too.
        learns: whether `fit` needs training requests.
        ended: whether edits are trained to end the model's turn after their answer, see `Suite`.
    """

    name: ClassVar[str]
    independent: bool = False
    learns: ClassVar[bool] = False
    ended: bool = True

    def __init__(self, model: nn.Module, processor: Any) -> None:
        self.model, self.processor = model, processor

    def fit(self, suite: Suite) -> None:
        """Learn what the system needs to know before it edits, from suite.train and suite.preserve."""
        self.ended = suite.ended
        self.learn(suite)

    def learn(self, suite: Suite) -> None:  # noqa: B027 (some systems learn nothing)
        """What `fit` does for this system."""

    def prepare(self, requests: Sequence[Sample]) -> None:  # noqa: B027 (most systems gain nothing by it)
        """Prepare for edits that will be made of these requests, each without the others: several may be faster."""

    @abstractmethod
    def edit(self, request: Sample) -> None:
        """Make the edit, in addition to those in force."""

    @abstractmethod
    def reset(self) -> None:
        """Take all edits back: the model computes what it computed before them, bit for bit."""

    def observe(self, samples: Sequence[Sample]) -> list[Observation]:
        """What the edited model says; see `metrics.observe`."""
        return observe(self.model, self.processor, samples, within=self.within)

    def within(self, batch: Batch) -> AbstractContextManager[None]:
        """What a pass over these prompts, with answers or without, is made in."""
        return nullcontext()

    def encode(self, samples: Sequence[Sample]) -> Batch:
        """As tokens, where the model is."""
        return encode(self.processor, samples, device_of(self.model))

    def targets(self, requests: Sequence[Sample]) -> Batch:
        """The same of what an edit shall make the model say, with the end of its turn where that is trained."""
        return encode(self.processor, requests, device_of(self.model), ended=self.ended)


def answer_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean negative log-likelihood of the answers' tokens; logits are computed where an answer is said alone."""
    answer = batch.answer_mask()[:, 1:]
    at = answer.any(0).nonzero().flatten()
    predicted = forward(model, batch.inputs, at)[answer[:, at]]
    return F.cross_entropy(predicted.float(), batch.inputs["input_ids"][:, 1:][answer])


def descend(
    parameters: Sequence[Tensor], lr: float, steps: int, stop_loss: float, loss: Callable[[int], Tensor]
) -> None:
    """Adam on these parameters, `steps` steps at most, until `loss` of a step's number is below `stop_loss`."""
    optimizer = torch.optim.Adam(parameters, lr)
    for step in range(steps):
        found = loss(step)
        if float(found.detach()) < stop_loss:
            break
        optimizer.zero_grad()
        found.backward()
        optimizer.step()


def last_ffn(model: nn.Module) -> list[nn.Parameter]:
    """The weights and biases of the last layer's FFN, which the baselines change."""
    return [p for p in find_decoder(model).layers[-1].weights() if isinstance(p, nn.Parameter)]


@contextmanager
def only(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within the block gradients go to these parameters of the model and to no others."""
    asked = {p: p.requires_grad for p in model.parameters()}
    for p in asked:
        p.requires_grad_(False)
    for p in parameters:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p, wanted in asked.items():
            p.requires_grad_(wanted)
            p.grad = None


class WeightEditor(Editor):
    """A system that writes to some weights.

    Args:
        model, processor: see `Editor`.
        parameters: these; None: the last layer's FFN.
    """

    def __init__(self, model: nn.Module, processor: Any, parameters: Sequence[nn.Parameter] | None = None) -> None:
        super().__init__(model, processor)
        self.parameters = last_ffn(model) if parameters is None else list(parameters)
        self._before = [p.detach().clone() for p in self.parameters]

    @override
    @torch.no_grad()
    def reset(self) -> None:
        for p, before in zip(self.parameters, self._before, strict=True):
            p.copy_(before)


def down_projection(model: nn.Module, layer: int) -> nn.Linear:
    """The matrix that ends a layer's FFN: its inputs are the keys, its outputs the values of what the layer knows.

    Raises UnsupportedModelError if the FFN is not dense, and ValueError if the matrix is no nn.Linear.
    """
    found = find_decoder(model).layers[layer]
    out = found.weights().w_out
    for module in found.module.modules():
        if isinstance(module, nn.Linear) and module.weight.data_ptr() == out.data_ptr():
            return module
    raise ValueError(f"model: expected the FFN of layer {layer} to end with an nn.Linear")
