"""SmolLM2-135M with an edit and a memory in its last four layers: a token at a time, and a prompt at once.

On a GPU with what Python and transformers take between the launches.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn
from unike_eval.eager import eager
from unike_eval.models import smollm2

from unike_kernels import ops
from unike_kernels.artifacts.edit import Edit, EditLayer
from unike_kernels.artifacts.fingerprint import fingerprint
from unike_kernels.artifacts.memory import MemoryBank, MemoryLayer
from unike_kernels.backbones import find_decoder
from unike_kernels.config import Config
from unike_kernels.nn import memory_shift
from unike_kernels.patching import patch

from ..harness import optional
from ..harness.case import Case, Run, System
from ..harness.roofline import Bound
from . import hidden

N = 15_000
NEURONS = 10
PROMPT = 128
LAYERS = 4  # the last ones, those whose hidden states there are
_REFERENCE = 8  # tokens that the definition, which is slow, is asked about
_AGREEMENT = 1e-3  # of the largest logit
Phase = Literal["decode", "prefill"]


class Subject:
    """The model, an edit of 10 neurons and a memory of `entries` of the model's own hidden states.

    Attributes:
        model: as it came. The systems get copies that share its weights.
        memory, edits: to be patched in.
        ids: int64 [1, 128], a prompt that is not in the memory.
    """

    def __init__(self, entries: int, phase: Phase, device: str = "cpu") -> None:
        self.model, tokenizer = smollm2.load()
        self.model.to(device)
        self.phase = phase
        self.ids = tokenizer(hidden.text(), return_tensors="pt").input_ids[:, -PROMPT:].to(device)
        generator = torch.Generator().manual_seed(0)
        normal = functools.partial(torch.randn, generator=generator)
        states = hidden.states()
        made_for, config = fingerprint(self.model), Config(tokens="all")

        def memory(s: hidden.States) -> MemoryLayer:
            d = s.pre.shape[1]
            r, usual = d // 8, s.out.mean(0)
            # Enc_sem leans towards the usual output, so that the gate is open.
            encoder = ops.SemanticEncoder(
                normal(r, d) * d**-0.5, normal(r), normal(d, r) * r**-0.5, d**0.5 * usual / usual.norm()
            )
            pre, out = (t[:entries].clone() for t in s)
            return MemoryLayer(pre, pre.unsqueeze(1), out.unsqueeze(1), encoder, normal(r), normal(d))

        def neurons(d: int) -> EditLayer:
            return EditLayer(
                normal(NEURONS, d) * d**-0.5, normal(NEURONS), normal(NEURONS, d), normal(d), torch.tensor(0.1)
            )

        self.memory = MemoryBank({i: memory(s) for i, s in states.items()}, config, made_for)
        layers = {i: neurons(s.pre.shape[1]) for i, s in states.items()}
        self.edits = [Edit("edit", layers, "silu", config, made_for, self.memory.id)]
        self._entered = ExitStack()

    def twin(self) -> nn.Module:
        """A copy of the modules on the same weights."""
        return copy.deepcopy(self.model, {id(p): p for p in self.model.parameters()})

    def patched(self) -> nn.Module:
        """A copy that is patched."""
        model = self.twin()
        patch(model, self.edits, self.memory)
        return model

    def eager(self, cached: bool) -> nn.Module:
        """A copy that runs edit and memory in eager torch."""
        model = self.twin()
        self._entered.enter_context(eager(model, self.edits, self.memory, cached=cached))
        return model

    def step(self, model: Any) -> Callable[[], Tensor]:
        """What is timed of a model: the logits [1, 49152] of the token after the prompt, or of the one behind that."""
        if self.phase == "prefill":
            return lambda: model(input_ids=self.ids, use_cache=True, logits_to_keep=1).logits[:, -1]
        cache = model(input_ids=self.ids, use_cache=True).past_key_values

        def decode() -> Tensor:
            logits: Tensor = model(input_ids=self.ids[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
            cache.crop(-1)
            return logits

        return decode

    @functools.cached_property
    def unpatched_logits(self) -> Tensor:
        """Of the model as it came."""
        return self.step(self.model)()

    @functools.cached_property
    def expected(self) -> Tensor:
        """The edited logits as eager torch computes them."""
        return self.step(self.eager(cached=True))()

    def check(self, logits: Tensor) -> None:
        """Raises AssertionError unless edited logits agree with those of eager torch, and the edit can be seen."""
        limit = _AGREEMENT * float(self.expected.abs().max())
        seen = float((self.expected - self.unpatched_logits).abs().max())
        assert seen > 10 * limit, f"the edit changes the logits by {seen:.2g}, too little to check to {limit:.2g}"
        torch.testing.assert_close(logits, self.expected, rtol=0, atol=limit)

    def check_definition(self, model: Any) -> None:
        """Raises AssertionError unless a patched model agrees with the operators' definitions on a short prompt."""
        start = self.ids[:, :_REFERENCE]
        found = model(input_ids=start).logits
        with ops.backend("reference"):
            wanted = model(input_ids=start).logits
        torch.testing.assert_close(found, wanted, rtol=0, atol=_AGREEMENT * float(wanted.abs().max()))

    def bound(self, model: nn.Module) -> Bound:
        """Of what a patched model adds to its forward pass: all layers together."""
        reads: list[Tensor] = []
        counts = {torch.int8: 0.0, torch.float32: 0.0}
        tokens = PROMPT if self.phase == "prefill" else 1
        for layer in find_decoder(model).layers:
            if layer.index in self.memory.layers:
                attention: Any = memory_shift(layer.attention.module)
                tables, k = attention.memory, attention.config.k
                d, r = tables.index.shape[1], tables.projected.shape[-1]
                # The entries of one token: how many those of a prompt have in common is not known.
                gathered = (tables.keys[:k], tables.values[:k], tables.projected[:k])
                packed = (tables.index,) if tables.codes is None else (tables.codes, tables.code_bounds)
                reads += [*packed, *gathered, tables.w2]
                counts[torch.int8] += tokens * tables.index.numel()
                counts[torch.float32] += tokens * (2 * k * d + k * r + r * d)
            for edit in self.edits:
                if layer.index in edit.layers:
                    neurons = edit.layers[layer.index]
                    reads += [neurons.keys, neurons.values]
                    counts[torch.float32] += tokens * 2 * neurons.keys.numel()
        return Bound(tuple(reads), counts, over="unpatched")


def _patched(subject: Subject) -> Run:
    model = subject.patched()

    def check(logits: Tensor) -> None:
        subject.check(logits)
        subject.check_definition(model)

    return Run(subject.step(model), check, subject.bound(model))


def _unpatched(subject: Subject) -> Run:
    def check(logits: Tensor) -> None:
        assert torch.equal(logits, subject.unpatched_logits), "the model does not repeat its logits"

    return Run(subject.step(subject.model), check)


def _eager(cached: bool, subject: Subject) -> Run:
    return Run(subject.step(subject.eager(cached)), subject.check)


def case(entries: int, phase: Phase, device: str = "cpu") -> Case:
    """One token after a prompt of 128, or that prompt."""
    systems = {
        "unike patched": System("ours", _patched),
        "unpatched": System("base", _unpatched),
        "eager, concatenated per call": System("peer", functools.partial(_eager, False)),
        "eager, concatenated once": System("peer", functools.partial(_eager, True)),
    }
    tokens = PROMPT if phase == "prefill" else 1
    title = f"{phase} of SmolLM2-135M, edit and memory of {entries} entries in {LAYERS} layers, T={tokens}"
    shape = {"phase": phase, "N": entries, "T": tokens, "layers": LAYERS}
    data = functools.partial(Subject, entries, phase, device)
    return Case("decode", title, shape, data, systems, device, captured=False)  # a cache grows


def quick(device: str = "cpu") -> list[Case]:
    """Both phases; none where SmolLM2 is not installed."""
    return _both(N, device)


def full(device: str = "cpu") -> list[Case]:
    """Another size of the memory too."""
    return [*quick(device), *_both(1000, device)]


def _both(entries: int, device: str) -> list[Case]:
    phases: tuple[Phase, Phase] = "decode", "prefill"
    return [case(entries, phase, device) for phase in phases] if optional.smollm2() else []
