"""Pages: they stand alone, whatever is told stays text, and all that a trace holds is in them."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from pages import Page
from PIL import Image

from unike_kernels.artifacts.pictures import Pictures
from unike_kernels.nn import Trace
from unike_kernels.nn.page import page, short, table
from unike_kernels.nn.routing import Route

HOSTILE = "<script>alert('1')</script> &amp; \"quoted\" </td></table><img src=x onerror=y>"


def told(texts=None, words=None, ids=True):
    """A trace of a row of three tokens: nothing acts on the first, on the second neurons do, on the third all."""
    trace = Trace(None if words is None else lambda ids: "".join(words[id] for id in ids))
    begun = trace.begin(1, 3, torch.tensor([[0, 1, 2]]) if ids else None)
    layer = begun.at(7)
    layer.entries = torch.full((1, 3, 7), -1)
    layer.entries[0, 2] = torch.tensor([3, 0, 1, 2, 4, 5, -1])
    layer.scores = torch.full((1, 3, 7), float("-inf"))
    layer.scores[0, 2, :6] = torch.tensor([0.75, 0.625, 0.5, 0.25, 0.125, -0.5])
    layer.alpha, layer.effective, layer.shift = (torch.tensor([[0.0, 0.0, v]]) for v in (0.4375, 2.5, 1.375))
    layer.neurons = {"a": torch.tensor([[[0.0, 0.0], [0.5, -2.0], [0.0, 0.125]]]), "idle": torch.zeros(1, 3, 2)}
    layer.memory_seconds, layer.neuron_seconds, layer.texts = 0.0123, 0.0045, texts
    return trace, begun


def test_all_that_a_trace_holds():
    texts = tuple(f"what entry {i} says" for i in range(6))
    trace, begun = told(texts, ["The", " capital", " is"])
    begun.routes[:] = [Route(None, "a", 0.5, 12, 0.75, 0.1, None, "The capital of Chile is")]
    html = trace.to_html()
    found = Page(html)
    for what in (
        trace.headline, "pass 0: 1 × 3 tokens, 16.8 ms", "row 0: The capital is", "layer 7", "memory 12.3 ms",
        "neurons 4.5 ms", "nothing acts on 1 tokens: The", " capital", "0.438", "2.5", "1.38", "up to 2", "up to 0.125",
        "0.750 what entry 3 says", "0.125 what entry 4 says", "and 1 more", str(begun.routes[0]),
        "fact 12 of the memory ('The capital of Chile is') 0.750",
    ):  # fmt: skip
        assert what in found.text, what
    assert "entry 5" not in found.text and "idle" not in found.text
    assert found.titles == ["neuron 0: 0.5", "neuron 1: -2", "neuron 0: 0", "neuron 1: 0.125"]
    assert "opacity:0.25" in html and "opacity:1.00" in html and "width:44%" in html
    assert trace._repr_html_() == html


def test_it_prints_what_the_nearest_entries_say():
    trace, _ = told(("no",) * 3 + ("yes " * 50, "", ""))
    line = str(trace).splitlines()[1]
    assert (
        line.startswith("layer 7: nearest 0.750 'yes yes ")
        and "yes  … yes" in line
        and line.endswith("yes ', 0.625 'no', 0.125 'entry 4'")
    )
    assert str(told()[0]).endswith("layer 7: nearest 0.750 'entry 3', 0.625 'entry 0', 0.500 'entry 1'")


def test_without_texts_and_tokens():
    found = Page(told()[0].to_html())
    assert "0.750 entry 3" in found.text and "row 0: 0 1 2" in found.text
    assert "row 0: [0][1][2]" in Page(told(ids=False)[0].to_html()).text
    assert "0 passes" in Page(Trace().to_html()).text
    empty = Trace()
    empty.begin(2, 3, torch.zeros(1, 3, dtype=torch.int64))  # of other rows: as if there were none
    assert "row 1: [0][1][2]" in Page(empty.to_html()).text


def test_pictures_of_entries_that_are_shown():
    """Each once, as a file that PIL opens."""
    pixels = torch.randint(0, 256, (2, 48, 48, 3), dtype=torch.uint8)
    trace, begun = told(tuple(f"what entry {i} says" for i in range(6)))
    begun.at(7).pictures = Pictures(pixels, torch.tensor([1, -1, -1, 0, 1, 0]))  # the last one is not shown
    found = Page(trace.to_html())
    assert "pictures of entries" in found.text and found.text.count("what entry 3 says") == 2
    seen = [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) for source in found.images]
    assert [torch.from_numpy(np.array(image)).tolist() for image in seen] == [pixels[i].tolist() for i in (0, 1, 1)]
    assert "pictures of entries" not in Page(told()[0].to_html()).text


def test_what_is_told_stays_text():
    trace, begun = told((HOSTILE,) * 6, [HOSTILE, "\n", HOSTILE])
    begun.at(7).neurons = {HOSTILE: torch.ones(1, 3, 2)}
    begun.routes[:] = [Route(HOSTILE, HOSTILE, 0.5, 1, 0.25, 0.1, None, HOSTILE)]
    found = Page(trace.to_html())
    assert found.text.count("<script>alert('1')</script>") > 10 and "↵" in found.text
    assert HOSTILE in Page(page(HOSTILE)).text


@pytest.mark.parametrize("text", ["x" * 100, HOSTILE])
def test_short_texts_stay(text):
    found = Page(short(text))
    assert (found.text, found.titles) == (text, [])


def test_long_texts_are_cut_in_the_middle():
    text = "<b>" + "x" * 100 + "answer"
    found = Page(short(text))
    assert found.titles == [text] and found.text == f"{text[:60]} … {text[-40:]}"


def test_tables():
    found = Page(table(["<a>", ("b", "number")], [["1", "2"], ["<i>both</i>"]]))
    assert found.text.split() == ["<a>b", "12", "both"]


def test_a_trace_as_a_figure(tmp_path):
    """What it shows are the trace's own values; words of formulas and of other lines stay words."""
    pytest.importorskip("matplotlib")
    trace, begun = told(words=["The", " $x", "\n"])
    begun.at(8).neurons = {"a": torch.tensor([[[0.0], [0.0], [-3.0]]])}
    figure = trace.plot()
    figure.savefig(tmp_path / "a.png")
    panels = {place.get_title(loc="left"): place for place in figure.axes if place.get_title(loc="left")}
    assert list(panels) == ["alpha", "shift", "neurons of a"]  # nothing of the idle edit
    shown = panels["neurons of a"].images[0].get_array()
    assert shown.tolist() == [[0.0, 2.0, 0.125], [0.0, 0.0, 3.0]]
    assert panels["alpha"].images[0].get_array()[0].tolist() == [0.0, 0.0, 0.4375]
    assert [label.get_text() for label in panels["alpha"].get_xticklabels()] == ["The", " $x", "↵"]
    assert [label.get_text() for label in panels["alpha"].get_yticklabels()] == ["layer 7", "layer 8"]
    with pytest.raises(ValueError, match="row: expected one of the 1 of pass 0, got 1"):
        trace.plot(row=1)
    with pytest.raises(IndexError):
        trace.plot(1)
    empty = Trace()
    empty.begin(1, 2)
    with pytest.raises(ValueError, match="number: expected a pass in which something acts"):
        empty.plot()
