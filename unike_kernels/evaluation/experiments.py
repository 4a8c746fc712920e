"""The runs behind the paper's tables: a system on a suite, kept request by request, so that a run can be resumed."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from tqdm.auto import tqdm

from .. import digits
from ..artifacts import write_text
from ..config import Config
from ..editing import EncoderTraining
from .digits_suite import digits_suite
from .editors import EDITORS, UniKE
from .editors.base import Editor
from .measure import Measured, before, measure
from .metrics import PROTOCOLS
from .suite import Suite

Backbone = Literal["digits-opt", "digits-llama"]
Tasks = Literal["vqa", "caption", "both"]
BACKBONES: tuple[Backbone, ...] = ("digits-opt", "digits-llama")


@dataclass(frozen=True)
class Run:
    """A system on a suite.

    Attributes:
        backbone: which model.
        tasks: "vqa", "caption" or "both", which come in turn.
        system: a name in `editors.EDITORS`.
        steps: edits in force when their requests are measured.
        variant: what the table calls a changed system, "" for the usual one.
        settings: what is changed: keyword arguments of the system.
    """

    backbone: Backbone
    tasks: Tasks
    system: str
    steps: int = 1
    variant: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of the run's file."""
        parts = (self.backbone, self.tasks, f"{self.steps}-step", self.system, self.variant)
        return "_".join("".join(c if c.isalnum() or c in "-." else "-" for c in part) for part in parts if part)

    def editor(self, model: nn.Module, processor: Any) -> Editor:
        """The system, not fitted."""
        return EDITORS[self.system](model, processor, **(DEFAULTS.get(self.system, {}) | dict(self.settings)))


# Other than a system's own defaults. No search on the validation requests stands behind them yet.
DEFAULTS: dict[str, dict[str, Any]] = {UniKE.name: {"encoders": EncoderTraining(lr=1e-3)}}


def suite(model: nn.Module, processor: Any, tasks: Tasks) -> Suite:
    """The digits of one task, or of both: then requests of the two come in turn."""
    if tasks != "both":
        return digits_suite(tasks, model, processor)
    parts = [digits_suite("vqa", model, processor), digits_suite("caption", model, processor)]
    split = {
        name: [
            dataclasses.replace(request, id=f"{request.task}-{request.id}")
            for pair in zip(*(getattr(part, name) for part in parts), strict=False)
            for request in pair
        ]
        for name in ("train", "validation", "test")
    }
    return Suite("digits-both", **split, preserve=[*parts[0].preserve, *parts[1].preserve])


def perform(
    run: Run, out: Path, *, split: Literal["validation", "test"] = "test", limit: int | None = None, seed: int = 0
) -> list[Measured]:
    """Measure what of a run is not yet in `out`, and return all of it.

    Args:
        run: what to measure.
        out: a folder; each run has a file there, a request a line.
        split: whose requests.
        limit: at most so many of them, the first ones; None: all.
        seed: of everything that is random.

    Raises:
        ValueError: the file is of other settings, or is not one of this function's.
    """
    random.seed(seed)
    torch.manual_seed(seed)
    model, processor = digits.load_model(run.backbone.removeprefix("digits-")), digits.load_processor()
    requests = suite(model, processor, run.tasks)
    wanted = list(getattr(requests, split))[:limit]
    wanted = wanted[: len(wanted) // run.steps * run.steps]
    file = out / split / f"{run.name}.jsonl"
    done = _load(file, run, seed)
    # Sequences are begun anew: what was edited before is not kept.
    start = len([r for r in wanted if r.id in done]) // run.steps * run.steps
    left = wanted[start:]
    if left:
        editor = run.editor(model, processor)
        editor.fit(requests)
        unedited = before(model, processor, left)
        out_of = tqdm(
            measure(editor, left, unedited, steps=run.steps), run.name, len(wanted), initial=start, leave=False
        )
        for measured in out_of:
            if measured.id not in done:
                _append(file, measured)
                done[measured.id] = measured
    return [done[r.id] for r in wanted]


def _header(run: Run, seed: int) -> dict[str, str]:
    settings = DEFAULTS.get(run.system, {}) | dict(run.settings)
    return {
        "run": run.name,
        "seed": str(seed),
        "settings": repr(sorted(settings.items())),
        "protocols": " ".join(PROTOCOLS),
    }


def _load(file: Path, run: Run, seed: int) -> dict[str, Measured]:
    """What is there of the run; a new file gets its first line. A line that was cut off is dropped."""
    header = _header(run, seed)
    if not file.exists():
        write_text(file, json.dumps(header) + "\n")
        return {}
    text = file.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    try:
        first, *lines = [json.loads(line) for line in whole.splitlines()]
        found = {line["id"]: Measured(line["id"], line["scores"], line["seconds"]) for line in lines}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not a file of results: {error}") from error
    if first != header:
        raise ValueError(f"{file}: holds results of {first}, not of {header}; give another folder")
    if whole != text:
        write_text(file, whole)
    return found


def _append(file: Path, measured: Measured) -> None:
    with open(file, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(dataclasses.asdict(measured)) + "\n")


def _unike(variant: str, **settings: Any) -> tuple[str, str, dict[str, Any]]:
    return UniKE.name, variant, settings


_SYSTEMS: list[tuple[str, str, dict[str, Any]]] = [(name, "", {}) for name in EDITORS]

# The rows of Table 4, and of Figures 4 b and c.
_ABLATION = [
    _unike("only Intrin", latent=False),
    _unike("only Latent-IKE", intrinsic=False),
    _unike("Intrin + Latent-IKE (alpha 0.3)", config=Config(alpha=0.3, beta=0.0)),
    _unike("without zeta", config=Config(beta=0.0)),
    _unike("random zeta", steer="random"),
    _unike("semantic zeta", steer="semantic"),
    _unike(""),
]
_DIRECTIONS = [
    _unike(""),
    _unike("without zeta", config=Config(beta=0.0)),
    _unike("random zeta", steer="random"),
    _unike("semantic zeta", steer="semantic"),
]
_GATES = [*(_unike(f"alpha {a}", config=Config(alpha=a)) for a in (0.1, 0.2, 0.3, 0.4, 0.5)), _unike("")]
_NEIGHBOURS = [_unike(f"K {k}", config=Config(k=k)) for k in (1, 5, 10, 20, 40)]


def table(name: str) -> list[Run]:
    """The runs of a table or a figure of the paper.

    Args:
        name: "1" (one step), "2" (10 and 20 steps), "3" (both tasks in one sequence), "4" (ablation), "4a" (K), "4b"
            (fixed alphas), "4c" (directions of zeta).
    """
    both: Sequence[Tasks] = ("vqa", "caption")
    runs: dict[str, Iterable[Run]] = {
        "1": (Run(b, t, *_system(1, s)) for b in BACKBONES for t in both for s in _SYSTEMS),
        "2": (Run("digits-llama", t, *_system(n, s)) for n in (10, 20) for t in both for s in _SYSTEMS),
        "3": (Run("digits-llama", "both", *_system(10, s)) for s in _SYSTEMS),
        "4": (Run("digits-llama", t, *_system(1, s)) for t in both for s in _ABLATION),
        "4a": (Run("digits-llama", "vqa", *_system(1, s)) for s in _NEIGHBOURS),
        "4b": (Run("digits-llama", "vqa", *_system(1, s)) for s in _GATES),
        "4c": (Run("digits-llama", "vqa", *_system(1, s)) for s in _DIRECTIONS),
    }
    if name not in runs:
        raise ValueError(f"table: expected one of {', '.join(runs)}; got {name!r}")
    return list(runs[name])


def _system(steps: int, system: tuple[str, str, dict[str, Any]]) -> tuple[str, int, str, dict[str, Any]]:
    name, variant, settings = system
    return name, steps, variant, settings
