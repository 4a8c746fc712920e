"""`unike edit`: edits from a file, trained, measured and saved."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..artifacts.edit import Edit
from ..artifacts.memory import MemoryBank
from ..backbones import find_decoder
from ..errors import ArtifactError
from ..patching import check_artifacts, patched
from ..training import EditResult, EditTraining, Sample, predicted, train_edit, train_edits, with_entries
from .models import NAMES, load
from .rows import Form, Request, read_edits
from .table import table

HELP = "train the edits that a file asks for, and say what came of them"
_SHOWN = 40  # characters of a prompt, and of a target

_FIELDS = """
A row has a prompt (or messages) and a target, and may have an image, rephrasings, preserve and an id. The names of
EasyEdit's, KnowEdit's, ZsRE's, CounterFact's, MMEdit's and VLKEB's files are understood as well: src, target_new, alt,
rephrase_prompt, rephrase, subject, locality, loc, m_loc and others. All edits are held to what the model says to all
that the file's rows preserve.
"""


def add_arguments_of_files(parser: argparse.ArgumentParser) -> None:
    """The model and the file; `unike memory` takes them too."""
    parser.add_argument("model", help=NAMES)
    parser.add_argument("file", type=Path, help="JSON, JSONL or YAML: a row or a list of rows")
    add_form(parser)


def add_form(parser: argparse._ActionsContainer) -> None:
    """What says how a file is meant, and where the model is."""
    parser.add_argument("--images", type=Path, help="folder that images' paths start from (default: the file's)")
    parser.add_argument("--chat", action="store_true", help="prompts are what a user says in a chat")
    parser.add_argument(
        "--template", default="{}", help="that prompts are put into, such as 'Question: {} Short answer:'"
    )
    parser.add_argument(
        "--question",
        help="the same for questions about unrelated images, where prompts are no questions: MMEdit's captions "
        "(default: --template)",
    )
    parser.add_argument("--device", help="(default: a GPU, if there is one)")


def form_of(args: argparse.Namespace) -> Form:
    """How the file is meant."""
    return Form(args.chat, args.template, args.images or args.file.parent, args.question)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.epilog = _FIELDS
    add_arguments_of_files(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder for <id>.safetensors and report.json")
    parser.add_argument(
        "--memory", type=Path, help="a memory, which is in force as at inference; its scope decides where edits act"
    )
    parser.add_argument("--sequence", action="store_true", help="train each with those before it in force")
    parser.add_argument("--layers", type=int, nargs="+", help="(default: the memory's, else the last four)")
    parser.add_argument("--steps", type=int, default=EditTraining.steps, help="at most (default: %(default)s)")


@dataclass(frozen=True)
class Line:
    """What came of a request.

    Attributes:
        id, prompt, target: of the request.
        steps: that training took.
        met: whether the edited model predicts every token of the target.
        stopped: why training ended.
        loss: of the target, at the end.
        divergence: from the unedited model on what is preserved, in nats a token.
        rephrasings: how many of them are answered by the target, and how many there are.
        file: of the edit.
    """

    id: str
    prompt: str
    target: str
    steps: int
    met: bool
    stopped: str
    loss: float
    divergence: float
    rephrasings: tuple[int, int]
    file: str


def run(args: argparse.Namespace) -> int:
    """Train, save and report; 0 if every target is met.

    Raises:
        ArtifactError: an id that is no name of a file; a damaged memory.
        FileNotFoundError: no such model, file or image.
        MismatchError: the memory is another model's.
        ValueError: a file of another form.
    """
    requests, unused = read_edits(args.file, form_of(args))
    for request in requests:
        if Path(request.id).name != request.id or not request.id.isprintable():
            raise ArtifactError(f"{args.file}: id: expected a name for a file, got {request.id!r}")
    if unused:
        print(f"fields that are not known: {', '.join(unused)}")
    memory = None if args.memory is None else MemoryBank.load(args.memory)
    training = EditTraining(steps=args.steps)
    model, processor = load(args.model, args.device)
    if memory is not None:
        check_artifacts(model, find_decoder(model), [], memory, memory.config, override=False)
    given = {"layers": args.layers, "training": training}
    results = _trained(model, processor, requests, memory, args.sequence, given)
    args.out.mkdir(parents=True, exist_ok=True)
    lines: list[Line] = []
    edits: list[Edit] = []
    for request, result in zip(requests, results, strict=True):
        edit, file = result.edit, args.out / f"{request.id}.safetensors"
        if edit.entries is not None and memory is not None and memory.scope is not None and request.rephrasings:
            edit = with_entries(model, processor, edit, memory.scope, [request.sample, *request.rephrasings])
        edit.save(file)
        edits = [*edits, edit] if args.sequence else [edit]
        with patched(model, edits, memory):
            right = predicted(model, processor, request.rephrasings)
        lines.append(_line(request, result, (sum(right), len(right)), file))
    (args.out / "report.json").write_text(json.dumps([asdict(line) for line in lines], indent=1, ensure_ascii=False))
    print("\n".join(described(lines)))
    return 0 if all(line.met for line in lines) else 1


def _trained(
    model: nn.Module,
    processor: Any,
    requests: Sequence[Request],
    memory: MemoryBank | None,
    sequence: bool,
    given: dict[str, Any],
) -> list[EditResult]:
    samples, ids = [request.sample for request in requests], [request.id for request in requests]
    given["preserve"] = [sample for request in requests for sample in request.preserve] or None
    if not sequence:
        return train_edits(model, processor, samples, memory, ids=ids, **given)
    results: list[EditResult] = []
    before: list[Sample] = []
    for id, sample in zip(ids, samples, strict=True):
        edits = [result.edit for result in results]
        results.append(train_edit(model, processor, sample, memory, id=id, previous=edits, protect=before, **given))
        before.append(sample)
    return results


def _line(request: Request, result: EditResult, rephrasings: tuple[int, int], file: Path) -> Line:
    asked, met = request.sample, result.reached
    return Line(
        request.id, asked.question, asked.answer, result.steps - 1, met, result.stopped, result.losses[-1],
        result.divergence, rephrasings, str(file),
    )  # fmt: skip


def described(lines: Sequence[Line]) -> list[str]:
    """The lines as a table, and how many targets are met."""
    head = ("edit", "prompt", "target", "met", "steps", "loss", "divergence", "rephrasings")
    cells: list[Sequence[str]] = [head]
    for line in lines:
        right, count = line.rephrasings
        cells.append((
            line.id, _short(line.prompt), _short(line.target), "yes" if line.met else "NO", str(line.steps),
            f"{line.loss:.3f}", f"{line.divergence:.4f}", f"{right} of {count}" if count else "-",
        ))  # fmt: skip
    met = sum(line.met for line in lines)
    return [*table(cells, 4), f"{met} of {len(lines)} targets met"]


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"{line[: _SHOWN - 3]}..."
