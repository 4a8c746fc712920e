"""Whether edits, a memory and a model belong together."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .. import backbones
from ..artifacts.compatibility import ModelDescription, check_compatibility
from ..artifacts.edit import Edit
from ..artifacts.fingerprint import identity
from ..artifacts.memory import MemoryBank
from ..config import Config
from ..errors import MismatchError


def describe(model: nn.Module, decoder: backbones.Decoder) -> ModelDescription:
    """What the judgement must know of a model."""
    activation = lambda i: decoder.layers[i].activation  # noqa: E731
    return ModelDescription(decoder.hidden_size, activation, len(decoder.layers), identity=identity(model))


def check_artifacts(
    model: nn.Module,
    decoder: backbones.Decoder,
    edits: Sequence[Edit],
    memory: MemoryBank | None,
    config: Config,
    override: bool,
) -> None:
    """`check_compatibility` of each edit and of the memory that are to be used together.

    Args:
        model: the model.
        decoder: its decoder.
        edits: the edits.
        memory: the memory in force, or None.
        config: the switches in force.
        override: see `check_compatibility`.
    """
    description = describe(model, decoder)
    memories = (memory.id, *memory.ids) if memory and memory.layers else (None,)
    scope = None
    if config.scope == "memory":
        if memory is None or memory.scope is None:
            raise MismatchError("scope='memory': expected a memory that has a scope (training.build_scope makes one)")
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise MismatchError("scope='memory': expected a model whose prompt its decoder reads, not an encoder")
        scope = memory.scope.id
        deciding = max(memory.scope.layers, default=0)
        edited = {*memory.layers, *(i for edit in edits for i in edit.layers)}
        if early := sorted(i for i in edited if i < deciding):
            raise MismatchError(f"edits, memory: their layers {early} come before layer {deciding}, which decides")
    for edit in edits:
        check_compatibility(edit, description, config=config, memories=memories, scope=scope, override=override)
    if memory is not None:
        check_compatibility(memory, description, config=config, override=override)
