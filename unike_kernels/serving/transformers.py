"""Edits in `transformers serve`: the model "name+edit" is the model `name` with that edit, "name+a+b" with two.

All of these models share the weights of one: what each has of its own are module objects, a few kilobytes. With
continuous batching they are one model, whose requests have their own edits. Generation and streaming are transformers'.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from ..artifacts.memory import MemoryBank
from ..patching import patch
from .continuous import EditingManager
from .flat import check_memory
from .folder import EditFolder, Version

M = TypeVar("M", bound=nn.Module)
_KEPT = 64  # edited models that are kept while others are asked for
_asked: ContextVar[list[str]] = ContextVar("asked")  # the edits of the HTTP request that is handled


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

    def manager(self, model: Any, **settings: Any) -> Any:
        """Of continuous batching: its requests have the edits of the HTTP requests that they come from."""
        return _Manager(model, self._folder.path, self._memory, **settings)


class _Manager(EditingManager):
    """Of a server, which adds requests without saying for whom."""

    def add_request(self, *args: Any, **kwargs: Any) -> str | None:
        from fastapi import HTTPException

        ids = _asked.get()
        try:
            return super().add_request(*args, unike_edit=ids, unike_memory=None if ids else False, **kwargs)
        except ValueError as error:
            self.output_router.result_handlers.pop(kwargs["request_id"], None)  # nothing will come
            raise HTTPException(status_code=404, detail=f"model: {error}") from error


def _resolving(original: Callable[..., Any], models: EditedModels) -> Callable[..., Any]:
    """For transformers' request handlers: which model a request's body names."""

    def resolve(self: Any, body: dict[str, Any]) -> Any:
        from fastapi import HTTPException

        _asked.set([])
        asked = body.get("model")
        if not isinstance(asked, str) or "+" not in asked:
            return original(self, body)
        try:
            base, versions = models.split(asked)
            model_id, model, processor = original(self, {**body, "model": base})
            body["model"] = asked
            if _batches(self, model, processor):
                _asked.set([version.edit.id for version in versions])
                return model_id, model, processor
            edited = models.edited(model, versions)
        except ValueError as error:
            raise HTTPException(status_code=404, detail=f"model: {error}") from error
        # With the versions: transformers keeps a worker for each of these.
        return "+".join([base, *(version.key for version in versions)]), edited, processor

    return resolve


def _batches(handler: Any, model: Any, processor: Any) -> bool:
    """Whether this request will join the continuous batch, as its handler finds out."""
    from transformers.cli.serving.systemone import SystemOneHandler

    modality = handler.model_manager.get_model_modality(model, processor=processor)
    batches: bool = handler.generation_state.use_continuous_batching(model, modality)
    return batches and not isinstance(handler, SystemOneHandler)


def _starting(models: EditedModels) -> Callable[..., None]:
    """For transformers' manager of continuous batching: with what it begins at the first request."""

    def init_cb(self: Any, model: Any, gen_config: Any) -> None:
        if self._cb is None:
            settings = {"generation_config": gen_config, "continuous_batching_config": self._cb_config}
            self._cb = models.manager(model, **settings)
            self._cb.start()

    return init_cb


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
        ValueError: with continuous_batching=True, a memory that `FlatModel` does not take.
    """
    from transformers.cli.serve import Serve
    from transformers.cli.serving.utils import BaseHandler, CBGenerateManager

    loaded = None if memory is None else MemoryBank.load(memory)
    if loaded is not None and options.get("continuous_batching"):
        check_memory(loaded)
    models = EditedModels(EditFolder(edits), loaded)
    # Handlers and managers are made by the server itself.
    original = getattr(BaseHandler._resolve_model, "original", BaseHandler._resolve_model)
    resolve = _resolving(original, models)
    resolve.original = original  # type: ignore[attr-defined]
    BaseHandler._resolve_model = resolve  # type: ignore[method-assign]
    CBGenerateManager.init_cb = _starting(models)  # type: ignore[method-assign]
    return Serve(**options)
