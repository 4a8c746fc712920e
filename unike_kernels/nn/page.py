"""HTML pages that stand alone: no scripts, nothing from a network, for light and dark screens."""

from __future__ import annotations

import struct
import zlib
from base64 import b64encode
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from html import escape
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from .routing import Route
    from .trace import LayerTrace, Trace

_ENTRIES = 5  # shown of those that a token retrieved
_Say = Callable[[Sequence[int]], str]  # the tokens in these places

_BEGIN, _END = 60, 40  # letters that are left of a long text

# All rules are of what is inside, as a notebook shows the page among others.
_STYLE = """
.unike, .unike-page { --ink: #1c2330; --soft: #5c6675; --line: #d8dde5; --paper: #ffffff; --tint: #f2f5f9;
  --acts: #0b6e4f; --idle: #a3420c; --bar: #2f6fde; color-scheme: light; }
@media (prefers-color-scheme: dark) { .unike, .unike-page { --ink: #e4e8ee; --soft: #9aa5b4; --line: #363e4a;
  --paper: #14181e; --tint: #1d232c; --acts: #5fd3a8; --idle: #f2a071; --bar: #7aa7ff; color-scheme: dark; } }
.unike-page { margin: 0; background: var(--paper); }
.unike { background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; max-width: 75em; margin: 0 auto; padding: 1em; overflow-wrap: anywhere; }
.unike h1 { font-size: 1.5em; } .unike h2 { font-size: 1.2em; } .unike h3 { font-size: 1em; margin: 1.2em 0 .3em; }
.unike summary { cursor: pointer; padding: .4em 0; font-weight: 600; }
.unike img { max-width: 100%; }
.unike img.pixels { max-width: 16em; width: 100%; image-rendering: pixelated; border: 1px solid var(--line); }
.unike .seen { display: flex; flex-wrap: wrap; gap: .6em; }
.unike .seen li { width: 13em; font-size: .85em; }
.unike .seen img { width: 6em; border: 1px solid var(--line); display: block; }
.unike table { border-collapse: collapse; table-layout: fixed; width: 100%; }
.unike th, .unike td { text-align: left; vertical-align: top; padding: .3em .5em; }
.unike tr { border-bottom: 1px solid var(--line); }
.unike th { color: var(--soft); font-weight: 600; font-size: .85em; }
.unike th.number { width: 5.5em; } .unike th.token { width: 15%; } .unike th.neurons { width: 22%; }
.unike td { font-variant-numeric: tabular-nums; }
.unike ol { list-style: none; margin: 0; padding: 0; }
.unike code { background: var(--tint); border-radius: .2em; padding: 0 .2em; white-space: pre-wrap; }
.unike .soft { color: var(--soft); } .unike .failed { color: var(--idle); }
.unike .route { border-left: .3em solid var(--idle); background: var(--tint); padding: .4em .8em; margin: .4em 0; }
.unike .acts { border-color: var(--acts); }
.unike .part { display: inline-block; width: 100%; height: .3em; background: var(--tint); }
.unike .part i, .unike .cell i { display: block; height: 100%; background: var(--bar); }
.unike .cell { display: inline-block; width: .7em; height: .9em; background: var(--tint); margin-right: 1px; }
@media (max-width: 45em) { .unike thead { display: none; }
  .unike table, .unike tbody, .unike tr, .unike td { display: block; }
  .unike tr { padding: .3em 0; } .unike td { padding: 0 .5em; }
  .unike td[data-name]::before { content: attr(data-name) ": "; color: var(--soft); } }
"""


def page(title: str, *parts: str) -> str:
    """A page of HTML under this title, which is a text; the parts are HTML."""
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<style>{_STYLE}</style></head>\n<body class="unike-page"><main class="unike">\n<h1>{escape(title)}</h1>\n'
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )


def cut(text: str) -> str:
    """A text without the middle of a long one, as answers stand at the end."""
    return text if len(text) <= _BEGIN + _END else f"{text[:_BEGIN]} … {text[-_END:]}"


def short(text: str) -> str:
    """A text as HTML, `cut`; all of a long one is its title."""
    told = cut(text)
    title = "" if told == text else f' title="{escape(text)}"'
    return f"<span{title}>{escape(told)}</span>"


def table(heads: Sequence[str | tuple[str, str]], rows: Iterable[Sequence[str]]) -> str:
    """A table.

    Args:
        heads: of the columns: texts, or texts with a class.
        rows: cells of HTML; one that has a single cell spans all columns.
    """
    named = [head if isinstance(head, tuple) else (head, "") for head in heads]
    first = "".join(f'<th class="{kind}">{escape(name)}</th>' for name, kind in named)
    lines = []
    for cells in rows:
        if len(cells) == 1:
            lines.append(f'<tr><td colspan="{len(named)}">{cells[0]}</td></tr>')
            continue
        told = zip(named, cells, strict=True)
        inside = "".join(f'<td data-name="{escape(name)}">{cell}</td>' for (name, _), cell in told)
        lines.append(f"<tr>{inside}</tr>")
    return f"<table><thead><tr>{first}</tr></thead><tbody>\n" + "\n".join(lines) + "\n</tbody></table>"


def explanation(trace: Trace) -> str:
    """HTML of all that a trace holds: a part for each pass, of which the first is open."""
    parts = [f"<p>{escape(trace.headline)}</p>"]
    for number, layers in enumerate(trace.passes):
        (rows, tokens), routes = trace.shapes[number], trace.routes[number]
        seconds = sum(layer.memory_seconds + layer.neuron_seconds for layer in layers.values())
        what = f"pass {number}: {rows} × {tokens} tokens, {_ms(seconds)}"
        inside = [
            _row(partial(trace.said, number, row), row, tokens, routes[row : row + 1], layers) for row in range(rows)
        ]
        opened = " open" if number == 0 else ""
        parts.append(f"<details{opened}><summary>{what}</summary>\n" + "\n".join(inside) + "\n</details>")
    seen = "".join(f"<li>{image}{short(text)}</li>" for text, image in _seen(trace).items())
    return "\n".join([*parts, *([f'<h2>pictures of entries</h2><ol class="seen">{seen}</ol>'] if seen else [])])


def _seen(trace: Trace) -> dict[str, str]:
    """What entries that are shown say -> their picture, once."""
    found: dict[str, str] = {}
    for layer in (layer for layers in trace.passes for layer in layers.values()):
        if layer.entries is None or layer.pictures is None:
            continue
        for entry in dict.fromkeys(layer.entries[..., :_ENTRIES].flatten().tolist()):
            picture = layer.pictures[entry] if entry >= 0 else None
            if picture is not None and layer.text(entry) not in found:
                source = b64encode(_png(picture)).decode()
                found[layer.text(entry)] = f'<img alt="" src="data:image/png;base64,{source}">'
    return found


def _png(pixels: Tensor) -> bytes:
    """A file of uint8 [H, W, 3]."""
    height, width, _ = pixels.shape
    lines = b"".join(b"\0" + bytes(line.flatten().tolist()) for line in pixels)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def _row(say: _Say, row: int, tokens: int, routes: Sequence[Route], layers: dict[int, LayerTrace]) -> str:
    """What was decided for a row of a batch, and what its layers did."""
    said = f"<h2>row {row}: {short(say(range(tokens)))}</h2>"
    why = "".join(
        f'<p class="route{"" if route.edit is None and route.fact is None else " acts"}">{escape(str(route))}</p>'
        for route in routes
    )
    return "\n".join([said + why, *(_layer(say, i, layers[i], row, tokens) for i in sorted(layers))])


def _layer(say: _Say, index: int, layer: LayerTrace, row: int, tokens: int) -> str:
    spent = f"memory {_ms(layer.memory_seconds)}, neurons {_ms(layer.neuron_seconds)}"
    head = f'<h3>layer {index} <span class="soft">{spent}</span></h3>'
    heads: list[str | tuple[str, str]] = [
        ("token", "token"), ("alpha", "number"), ("entries attended", "number"), ("shift", "number"),
        ("neurons", "neurons"), "entries retrieved",
    ]  # fmt: skip
    rows: list[Sequence[str]] = []
    quiet: list[int] = []
    for at in range(tokens):
        if _quiet(layer, row, at):
            quiet.append(at)
            continue
        rows += _skipped(say, quiet)
        quiet = []
        rows.append(_token(layer, row, at, say([at])))
    return head + table(heads, [*rows, *_skipped(say, quiet)])


def _quiet(layer: LayerTrace, row: int, at: int) -> bool:
    """Whether nothing was done to a token."""
    found = layer.entries is not None and bool((layer.entries[row, at] >= 0).any())
    return not found and not any(bool(values[row, at].any()) for values in layer.neurons.values())


def _skipped(say: _Say, quiet: Sequence[int]) -> list[Sequence[str]]:
    """A row for all of these tokens, which follow one another."""
    if not quiet:
        return []
    return [[f'<span class="soft">nothing acts on {len(quiet)} tokens: {short(say(quiet))}</span>']]


def _token(layer: LayerTrace, row: int, at: int, word: str) -> list[str]:
    alpha, spread, shift = (
        "" if t is None else f"{float(t[row, at]):.3g}" for t in (layer.alpha, layer.effective, layer.shift)
    )
    if layer.alpha is not None:
        alpha += f'<span class="part"><i style="width:{100 * min(float(layer.alpha[row, at]), 1):.0f}%"></i></span>'
    said = word.replace("\n", "↵")
    return [f"<code>{escape(said)}</code>", alpha, spread, shift, _neurons(layer, row, at), _retrieved(layer, row, at)]


def _neurons(layer: LayerTrace, row: int, at: int) -> str:
    """A line for each edit that acts on a token: how much each neuron puts out, against the most of any token."""
    lines = []
    for name, values in layer.neurons.items():
        most, own = float(values.abs().max()), values[row, at].tolist()
        if not any(own):
            continue
        cells = [
            f'<span class="cell" title="neuron {i}: {value:.3g}"><i style="opacity:{abs(value) / most:.2f}"></i></span>'
            for i, value in enumerate(own)
        ]
        lines.append(
            f'<li>{short(name)} <span class="soft">up to {max(map(abs, own)):.3g}</span><br>{"".join(cells)}</li>'
        )
    return f"<ol>{''.join(lines)}</ol>" if lines else ""


def _retrieved(layer: LayerTrace, row: int, at: int) -> str:
    """The first entries that a token retrieved, with their scores and what they say."""
    if layer.entries is None or layer.scores is None:
        return ""
    found = zip(layer.entries[row, at].tolist(), layer.scores[row, at].tolist(), strict=True)
    lines = [f"<li>{score:.3f} {short(layer.text(entry))}</li>" for entry, score in found if entry >= 0]
    more = len(lines) - _ENTRIES
    rest = [f'<li class="soft">and {more} more</li>'] if more > 0 else []
    return f"<ol>{''.join([*lines[:_ENTRIES], *rest])}</ol>"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"
