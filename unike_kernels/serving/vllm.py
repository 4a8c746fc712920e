"""A plugin of vLLM: each request with its own edits, and a memory for all (entry point `vllm.general_plugins`).

Start vLLM with `--additional-config '{"unike": {"edits": "FOLDER", "memory": "FILE"}}'`; both are optional, and so is
"layers", the decoder layers that edits may name (the last four), "max_edits", of one request (16), "search", how
the memory is retrieved from where that need not be exact, such as {"kind": "hnsw"} (see `ANNConfig`), and "authorize",
"package.module:function", which is asked whether a client may name these edits and this tenant (see `access`); without
it clients are not told apart. With "sharded_memory" the ranks of tensor parallelism each have a part of the memory's
entries. A request names its edits in `SamplingParams(extra_args={"unike_edit":
"capital-of-peru"})`, several as a list, over HTTP in the field `vllm_xargs`; `"unike_memory": 0` declines the memory,
`"unike_memory": "acme"` lets a tenant's entries alone shift it. What a server tells over HTTP of its edits is in
`vllm_http`.

* In the front-end a request's edits are looked up. An unknown one is an error of that request alone. Versions of edits
  and the use of the memory enter its cache salt, hashed with the client's own: no two requests share a prefix whose
  keys and values differ, whatever salt a client sends.
* In the engine's process it gets hold of those versions: what happens to the files later does not concern it.
* In the worker the model's FFNs and attentions call two operators, opaque to torch.compile, which compute with what
  the runner said the step holds. A step without edits passes through them. They run between the pieces that CUDA graphs
  replay, as vLLM's own attention does. In a graph of a whole step they compute with tables that stay where they are,
  into which each step is written before its replay (`StepTables`), as vLLM's own LoRA does; a step that these have no
  room for is computed without a graph.

vLLM's second model runner is refused: its `execute_model` itself calls the model, or replays a graph of it. It would
take a method around that call which is given the step's `input_batch`, as `_model_forward` of the first one is.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..nn import Ranks
from ..ops import _workspace
from .operators import OPERATORS, install, language_of, rehearsal, stage_of, step
from .ragged import RaggedRuntime, RequestSlice, remembers
from .served import KEY, Served

_ROOM = 256  # edits, in the tables of whole graphs


def _embedding(model: Any) -> Callable[[Tensor], Tensor]:
    """ids [T] -> [T, e], all of it on each rank; on a stage of a pipeline that has none, the ids themselves."""
    language = language_of(model)
    found: Callable[[Tensor], Tensor] = getattr(language, "embed_input_ids", None) or language.get_input_embeddings
    return found


def _sum_over_ranks(part: Tensor) -> Tensor:
    from vllm.distributed import tensor_model_parallel_all_reduce

    total: Tensor = tensor_model_parallel_all_reduce(part.clone())  # which some do in place
    return total


# --- what a server is told --------------------------------------------------------------------------------------------


class _Served(Served):
    """A server's settings, as a process of vLLM needs them."""

    def __init__(self, vllm_config: Any, settings: dict[str, Any]) -> None:
        model = vllm_config.model_config
        super().__init__("additional_config.unike", settings, model.hf_config, model.hf_text_config, model.model)

    def admit(self, request: Any) -> None:
        """Look up what a request asks for, and note it in the request and in its cache salt. Raises as `Served.told`
        does."""
        params = request.sampling_params
        extra = (params.extra_args or {}) if params is not None else {}
        told, request.cache_salt = self.told(extra, request.cache_salt)
        if params is not None:
            params.extra_args = {**extra, KEY: told}


_known: dict[int, tuple[Any, _Served]] = {}


def _configured(vllm_config: Any) -> dict[str, Any] | None:
    settings = vllm_config.additional_config
    return settings.get(KEY) if isinstance(settings, dict) else None


def _served(vllm_config: Any) -> _Served | None:
    """Of this process; None: the server was not told of edits."""
    settings = _configured(vllm_config)
    if settings is None:
        return None
    if vllm_config.use_v2_model_runner:
        raise ValueError(
            "additional_config.unike: needs vLLM's first model runner; unset VLLM_USE_V2_MODEL_RUNNER. The second one "
            "has no method around the model that is given what a step holds"
        )
    # Beside the config and not on it: that one is pickled for other processes.
    if id(vllm_config) not in _known:
        _known[id(vllm_config)] = vllm_config, _Served(vllm_config, settings)
    return _known[id(vllm_config)][1]


# --- the places in vLLM -----------------------------------------------------------------------------------------------


def _wrap(owner: type, name: str, around: Callable[..., Any]) -> None:
    original = getattr(owner, name)
    if name not in vars(owner) or hasattr(original, "_unike"):
        return

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(original, self, *args, **kwargs)

    wrapped._unike = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)


def _post_init(original: Callable[..., Any], self: Any) -> None:
    original(self)
    settings = _configured(self)
    if settings is not None:
        _run_between_graphs(self, whole=not settings.get("search"))


def _run_between_graphs(vllm_config: Any, whole: bool) -> None:
    """Let the operators split what vLLM compiles, and no CUDA graph of a piece hold one of them.

    Args:
        vllm_config: vLLM's.
        whole: whether graphs of whole steps may hold them.
    """
    from vllm.config import CompilationMode, CUDAGraphMode
    from vllm.logger import init_logger

    config = vllm_config.compilation_config
    split = config.mode == CompilationMode.VLLM_COMPILE and bool(config.splitting_ops)
    if split:
        config.splitting_ops = [*config.splitting_ops, *(op for op in OPERATORS if op not in config.splitting_ops)]
    # What vLLM itself asks of PIECEWISE, which it has for no encoder-decoder.
    model = vllm_config.model_config
    pieces = split and config.is_attention_compiled_piecewise() and not (model is not None and model.is_encoder_decoder)
    asked = config.cudagraph_mode or CUDAGraphMode.NONE
    mode = asked if whole or asked == CUDAGraphMode.NONE else CUDAGraphMode.PIECEWISE
    mode = mode if pieces else mode.without_piecewise()
    if mode == asked:
        return
    init_logger("vllm.unike_kernels").info(
        "additional_config.unike: cudagraph_mode %s in place of %s: %s",
        mode,
        asked,
        "vLLM does not compile this model in pieces, between which edits would be computed"
        if whole
        else 'no graph of a whole step holds the approximate search of the memory that "search" asks for',
    )
    config.cudagraph_mode = mode
    if mode == CUDAGraphMode.NONE:  # as vLLM leaves them then
        config.max_cudagraph_capture_size, config.cudagraph_capture_sizes = 0, []


def _compute_hash(original: Callable[..., Any], self: Any) -> str:
    """By which vLLM keeps compiled models. Which layers call an operator depends on a file, that of the memory."""
    settings, found = _configured(self), str(original(self))
    if settings is None or not settings.get("memory"):
        return found
    with safe_open(str(settings["memory"]), framework="pt") as file:
        names = sorted(file.keys())
    return hashlib.sha256(f"{found} {names}".encode()).hexdigest()[: len(found)]


def _process_inputs(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    from vllm.exceptions import GracefulHTTPError, VLLMValidationError

    request = original(self, *args, **kwargs)
    served = _served(self.vllm_config)
    params = request.sampling_params
    try:
        if served is not None:
            served.admit(request)
        elif params is not None and {"unike_edit", "unike_memory"} & set(params.extra_args or {}):
            raise ValueError("unike_edit: this server was started without additional_config.unike")
    except PermissionError as error:
        raise GracefulHTTPError(str(error), HTTPStatus.FORBIDDEN) from error
    except ValueError as error:
        raise VLLMValidationError(str(error)) from error  # what the servers answer with the status 400
    return request


def _preprocess_add_request(original: Callable[..., Any], self: Any, request: Any) -> Any:
    """The request holds its versions until it is over."""
    made = original(self, request)
    served = _served(self.vllm_config)
    if served is not None and made[0].sampling_params is not None:
        folder = served.folder
        made[0].unike_retained = [folder.retain(key) for key in _told(made[0].sampling_params)["edits"] if folder]
    return made


def _sleep(original: Callable[..., Any], self: Any, level: int = 1, *args: Any, **kwargs: Any) -> Any:
    """At level 1 vLLM keeps a copy of what `_load_model` has made; from level 2 on that is lost, as the weights are."""
    if level > 1 and _configured(self.vllm_config) is not None:
        raise ValueError(
            f"additional_config.unike: sleep: expected level 0 or 1, got {level}: it discards the tables of edits and "
            "memory, and loading weights again brings back none of them"
        )
    return original(self, level, *args, **kwargs)


def _load_model(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(self, *args, **kwargs)
    served = _served(self.vllm_config)
    if served is not None:
        parallel, model = self.parallel_config, self.get_model()
        _supported(parallel)
        text, ranks = self.vllm_config.model_config.hf_text_config, parallel.tensor_parallel_size
        served.model = None  # one that only checked is not on the model's device
        flat = served.flat(self.device, stage_of(model, text), _ranks() if served.sharded else None)
        if flat.routes and flat.layers:
            _check_embedding(model, self.device)
        install(
            model,
            text,
            flat,
            edits=served.folder is not None,
            ranks=ranks,
            rank=parallel.rank % ranks,
            summed=_sum_over_ranks,
        )
        first = served.first_edit()  # which those to come resemble
        if self.compilation_config.cudagraph_mode.has_full_cudagraphs():
            requests = self.scheduler_config.max_num_seqs
            tokens = self.compilation_config.max_cudagraph_capture_size
            room = min(requests, _ROOM) if served.folder is not None else 0
            flat.for_graphs(tokens, requests, room, like=None if first is None else first.edit)
        if self.device.type != "cpu":  # before vLLM measures what room is left
            if first is not None:
                flat.hold(first)
            flat.warm_up(self.vllm_config.model_config.dtype)
    return result


def _ranks() -> Ranks | None:
    """Those of tensor parallelism, by vLLM's own communication; None: there is one alone."""
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    if group.world_size == 1:
        return None
    return Ranks(group.rank_in_group, group.world_size, group.all_gather, group.all_reduce)


def _supported(parallel: Any) -> None:
    """Raises ValueError where a pass of the model holds a part of a step's tokens, which the operators would need to
    know."""
    if parallel.use_ubatching:
        raise ValueError(
            "additional_config.unike: microbatches (enable_dbo, ubatch_size) are not supported: each is a "
            "part of the step whose requests the edits are told of"
        )
    if parallel.prefill_context_parallel_size > 1:
        raise ValueError(
            "additional_config.unike: prefill context parallelism is not supported: a rank has a part of "
            "the tokens of the step whose requests the edits are told of"
        )


def _check_embedding(model: nn.Module, device: torch.device) -> None:
    """Raises UnsupportedModelError on a stage of a pipeline that has none."""
    if not _embedding(model)(torch.zeros(1, dtype=torch.int64, device=device)).is_floating_point():
        raise UnsupportedModelError(
            "additional_config.unike: this memory's scope decides by the prompt's embeddings, and a stage of the "
            "pipeline that has edited layers has none: serve it without pipeline parallelism"
        )


def _v2_unsupported(original: Callable[..., Any], self: Any) -> Any:
    """vLLM's second model runner has no place to be told in what a step holds; vLLM takes the first one then."""
    return [*original(self), *(["the edits of unike_kernels"] if _configured(self) is not None else [])]


def _model_forward(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    served = _served(self.vllm_config)
    if served is None:
        return original(self, *args, **kwargs)
    flat = served.flat()
    with step(flat, _shares(self, served, flat)):
        _write_for_graph(flat)
        return original(self, *args, **kwargs)


def _write_for_graph(flat: RaggedRuntime) -> None:
    """Before a graph of a whole step is replayed. What it has no room for is computed without one."""
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import get_forward_context
    from vllm.logger import init_logger

    context = get_forward_context()
    if context.cudagraph_runtime_mode == CUDAGraphMode.FULL and not flat.write():
        context.cudagraph_runtime_mode = CUDAGraphMode.NONE
        init_logger("vllm.unike_kernels").warning_once(
            "additional_config.unike: more or larger edits at once than whole CUDA graphs have room for, or edits of "
            "another dtype or with gates: such steps are computed without a graph. There is room for as many edits as "
            "max_num_seqs, at most %s, like the first one of the folder when the server starts.",
            _ROOM,
        )


def _dummy_run(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """In which vLLM measures, warms up and captures."""
    served = _served(self.vllm_config)
    tables = served.model.graphs if served is not None and served.model is not None else None
    if tables is None:
        return original(self, *args, **kwargs)
    if self.device.type == "cuda":
        _workspace.stock(self.device)  # a capture takes some
    with rehearsal(tables):
        return original(self, *args, **kwargs)


def _told(params: Any) -> dict[str, Any]:
    """What the front-end has noted of a request."""
    extra = params.extra_args if params is not None else None
    told: dict[str, Any] = (extra or {}).get(KEY, {"edits": []})
    return told


def _acting(runner: Any, state: Any, keys: Sequence[str], served: _Served, flat: RaggedRuntime) -> tuple[str, ...]:
    """Of a request's edits those that act in it, decided at its first step."""
    if not hasattr(state, "unike_acting"):
        versions = [served.folder.held(key) for key in keys] if served.folder is not None else []
        acting = flat.decide(state.prompt_token_ids, versions, _embedding(runner.get_model()))
        state.unike_acting = tuple(version.key for version in acting)
    found: tuple[str, ...] = state.unike_acting
    return found


def _stats(worker: Any) -> dict[str, float]:
    """What a worker tells a monitor, see `RaggedRuntime.stats`; nothing where the server was not told of edits."""
    served = _served(worker.vllm_config)
    return served.flat().stats if served is not None and served.model is not None else {}


def _shares(runner: Any, served: _Served, flat: RaggedRuntime) -> Sequence[RequestSlice]:
    """The requests of a step in their order, their edits made resident."""
    batch, starts, shares = runner.input_batch, runner.query_start_loc.np, []
    usual = remembers(served.memory, None)  # of requests that sample nothing, and so can ask for nothing
    for row in range(batch.num_reqs):
        state = runner.requests[batch.req_ids[row]]
        told = _told(state.sampling_params)
        keys = _acting(runner, state, told["edits"], served, flat)
        if served.folder is not None and any(key not in flat.bank for key in keys):
            needed = [key for each in runner.requests.values() for key in _told(each.sampling_params)["edits"]]
            for key in keys:
                flat.hold(served.folder.held(key), needed)
        before = state.num_prompt_tokens - 1 - int(batch.num_computed_tokens_cpu[row])
        shares.append(RequestSlice(int(starts[row + 1] - starts[row]), keys, told.get("memory", usual), max(before, 0)))
    return shares


def register() -> None:
    """What vLLM calls in each of its processes."""
    from vllm.config import VllmConfig
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.worker_base import WorkerBase

    _wrap(VllmConfig, "__post_init__", _post_init)
    _wrap(VllmConfig, "compute_hash", _compute_hash)
    _wrap(VllmConfig, "_get_v2_model_runner_unsupported_features", _v2_unsupported)
    _wrap(InputProcessor, "process_inputs", _process_inputs)
    _wrap(EngineCore, "preprocess_add_request", _preprocess_add_request)
    _wrap(EngineCore, "sleep", _sleep)
    _wrap(GPUModelRunner, "load_model", _load_model)
    _wrap(CPUModelRunner, "load_model", _load_model)
    _wrap(GPUModelRunner, "_model_forward", _model_forward)
    _wrap(GPUModelRunner, "_dummy_run", _dummy_run)
    WorkerBase.unike_stats = _stats
