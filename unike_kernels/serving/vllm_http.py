"""What vLLM's server tells and is told of edits over HTTP: start it with `--middleware MODULE.EditMiddleware` as well.

MODULE is this one, `unike_kernels.serving.vllm_http`. As for LoRA adapters:

* `/v1/models` lists the edits, and a request's `model` may be one: "kea", several as "kea+other". The reply names it.
* `/v1/load_edit` and `/v1/unload_edit`, in the form of `/v1/load_lora_adapter`, where additional_config.unike has
  "updating": true; they are routes of the server's own, behind its API keys. `/v1/edits` lists the ids.
* `/metrics` has `unike_requests_total` by edit, `unike_edits_resident`, `unike_prompts_routed`,
  `unike_prompts_not_routed` and `unike_memory_seconds`.
* the hook "authorize" is given the headers of the request.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

from .access import headers
from .http import allowed, edit_routes
from .vllm import _Served, _served, _wrap

_log = logging.getLogger("unike_kernels")
_RPC_TIMEOUT = 5.0  # seconds
_asked: ContextVar[str | None] = ContextVar("asked", default=None)  # the model that the request named, if it is edits


class EditMiddleware:
    """ASGI middleware of vLLM's server; see the text of this module.

    Args:
        app: what it stands before.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app
        self._metrics: _Metrics | None = None
        _adapt_vllm()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """The start of the server, which is when it gets the routes, and each request."""
        server: Any = scope.get("app")
        served = _served_by(server.state) if server is not None else None
        if served is not None and served.folder is not None:
            if scope["type"] == "lifespan":
                server.include_router(edit_routes(served.folder, served.authorize, updating=served.updating))
            else:
                given = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
                headers.set(given)
                _asked.set(None)
            if scope["type"] == "http" and scope["path"] == "/metrics":
                self._metrics = self._metrics or _Metrics()
                await self._metrics.update(served, server.state.engine_client)
        await self._app(scope, receive, send)


def _served_by(state: Any) -> _Served | None:
    """What `state.vllm_config`, or that of an engine, says of edits; None: nothing."""
    config = getattr(state, "vllm_config", None)
    return None if config is None else _served(config)


class _Metrics:
    """Of prometheus_client, in the registry that vLLM's are in."""

    def __init__(self) -> None:
        from prometheus_client import Counter as PrometheusCounter
        from prometheus_client import Gauge

        self._requests = PrometheusCounter("unike_requests", "requests by edit; without a name: with none", ["edit"])
        self._told: Counter[str] = Counter()
        about = {
            "edits_resident": "edits whose neurons are in the pools of the worker",
            "prompts_routed": "prompts that a scope gave to an edit",
            "prompts_not_routed": "prompts that a scope gave to no edit",
            "memory_seconds": "seconds that retrieval and attention over the memory took",
        }
        # Gauges although they only grow: several servers read them from the same worker.
        self._worker = {
            name: Gauge(f"unike_{name}", text, multiprocess_mode="mostrecent") for name, text in about.items()
        }

    async def update(self, served: _Served, engine: Any) -> None:
        """Set to what is known now; of an engine that does not answer, to what was known last."""
        for edit, count in served.asked.items():
            self._requests.labels(edit).inc(count - self._told[edit])
        self._told = served.asked.copy()
        try:
            found = await engine.collective_rpc("unike_stats", timeout=_RPC_TIMEOUT)
        except Exception as error:  # of a dead engine /health tells
            _log.warning("metrics: the engine does not answer: %s", error)
            return
        for name, gauge in self._worker.items():  # ranks say the same, of a pipeline's stages some have no edited layer
            if values := [each[name] for each in found if name in each]:
                gauge.set(max(values))


# --- the places in vLLM -----------------------------------------------------------------------------------------------


def _adapt_vllm() -> None:
    """Let edits be models. Once, in the process that serves HTTP."""
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.serve.engine.serving import BaseServing

    _wrap(BaseServing, "_check_model", _check_model)
    _wrap(OpenAIServingModels, "model_name", _model_name)
    _wrap(OpenAIServingModels, "show_available_models", _show_available_models)


async def _check_model(original: Callable[..., Any], self: Any, request: Any) -> Any:
    """A model that is the name of edits becomes the base model and these."""
    served = _served_by(getattr(self.models, "engine_client", None))
    named = _named(self.models, served, request)
    if named:
        xargs = request.vllm_xargs or {}
        if "unike_edit" in xargs:
            return self.create_error_response("model: expected the base model where vllm_xargs name an edit")
        _asked.set(request.model)
        request.vllm_xargs = {**xargs, "unike_edit": named}
        request.model = self.models.base_model_paths[0].name
    return await original(self, request)


def _named(models: Any, served: _Served | None, request: Any) -> list[str]:
    """The edits that a request's model names; none where it is another model, or requests of its kind take no edits."""
    model = request.model
    if served is None or served.folder is None or not model or not hasattr(request, "vllm_xargs"):
        return []
    if models.is_base_model(model) or model in models.lora_requests:
        return []
    ids: list[str] = model.split("+")
    return ids if set(ids) <= set(served.folder.ids()) else []


def _model_name(original: Callable[..., Any], self: Any, lora_request: Any = None) -> Any:
    """In replies: the model that was asked for."""
    asked = _asked.get()
    return original(self, lora_request) if asked is None or lora_request is not None else asked


async def _show_available_models(original: Callable[..., Any], self: Any) -> Any:
    listed = await original(self)
    served = _served_by(getattr(self, "engine_client", None))
    if served is not None and served.folder is not None:
        base = listed.data[0]
        listed.data += [
            base.model_copy(update={"id": id, "root": id, "parent": base.id, "max_model_len": None})
            for id in allowed(served.authorize, served.folder.ids())
            if not self.is_base_model(id) and id not in self.lora_requests
        ]
    return listed
