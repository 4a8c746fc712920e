"""From what the vision tower sees to what the language model reads: a mixture of learned prompts."""

from __future__ import annotations

from pathlib import Path

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


def load_projector(width: int, file: Path = FILE) -> Projector:
    """The shipped projector, float32, frozen.

    Args:
        width: of the language model's embeddings.
        file: safetensors, as `evaluation/scripts/train_flags.py` writes it.

    Raises:
        ValueError: the file holds no projector, or one for another language model.
    """
    try:
        found = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: expected a projector in safetensors: {error}") from error
    if set(found) != set(_SHAPES):
        raise ValueError(f"{file}: expected tensors {', '.join(sorted(_SHAPES))}; got {', '.join(sorted(found))}")
    entries = len(found["prompts"])
    for name, shape in _SHAPES.items():
        wanted = tuple(entries if i == 0 and n is None else width if n is None else n for i, n in enumerate(shape))
        if tuple(found[name].shape) != wanted:
            raise ValueError(f"{file}: {name}: expected shape {wanted}, got {tuple(found[name].shape)}")
        if not bool(found[name].isfinite().all()):
            raise ValueError(f"{file}: {name}: expected finite numbers")
    projector = Projector(entries, width)
    projector.load_state_dict({name: t.float() for name, t in found.items()})
    return projector.requires_grad_(False)
