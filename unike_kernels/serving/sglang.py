"""A plugin of SGLang: each request with its own edits, and a memory for all (entry point `sglang.srt.plugins`).

Start SGLang with `--json-model-override-args '{"unike": {"edits": "FOLDER", "memory": "FILE"}}'`, the settings of the
plugin for vLLM but for "sharded_memory" and "updating". A request names its edits in its sampling parameters,
`"custom_params": {"unike_edit": "capital-of-peru"}`, several as a list, or as the `model` of an OpenAI request;
`"unike_memory": 0` declines the memory, `"unike_memory": "acme"` lets a tenant's entries alone shift it.

* In the front-end a request's edits are looked up. An unknown one is an error of that request alone. What they are
  enters the request's cache salt: no two requests share a prefix whose keys and values differ.
* In the scheduler's process, which is the worker's too, the request gets hold of those versions.
* There the model's FFNs and attentions call two operators, opaque to torch.compile (see `operators`), which compute
  with what the batch says of its rows. CUDA graphs are captured while these do nothing, so a batch that has edits or
  uses the memory is computed without one.

What would give a layer other tokens than the batch has is refused when the server starts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from torch import Tensor

from .access import headers
from .operators import install, language_of, step
from .ragged import RequestSlice
from .repository import Version
from .served import KEY, SETTINGS, Served

_NAME = f"json_model_override_args.{KEY}"
_KNOWN = SETTINGS - {"sharded_memory", "updating"}
_ASKED = {"unike_edit", "unike_memory"}
# Arguments of SGLang's server -> what they must be: with any other value a layer gets a part of a batch's tokens, or
# those of others, or a request has several rows.
_NEEDED = {
    "tp_size": 1,
    "pp_size": 1,
    "attn_cp_size": 1,
    "dcp_size": 1,
    "enable_dp_attention": False,
    "enable_two_batch_overlap": False,
    "enable_pdmux": False,
    "speculative_algorithm": None,
    "dllm_algorithm": None,
    "disaggregation_mode": "null",
}


@dataclass
class _Asked:
    """What the scheduler keeps with a request: its versions, of which those act that are decided at its first step."""

    versions: Sequence[Version]
    memory: bool | str
    acting: tuple[Version, ...] | None = None


def _server(model_config: Any) -> Served | None:
    """None: the server was not told of edits."""
    settings = model_config.model_override_args.get(KEY)
    if settings is None:
        return None
    _check_places()
    config, text = model_config.hf_config, model_config.hf_text_config
    return Served(_NAME, settings, config, text, model_config.model_path, _KNOWN)


# --- the front-end ----------------------------------------------------------------------------------------------------


def _init_model_config(original: Callable[..., Any], manager: Any) -> None:
    original(manager)
    manager.unike = _server(manager.model_config)


def _generate_request(original: Callable[..., Any], manager: Any, obj: Any, request: Any = None) -> Any:
    headers.set({} if request is None else dict(request.headers))
    return original(manager, obj, request)


def _handle_request(original: Callable[..., Any], serving: Any, request: Any, raw_request: Any) -> Any:
    """A model that is the name of edits, "kea" or "kea+other", is the base model with these; the reply names it."""
    served, model = serving.tokenizer_manager.unike, getattr(request, "model", None)
    if served is not None and served.folder is not None and model and hasattr(request, "custom_params"):
        ids, params = model.split("+"), request.custom_params or {}
        if set(ids) <= set(served.folder.ids()) and model != serving.tokenizer_manager.served_model_name:
            if "unike_edit" in params:
                return _error(serving, "model: expected the base model where custom_params name an edit")
            request.custom_params = {**params, "unike_edit": ids}
    return original(serving, request, raw_request)


async def _error(serving: Any, message: str) -> Any:
    return serving.create_error_response(message)


def _create_tokenized_object(original: Callable[..., Any], manager: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
    from fastapi import HTTPException

    made, served = original(manager, obj, *args, **kwargs), manager.unike
    params = made.sampling_params
    asked = params.custom_params or {}
    named = isinstance(asked, dict) and not _ASKED.isdisjoint(asked)
    if served is None:
        if named:
            raise ValueError(f"unike_edit: this server was started without {_NAME}")
    elif not hasattr(made, "cache_salt"):  # that of an embedding
        if named:
            raise ValueError("unike_edit: embeddings are computed without edits and without the memory")
    else:
        if not isinstance(asked, dict):
            raise ValueError(f"custom_params: expected a mapping, got {asked!r:.80}")
        if (params.beam_width or 1) > 1 or made.session_params is not None or made.input_embeds is not None:
            raise ValueError(
                f"a server with {_NAME} computes no beams, no sessions that keep their keys and values, and no prompts "
                "of embeddings"
            )
        try:
            told, made.cache_salt = served.told(asked, made.cache_salt, made.input_ids)
        except PermissionError as error:
            raise HTTPException(HTTPStatus.FORBIDDEN, str(error)) from error
        params.custom_params = {**asked, KEY: json.dumps(told)}  # of which the processes pass on scalars alone
    return made


# --- the scheduler's process ------------------------------------------------------------------------------------------


def _create_generation_req(original: Callable[..., Any], scheduler: Any, asked: Any, *args: Any, **kwargs: Any) -> Any:
    """The request holds its versions until it is over."""
    request = original(scheduler, asked, *args, **kwargs)
    served = scheduler.tp_worker.model_runner.unike
    if served is not None:
        try:
            told = (asked.sampling_params.custom_params or {}).get(KEY)
            if told is None:
                raise ValueError(f"this request came by a front-end that does not know of {_NAME}")
            told = json.loads(told)
            request.unike = _Asked([served.folder.held(key) for key in told["edits"]], told["memory"])
        except ValueError as error:
            request.set_finish_with_abort(str(error))
    return request


def _load_model(original: Callable[..., Any], runner: Any) -> None:
    original(runner)
    runner.unike = served = _server(runner.model_config)
    if served is None:
        return
    for name, value in _NEEDED.items():
        if (given := getattr(runner.server_args, name)) != value:
            raise ValueError(f"{_NAME}: expected {name}={value!r}, got {given!r}: edits are not served with it")
    device = next(runner.model.parameters()).device
    flat = served.flat(device)
    install(runner.model, runner.model_config.hf_text_config, flat, edits=served.folder is not None)
    if device.type != "cpu":  # before SGLang measures what room is left
        if (first := served.first_edit()) is not None:
            flat.hold(first)
        flat.warm_up(runner.dtype)


def _init_new(original: Callable[..., Any], cls: type, batch: Any, runner: Any, **kwargs: Any) -> Any:
    made = original(cls, batch, runner, **kwargs)
    made.unike = _shares(batch.reqs, made, runner) if getattr(runner, "unike", None) is not None else []
    return made


def _shares(requests: Sequence[Any], batch: Any, runner: Any) -> list[RequestSlice]:
    """The rows of a batch in their order, their edits made resident."""
    flat, shares = runner.unike.flat(), []
    needed: list[Version] = []
    tokens, before = batch.extend_seq_lens_cpu, batch.extend_prefix_lens_cpu
    if tokens is None:  # each has its next one
        tokens = [1] * batch.batch_size
        before = [len(request.origin_input_ids) for request in requests]
    for request, count, start in zip(requests, tokens, before, strict=True):
        asked = getattr(request, "unike", None)  # SGLang's own trials have none
        versions = () if asked is None else _acting(request, asked, runner)
        needed += versions
        keys = tuple(version.key for version in versions)
        prompt = max(len(request.origin_input_ids) - 1 - start, 0)
        shares.append(RequestSlice(count, keys, asked is not None and asked.memory, prompt))
    for version in needed:
        flat.hold(version, [each.key for each in needed])
    return shares


def _acting(request: Any, asked: _Asked, runner: Any) -> tuple[Version, ...]:
    if asked.acting is None:
        embed: Callable[[Tensor], Tensor] = language_of(runner.model).get_input_embeddings()
        asked.acting = runner.unike.flat().decide(request.origin_input_ids_unpadded, asked.versions, embed)
    return asked.acting


def _forward_raw(original: Callable[..., Any], runner: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    shares = getattr(batch, "unike", None)  # what SGLang makes up to try and capture the model has none
    if not shares:
        return original(runner, batch, *args, **kwargs)
    flat = runner.unike.flat()
    with step(flat, shares):
        if not flat.acting:
            return original(runner, batch, *args, **kwargs)
        graphs = {name: getattr(runner, name) for name in ("decode_cuda_graph_runner", "prefill_cuda_graph_runner")}
        try:
            vars(runner).update(dict.fromkeys(graphs))
            return original(runner, batch, *args, **kwargs)
        finally:
            vars(runner).update(graphs)


# --- the places in SGLang ---------------------------------------------------------------------------------------------

_AROUND = {
    "managers.tokenizer_manager.TokenizerManager.init_model_config": _init_model_config,
    "managers.tokenizer_manager.TokenizerManager.generate_request": _generate_request,
    "managers.tokenizer_manager.TokenizerManager._create_tokenized_object": _create_tokenized_object,
    "entrypoints.openai.serving_base.OpenAIServingBase.handle_request": _handle_request,
    "managers.scheduler.Scheduler._create_generation_req": _create_generation_req,
    "model_executor.model_runner.ModelRunner.load_model": _load_model,
    "model_executor.model_runner.ModelRunner._forward_raw": _forward_raw,
    "model_executor.forward_batch_info.ForwardBatch.init_new": _init_new,
}


def _check_places() -> None:
    """Raises RuntimeError where SGLang, which logs it and goes on, did not find one of the places: requests would go
    unedited."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    missing = sorted(f"sglang.srt.{place}" for place in _AROUND if f"sglang.srt.{place}" not in HookRegistry._patched)
    if missing:
        raise RuntimeError(f"{_NAME}: this version of SGLang does not have {', '.join(missing)}; 0.5.23 does")


def register() -> None:
    """What SGLang calls in each of its processes."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for place, around in _AROUND.items():
        HookRegistry.register(f"sglang.srt.{place}", around, HookType.AROUND)
