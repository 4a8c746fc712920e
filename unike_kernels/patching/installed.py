"""`installed`: what is in force in a patched model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from .. import backbones
from ..config import Config
from .session import require_state


@dataclass(frozen=True)
class InstalledEdit:
    """An edit that is in force; prints as a line.

    Attributes:
        id: its name.
        layers: decoder layer -> its neurons there.
        betas: decoder layer -> its beta there.
        replaced: with scope="memory", the newer edit of the same fact that wins wherever both would act; None: none.
    """

    id: str
    layers: Mapping[int, int]
    betas: Mapping[int, float]
    replaced: str | None = None

    def __str__(self) -> str:
        places = ", ".join(f"{i}: {n}" for i, n in self.layers.items())
        betas = sorted({f"{beta:.4g}" for beta in self.betas.values()})
        instead = "" if self.replaced is None else f"; {self.replaced!r} takes its place: one fact"
        return f"edit {self.id!r}: neurons of layers {places}; beta {', '.join(betas)}{instead}"


@dataclass(frozen=True, repr=False)
class InstalledReport:
    """What is in force in a patched model; prints as a list.

    Attributes:
        model: class name.
        layers: indices of the patched layers.
        edits: in the order of their arrival.
        memory: `MemoryBank.id`, or None.
        entries: of the memory in each layer.
        tenants: of the memory.
        scope_id: of the memory's scope, or None.
        facts: that the scope knows.
        config: the switches in force; `config.scope` says where edits act.
    """

    model: str
    layers: tuple[int, ...]
    edits: tuple[InstalledEdit, ...]
    memory: str | None
    entries: int
    tenants: tuple[str, ...]
    scope_id: str | None
    facts: int
    config: Config

    def __repr__(self) -> str:
        tenants = f" of the tenants {', '.join(self.tenants)}" if self.tenants else ""
        memory = "none" if self.memory is None else f"{self.memory}, {self.entries:,} entries{tenants}"
        scope = repr(self.config.scope)
        if self.config.scope == "memory":
            scope += f", {self.facts:,} facts of {self.scope_id}"
        return "\n".join([
            f"{self.model}: layers {', '.join(map(str, self.layers))} are patched",
            *(f"  {edit}" for edit in self.edits or ["no edits"]),
            f"  memory: {memory}",
            f"  scope: {scope}",
            f"  {self.config}",
        ])  # fmt: skip


def installed(model: nn.Module) -> InstalledReport:
    """What is in force in a patched model: its edits with their layers and betas, its memory, scope and config.

    It tells of the version that the next pass computes with, after all changes so far (`add_edit`, `remove_edit`,
    `set_beta`, `swap_memory`, `patch(..., replace=True)`); a `rows` block may select less of it.

    Raises PatchError if the model is not patched, or something that was patched is not in it any more.
    """
    state = require_state(model)
    version = state.installed
    memory, router = version.memory, version.router
    replaced = {} if router is None else router.replaced
    edits = (
        InstalledEdit(
            id,
            {i: len(layer.keys) for i, layer in sorted(edit.layers.items())},
            {i: float(layer.beta) for i, layer in sorted(edit.layers.items())},
            replaced.get(id),
        )
        for id, edit in version.artifacts.items()
    )
    scope = None if memory is None else memory.scope
    return InstalledReport(
        type(backbones.unwrap(model)).__name__,
        tuple(sorted({*state.ffns, *state.attentions})),
        tuple(edits),
        None if memory is None else memory.id,
        0 if memory is None else len(memory),
        () if memory is None else tuple(memory.tenants),
        None if scope is None else scope.id,
        0 if scope is None else scope.count,
        state.config,
    )
