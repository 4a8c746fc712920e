"""The demo's page, of made-up values: it stands alone, its picture can be seen, and whatever is said stays text."""

from __future__ import annotations

import base64
import io
import itertools

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from pages import Page
from PIL import Image
from unike_eval.demo_page import Change, demo_page, picture
from unike_eval.demo_picture import demo_picture, described

from unike_kernels.nn import Trace
from unike_kernels.training import Sample

HOSTILE = "<script>alert('1')</script> \"&amp;\" </td>"


def made(image=None, text="w1 w2"):
    trace = Trace(lambda ids: "".join(f"<{id}>" for id in ids))
    at = trace.begin(1, 2, torch.tensor([[4, 5]])).at(3)
    at.entries, at.scores, at.texts = torch.tensor([[[1], [0]]]), torch.tensor([[[0.5], [0.25]]]), (text, "said")
    at.alpha = at.effective = at.shift = torch.ones(1, 2)
    changes = [
        Change("the edit", text, "ten", "four"),
        Change("the edit", "other", "six", text),
        Change(text, "p", "a", "a"),
    ]
    scores = {"mmedit": {"reliability": 1.0, "m_locality": 0.5}, "unike": {"reliability": 0.25, text: 0.125}}
    return demo_page("digits-opt", Sample(text, f"answer {text}", image), changes, [f"edit {text}"], scores, trace)


def test_all_of_it():
    html = made()
    found = Page(html)
    for what in (
        "unike demo: digits-opt", "w1 w2 should be answered answer w1 w2", "the edit", "tenfour", "edit w1 w2",
        "mmedit100.0%50.0%", "unike25.0%12.5%", "row 0: <4><5>", "layer 3", "0.500 said", "0.250 w1 w2",
    ):  # fmt: skip
        assert what in found.text, what
    assert found.images == [] and found.text.count("the edit") == 1


def test_whatever_is_said_stays_text():
    found = Page(made(torch.rand(16, 16), HOSTILE))
    assert found.text.count(HOSTILE) >= 8
    assert len(found.images) == 1


@pytest.mark.parametrize("shape", [(5, 4), (3, 5, 4)])
def test_the_picture(shape):
    image = torch.rand(shape)
    (source,) = Page(made(image)).images
    assert source == picture(image)
    with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as seen:
        assert seen.format == "PNG" and seen.size == (4, 5)
        pixels = torch.from_numpy(np.array(seen)).view(5, 4, -1)
    want = image.view(-1, 5, 4).permute(1, 2, 0) * 255
    assert (pixels - want).abs().max() <= 0.5


def test_the_pictures_of_all_changes():
    """Each with its question and answers; what changed is told from what did not. Text alone is left out."""
    images = [torch.rand(4, 5), torch.rand(3, 4, 5), *(torch.rand(2, 2) for _ in range(3))]
    changes = [
        Change("the edit", "what ?", "ten", "four", images[0]),
        Change("elsewhere", "which ? " * 20, "$one_1$", "$one_1$", images[1]),
        *(Change("more", f"p{i}", "a", "b", image) for i, image in enumerate(images[2:])),
        Change("text", "q", "a", "a"),
    ]
    figure = demo_picture(changes)
    FigureCanvasAgg(figure).draw()
    assert len(figure.axes) == 5
    for place, image in zip(figure.axes, images, strict=True):
        wanted = image if image.dim() == 2 else image.permute(1, 2, 0)
        torch.testing.assert_close(torch.tensor(np.array(place.images[0].get_array())), wanted)
    told = [(place.get_title("left"), place.get_xlabel()) for place in figure.axes]
    assert told[0] == ("the edit\n\nwhat ?", "ten → four") and told[1][1] == "$one_1$, as before"
    assert told[1][0].count("which ?") == 20
    changed, same = (place.xaxis.label.get_color() for place in figure.axes[:2])
    assert changed != same
    # No text lies over another or over a picture, or outside.
    texts = [text for place in figure.axes for text in (place._left_title, place.xaxis.label)]
    boxes = [part.get_window_extent() for part in (*texts, *(place.images[0] for place in figure.axes))]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert all(figure.bbox.fully_containsx(x) and figure.bbox.fully_containsy(y) for b in boxes for x, y in b.corners())
    assert described(changes[:2] + changes[-1:]).splitlines() == [
        "the edit: what ? ten -> four",
        f"elsewhere: {'which ? ' * 20} $one_1$ -> $one_1$",
    ]
    with pytest.raises(ValueError, match="changes: expected some about pictures"):
        demo_picture(changes[-1:])
