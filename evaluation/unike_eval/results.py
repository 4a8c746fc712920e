"""What a run has measured, kept request by request in a file, so that it goes on where it was interrupted."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from unike_kernels.artifacts.files import write_text
from unike_kernels.training.progress import progress_bar

from .editors.base import Editor
from .measure import TOGETHER, Measured, Observed, measure
from .suite import Request


def precision() -> str:
    """Of products of float32 matrices, in words where it is not torch's own."""
    found = torch.get_float32_matmul_precision()
    return "" if found == "highest" else f", float32 matmul precision {found}"


class Results:
    """A file of JSON lines: what the run is, then a request a line.

    Args:
        file: created if it does not exist. A last line that was cut off is dropped.
        header: what the run is; results of another matmul precision are not mixed with it.

    Attributes:
        rows: request id -> what was measured.

    Raises:
        ValueError: the file holds the results of another run, or is none of results.
    """

    def __init__(self, file: Path, header: Mapping[str, str]) -> None:
        self._file, self.rows = file, dict[str, Measured]()
        if precision():
            header = {**header, "precision": torch.get_float32_matmul_precision()}
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps(header) + "\n")
            return
        text = file.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        try:
            first, *lines = [json.loads(line) for line in whole.splitlines()]
            self.rows = {line["id"]: Measured(line["id"], line["scores"], line["seconds"]) for line in lines}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}: not a file of results: {error}") from error
        if first != header:
            raise ValueError(f"{file}: holds results of {first}, not of {header}; give another folder")
        if whole != text:
            write_text(file, whole)

    def add(self, measured: Measured) -> None:
        """Keep what was measured, unless it is there."""
        if measured.id not in self.rows:
            with open(self._file, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(dataclasses.asdict(measured)) + "\n")
            self.rows[measured.id] = measured


def resumed(
    results: Results | None,
    requests: Sequence[Request],
    editor: Callable[[], Editor],
    unedited: Callable[[Sequence[Request]], Mapping[str, Observed]],
    *,
    steps: int = 1,
    name: str = "requests",
    progress: bool = True,
) -> list[Measured]:
    """Measure what is not yet in the results, and return all.

    Args:
        results: what is there; None: nothing is, and nothing is kept.
        requests: in this order; a last sequence that is shorter than `steps` is left out.
        editor: makes a fitted one, if there is something left to be measured.
        unedited: what the model says to some of the requests before any edit.
        steps: see `measure`. A sequence that was interrupted is begun anew: what was edited before is not kept.
        name: of the run, for the progress.
        progress: show it.
    """
    done = {} if results is None else results.rows
    requests = requests[: len(requests) // steps * steps]
    start = len([r for r in requests if r.id in done]) // steps * steps
    if start == len(requests):
        return [done[r.id] for r in requests]
    found, made = dict(done), editor()
    part = steps * max(1, TOGETHER // steps)
    with progress_bar(name, len(requests), progress) as bar:
        bar.update(start)
        for at in range(start, len(requests), part):
            some = requests[at : at + part]
            for measured in measure(made, some, unedited(some), steps=steps):
                if results is not None:
                    results.add(measured)
                found.setdefault(measured.id, measured)
                bar.update()
    return [found[r.id] for r in requests]
