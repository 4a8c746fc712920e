"""`unike info`: what `patch` would find in a model, and what edits and a memory would cost there; what is in a file."""

from __future__ import annotations

import argparse
import os

from torch import nn

from .. import backbones
from ..artifacts import files
from ..artifacts.edit import Edit
from ..artifacts.memory import MemoryBank
from ..environment import show_config
from ..errors import UnsupportedModelError
from .models import NAMES, skeleton
from .table import table

K = 40  # entries that a token retrieves
_WORDS = 4  # columns of the table that hold no numbers
_SCAN = 64  # bytes to which the codes of an int8 scan are padded; 16 more bound their errors


HELP = "versions, CPU and backends; what would be patched in a model; or what an edit or a memory holds"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument(
        "model",
        nargs="?",
        help=f"{NAMES}; or the file of an edit or a memory",
    )
    parser.add_argument("--neurons", type=int, default=10, help="of an edit, in each layer (default: %(default)s)")
    parser.add_argument("--entries", type=int, default=15_000, help="of a memory (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Print the versions, the table of a model, of which no weights are read, or what a file holds.

    Raises:
        ArtifactError: a file that is neither an edit nor a memory, or is damaged.
        FileNotFoundError: there is no such model.
        UnsupportedModelError: the structure of the model is not known.
        ValueError: a negative number.
    """
    if args.model is None:
        print(show_config())
        return 0
    if args.neurons < 0 or args.entries < 0:
        raise ValueError(
            f"neurons, entries: expected numbers that are not negative, got {args.neurons} and {args.entries}"
        )
    if os.path.isfile(args.model):
        print(describe_file(args.model))
        return 0
    print(describe(skeleton(args.model), args.neurons, args.entries))
    return 0


def describe(model: nn.Module, neurons: int, entries: int) -> str:
    """The table of a model's layers, and what an edit and a memory would add to each.

    Args:
        model: it may be on the meta device.
        neurons: of an edit, in each layer.
        entries: of the memory.
    """
    decoder = backbones.find_decoder(model)
    usual, d = decoder.select(None), decoder.hidden_size
    r, rows = d // 8, min(K, entries)
    edit = neurons * (2 * d + 1) + d + 1  # float32 numbers in a layer
    memory = entries * (-(-d // _SCAN) * _SCAN + 16) + 4 * (rows * (2 * d + r) + r * d + d)  # bytes read for a token
    head = ("layer", "attention", "FFN", "activation", "own, MB", "edit, KB", "added", "memory, MB", "added")
    cells = [head]
    for layer in decoder.layers:
        own = sum(p.numel() * p.element_size() for p in layer.module.parameters())
        sites = layer.ffn if layer.has("ffn") else ()
        ffn = " + ".join(site.name for site in sites) or "none"
        kind = f" ({type(sites[0].module).__name__})" if len(sites) == 1 else ""
        attention = type(layer.attention.module).__name__ if layer.has("attention") else "none"
        cells.append((
            f"{'*' if layer.index in usual else ' '} {layer.index}", attention, ffn + kind,
            _activation(layer), f"{own / 1e6:.1f}", f"{4 * edit / 1e3:.1f}", f"{4 * edit / own:.2%}",
            f"{memory / 1e6:.1f}", f"{memory / own:.1%}",
        ))  # fmt: skip
    where = decoder.path or "the model itself"
    return "\n".join([
        f"{type(model).__name__}: decoder {where}, {len(decoder.layers)} layers, d = {d}",
        f"An edit of {neurons} neurons a layer, a memory of {entries:,} entries with k = {K} and r = {r}.",
        "Added: bytes read for one token beside those that the layer reads itself. *: patched by default.",
        *table(cells, _WORDS),
        f"In {len(usual)} layers: {len(usual) * edit:,} parameters of an edit, and "
        f"{len(usual) * entries * d * 8 / 1e6:,.0f} MB for index and keys of the memory.",
    ])  # fmt: skip


def describe_file(path: str) -> str:
    """What an edit or a memory holds. Raises ArtifactError."""
    artifact: Edit | MemoryBank = Edit.load(path) if files.kind_of(path) == "edit" else MemoryBank.load(path, mmap=True)
    lines = _of_edit(artifact) if isinstance(artifact, Edit) else _of_memory(artifact)
    model = artifact.base_model
    return "\n".join([
        *lines,
        f"  model: {model['model_type']}, {model['layers']} layers, d = {artifact.hidden_size}",
        f"  {artifact.config}",
        *(f"  {name}: {text}" for name, text in artifact.notes.items()),
    ])  # fmt: skip


def _of_edit(edit: Edit) -> list[str]:
    neurons = ", ".join(f"{i}: {len(layer.keys)}" for i, layer in sorted(edit.layers.items()))
    lines = [f"edit {edit.id!r}: neurons in layers {neurons}; {edit.nbytes:,} bytes", f"  memory: {edit.memory_id}"]
    if edit.entries is not None:
        lines.append(f"  scope {edit.scope_id}: {len(edit.entries)} of its own entries decide where it acts")
    return lines


def _of_memory(memory: MemoryBank) -> list[str]:
    layers = ", ".join(map(str, sorted(memory.layers))) or "none"
    lines = [f"memory {memory.id}: {len(memory):,} entries in layers {layers}; {memory.nbytes:,} bytes"]
    if memory.texts is not None:
        lines.append(f"  texts of {sum(map(bool, memory.texts)):,} entries")
    lines += [f"  tenant {name!r}: {len(entries):,} entries" for name, entries in memory.tenants.items()]
    if (scope := memory.scope) is not None:
        reads = "a function that is not in the file" if scope.encoder is None else "the text"
        if scope.layers:
            reads += f" and layers {', '.join(map(str, scope.layers))}"
        lines += [
            f"  scope {scope.id}: {scope.count:,} facts in {len(scope.entries):,} entries of width "
            f"{scope.width}, told by {reads}",
            f"  an edit acts above a margin of {scope.threshold:.3f}, in {scope.false_alarms:.1%} of the prompts for "
            "neighbouring facts",
        ]
    return lines


def _activation(layer: backbones.Layer) -> str:
    try:
        return layer.activation if layer.has("ffn") else "none"
    except UnsupportedModelError:
        return "unknown"
