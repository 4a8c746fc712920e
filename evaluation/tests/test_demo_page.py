"""The demo's page, of made-up values: it stands alone, its picture can be seen, and whatever is said stays text."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from pages import Page
from PIL import Image
from unike_eval.demo_page import Change, demo_page, picture

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
