"""What an edit costs at inference: prefill and decode, unpatched, in eager torch, and patched, in one run."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unike_kernels.artifacts.edit import Edit
from unike_kernels.artifacts.memory import MemoryBank
from unike_kernels.patching import patched
from unike_kernels.training.samples import accepted, text_model_of

from .eager import eager


@dataclass(frozen=True)
class LatencyRow:
    """One system in one phase, in milliseconds per forward pass."""

    phase: str
    system: str
    median: float
    spread: float  # interquartile range
    ratio: float  # median of the rounds' ratios to the unpatched model


@dataclass(frozen=True)
class LatencyTable:
    """All systems in all phases; prints as a table.

    Attributes:
        rows: in the order measured.
        tokens: of the prompt.
        threads: torch's.
        agreement: largest difference between the logits of the edited systems, checked before anything was timed.
    """

    rows: tuple[LatencyRow, ...]
    tokens: int
    threads: int
    agreement: float

    def __str__(self) -> str:
        lines = [
            f"latency in ms per forward pass: prompt of {self.tokens} tokens, {self.threads} threads, "
            f"edited systems agree to {self.agreement:.1g}",
            "  phase    system                              median  spread  x unpatched",
        ]
        lines += [f"  {r.phase:8s} {r.system:35s} {r.median:6.2f}  {r.spread:6.2f}  {r.ratio:6.2f}" for r in self.rows]
        return "\n".join(lines)


@torch.no_grad()
def measure_latency(
    model: nn.Module,
    inputs: dict[str, Tensor],
    edits: Sequence[Edit],
    memory: MemoryBank | None,
    *,
    rounds: int = 15,
    calls: int = 5,
) -> LatencyTable:
    """Time the systems in turn, `rounds` times, `calls` forward passes each time.

    Args:
        model: not patched.
        inputs: one encoded prompt, as `encode` gives it.
        edits: what is patched in.
        memory: patched in, too; None: edits alone.
        rounds: interleaved repetitions, at least 3.
        calls: forward passes per repetition and system.

    Raises:
        RuntimeError: the edited systems compute different things, so that their times could not be compared.
        ValueError: too few rounds or calls.
    """
    if rounds < 3 or calls < 1:
        raise ValueError(f"rounds, calls: expected at least 3 and 1, got {rounds} and {calls}")
    systems: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "unpatched": nullcontext,
        "eager, weights concatenated per call": lambda: eager(model, edits, memory, cached=False),
        "eager, concatenation cached": lambda: eager(model, edits, memory, cached=True),
        "patched": lambda: patched(model, edits, memory),
    }
    into = text_model_of(model, inputs)
    prefill = functools.partial(into, **accepted(into, inputs), use_cache=True)
    worst = _check_agreement(prefill, systems)
    text: Any = getattr(model, "language_model", model)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    longer = torch.cat([mask, mask[:, :1]], 1)
    times: dict[tuple[str, str], list[float]] = {(phase, s): [] for phase in ("prefill", "decode") for s in systems}
    for _ in range(rounds):
        for name, system in systems.items():
            with system():
                cache = text(input_ids=ids, attention_mask=mask, use_cache=True).past_key_values

                def decode(cache: Any = cache) -> None:
                    text(input_ids=ids[:, -1:], attention_mask=longer, past_key_values=cache, use_cache=True)
                    cache.crop(-1)

                times["prefill", name].append(_time(prefill, calls))
                times["decode", name].append(_time(decode, calls))
    rows = []
    for (phase, name), values in times.items():
        quarters = statistics.quantiles(values, n=4)
        ratios = [v / u for v, u in zip(values, times[phase, "unpatched"], strict=True)]
        rows.append(
            LatencyRow(phase, name, statistics.median(values), quarters[2] - quarters[0], statistics.median(ratios))
        )
    return LatencyTable(tuple(rows), ids.shape[1], torch.get_num_threads(), worst)


def _time(run: Callable[[], object], calls: int) -> float:
    """Milliseconds per call, after one call that is not counted."""
    run()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls * 1e3


def _check_agreement(prefill: Callable[[], Any], systems: dict[str, Any]) -> float:
    logits = {}
    for name, system in systems.items():
        with system():
            logits[name] = prefill().logits.float()
    wanted = logits["patched"]
    edited = {name: v for name, v in logits.items() if name not in ("unpatched", "patched")}
    differences = {name: float((v - wanted).abs().max()) for name, v in edited.items()}
    limit = 1e-3 * float(wanted.abs().max())
    wrong = {name: d for name, d in differences.items() if not d <= limit}
    if wrong:
        raise RuntimeError(f"the edited systems do not compute the same logits (limit {limit:.2g}): {wrong}")
    return max(differences.values())
