"""How an edit is trained, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..artifacts.edit import Edit
from ..config import Config

# Chosen on validation requests about countries (docs/evaluation.md).
_SCOPED_DROPOUT = 0.4
_SCOPED_SUFFIX = 3


@dataclass(frozen=True)
class EditTraining:
    """How an edit is trained.

    Attributes:
        neurons: per layer (the paper's 10).
        bias: whether neurons have biases. Without, an edit can be folded into FFNs that have none (`fold`), which gated
            FFNs take of gated neurons alone (Config.neurons); the biases of the edit are zeros.
        end: train the token behind the answer, too, that ends the model's turn, so that it stops there: for messages
            what the chat template ends an assistant's turn with, else the tokenizer's end of text, where it has one.
        lr: of Adam.
        steps: at most.
        stop_loss: stop when every target token is predicted and the target's loss is below this ...
        stop_preserve: ... and the divergence on the `preserve` samples was below this, in nats a token, in the mean of
            the last pass over them.
        preserve_weight: of the divergence from the unedited model on the `preserve` samples.
        preserve_batch: how many of them are seen in a step.
        activation_weight: of T-Patcher's activation loss: exp(-a) in the mean over the neurons, a the pre-activation of
            a neuron at the token of the answer that its key was made from.
        prompt_dropout: chance of each token of the prompt to be left out of a second copy of the request, with which
            the edit is trained too, so that it holds in other words; drawn anew in each step; 0: no copy. None: 0.4
            where the memory decides where an edit acts (Config.scope), else 0. Samples to protect get such copies,
            too. Without a scope it suits questions about an image, 0.3 say; where the subject is in the prompt's
            words, these are left out as well.
        random_suffix: tokens at most, drawn from the vocabulary, that follow the prompt in that second copy in the
            place of what was left out, so that what the edit says does not hang on the token that it is said behind.
            None: 3 where the memory decides where an edit acts and there are such copies, else 0.
        memory_weight: of T-Patcher's memory loss: max(0, a - margin) in the mean over neurons and `preserve` tokens.
        margin: see there; the pre-activation below which a neuron counts as silent.
        seed: of the initialisation and of the order of the preserve samples.
    """

    neurons: int = 10
    bias: bool = True
    end: bool = True
    lr: float = 1e-2
    steps: int = 100
    stop_loss: float = 0.05
    stop_preserve: float = 1e-3
    preserve_weight: float = 10.0
    preserve_batch: int = 16
    prompt_dropout: float | None = None
    random_suffix: int | None = None
    activation_weight: float = 0.0
    memory_weight: float = 0.0
    margin: float = -3.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("neurons", "lr", "steps", "stop_loss", "stop_preserve", "preserve_batch"):
            if not getattr(self, name) > 0:
                raise ValueError(f"EditTraining.{name}: expected a positive number, got {getattr(self, name)!r}")
        if self.prompt_dropout is not None and not 0 <= self.prompt_dropout < 1:
            raise ValueError(
                f"EditTraining.prompt_dropout: expected None, or 0 or more and below 1; got {self.prompt_dropout!r}"
            )
        if self.random_suffix is not None and not self.random_suffix >= 0:
            raise ValueError(f"EditTraining.random_suffix: expected None, or 0 or more; got {self.random_suffix!r}")
        for name in ("preserve_weight", "activation_weight", "memory_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"EditTraining.{name}: expected 0 or more, got {getattr(self, name)!r}")

    def decided(self, config: Config) -> EditTraining:
        """With what is left to the configuration filled in. Raises ValueError for a suffix without prompt dropout."""
        scoped = config.scope == "memory"
        dropout, suffix = self.prompt_dropout, self.random_suffix
        if dropout is None:
            dropout = _SCOPED_DROPOUT if scoped else 0.0
        if suffix is None:
            suffix = _SCOPED_SUFFIX if scoped and dropout else 0
        if suffix and not dropout:
            raise ValueError(
                f"EditTraining.random_suffix: expected 0 where prompt_dropout is, as no copy is made then; got {suffix}"
            )
        return replace(self, prompt_dropout=dropout, random_suffix=suffix)


@dataclass(frozen=True)
class EditResult:
    """An edit and how its training went.

    Attributes:
        edit: ready to patch in or save.
        losses: loss of the target at each step, before the step.
        divergence: from the unedited model on the `preserve` samples at the end, in nats a token; 0 without any.
        reached: whether the edited model predicts every target token.
        stopped: why training ended: "target met" (and the preserve samples kept), "step limit, target met" or
            "step limit, target not met".
    """

    edit: Edit
    losses: tuple[float, ...]
    divergence: float
    reached: bool
    stopped: str

    @property
    def steps(self) -> int:
        """How many steps training took."""
        return len(self.losses)

    def __repr__(self) -> str:
        return (
            f"edit {self.edit.id!r}: {self.stopped} after {self.steps - 1} steps, target loss {self.losses[0]:.3f} -> "
            f"{self.losses[-1]:.3f}, divergence elsewhere {self.divergence:.3f} nats a token"
        )
