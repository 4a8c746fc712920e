"""Requests from benchmarks' files, and `unike eval --data FILE --model PATH`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from unike_kernels.artifacts.files import write_text
from unike_kernels.cli import rows
from unike_kernels.cli.models import load
from unike_kernels.cli.rows import Form

from .editors import EDITORS, UniKE, make_editor
from .evaluate import evaluate
from .metrics import Case
from .suite import Request, Suite

__all__ = ["Form", "evaluate_file", "read_requests"]


def read_requests(file: Path | str, form: Form | None = None) -> list[Request]:
    """The requests of a JSON, JSONL or YAML file in the library's own form, or as a benchmark publishes it.

    MMEdit's, VLKEB's (with its portability), KnowEdit's, ZsRE's and CounterFact's are known; of several right answers
    the first is asked for. Images stay files, and are opened where they are needed.

    Args:
        file: of the requests.
        form: how its texts are meant; None: prompts as they are, images next to the file.

    Raises:
        FileNotFoundError: no such file, or images are missing.
        ValueError: rows of another form; the message names the first of them and counts the others.
    """
    file = Path(file)
    found, _ = rows.read_edits(file, form or Form(chat=False, template="{}", images=file.parent))
    return [_request(row) for row in found]


def _request(row: rows.Request) -> Request:
    case = Case(
        row.sample,
        rephrasings=row.rephrasings,
        images=row.images,
        text_locality=row.text_locality,
        image_locality=row.image_locality,
        near_locality=row.near_locality,
        subject_locality=row.subject_locality,
        portability=row.portability,
    )
    return Request(row.id, "vqa", case, row.wrong, subject=row.subject)


def evaluate_file(
    data: Path,
    name: str,
    out: Path,
    form: Form,
    *,
    train: Path | None = None,
    systems: Sequence[str] | None = None,
    steps: int = 1,
    limit: int | None = None,
    device: str | None = None,
    seed: int = 0,
) -> None:
    """Evaluate systems on the requests of a file, print a table for each, and write all to evaluation.md in `out`.

    Args:
        data: the requests.
        name: of the model, see `unike_kernels.cli.models`.
        out: a folder; a run that was interrupted goes on from there.
        form: how the texts of the files are meant.
        train: other requests, for the systems that learn from some; UniKE makes its memory of them.
        systems: names in `editors.EDITORS`; None: UniKE.
        steps: see `evaluate`.
        limit: at most so many requests, the first ones; None: all.
        device: None: a GPU, if there is one.
        seed: of everything that is random.

    Raises:
        FileNotFoundError, ValueError: see `read_requests` and `evaluate`; a system that learns, and no `train`.
    """
    requests, learnt = read_requests(data, form)[:limit], [] if train is None else read_requests(train, form)
    names = systems or [UniKE.name]
    for system in names:
        if train is None and EDITORS[system].learns:
            raise ValueError(f"--train: {system} learns from other requests than those of --data; expected a file")
    model, processor = load(name, device)
    kept = [sample for request in learnt for sample in (*request.case.text_locality, *request.case.image_locality)]
    learnt = [replace(request, id=f"train-{request.id}") for request in learnt]  # files count their rows alike
    suite = Suite(str(train), learnt, [], requests, kept, ended=True)
    told = [f"# {data.name}", f"{name}, {len(requests)} requests, {steps} in force together, seed {seed}."]
    for system in names:
        editor = make_editor(system, model, processor, seed)
        editor.fit(suite)
        found = evaluate(model, processor, requests, editor, steps=steps, out=out / system)
        told += [f"## {system}", str(found)]
        print(f"{system}\n\n{found}\n", flush=True)
    write_text(out / "evaluation.md", "\n\n".join(told) + "\n")
    print(f"written: evaluation.md and the requests' results in {out}")
