"""The runs behind the paper's tables: a system on a suite, kept request by request, so that a run can be resumed."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from .builtin_suite import WORLDS, world_suite
from .countries import countries_suite
from .editors import IKE, FineTune, IntrinsicIKE, LatentIKE, TPatcher, UniKE, make_editor
from .editors.base import Editor
from .flags import flags_suite, load_flags
from .measure import Measured, Observed, before
from .metrics import PROTOCOLS
from .models import smollm2
from .results import Results, resumed
from .settings import CANDIDATES, DEFAULTS, H_POS, REAL, REAL_CANDIDATES, SCOPED, Settings, told
from .suite import Request, Suite, Task

Backbone = Literal["digits-opt", "digits-llama", "easyvqa-opt", "easyvqa-llama", "countries-smollm2", "flags-smollm2"]
Tasks = Literal["vqa", "caption", "both"]
BACKBONES: tuple[Backbone, ...] = ("digits-opt", "digits-llama")  # of the paper's tables
SECOND: tuple[Backbone, ...] = ("easyvqa-opt", "easyvqa-llama")
SHIPPED = BACKBONES + SECOND


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

    def editor(self, model: nn.Module, processor: Any, seed: int = 0) -> Editor:
        """The system, not fitted."""
        return make_editor(self.system, model, processor, seed, **{**DEFAULTS.get(self.system, {}), **self.settings})


def suite(backbone: Backbone, model: nn.Module, processor: Any, tasks: Tasks) -> Suite:
    """The suite of the backbone's world for one task, or for both: then requests of the two come in turn."""
    world = backbone.split("-")[0]
    if world == "countries":
        return countries_suite(model, processor)
    if world == "flags":
        return flags_suite(model, processor)
    if tasks != "both":
        return world_suite(world, tasks, model, processor)
    parts = [world_suite(world, task, model, processor) for task in get_args(Task)]
    split = {
        name: [
            dataclasses.replace(request, id=f"{request.task}-{request.id}")
            for pair in zip(*(getattr(part, name) for part in parts), strict=False)
            for request in pair
        ]
        for name in ("train", "validation", "test")
    }
    preserve = [*parts[0].preserve, *parts[1].preserve]
    requests = split["train"], split["validation"], split["test"]
    return Suite(f"{world}-both", *requests, preserve, parts[0].facts, parts[0].ended)  # those of the world


@dataclass
class _Setting:
    """A model with the requests to it, and what it says to them before any edit: shared by the runs of a process."""

    model: nn.Module
    processor: Any
    suite: Suite
    unedited: dict[str, Observed] = field(default_factory=dict)

    def before(self, requests: Sequence[Request]) -> Mapping[str, Observed]:
        unknown = [r for r in requests if r.id not in self.unedited]
        self.unedited |= before(self.model, self.processor, unknown)
        return self.unedited


@cache
def load(backbone: Backbone) -> tuple[nn.Module, Any]:
    """The model and its processor."""
    world, decoder = backbone.split("-")
    if world == "countries":
        return smollm2.load()
    if world == "flags":
        return load_flags()
    return WORLDS[world].load_model(decoder), WORLDS[world].load_processor()


@cache
def _setting(backbone: Backbone, tasks: Tasks) -> _Setting:
    model, processor = load(backbone)
    return _Setting(model, processor, suite(backbone, model, processor, tasks))


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
        ValueError: the file is of other settings, or is not one of this function's; fewer requests than a sequence has.
    """
    setting = _setting(run.backbone, run.tasks)
    wanted = list(getattr(setting.suite, split))[:limit]
    if len(wanted) < run.steps:
        raise ValueError(f"requests: expected at least {run.steps} for a sequence of {run.name}, got {len(wanted)}")

    def fitted() -> Editor:
        editor = run.editor(setting.model, setting.processor, seed)
        _sow(seed)
        editor.fit(setting.suite)
        _sow(seed)
        return editor

    results = Results(out / split / f"{run.name}.jsonl", _header(run, seed))
    return resumed(results, wanted, fitted, setting.before, steps=run.steps, name=run.name)


def _sow(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)


def _header(run: Run, seed: int) -> dict[str, str]:
    settings = {**DEFAULTS.get(run.system, {}), **run.settings}
    return {
        "run": run.name,
        "seed": str(seed),
        "settings": repr(sorted(settings.items())),
        "protocols": " ".join(PROTOCOLS),
    }


# As the paper trains an edit: each step sees the whole prompt.
_WHOLE = dataclasses.replace(DEFAULTS[UniKE.name]["training"], prompt_dropout=0.0)


def _unike(variant: str, *, settings: Settings | None = None, **config: Any) -> tuple[str, str, Settings]:
    """A variant of UniKE without prompt dropout: other arguments, and changes of its configuration."""
    changed = {"config": dataclasses.replace(DEFAULTS[UniKE.name]["config"], **config)} if config else {}
    return UniKE.name, variant, {"training": _WHOLE, **(settings or {}), **changed}


def _with_ike(variant: str, k: int) -> tuple[str, str, Settings]:
    config = dataclasses.replace(DEFAULTS[UniKE.name]["config"], beta=0.0)
    return IntrinsicIKE.name, variant, {**DEFAULTS[UniKE.name], "training": _WHOLE, "config": config, "k": k}


_AS_IN_PAPER = _unike("UniKE, without prompt dropout")
# The share of 0.15, 0.3 and 0.5 that suits them best on validation requests of both worlds (docs/evaluation-toy.md).
_WITH_DROPOUT = [
    (name, f"{name}, with prompt dropout", {"prompt_dropout": 0.15}) for name in (FineTune.name, TPatcher.name)
]
_WITH_SCOPE = (UniKE.name, "UniKE, with a scope", SCOPED)
_SYSTEMS: list[tuple[str, str, Settings]] = [
    *((name, "", {}) for name in CANDIDATES),
    _WITH_SCOPE,
    _AS_IN_PAPER,
    *_WITH_DROPOUT,
]

# The rows of Table 4, and of Figures 4 b and c. What the paper calls collaboration is zeta and the alpha of each token.
_ALPHA = 0.3
_ABLATION = [
    _unike("only Intrin", settings={"latent": False}, beta=0.0),
    _unike("only Latent-IKE", settings={"intrinsic": False}, alpha=_ALPHA),
    _with_ike("", DEFAULTS[IKE.name]["k"]),
    _unike(f"Intrin + Latent-IKE (alpha {_ALPHA})", alpha=_ALPHA, beta=0.0),
    _unike("Intrin + Latent-IKE, alpha", beta=0.0),
    _unike(f"Intrin + Latent-IKE (alpha {_ALPHA}), zeta", alpha=_ALPHA),
    _AS_IN_PAPER,
    (UniKE.name, "", {}),
]
_DIRECTIONS = [
    _AS_IN_PAPER,
    _unike("without zeta", beta=0.0),
    _unike("random zeta", settings={"steer": "random"}),
    _unike("semantic zeta", settings={"steer": "semantic"}),
]
_GATES = [*(_unike(f"alpha {a}", alpha=a) for a in (0.1, 0.2, 0.3, 0.4, 0.5)), _AS_IN_PAPER]
_NEIGHBOURS = [
    *(_unike(f"K {k}", k=k, alpha=_ALPHA, beta=0.0) for k in (1, 5, 10, 20, 40)),
    *(_with_ike(f"K {k}", k) for k in (1, 4, 8, 16)),
]


# On real facts every system, each with the settings that its search found; UniKE's edits without a scope; and a memory
# alone that returns h_pos of the nearest entry.
_COUNTRIES: list[tuple[str, str, Settings]] = [
    *((name, "UniKE, scope" if name == UniKE.name else "", settings) for name, settings in REAL.items()),
    (UniKE.name, "UniKE, edits act everywhere", {**REAL[UniKE.name], "scope": None}),
    (LatentIKE.name, "Latent-IKE, h_pos", {"config": H_POS, "layers": 4}),
]
# KE, MEND and SERAC learn for long on a model of this size; IKE would have to show the pictures of its examples.
_FLAGS = [system for system in _COUNTRIES if system[0] in (FineTune.name, TPatcher.name, UniKE.name)]


def table(name: str) -> list[Run]:
    """The runs of a table or a figure of the paper.

    Args:
        name: "1" (one step), "2" (10 and 20 steps), "3" (both tasks in one sequence), "4" (ablation), "4a" (K), "4b"
            (fixed alphas), "4c" (directions of zeta); "easyvqa" (one step, the second world); "countries" (real facts:
            one edit, ten and a hundred in force); "search" and "countries-search" (all candidates for the settings of
            each system).
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
        "easyvqa": (Run(b, "vqa", *_system(1, s)) for b in SECOND for s in _SYSTEMS),
        "countries": (Run("countries-smollm2", "vqa", *_system(n, s)) for n in (1, 10, 100) for s in _COUNTRIES),
        "flags": (Run("flags-smollm2", "vqa", *_system(1, s)) for s in _FLAGS),
        "countries-search": (
            Run("countries-smollm2", "vqa", name, variant=told(c), settings=c)
            for name, candidates in REAL_CANDIDATES.items()
            for c in candidates
        ),
        "search": (
            Run(b, "both", name, variant=told(c), settings=c)
            for name, candidates in CANDIDATES.items()
            for c in candidates
            for b in BACKBONES
        ),
    }
    if name not in runs:
        raise ValueError(f"table: expected one of {', '.join(runs)}; got {name!r}")
    return list(runs[name])


def _system(steps: int, system: tuple[str, str, Settings]) -> tuple[str, int, str, Settings]:
    name, variant, settings = system
    return name, steps, variant, settings
