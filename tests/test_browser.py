"""The pages in a real browser: nothing runs out of its place, on wide and narrow screens, and there is a picture.

They need Chromium (`apt install chromium`), and are skipped without.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from html import unescape

import chats
import pytest
import torch
from configs import every_token
from PIL import Image
from unike_eval.demo_page import Change, demo_page

import unike_kernels as uk
from unike_kernels.nn.page import page
from unike_kernels.training import Sample

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium (apt install chromium)"),
]
WIDTHS = (1280, 600)
LONG = "pneumono" * 25  # with no place to break a line
# What is wider than its place, or ends beyond the window, in a copy of the page: the page itself has no scripts.
PROBE = """<script>
const out = [], width = document.documentElement.clientWidth;
for (const e of document.querySelectorAll("body *:not(script)")) {
  const box = e.getBoundingClientRect();
  if (box.width && (box.right > width + 1 || (e.clientWidth && e.scrollWidth > e.clientWidth + 1)))
    out.push(e.tagName + "." + e.className + ": " + e.textContent.slice(0, 40));
}
document.documentElement.setAttribute("data-found",
  JSON.stringify({width, total: document.documentElement.scrollWidth, out}));
</script></body>"""


def browse(html, folder, width, *options):
    """What Chromium prints."""
    file = folder / "page.html"
    file.write_text(html)
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={width},1600",
        f"--user-data-dir={folder}/profile", *options, file.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def overflowing(html, folder, width):
    """The elements that do not fit."""
    dom = browse(html.replace("</body>", PROBE), folder, width, "--dump-dom")
    found = json.loads(unescape(re.search(r'data-found="(.*?)"', dom).group(1)))
    assert found["width"] == width
    return found["out"] + (["the page"] if found["total"] > width else [])


def shades(html, folder):
    """How many colours there are in a picture of it."""
    browse(html, folder, WIDTHS[0], f"--screenshot={folder / 'page.png'}")
    with Image.open(folder / "page.png") as seen:
        assert seen.width == WIDTHS[0]
        return len(seen.convert("RGB").getcolors(1 << 24))


@pytest.fixture
def trace(make_memory, make_edit):
    """Of a patched model that reads a long word, with entries that say long things and a route that names them."""
    model = chats.model()
    memory = make_memory(model, every_token(k=7, values="out"), layers=[2, 3])
    memory = dataclasses.replace(memory, texts=tuple(LONG if i % 2 else "a b" for i in range(50)))
    edit = make_edit(model, "an-edit-of-a-rather-long-name-" + "x" * 120, memory, layers=(2, 3))
    tokenizer = chats.tokenizer()
    with torch.no_grad(), uk.patched(model, [edit], memory), uk.explain(model, tokenizer) as found:
        model(**tokenizer(f"Who {LONG[:24]}?", return_tensors="pt"))
    return found


@pytest.mark.parametrize("width", WIDTHS)
def test_what_explain_shows(trace, tmp_path, width):
    assert overflowing(trace.to_html(), tmp_path, width) == []


@pytest.mark.parametrize("width", WIDTHS)
def test_what_the_demo_shows(trace, tmp_path, width):
    changes = [Change("the edit", f"question: {LONG} ?", "ten", LONG), Change("elsewhere", "a", "b", "c")]
    scores = {name: dict.fromkeys(("reliability", "t_generality", "m_generality"), 1 / 3) for name in ("a", "b")}
    request = Sample(LONG, LONG, torch.rand(16, 16))
    html = demo_page("digits-opt", request, changes, [f"edit {LONG}"], scores, trace)
    assert overflowing(html, tmp_path, width) == []
    if width == WIDTHS[0]:
        assert shades(html, tmp_path) > 50  # text, bars and a picture of noise


def test_what_does_not_fit_is_found(tmp_path):
    html = page("A page", f'<p style="width: 20em; overflow-wrap: normal">{LONG}</p>')
    assert any(LONG[:40] in found for found in overflowing(html, tmp_path, WIDTHS[0]))
