"""Measuring edits of a model of one's own, in one call that can be interrupted."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from typing_extensions import override

from unike_kernels.artifacts.edit import Edit
from unike_kernels.artifacts.fingerprint import fingerprint
from unike_kernels.artifacts.memory import MemoryBank
from unike_kernels.patching import patched
from unike_kernels.training.samples import Sample

from .editors.base import Editor
from .editors.unike import UniKE
from .measure import Estimate, Measured, before, figures
from .metrics import METRICS, PROTOCOLS, Observation
from .results import Results, resumed
from .suite import Request


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        rows: each request with its scores in all protocols, in the order of the requests.
    """

    rows: tuple[Measured, ...]

    def figures(self, protocol: str = "generated") -> dict[str, Estimate]:
        """Metric, and their "mean" -> its estimate over requests. Raises ValueError for an unknown protocol."""
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol: expected one of {', '.join(PROTOCOLS)}; got {protocol!r}")
        return figures(self.rows, protocol)

    def __str__(self) -> str:
        """A Markdown table, a protocol a line: percentages with their 95% confidence intervals over requests."""
        found = {protocol: self.figures(protocol) for protocol in PROTOCOLS}
        names = [m for m in (*METRICS, "mean") if any(m in of for of in found.values())]
        lines = ["| protocol | " + " | ".join(names) + " |", "|" + " --- |" * (len(names) + 1)]
        for protocol, of in found.items():
            cells = (str(of[m]) if m in of else "" for m in names)
            lines.append(f"| {protocol}: {PROTOCOLS[protocol]} | {' | '.join(cells)} |")
        seconds = statistics.median(row.seconds for row in self.rows)
        return "\n".join([*lines, "", f"{len(self.rows)} requests, {seconds:.2f} seconds an edit (median)."])


def evaluate(
    model: nn.Module,
    processor: Any,
    requests: Sequence[Request],
    edits: Sequence[Edit] | Editor | None = None,
    *,
    memory: MemoryBank | None = None,
    steps: int = 1,
    out: Path | str | None = None,
    progress: bool = True,
) -> Evaluation:
    """Edit, measure and take back, request by request, in all protocols of `metrics`.

    Args:
        model: a Hugging Face model, not patched; it is as it was afterwards.
        processor: its processor or tokenizer.
        requests: see `read_requests`.
        edits: trained ones, each with the id of its request; or a system that makes them, fitted if it learns from
            other requests (`unike_eval.editors`); None: the library's own neurons, trained here without a memory.
        memory: that is in force with trained edits.
        steps: edits that are in force together when their requests are measured; what is left over is left out.
        out: a folder, created if it does not exist, in which each request is kept in evaluation.jsonl once it is
            measured: a second call goes on where the first one was interrupted. None: nothing is kept.
        progress: show how far it is (see UNIKE_PROGRESS).

    Raises:
        ValueError: fewer requests than steps, ids that are not distinct, requests without an edit; a memory without
            trained edits; or `out` holds the results of another run.
    """
    requests = list(requests)
    ids = [request.id for request in requests]
    if not 1 <= steps <= len(requests):
        raise ValueError(f"steps: expected 1 to {len(requests)}, as there are so many requests; got {steps}")
    if len(set(ids)) < len(ids):
        raise ValueError(f"requests: expected distinct ids, got {next(id for id in ids if ids.count(id) > 1)!r} twice")
    if isinstance(edits, Editor | None):
        if memory is not None:
            raise ValueError("memory: expected trained edits with it; systems make their own")
        editor = edits or UniKE(model, processor, latent=False)
    else:
        by_id = {edit.id: edit for edit in edits}
        missing = [id for id in ids if id not in by_id]
        if missing:
            raise ValueError(f"edits: expected one with the id of each request, got none for {', '.join(missing[:5])}")
        made = {id(request.case.request): by_id[request.id] for request in requests}
        editor = _Trained(model, processor, made, memory)
    results = None if out is None else Results(Path(out) / "evaluation.jsonl", _header(editor, model, requests, steps))
    rows = resumed(
        results, requests, lambda: editor, lambda some: before(model, processor, some),
        steps=steps, name="evaluate", progress=progress,
    )  # fmt: skip
    return Evaluation(tuple(rows))


class _Trained(Editor):
    """Edits that were trained before: of the request with this `id()` that one."""

    name = "trained edits"

    def __init__(self, model: nn.Module, processor: Any, made: Mapping[int, Edit], memory: MemoryBank | None) -> None:
        super().__init__(model, processor)
        self._made, self._memory, self._edits = made, memory, list[Edit]()

    @override
    def edit(self, request: Sample) -> None:
        self._edits.append(self._made[id(request)])

    @override
    def reset(self) -> None:
        self._edits.clear()

    @override
    def observe(self, samples: Sequence[Sample]) -> list[Observation]:
        with patched(self.model, self._edits, self._memory):
            return super().observe(samples)


def _header(editor: Editor, model: nn.Module, requests: Sequence[Request], steps: int) -> dict[str, str]:
    """What tells a run from others."""
    settings = {
        name: value
        for name, value in sorted(vars(editor).items())
        if not name.startswith("_") and (isinstance(value, int | float | str) or dataclasses.is_dataclass(value))
    }
    asked = repr([(r.id, r.case.request.question, r.case.request.answer) for r in requests])
    return {
        "system": editor.name,
        "settings": repr(settings),
        "model": json.dumps(fingerprint(model), sort_keys=True),
        "requests": hashlib.sha256(asked.encode()).hexdigest(),
        "steps": str(steps),
        "protocols": " ".join(PROTOCOLS),
    }
