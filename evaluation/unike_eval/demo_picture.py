"""What `unike demo` draws: pictures with what the model said about them before the edit and says after it."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill
from typing import Any

from .demo_page import Change

_IN_A_ROW = 5
_SAME, _CHANGED = "#5c6675", "#0b6e4f"


def demo_picture(changes: Sequence[Change]) -> Any:
    """A figure of matplotlib: each change that has a picture, its group and question above, its answers below.

    Raises:
        ValueError: no change has a picture.
    """
    from matplotlib.figure import Figure

    shown = [(change, change.image) for change in changes if change.image is not None]
    if not shown:
        raise ValueError("changes: expected some about pictures, got none")
    titles = [f"{fill(change.group, 28)}\n\n{fill(change.prompt, 28)}" for change, _ in shown]
    height = 2.6 + 0.17 * max(len(title.splitlines()) for title in titles)
    rows = -(-len(shown) // _IN_A_ROW)
    figure = Figure(figsize=(2.1 * _IN_A_ROW, height * rows), layout="compressed")
    places = list(figure.subplots(rows, _IN_A_ROW, squeeze=False).flat)
    for place in places[len(shown) :]:
        place.remove()
    for place, title, (change, image) in zip(places, titles, shown, strict=False):
        pixels = image.detach().cpu().numpy()
        place.imshow(pixels if pixels.ndim == 2 else pixels.transpose(1, 2, 0), cmap="gray", vmin=0, vmax=1)
        place.set(xticks=[], yticks=[])
        place.set_title(title, loc="left", fontsize="small", color=_SAME, parse_math=False)
        changed = change.before != change.after
        told = f"{change.before} → {change.after}" if changed else f"{change.after}, as before"
        style = {"weight": "bold" if changed else "normal", "color": _CHANGED if changed else _SAME}
        place.set_xlabel(fill(told, 24), loc="left", parse_math=False, **style)
    return figure


def described(changes: Sequence[Change]) -> str:
    """The same in words, a line for each."""
    shown = [change for change in changes if change.image is not None]
    return "\n".join(f"{c.group}: {c.prompt} {c.before} -> {c.after}" for c in shown)
