"""`unike tune`: the fastest tile sizes of each Triton kernel on this GPU, for each bucket of tokens by itself, one size
after the other."""

from __future__ import annotations

import functools
import importlib
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from unike_kernels.ops import _tiles
from unike_kernels.ops.patched_ffn import FUSED_TOKENS

from .cases import attention, ffn
from .harness import device
from .harness.case import Run

_ROUNDS = 15


@dataclass(frozen=True)
class Tunable:
    """A kernel and the launches that count.

    Attributes:
        op: its name in the cache.
        module: where its `Tiles` and `CANDIDATES` are, below unike_kernels.ops.
        runs: (tokens, dtype) -> launches of several widths, each checked before it is timed.
        most: tokens of the largest bucket.
    """

    op: str
    module: str
    runs: Callable[[int, torch.dtype], Sequence[Run]]
    most: int = _tiles.BUCKETS[-1]


@dataclass(frozen=True)
class Tuned:
    """What was found for a kernel and launches of one form: its sizes, and their seconds with the default ones and with
    these."""

    op: str
    form: str
    sizes: Any
    before: float
    after: float


_WIDTHS = 4096, 576


def _ffn_runs(prepare: Callable[[ffn.Layer], Run], tokens: int, dtype: torch.dtype) -> list[Run]:
    return [prepare(ffn.Layer(d, tokens, min(tokens, 8), "cuda", dtype)) for d in _WIDTHS]


def _attention_runs(tokens: int, dtype: torch.dtype) -> list[Run]:
    layers = (attention.Layer(attention.N, d, tokens, attention.K, "cuda", dtype) for d in _WIDTHS)
    return [attention.fused(layer) for layer in layers]


TUNABLES = (
    Tunable("patched_ffn", "patched_ffn.triton_fused", functools.partial(_ffn_runs, ffn.fused), FUSED_TOKENS),
    Tunable("add_extra_neurons", "patched_ffn.triton", functools.partial(_ffn_runs, ffn.beside)),
    Tunable("latent_attention", "latent_attention.triton", _attention_runs),
)


def seconds(run: Run) -> float:
    """Of a call on the GPU: the median of some rounds."""
    timer, call = device.timer("cuda"), device.replay(run.call) or run.call
    return statistics.median(timer(call, 1) for _ in range(_ROUNDS))


def tune(
    tunables: Sequence[Tunable],
    dtypes: Sequence[torch.dtype] = (torch.bfloat16,),
    timed: Callable[[Run], float] = seconds,
) -> Iterator[Tuned]:
    """Try each candidate of each size, the others as they are the best so far; what fails or is wrong is left out.

    Args:
        tunables: some of `TUNABLES`.
        dtypes: of the weights.
        timed: seconds of a call.

    Yields:
        What was found for each, and each bucket of tokens.

    Raises:
        AssertionError: a result is wrong with the default sizes.
    """
    forms = itertools.product(tunables, dtypes, _tiles.BUCKETS)
    for each, dtype, tokens in forms:
        if tokens > each.most:
            continue
        module = importlib.import_module(f"unike_kernels.ops.{each.module}")
        runs = each.runs(tokens, dtype)
        best = module.Tiles()
        before = shortest = _cost(each.op, best, runs, timed)
        for name, candidates in module.CANDIDATES.items():
            for value in candidates:
                sizes = best._replace(**{name: value})
                if sizes == best:
                    continue
                try:
                    cost = _cost(each.op, sizes, runs, timed)
                except Exception:  # does not compile, does not fit, or is wrong: no candidate
                    continue
                if cost < shortest:
                    best, shortest = sizes, cost
        yield Tuned(each.op, _tiles.form(tokens, dtype), best, before, shortest)


def _cost(op: str, sizes: Any, runs: Sequence[Run], timed: Callable[[Run], float]) -> float:
    """The geometric mean of the seconds of the runs, each of which is checked first."""
    with _tiles.forced(op, sizes):
        logs = []
        for run in runs:
            run.check(run.call())
            logs.append(math.log(timed(run)))
    return math.exp(statistics.fmean(logs))


def merged(found: Sequence[Tuned], name: str) -> Mapping[str, Any]:
    """The cache with what was found on the GPU of this name."""
    cache = _tiles.read()
    own = dict(cache.get(name, {}))
    for each in found:
        own[each.op] = own.get(each.op, {}) | {each.form: each.sizes._asdict()}
    return cache | {name: own}
