"""Edits in `transformers serve`: the model "name+edit" is the model `name` with that edit, "name+a+b" with two.

All of these models share the weights of one: what each has of its own are module objects, a few kilobytes. With
continuous batching they are one model, whose requests have their own edits. Generation and streaming are transformers'.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections import Counter
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

from ..artifacts.memory import MemoryBank
from ..errors import PatchError, UnsupportedModelError
from ..patching import patch, rows
from .continuous import EditingManager
from .ragged import check_memory
from .repository import MOST_EDITS, EditRepository, NoSuchEditError, Version, check_ids, check_most

M = TypeVar("M", bound=nn.Module)
_KEPT = 64  # edited models of a model, and workers for them, that are kept while others are asked for
_log = logging.getLogger("unike_kernels")


class _Asked(NamedTuple):
    """What the HTTP request that is handled asked for: the edits, and transformers' name of the model without."""

    edits: tuple[str, ...] = ()
    base: str | None = None


_NOTHING = _Asked()
_asked: ContextVar[_Asked] = ContextVar("asked", default=_NOTHING)


class RequestError(Exception):
    """What a client asked for and cannot have; it is told in the form of OpenAI's errors."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status

    @classmethod
    def of(cls, error: Exception) -> RequestError:
        """404 for an edit that is not there, 400 for all else."""
        return cls(404 if isinstance(error, NoSuchEditError) else 400, f"model: {error}")

    def body(self) -> dict[str, Any]:
        """The reply."""
        code = "model_not_found" if self.status == 404 else None
        told = {"message": str(self), "type": "invalid_request_error", "param": "model", "code": code}
        return {"error": told}


def sharing_weights(model: M) -> M:
    """Another model object with the same parameters and buffers, which can be patched without the first."""
    shared = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, shared)


class EditedModels:
    """Resolves the names of edited models for a server; `folder` has the edits.

    Args:
        edits: the folder with the edits.
        memory: for edited models; None: none.
        max_edits: of one name.

    Raises ValueError for a memory of tenants: a name does not tell whose entries it may use.
    """

    def __init__(self, edits: EditRepository, memory: MemoryBank | None = None, max_edits: int = MOST_EDITS) -> None:
        if memory is not None and memory.tenants:
            raise ValueError("memory: expected one without tenants: the name of an edited model does not name a tenant")
        self.folder, self._memory, self._most = edits, memory, check_most(max_edits)
        self.asked: Counter[str] = Counter()  # requests by edit, "" for none
        # By the model, with which all that shares its weights shall go.
        self._made: WeakKeyDictionary[Any, dict[tuple[str, ...], Any]] = WeakKeyDictionary()

    @property
    def needs_prompt_ends(self) -> bool:
        """Whether the memory needs to know where prompts end."""
        return self._memory is not None and self._memory.config.needs_prompt_ends

    def split(self, name: str) -> tuple[str, list[Version]]:
        """The base model's name, and the versions of the edits that follow it.

        Raises ValueError for an edit that is not there (NoSuchEditError), a name that is none, or too many.
        """
        base, *ids = name.split("+")
        ids = check_ids("edits", ids, self._most)
        return base, [self.folder.get(id) for id in ids]

    def edited(self, model: Any, versions: list[Version]) -> Any:
        """The model with these edits, or itself with none. Raises as `patch` does."""
        if not versions:
            return model
        known, key = self._made.setdefault(model, {}), tuple(version.key for version in versions)
        if key not in known:
            made = sharing_weights(model)
            patch(made, [version.edit for version in versions], self._memory)
            if self.needs_prompt_ends:
                made.generate = _knowing_prompts(made)
            while len(known) >= _KEPT:
                del known[next(iter(known))]
            known[key] = made
        return known[key]

    def manager(self, model: Any, **settings: Any) -> Any:
        """Of continuous batching: its requests have the edits of the HTTP requests that they come from."""
        return _Manager(model, self.folder.path, self._memory, **settings)


def _knowing_prompts(model: Any) -> Callable[..., Any]:
    """Its `generate`, which says where prompts end: the server gives it one, without padding."""
    generate = model.generate

    @functools.wraps(generate)
    def told(*args: Any, **kwargs: Any) -> Any:
        if "input_ids" not in kwargs:  # speech
            raise RequestError(400, "model: the memory here needs to know where a prompt of text ends; there is none")
        batch, tokens = kwargs["input_ids"].shape
        with rows(model, prompt_lengths=[tokens] * batch):
            return generate(*args, **kwargs)

    return told


class _Manager(EditingManager):
    """Of a server, which adds requests without saying for whom."""

    def add_request(self, *args: Any, **kwargs: Any) -> str | None:
        ids = _asked.get().edits
        try:
            return super().add_request(*args, unike_edit=ids, unike_memory=None if ids else False, **kwargs)
        except ValueError as error:
            self.output_router.result_handlers.pop(kwargs["request_id"], None)  # nothing will come
            raise RequestError.of(error) from error


def _resolving(original: Callable[..., Any], models: EditedModels) -> Callable[..., Any]:
    """For transformers' request handlers: which model a request's body names."""

    def plain(self: Any, body: dict[str, Any]) -> Any:
        found = original(self, body)
        models.asked[""] += 1
        return found

    def resolve(self: Any, body: dict[str, Any]) -> Any:
        _asked.set(_NOTHING)
        asked = body.get("model")
        if asked is None and self.model_manager.force_model is not None:
            return plain(self, body)
        if not isinstance(asked, str):
            raise RequestError(400, f"model: expected the name of a model, got {asked!r:.80}")
        if "+" not in asked:
            return plain(self, body)
        try:
            base, versions = models.split(asked)
            if models.needs_prompt_ends and _decides(self):
                raise RequestError(
                    400, "model: the memory here needs to know where a prompt ends; a decision has no end"
                )
            try:
                model_id, model, processor = original(self, {**body, "model": base})
            except (OSError, ValueError) as error:
                _log.warning("model %r: %s", base, error)
                raise RequestError(404, f"model: {base!r:.80} cannot be loaded") from error
            _asked.set(_Asked(tuple(version.edit.id for version in versions), model_id))
            body["model"] = asked
            # The name that came is the one in the reply; see `_managing`.
            edited = model if _batches(self, model, processor) else models.edited(model, versions)
            models.asked.update(version.edit.id for version in versions)
            return asked, edited, processor
        except (ValueError, PatchError, UnsupportedModelError) as error:
            raise RequestError.of(error) from error

    return resolve


def _managing(original: Callable[..., Any]) -> Callable[..., Any]:
    """For transformers' state, which keeps a worker, a thread, for each name of a model."""

    def get_manager(self: Any, model_id: str, use_cb: bool = False) -> Any:
        asked, workers = _asked.get(), self._generate_managers
        if asked.edits and use_cb:  # all in one batch
            return original(self, asked.base, use_cb)
        if asked.edits and model_id not in workers:
            edited = [name for name in workers if "+" in name]
            if len(edited) >= _KEPT:  # threads do not end: the one that was begun first works for this name now
                workers[model_id] = workers.pop(edited[0])
        return original(self, model_id, use_cb)

    return get_manager


def _listing(manager: Any, models: EditedModels) -> dict[str, Any]:
    """All models: transformers' cached ones, those that are loaded, and these with each edit."""
    from huggingface_hub.errors import CacheNotFound

    listed = getattr(manager, "list_models", None) or manager.get_gen_models  # as before transformers 5.24
    try:
        cards = {card["id"]: card for card in listed()}
    except CacheNotFound:  # models of folders need none
        cards = {}
    loaded = [name.rpartition("@")[0] or name for name in manager.loaded_models]
    for name in loaded:
        cards.setdefault(name, {"id": name, "object": "model", "owned_by": "", "created": 0})
    edited = [{**cards[name], "id": f"{name}+{id}", "parent": name} for name in loaded for id in models.folder.ids()]
    return {"object": "list", "data": [*cards.values(), *edited]}


def _counted(asked: Counter[str]) -> str:
    """Requests by edit, in the form that Prometheus reads; ids need no escapes."""
    lines = ["# HELP unike_requests_total requests by edit; without a name: with none"]
    lines += ["# TYPE unike_requests_total counter"]
    lines += [f'unike_requests_total{{edit="{edit}"}} {count}' for edit, count in sorted(asked.items())]
    return "\n".join(lines) + "\n"


def _answering(original: Callable[..., Any], models: EditedModels) -> Callable[..., Any]:
    """For transformers' maker of the application: with answers to what cannot be had, and a list of what can."""

    @functools.wraps(original)
    def build(manager: Any, *args: Any, **kwargs: Any) -> Any:
        from fastapi.responses import JSONResponse, PlainTextResponse
        from fastapi.routing import APIRoute

        from .access import anybody
        from .http import edit_routes

        def listed() -> Any:
            return JSONResponse(_listing(manager, models))

        def metrics() -> Any:
            return PlainTextResponse(_counted(models.asked), media_type="text/plain; version=0.0.4")

        async def answer(request: Any, error: Any) -> Any:
            return JSONResponse(error.body(), status_code=error.status)

        app = original(manager, *args, **kwargs)
        app.add_exception_handler(RequestError, answer)
        app.include_router(edit_routes(models.folder, anybody, updating=False))
        app.add_api_route("/metrics", metrics, methods=["GET"])
        app.router.routes.insert(0, APIRoute("/v1/models", listed, methods=["GET"]))  # before transformers' own
        return app

    return build


def _decides(handler: Any) -> bool:
    """Whether its requests are answered by single passes, without generation."""
    from transformers.cli.serving.systemone import SystemOneHandler

    return isinstance(handler, SystemOneHandler)


def _batches(handler: Any, model: Any, processor: Any) -> bool:
    """Whether this request will join the continuous batch, as its handler finds out."""
    modality = handler.model_manager.get_model_modality(model, processor=processor)
    batches: bool = handler.generation_state.use_continuous_batching(model, modality)
    return batches and not _decides(handler)


def _starting(models: EditedModels) -> Callable[..., None]:
    """For transformers' manager of continuous batching: with what it begins at the first request."""

    def init_cb(self: Any, model: Any, gen_config: Any) -> None:
        if self._cb is None:
            settings = {"generation_config": gen_config, "continuous_batching_config": self._cb_config}
            self._cb = models.manager(model, **settings)
            self._cb.start()

    return init_cb


def _replace(owner: Any, name: str, around: Callable[..., Any], *args: Any) -> None:
    """Put `around` what transformers has there, and not around what was put there before."""
    original = getattr(owner, name)
    original = getattr(original, "original", original)
    made = around(original, *args)
    made.original = original
    setattr(owner, name, made)


def serve(
    edits: str | Path, memory: MemoryBank | str | Path | None = None, *, max_edits: int = MOST_EDITS, **options: Any
) -> Any:
    """transformers' server, which knows edited models by their names.

    Args:
        edits: a folder of edits, `<id>.safetensors`; they may come, change and go while the server runs.
        memory: what edited models use, or its file; None: none.
        max_edits: of one request.
        options: of `transformers serve`, such as host, port, dtype, continuous_batching, non_blocking.

    Returns:
        transformers' server, once it ends; with non_blocking=True at once.

    Raises:
        ImportError: transformers' server is not installed.
        FileNotFoundError, ArtifactError: no such folder or memory, or not a valid one.
        ValueError: a memory of tenants; with continuous_batching=True, one that `RaggedRuntime` does not take; with
            compile=True, one that needs to know where prompts end.
    """
    from transformers.cli.serve import Serve
    from transformers.cli.serving import server
    from transformers.cli.serving.utils import BaseHandler, CBGenerateManager, GenerationState

    loaded = memory if memory is None or isinstance(memory, MemoryBank) else MemoryBank.load(memory)
    if loaded is not None and options.get("continuous_batching"):
        check_memory(loaded)
    if loaded is not None and options.get("compile") and loaded.config.needs_prompt_ends:
        raise ValueError(
            "memory: with compile=True transformers' masks do not tell where prompts end; expected one with "
            f"retrieval='token', alpha='token' or a number, and tokens='all' or 'text'; got {loaded.config}"
        )
    models = EditedModels(EditRepository(edits), loaded, max_edits)
    # Handlers and managers are made by the server itself.
    _replace(BaseHandler, "_resolve_model", _resolving, models)
    _replace(GenerationState, "get_manager", _managing)
    _replace(server, "build_server", _answering, models)
    CBGenerateManager.init_cb = _starting(models)  # type: ignore[method-assign]
    return Serve(**options)
