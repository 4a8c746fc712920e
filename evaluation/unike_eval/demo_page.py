"""The page that `unike demo` writes: the request and its picture, what the model said before and says after, why."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import groupby
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from unike_kernels.nn import Trace
from unike_kernels.nn.page import explanation, page, short, table
from unike_kernels.training import Sample


class Change(NamedTuple):
    """What an edit did to an answer.

    Attributes:
        group: what the prompt is to the edit, in words.
        prompt: what was asked.
        before, after: what the model said.
        image: that it was asked about, a tensor in 0..1, [H, W] or [3, H, W]; None: there was none.
    """

    group: str
    prompt: str
    before: str
    after: str
    image: Tensor | None = None


def demo_page(
    name: str,
    request: Sample,
    changes: Sequence[Change],
    told: Sequence[str],
    scores: Mapping[str, Mapping[str, float]],
    trace: Trace,
) -> str:
    """A page of HTML that stands alone.

    Args:
        name: of the model.
        request: that was edited; its image, if any, is a tensor in 0..1, [H, W] or [3, H, W].
        changes: answers before and after, those of a group behind one another.
        told: the edit's figures, in texts.
        scores: protocol -> metric -> share.
        trace: of a pass over the request with its answer.
    """
    asked = f"<p><code>{escape(request.prompt)}</code> should be answered <code>{escape(request.answer)}</code></p>"
    metrics = list(dict.fromkeys(metric for values in scores.values() for metric in values))
    shares = [
        [escape(protocol), *(f"{values[metric]:.1%}" if metric in values else "" for metric in metrics)]
        for protocol, values in scores.items()
    ]
    return page(
        f"unike demo: {name}",
        asked
        if request.image is None
        else f'<p><img class="pixels" src="{picture(request.image)}" alt="the picture"></p>{asked}',
        "<h2>Before and after</h2>",
        table(["prompt", "before", "after"], _rows(changes)),
        "<h2>The edit</h2>",
        *(f"<p>{escape(line)}</p>" for line in told),
        table(["protocol", *metrics], shares),
        "<h2>Why it answers so</h2>",
        explanation(trace),
    )


def picture(image: Tensor) -> str:
    """A data URI of a PNG of an image in 0..1, [H, W] or [3, H, W]."""
    pixels = (image.detach().cpu().clamp(0, 1) * 255).round().byte().numpy()
    with io.BytesIO() as file:
        Image.fromarray(pixels if pixels.ndim == 2 else pixels.transpose(1, 2, 0)).save(file, format="PNG")
        return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _rows(changes: Sequence[Change]) -> Iterator[Sequence[str]]:
    """Of a table, a group under its name."""
    for group, own in groupby(changes, lambda change: change.group):
        yield [f'<span class="soft">{escape(group)}</span>']
        for change in own:
            yield [short(change.prompt), short(change.before), short(change.after)]
