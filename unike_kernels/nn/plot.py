"""A trace as a figure of matplotlib: for each token and layer, how far the memory shifts it and what neurons say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .trace import LayerTrace, Trace

_MOST = 48  # tokens whose words can still be read beside one another


def plot(trace: Trace, number: int, row: int) -> Any:
    """See `Trace.plot`."""
    from matplotlib.figure import Figure

    layers = trace.passes[number]
    if not layers:
        raise ValueError(f"number: expected a pass in which something acts, got {number}, in which nothing does")
    rows, tokens = trace.shapes[number]
    if not 0 <= row < rows:
        raise ValueError(f"row: expected one of the {rows} of pass {number}, got {row}")
    order = sorted(layers)
    names = sorted({name for layer in layers.values() for name in layer.neurons})
    panels = {
        "alpha": [_of(layers[i].alpha, row, tokens) for i in order],
        "shift": [_of(layers[i].shift, row, tokens) for i in order],
        **{f"neurons of {name}": [_neurons(layers[i], name, row, tokens) for i in order] for name in names},
    }
    shown = {name: torch.stack(lines) for name, lines in panels.items() if any(bool(line.any()) for line in lines)}
    height = 1.2 + 0.35 * len(order)
    figure = Figure(figsize=(min(4 + 0.35 * tokens, 18), height * max(len(shown), 1)), layout="constrained")
    places = figure.subplots(max(len(shown), 1), squeeze=False)[:, 0]
    for place, (name, values) in zip(places, shown.items(), strict=False):
        image = place.imshow(values.numpy(), aspect="auto", vmin=0, vmax=1 if name == "alpha" else None, cmap="viridis")
        place.set_title(name, loc="left", fontsize="medium", parse_math=False)
        place.set_yticks(range(len(order)), [f"layer {i}" for i in order])
        words = [trace.said(number, row, [at]).replace("\n", "↵") for at in range(tokens)] if tokens <= _MOST else []
        place.set_xticks(range(len(words)), words, rotation=60, ha="right", fontsize="small", parse_math=False)
        figure.colorbar(image, ax=place)
    if not shown:
        places[0].set_axis_off()
        places[0].set_title("nothing acts on this row", loc="left")
    return figure


def _of(values: Tensor | None, row: int, tokens: int) -> Tensor:
    nothing = torch.zeros(tokens, dtype=torch.float32, device="cpu")
    return nothing if values is None else values[row].detach().float().cpu()


def _neurons(layer: LayerTrace, name: str, row: int, tokens: int) -> Tensor:
    """The largest output of an edit's neurons on each token."""
    own = layer.neurons.get(name)
    return _of(None if own is None else own.abs().amax(-1), row, tokens)
