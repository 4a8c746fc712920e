"""UniKE: this library's own edits, with a memory of the training requests."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from typing_extensions import override

from unike_kernels.artifacts.edit import Edit
from unike_kernels.artifacts.memory import MemoryBank
from unike_kernels.config import Config
from unike_kernels.patching import patched
from unike_kernels.training import (
    EditTraining,
    EncoderTraining,
    ScopeResult,
    ScopeTraining,
    build_memory,
    build_scope,
    train_edits,
)
from unike_kernels.training.build_memory import MemoryResult
from unike_kernels.training.samples import Sample

from ..metrics import Observation
from ..suite import Suite
from .base import Editor

STEERING = ("truth", "random", "semantic")

_SCOPES: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], ScopeResult]] = WeakKeyDictionary()
_MADE: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], MemoryResult]] = WeakKeyDictionary()


class UniKE(Editor):
    """Extra neurons, a memory, and zeta' (paper, section 3).

    Args:
        config: the semantics.
        encoders, training: how the memory's encoders and an edit are trained; whether an edit ends the model's turn is
            the suite's.
        intrinsic: train neurons for each edit; False: the memory alone.
        latent: shift the attention by the memory; False: neurons alone, zeta' as ever.
        steer: zeta' from the truthfulness space, "truth"; or as long, but a direction at random, "random", or that from
            wrong to right answers in the semantic space, "semantic".
        scope: how a scope is trained that decides where an edit acts; None: edits act in every row.
        scope_layers: whose states it reads, see `build_scope`.
        layers: of the edits; None: those of the memory.
        preserve: hold the model to what it says to the suite's preserved questions (without a suite, to neutral ones),
            and to other edits' requests.
        seed: of the encoders, the edits, the scope and a direction at random.
    """

    name = "UniKE"

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        *,
        config: Config | None = None,
        encoders: EncoderTraining | None = None,
        training: EditTraining | None = None,
        intrinsic: bool = True,
        latent: bool = True,
        steer: Literal["truth", "random", "semantic"] = "truth",
        scope: ScopeTraining | None = None,
        scope_layers: Sequence[int] | None = None,
        layers: Sequence[int] | None = None,
        preserve: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(model, processor)
        self.config, self.seed = config or Config(), seed
        self.scope = None if scope is None else replace(scope, seed=seed)
        self.scope_layers, self.layers = scope_layers, layers
        if scope is not None:
            self.config = replace(self.config, scope="memory")
        self.encoders = replace(encoders or EncoderTraining(), seed=seed)
        self.training = training or EditTraining()
        if steer not in STEERING:
            raise ValueError(f"steer: expected one of {', '.join(STEERING)}; got {steer!r}")
        if steer == "semantic" and self.config.values == "projected":
            raise ValueError("steer: 'semantic' needs the states at \"pre\" or \"out\", not config.values='projected'")
        self.steer = steer
        self.intrinsic, self.latent = intrinsic, latent
        self._edits: list[Edit] = []
        self._requests: list[Sample] = []  # of the edits in force: those to come shall not answer for them
        self._prepared: dict[int, Edit] = {}
        self.preserve = preserve
        self._preserve: list[Sample] | None = None if preserve else []  # None: neutral questions
        self.independent = scope is not None and not preserve
        self._memory: MemoryBank | None = None
        self._zeta: dict[int, Tensor] | None = None

    @override
    def learn(self, suite: Suite) -> None:
        self.training = replace(self.training, end=suite.ended)
        if not suite.train:  # nothing to make a memory of: the neurons alone
            return
        self._preserve = list(suite.preserve) if self.preserve else []
        scope = None if self.scope is None else self._scope(suite)
        if scope is not None and not self.latent:  # a memory of the scope alone
            self._memory = scope.memory(self.model, self.config)
            return
        made = self._made(suite)
        if self.latent:
            self._memory = replace(made.memory, config=self.config, scope=scope.scope if scope else None)
        self._zeta = None if self.latent and self.steer == "truth" else self._directions(made)

    def _made(self, suite: Suite) -> MemoryResult:
        """The memory of a suite's training requests: variants that differ in other things share it."""
        known = _MADE.setdefault(self.model, {})
        key = suite.name, tuple(r.id for r in suite.train), self.encoders, self.config.values
        if key not in known:
            triplets = [r.triplet for r in suite.train]
            known[key] = build_memory(
                self.model,
                self.processor,
                triplets,
                config=replace(self.config, scope="all"),
                training=self.encoders,
                progress=False,
            )
        return known[key]

    def _scope(self, suite: Suite) -> ScopeResult:
        """Of a suite's facts: variants that differ in other things share it."""
        known = _SCOPES.setdefault(self.model, {})
        key = suite.name, self.scope, self.scope_layers
        if key not in known:
            known[key] = build_scope(
                self.model,
                self.processor,
                suite.facts,
                layers=self.scope_layers,
                training=self.scope,
                progress=False,
            )
        return known[key]

    @torch.no_grad()
    def _directions(self, made: MemoryResult) -> dict[int, Tensor]:
        """Of each layer, [d]."""
        found = {}
        for i, space in made.spaces.items():
            right = direction = space.zeta_prime
            if self.steer == "random":
                direction = torch.randn(right.shape, generator=torch.Generator().manual_seed(self.seed + i))
            elif self.steer == "semantic":
                hidden = made.hidden[i]
                # Of the states that Enc_sem was trained on.
                at_pre = self.config.values == "pre"
                pos, neg = (hidden.pos_pre, hidden.neg_pre) if at_pre else (hidden.pos_out, hidden.neg_out)
                direction = space.semantic(pos).mean(0) - space.semantic(neg).mean(0)
            found[i] = direction * (right.norm() / direction.norm().clamp(min=1e-12))
        return found

    @override
    def prepare(self, requests: Sequence[Sample]) -> None:
        if self.intrinsic:
            made = self._trained(requests)
            self._prepared = {id(request): edit for request, edit in zip(requests, made, strict=True)}

    @override
    def edit(self, request: Sample) -> None:
        if not self.intrinsic:
            return
        if id(request) in self._prepared and (self.independent or not self._edits):
            self._edits.append(replace(self._prepared[id(request)], id=f"edit-{len(self._edits)}"))
        else:
            self._edits += self._trained([request])
        self._requests.append(request)

    def _trained(self, requests: Sequence[Sample]) -> list[Edit]:
        """An edit for each, in addition to those in force, unless these do not matter."""
        previous = [] if self.independent else self._edits
        n = len(previous)
        results = train_edits(
            self.model,
            self.processor,
            requests,
            self._memory,
            ids=[f"edit-{n}-{i}" for i in range(len(requests))],
            previous=previous,
            preserve=self._preserve,
            protect=self._requests if self.preserve else (),
            layers=self.layers,
            config=self.config,
            zeta=self._zeta,
            training=replace(self.training, seed=self.seed + n),
            progress=False,
        )
        return [result.edit for result in results]

    @override
    def reset(self) -> None:
        self._edits.clear()
        self._requests.clear()

    def in_force(self) -> AbstractContextManager[object]:
        """Within the block the model is the edited one."""
        return patched(self.model, self._edits, self._memory, config=self.config)

    @override
    def observe(self, samples: Sequence[Sample]) -> list[Observation]:
        with self.in_force():
            return super().observe(samples)
