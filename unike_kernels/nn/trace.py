"""What a patched model's layers did in each forward pass, kept for whoever asks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..artifacts.pictures import Pictures
from .page import cut, explanation, page
from .plot import plot
from .routing import Route

_NEAREST = 3  # entries of a layer that a trace prints


@dataclass
class LayerTrace:
    """One layer in one pass over B rows of T tokens.

    Attributes:
        entries: int64 [B, T, k], the memory's entries that each token retrieved, -1 for none; None: no memory here.
        scores: float32 [B, T, k], their cosines, -inf for none.
        alpha: float32 [B, T], the gate; 0 for a token that is not shifted.
        effective: float32 [B, T], how many of its entries a token attends to: exp of the softmax's entropy, k where it
            is uniform, 1 where one entry has all the weight; 0 for a token that is not shifted.
        shift: float32 [B, T], |shifted output - output|.
        neurons: edit id -> [B, T, n], what its neurons put out; 0 in rows that do not use the edit.
        memory_seconds, neuron_seconds: what they took.
        texts: what the memory's entries say, see `MemoryBank.texts`; None: it does not tell.
        pictures: what they show, see `MemoryBank.pictures`; None: it does not tell.
    """

    entries: Tensor | None = None
    scores: Tensor | None = None
    alpha: Tensor | None = None
    effective: Tensor | None = None
    shift: Tensor | None = None
    neurons: dict[str, Tensor] = field(default_factory=dict)
    memory_seconds: float = 0.0
    neuron_seconds: float = 0.0
    texts: tuple[str, ...] | None = field(default=None, repr=False)
    pictures: Pictures | None = field(default=None, repr=False)

    def text(self, entry: int) -> str:
        """What an entry says; its number, where that is not known."""
        return (self.texts[entry] if self.texts else "") or f"entry {entry}"


def seconds_since(start: float) -> float:
    """Of time.perf_counter; a GPU has done its work by then."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


@dataclass(frozen=True)
class PassTrace:
    """Where the layers record one pass of `shape` = (rows, tokens)."""

    shape: tuple[int, int]
    layers: dict[int, LayerTrace]
    routes: list[Route]

    def at(self, layer: int) -> LayerTrace:
        """The record of a layer."""
        return self.layers.setdefault(layer, LayerTrace())


class Trace:
    """The passes of a patched model.

    Attributes:
        passes: of each forward pass, layer index -> `LayerTrace`.
        routes: of each forward pass, which edit acts in each row, and why; with scope="memory", where there are edits.
        shapes: (B, T) of each forward pass.
        ids: of each forward pass, int64 [B, T], its tokens; None: the decoder was given embeddings, and nobody the ids.
        spell: the text of token ids; None: they are shown as numbers.
    """

    def __init__(self, spell: Callable[[list[int]], str] | None = None) -> None:
        self.passes: list[dict[int, LayerTrace]] = []
        self.routes: list[list[Route]] = []
        self.shapes: list[tuple[int, int]] = []
        self.ids: list[Tensor | None] = []
        self.spell = spell

    def __repr__(self) -> str:
        lines = [self.headline]
        for number, routes in enumerate(self.routes):
            lines += [f"pass {number}, row {row}: {route}" for row, route in enumerate(routes)]
        for i in sorted({i for layers in self.passes for i in layers}):
            near = [f"{score:.3f} {cut(text)!r}" for text, score in self.nearest(i)]
            lines += [f"layer {i}: nearest {', '.join(near)}"] if near else []
        return "\n".join(lines)

    def to_html(self) -> str:
        """A page of HTML that stands alone: of each pass, row and layer the tokens, the entries that they retrieved and
        what these say, the gates, shifts, neurons and seconds, and why an edit acts or does not."""
        return page("What the edits and the memory did", explanation(self))

    _repr_html_ = to_html  # of notebooks

    def plot(self, number: int = 0, row: int = 0) -> Any:
        """A figure of matplotlib: for each layer and token of a row of a pass the gate, the shift, and the most that a
        neuron of each edit puts out. What is zero everywhere is left out.

        Args:
            number: of the pass.
            row: of its batch.

        Raises:
            ImportError: matplotlib is not installed.
            IndexError: there is no such pass.
            ValueError: there is no such row, or nothing acts in the pass.
        """
        return plot(self, number, row)

    @property
    def headline(self) -> str:
        """The counters, in a line."""
        told = self.counters()
        spent = ", ".join(f"{name} {1e3 * told[f'{name}_seconds']:.1f} ms" for name in ("memory", "neuron"))
        return (
            f"{told['passes']} passes: {told['shifted']} of {told['tokens']} tokens shifted, by "
            f"{told['alpha_mean']:.2f} in the mean; {spent}"
        )

    def nearest(self, layer: int) -> list[tuple[str, float]]:
        """What the nearest entries of a layer say, and the best cosine of a token with each, over all passes."""
        found: dict[str, float] = {}
        for at in (layers[layer] for layers in self.passes if layer in layers):
            if at.entries is None or at.scores is None:
                continue
            for entry, score in zip(at.entries.flatten().tolist(), at.scores.flatten().tolist(), strict=True):
                if entry >= 0:
                    found[at.text(entry)] = max(score, found.get(at.text(entry), score))
        return sorted(found.items(), key=lambda pair: -pair[1])[:_NEAREST]

    def said(self, number: int, row: int, places: Sequence[int]) -> str:
        """The tokens in these places of a row of a pass, as a text: as ids where nothing spells them, or as places."""
        ids = self.ids[number]
        if ids is None:
            return "".join(f"[{at}]" for at in places)
        chosen = ids[row, list(places)].tolist()
        return self.spell(chosen) if self.spell else " ".join(map(str, chosen))

    def begin(self, batch: int, tokens: int, ids: Tensor | None = None) -> PassTrace:
        """The record of a pass that begins."""
        self.passes.append({})
        self.routes.append([])
        self.shapes.append((batch, tokens))
        known = ids is not None and ids.shape == (batch, tokens)
        self.ids.append(ids.detach().cpu() if ids is not None and known else None)
        return PassTrace((batch, tokens), self.passes[-1], self.routes[-1])

    def counters(self) -> dict[str, float]:
        """Sums over passes and layers, as a server would export them.

        `passes`; `tokens` that came to a layer with a memory; `shifted`, those with alpha above 0; `alpha_mean` and
        `alpha_max` over these; `score_mean`, the best cosine of each that retrieved anything, and `effective_mean`,
        over how many entries each of them spread its attention; `memory_seconds`, `neuron_seconds`.
        """
        layers = [layer for each in self.passes for layer in each.values()]
        alpha, spread = (_all([getattr(layer, name) for layer in layers]) for name in ("alpha", "effective"))
        best = _all([layer.scores[..., 0] if layer.scores is not None else None for layer in layers])
        open_, found, spread = alpha[alpha > 0], best[best.isfinite()], spread[spread > 0]
        return {
            "passes": len(self.passes),
            "tokens": alpha.numel(),
            "shifted": open_.numel(),
            "alpha_mean": float(open_.mean()) if open_.numel() else 0.0,
            "alpha_max": float(open_.max()) if open_.numel() else 0.0,
            "score_mean": float(found.mean()) if found.numel() else 0.0,
            "effective_mean": float(spread.mean()) if spread.numel() else 0.0,
            "memory_seconds": sum(layer.memory_seconds for layer in layers),
            "neuron_seconds": sum(layer.neuron_seconds for layer in layers),
        }


def _all(parts: Sequence[Tensor | None]) -> Tensor:
    """Those that are there, flat and behind one another."""
    none = torch.empty(0, dtype=torch.float32, device="cpu")
    return torch.cat([none, *(part.flatten() for part in parts if part is not None)])
