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
from unike_bench.harness.measure import Row
from unike_bench.harness.timing import Spread
from unike_bench.report.plots import plots
from unike_bench.report.report import Report
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


def measured(system, role, tokens, milliseconds, **more):
    """A row with all that a row can say."""
    title = f"memory attention: retrieval of k=40 from N=15000, attention, gate and blend, d=4096, T={tokens}"
    seconds = tuple(milliseconds * 1e-3 * (1 + i / 10) for i in range(25))
    return Row(
        "ffn", f"ffn-T{tokens}", title, {"d": 4096, "T": tokens, "layers": 4}, system, role, seconds,
        speedup=Spread(10.25, 11.5, 12.75), against="eager, concatenated once", bound=5e-4, read=5e-4, reached=0.25,
        host=1e-5, graph=True, **more,
    )  # fmt: skip


@pytest.mark.parametrize("width", WIDTHS)
def test_what_the_benchmark_shows(tmp_path, width):
    more = {"over": Spread(0.98, 1.02, 1.05), "added": 4e-3, "recall": 0.9999}
    rows = [
        row
        for tokens in (1, 16, 128)
        for row in (
            measured("unike patched_ffn", "ours", tokens, 43.9, **more),
            measured("unpatched", "base", tokens, 40.1),
            measured("eager, concatenated per call", "peer", tokens, 90.0, **more),
        )
    ]
    failed = dataclasses.replace(rows[0], case="failed", seconds=(), failure=f"AssertionError: {LONG}")
    report = Report([*rows, failed], {"CPU": LONG}, ["faiss is not installed: its rows left out"])
    html = report.html(plots(rows))
    assert overflowing(html, tmp_path, width) == []
    for what in ("p50", "p95", "p99", "over unpatched", "+2.0%", "Throughput: ", "Time over the unpatched"):
        assert what in html, what
    if width == WIDTHS[0]:
        assert shades(html, tmp_path) > 50  # text, and plots


def test_what_does_not_fit_is_found(tmp_path):
    html = page("A page", f'<p style="width: 20em; overflow-wrap: normal">{LONG}</p>')
    assert any(LONG[:40] in found for found in overflowing(html, tmp_path, WIDTHS[0]))
