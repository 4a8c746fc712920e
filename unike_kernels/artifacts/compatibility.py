"""Whether an edit or a memory was made for a model: one judgement, for `patch`, `fold`, banks and servers alike."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from ..config import Config
from ..errors import MismatchError
from .edit import Edit
from .fingerprint import Identity, judge
from .memory import MemoryBank


@dataclass(frozen=True)
class ModelDescription:
    """What is known of a model, or of what serves one.

    Attributes:
        hidden_size: d.
        activation: decoder layer -> the activation of its FFN; may raise UnsupportedModelError.
        layers: how many decoder layers; None: not known.
        editable: the layers that edits may have neurons in; None: all.
        identity: which model it is; None: not known.
        what: what messages call it.
    """

    hidden_size: int
    activation: Callable[[int], str]
    layers: int | None = None
    editable: Collection[int] | None = None
    identity: Identity | None = None
    what: str = "model"


def check_compatibility(
    artifact: Edit | MemoryBank,
    model: ModelDescription,
    *,
    config: Config | None = None,
    memories: Sequence[str | None] | None = None,
    scope: str | None = None,
    override: bool = False,
) -> None:
    """Whether an edit or a memory fits a model. Sizes and layers must; the rest may be overridden.

    Warns where the base model was cast or quantised since, or its weights could not be compared.

    Args:
        artifact: the edit or the memory.
        model: what it is to be used with.
        config: the switches that it is to be used with; None: its own.
        memories: of an edit: the ids of the memories in force, one of which it must have been trained with, None for
            none; the first is the one that messages name. None: not judged.
        scope: of an edit: the id of the scope that decides where it acts; None: none does.
        override: accept another base model, config or memory.

    Raises:
        MismatchError: it does not fit; the message names the artifact, what it has and what was found.
    """
    name = f"edit {artifact.id!r}" if isinstance(artifact, Edit) else f"memory {artifact.id}"
    if artifact.hidden_size != model.hidden_size:
        raise MismatchError(
            f"{name}: its hidden size is {artifact.hidden_size}, the {model.what}'s {model.hidden_size}"
        )
    beyond = [i for i in artifact.layers if model.layers is not None and i >= model.layers]
    if beyond:
        raise MismatchError(f"{name}: it names the layers {beyond}, the {model.what} has {model.layers}")
    problems, warning = [], None
    if model.identity is not None:
        error, warning = judge(artifact.base_model, model.identity)
        problems += [error] if error else []
    if config is not None and (differing := config.differences(artifact.config)):
        problems.append(f"its Config differs ({'; '.join(differing)})")
    if isinstance(artifact, Edit):
        if model.editable is not None and (missing := sorted(set(artifact.layers) - set(model.editable))):
            raise MismatchError(f"{name}: the {model.what} has no layers {missing}, it has {sorted(model.editable)}")
        for i in artifact.layers:
            if (found := model.activation(i)) != artifact.activation:
                raise MismatchError(f"{name}: it is for {artifact.activation} FFNs, the {model.what}'s are {found}")
        if memories is not None and artifact.memory_id not in memories:
            problems.append(f"it was trained with the memory {artifact.memory_id}, this one is {memories[0]}")
        if scope is not None and artifact.scope_id != scope:
            raise MismatchError(
                f"{name}: it has {'no entries' if artifact.scope_id is None else 'entries of another scope'}, by which "
                "the memory decides where it acts: make some (training.with_entries)"
            )
    if problems and not override:
        raise MismatchError(f"{name}: {'; '.join(problems)}. Pass override=True to use it all the same.")
    if warning:
        warnings.warn(f"{name}: {warning}", stacklevel=3)
