"""Edits in `transformers serve`: the model "name+edit" is the model `name` with that edit, "name+a+b" with two.

All of these models share the weights of one: what each has of its own are module objects, a few kilobytes. Generation,
streaming and continuous batching are transformers' own; its continuous batching serves one model at a time, and so one
set of edits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from ..memory import MemoryBank
from ..patching import patch
from .folder import EditFolder, Version

M = TypeVar("M", bound=nn.Module)
_KEPT = 64  # edited models that are kept while others are asked for


def sharing_weights(model: M) -> M:
    """Another model object with the same parameters and buffers, which can be patched without the first."""
    shared = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, shared)


class EditedModels:
    """Resolves the names of edited models for a server.

    Args:
        edits: the folder with the edits.
        memory: for edited models; None: none.
    """

    def __init__(self, edits: EditFolder, memory: MemoryBank | None = None) -> None:
        self._folder, self._memory = edits, memory
        self._made: dict[tuple[int, tuple[str, ...]], tuple[Any, list[Version]]] = {}

    def split(self, name: str) -> tuple[str, list[Version]]:
        """The base model's name, and the versions of the edits that follow it.

        Raises ValueError for an edit that is not there.
        """
        base, *ids = name.split("+")
        return base, [self._folder.get(id) for id in ids]

    def edited(self, model: Any, versions: list[Version]) -> Any:
        """The model with these edits, or itself with none. Raises as `patch` does."""
        if not versions:
            return model
        key = id(model), tuple(version.key for version in versions)
        if key not in self._made:
            made = sharing_weights(model)
            patch(made, [version.edit for version in versions], self._memory)
            while len(self._made) >= _KEPT:
                del self._made[next(iter(self._made))]
            self._made[key] = made, versions
        return self._made[key][0]


def _resolving(original: Callable[..., Any], models: EditedModels) -> Callable[..., Any]:
    """For transformers' request handlers: which model a request's body names."""

    def resolve(self: Any, body: dict[str, Any]) -> Any:
        from fastapi import HTTPException

        asked = body.get("model")
        if not isinstance(asked, str) or "+" not in asked:
            return original(self, body)
        try:
            base, versions = models.split(asked)
            _, model, processor = original(self, {**body, "model": base})
            edited = models.edited(model, versions)
        except ValueError as error:
            raise HTTPException(status_code=404, detail=f"model: {error}") from error
        body["model"] = asked
        # With the versions: transformers keeps a worker for each of these.
        return "+".join([base, *(version.key for version in versions)]), edited, processor

    return resolve


def serve(edits: str | Path, memory: str | Path | None = None, **options: Any) -> Any:
    """transformers' server, which knows edited models by their names.

    Args:
        edits: a folder of edits, `<id>.safetensors`; they may come, change and go while the server runs.
        memory: a file that edited models use; None: none.
        options: of `transformers serve`, such as host, port, dtype, continuous_batching, non_blocking.

    Returns:
        transformers' server, once it ends; with non_blocking=True at once.

    Raises:
        ImportError: transformers' server is not installed.
        FileNotFoundError, ArtifactError: no such folder or memory, or not a valid one.
    """
    from transformers.cli.serve import Serve
    from transformers.cli.serving.utils import BaseHandler

    models = EditedModels(EditFolder(edits), None if memory is None else MemoryBank.load(memory))
    # The handlers are made by the server itself; it is their common base that resolves names.
    original = getattr(BaseHandler._resolve_model, "original", BaseHandler._resolve_model)
    resolve = _resolving(original, models)
    resolve.original = original  # type: ignore[attr-defined]
    BaseHandler._resolve_model = resolve  # type: ignore[method-assign]
    return Serve(**options)
