"""From what the vision tower sees to what the language model reads: a mixture of learned prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from typing_extensions import override

FILE = Path(__file__).parent / "projector.safetensors"
STAGES = (2, 4, 6)  # of the tower whose states are read
CHANNELS, PLACES, NARROW = 40 + 112 + 320, 49, 64
TOKENS = 4  # that stand for an image
CHANGED = "language_model."  # in front of the names of the modules that are changed
# As LLaVA's: two linear layers; what lies between them is a softmax, so that an image becomes a mixture of few prompts.
_SHAPES: dict[str, tuple[int | None, ...]] = {
    "narrow.weight": (NARROW, CHANNELS),
    "narrow.bias": (NARROW,),
    "choose.weight": (None, PLACES * NARROW),
    "choose.bias": (None,),
    "prompts": (None, TOKENS, None),
}  # fmt: skip


class Projector(nn.Module):
    """Projects states of an image's places to tokens of the language model.

    Args:
        entries: learned prompts.
        width: of the language model's embeddings.
    """

    def __init__(self, entries: int, width: int) -> None:
        super().__init__()
        self.narrow = nn.Linear(CHANNELS, NARROW)
        self.choose = nn.Linear(PLACES * NARROW, entries)
        self.prompts = nn.Parameter(torch.zeros(entries, TOKENS, width))

    def scores(self, states: Tensor) -> Tensor:
        """Of the prompts, [B, entries], before the softmax, for states [B, 49, 472]."""
        return self.choose(F.gelu(self.narrow(states)).flatten(1))

    @override
    def forward(self, states: Tensor) -> Tensor:
        """Tokens [B, 4, width] for states [B, 49, 472]."""
        return torch.einsum("be,etw->btw", self.scores(states).softmax(-1), self.prompts)


def load_projector(language_model: nn.Module, file: Path = FILE) -> Projector:
    """The shipped projector, float32, frozen; and the language model learns what belongs to it.

    Args:
        language_model: with input embeddings; low-rank changes are added to its weights, in place.
        file: safetensors, as `evaluation/scripts/train_flags.py` writes it: the projector's tensors, and for a changed
            module of the language model "language_model.<module>.a" [r, in] and ".b" [out, r], whose product is added.

    Raises:
        ValueError: the file holds no projector, or one for another language model, which is not changed then.
    """
    try:
        found = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: expected a projector in safetensors: {error}") from error
    for name, tensor in found.items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{file}: {name}: expected finite numbers")
    changes = {name.removeprefix(CHANGED): found.pop(name).float() for name in list(found) if name.startswith(CHANGED)}
    if set(found) != set(_SHAPES):
        raise ValueError(f"{file}: expected tensors {', '.join(sorted(_SHAPES))}; got {', '.join(sorted(found))}")
    embeddings: Any = language_model.get_input_embeddings()  # type: ignore[operator]
    entries, width = len(found["prompts"]), embeddings.weight.shape[1]
    for name, shape in _SHAPES.items():
        wanted = tuple(entries if i == 0 and n is None else width if n is None else n for i, n in enumerate(shape))
        if tuple(found[name].shape) != wanted:
            raise ValueError(f"{file}: {name}: expected shape {wanted}, got {tuple(found[name].shape)}")
    _change(language_model, changes, file)
    projector = Projector(entries, width)
    projector.load_state_dict({name: t.float() for name, t in found.items()})
    return projector.requires_grad_(False)


@torch.no_grad()
def _change(language_model: nn.Module, changes: dict[str, Tensor], file: Path) -> None:
    weights, added = dict(language_model.named_parameters()), {}
    for name in {name.rpartition(".")[0] for name in changes}:
        weight, a, b = weights.get(f"{name}.weight"), changes.get(f"{name}.a"), changes.get(f"{name}.b")
        shapes = [None if t is None else tuple(t.shape) for t in (weight, a, b)]
        match shapes:
            case (outputs, inputs), (r, i), (o, s) if (o, s, i) == (outputs, r, inputs):
                added[name] = changes[f"{name}.b"] @ changes[f"{name}.a"]
            case _:
                raise ValueError(
                    f"{file}: {CHANGED}{name}: expected factors [r, in] and [out, r] for a weight [out, in]; got "
                    f"shapes {shapes[1]} and {shapes[2]} for {shapes[0]}"
                )
    for name, product in added.items():
        weights[f"{name}.weight"].add_(product)
