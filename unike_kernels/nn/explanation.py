"""What a patched model's layers did in each forward pass, kept for whoever asks."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Told:
    """One layer in one pass over B rows of T tokens.

    Attributes:
        entries: int64 [B, T, k], the memory's entries that each token retrieved, -1 for none; None: no memory here.
        scores: float32 [B, T, k], their cosines, -inf for none.
        alpha: float32 [B, T], the gate; 0 for a token that is not shifted.
        neurons: edit id -> [B, T, n], what its neurons put out; 0 in rows that do not use the edit.
        memory_seconds, neuron_seconds: what they took.
    """

    entries: Tensor | None = None
    scores: Tensor | None = None
    alpha: Tensor | None = None
    neurons: dict[str, Tensor] = field(default_factory=dict)
    memory_seconds: float = 0.0
    neuron_seconds: float = 0.0


def seconds_since(start: float) -> float:
    """Of time.perf_counter; a GPU has done its work by then."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


class Explanation:
    """The passes of a patched model.

    Attributes:
        passes: of each forward pass, layer index -> `Told`.
    """

    def __init__(self) -> None:
        self.passes: list[dict[int, Told]] = []
        self.shape = 0, 0  # rows and tokens of this pass

    def begin(self, batch: int, tokens: int) -> None:
        """A pass begins."""
        self.passes.append({})
        self.shape = batch, tokens

    def at(self, layer: int) -> Told:
        """What there is to say about a layer in this pass."""
        return self.passes[-1].setdefault(layer, Told())

    def counters(self) -> dict[str, float]:
        """Sums over passes and layers, as a server would export them.

        `passes`; `tokens` that came to a layer with a memory; `shifted`, those with alpha above 0; `alpha_mean` and
        `alpha_max` over these; `score_mean`, the best cosine of each that retrieved anything; `memory_seconds`,
        `neuron_seconds`.
        """
        told = [t for each in self.passes for t in each.values()]
        alphas = [t.alpha.flatten() for t in told if t.alpha is not None]
        alpha = torch.cat(alphas) if alphas else torch.empty(0, dtype=torch.float32, device="cpu")
        bests = [t.scores[..., 0].flatten() for t in told if t.scores is not None and t.scores.shape[-1]]
        best = torch.cat(bests) if bests else torch.empty(0, dtype=torch.float32, device="cpu")
        open_, found = alpha[alpha > 0], best[best.isfinite()]
        return {
            "passes": len(self.passes),
            "tokens": alpha.numel(),
            "shifted": open_.numel(),
            "alpha_mean": float(open_.mean()) if open_.numel() else 0.0,
            "alpha_max": float(open_.max()) if open_.numel() else 0.0,
            "score_mean": float(found.mean()) if found.numel() else 0.0,
            "memory_seconds": sum(t.memory_seconds for t in told),
            "neuron_seconds": sum(t.neuron_seconds for t in told),
        }
