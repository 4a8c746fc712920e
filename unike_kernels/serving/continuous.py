"""Edits for each request of transformers' continuous batching.

A step there computes the tokens of all its requests behind one another, [1, T, d]. Hooks on the model's FFNs and
attentions hand these to a `RaggedRuntime`, which a manager tells before each step whose tokens they are.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Sequence
from random import Random
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager

from .. import backbones
from ..artifacts.edit import Edit
from ..artifacts.memory import MemoryBank
from ..errors import PatchError
from ..patching import check_artifacts, is_patched
from ..retrieval import Retriever
from .hooks import hook_attention, hook_ffn
from .ragged import RaggedRuntime, RequestSlice, remembers
from .repository import EditRepository, Version, check_ids

_KEY = "unike"  # of what a request's state carries: it follows the request when it is forked or put off


class _Asked(NamedTuple):
    """What a request asked for. transformers copies what a state carries; versions are not to be copied."""

    versions: tuple[Version, ...] = ()
    memory: bool | str = False

    def __deepcopy__(self, memo: dict[int, Any]) -> _Asked:
        return self


class EditingManager(ContinuousBatchingManager):
    """transformers' manager, whose requests name their edits: `manager.add_request(ids, unike_edit="kea")`.

    Args:
        model: a PreTrainedModel as `patch` takes it, not patched. While the manager runs it is the manager's alone:
            transformers' continuous batching does not leave passes of other threads as they are.
        edits: a folder of edits (see `EditRepository`), which may come, change and go; a request keeps the versions
            that it began with. None: no edits.
        memory: for the requests that do not decline it with unike_memory=False, or for the tenant that they name; None:
            none.
        retriever: makes the index of a layer's retrieval keys, see `patch`; None: what the memory's `search` says.
        generation_config: None: the model's.
        continuous_batching_config: None: the defaults. It must not ask for CUDA graphs or compilation, which would keep
            the edits of the step that they recorded, or for asynchronous batching.

    Raises:
        PatchError: the model is patched.
        FileNotFoundError: there is no such folder.
        MismatchError: the memory is for another model.
        UnsupportedModelError: as `patch`; a layer of the memory has no attention, or no layer an FFN.
        ValueError: as `RaggedRuntime`; a config that asks for one of these.
    """

    def __init__(
        self,
        model: Any,
        edits: str | os.PathLike[str] | None = None,
        memory: MemoryBank | None = None,
        *,
        retriever: Callable[[Tensor], Retriever] | None = None,
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
    ) -> None:
        if is_patched(model):
            raise PatchError(f"{type(model).__name__} is patched: unpatch it first; here each request brings its edits")
        config = copy.copy(continuous_batching_config) or ContinuousBatchingConfig()
        compiled = config.varlen_compile_config or config.decode_compile_config
        if any(config.cuda_graph_booleans) or compiled or config.use_async_batching:
            raise ValueError(
                "continuous_batching_config: expected no use_cuda_graph, use_async_batching or compile config: they "
                "would keep the edits of the step that they recorded"
            )
        config.use_cuda_graph = config.use_async_batching = False
        self._decoder = backbones.find_decoder(model)
        self._folder = None if edits is None else EditRepository(edits, self._check)
        self._memory = memory
        if memory is not None:
            check_artifacts(model, self._decoder, [], memory, memory.config, override=False)
            for i in memory.layers:
                self._decoder.select([i], need=("attention",))
        layers = self._decoder.layers
        editable = [layer.index for layer in layers if layer.has("ffn")] or self._decoder.select(None)
        self._flat = RaggedRuntime(
            editable,
            self._decoder.hidden_size,
            layers[editable[-1]].activation,
            memory,
            retriever=retriever,
            device=backbones.device_of(layers[0].module),
        )
        super().__init__(model, generation_config or model.generation_config, config)
        self.logit_processor.supported_keys[_KEY] = _Asked

    def add_request(
        self,
        *args: Any,
        unike_edit: str | Sequence[str] = (),
        unike_memory: bool | str | None = None,
        **kwargs: Any,
    ) -> str | None:
        """transformers' `add_request`, for a request with edits.

        Args:
            *args: transformers'.
            unike_edit: the ids of its edits, or one; with Config(scope="memory") those that may act.
            unike_memory: whether the memory shifts it, or the tenant whose entries alone do; True is
                refused where there are tenants. None: it does, unless there are tenants.
            **kwargs: transformers'.

        Raises:
            ValueError: an unknown edit or tenant, or one that does not fit this model; invalid or repeated ids.
        """
        ids = check_ids("unike_edit", unike_edit)
        if ids and self._folder is None:
            raise ValueError("unike_edit: this manager was made without a folder of edits")
        versions = tuple(self._folder.get(id) for id in ids) if self._folder is not None else ()
        if versions:
            prompt = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            embedding: Any = self.model.get_input_embeddings()  # type: ignore[operator]
            versions = self._flat.decide(prompt, versions, embedding)
        kwargs[_KEY] = _Asked(versions, remembers(self._memory, unike_memory))
        return super().add_request(*args, **kwargs)

    def _run_generation_loop(self, *args: Any, **kwargs: Any) -> None:  # which depend on transformers' version
        hooks = [handle for layer in self._decoder.layers for handle in self._hook(layer)]
        try:
            super()._run_generation_loop(*args, **kwargs)
        finally:
            for handle in hooks:
                handle.remove()

    def _hook(self, layer: backbones.Layer) -> list[RemovableHandle]:
        hooks = []
        if layer.has("ffn"):  # an edit that names a layer without one does not fit
            hooks += hook_ffn(layer, functools.partial(self._flat.ffn, layer.index))
        if self._memory is not None and layer.index in self._memory.layers:
            hooks += hook_attention(layer, functools.partial(self._flat.attention, layer.index))
        return hooks

    def _check(self, edit: Edit) -> None:
        self._flat.check(edit)  # that its layers have FFNs, before what these compute is asked for
        config = self._memory.config if self._memory is not None else edit.config
        check_artifacts(self.model, self._decoder, [edit], self._memory, config, override=False)

    def _create_batch_processor(self) -> Any:
        processor = super()._create_batch_processor()
        _keep_apart(processor.cache, processor.scheduler)
        return processor

    def _generation_step(self) -> None:
        processor: Any = self.batch_processor
        requests = [(each.state, each.query_length) for each in processor.inputs_and_outputs.requests_in_batch]
        versions = {version.key: version for state, _ in requests for version in _asked(state).versions}
        for version in versions.values():
            self._flat.hold(version, list(versions))
        self._flat.begin([_share(state, tokens) for state, tokens in requests])
        try:
            super()._generation_step()
        finally:
            self._flat.end()


def _asked(state: Any) -> _Asked:
    """Of a request; of transformers' own, for warming up, nothing."""
    asked: _Asked = state.logit_processor_kwargs.get(_KEY, _Asked())
    return asked


def _share(state: Any, tokens: int) -> RequestSlice:
    """What a step computes for a request; its state says already how many tokens there are afterwards."""
    asked = _asked(state)
    prompt = state._true_initial_tokens or len(state.initial_tokens)
    before = prompt - 1 - (state.position_offset - tokens)
    return RequestSlice(tokens, tuple(version.key for version in asked.versions), asked.memory, max(before, 0))


def _keep_apart(cache: Any, scheduler: Any) -> None:
    """Let no requests share the keys and values of a prefix that was computed with other edits, or another memory.

    transformers finds blocks by a hash of their tokens: the tokens that it gets to see here are other ones for each.
    """
    search, mark = cache.search_prefix_match, cache.mark_complete_blocks

    def search_prefix_match(request_id: str, prompt_ids: list[int]) -> int:
        state = scheduler.waiting_requests.get(request_id) or scheduler.active_requests[request_id]
        matched: int = search(request_id, _salted(prompt_ids, state))
        return matched

    def mark_complete_blocks(state: Any, complete_blocks: dict[str, int]) -> None:
        tokens = _salted(state.initial_tokens + state.generated_tokens, state)
        told = {"request_id": state.request_id, "status": state.status}
        mark(SimpleNamespace(**told, initial_tokens=tokens, generated_tokens=[]), complete_blocks)

    cache.search_prefix_match, cache.mark_complete_blocks = search_prefix_match, mark_complete_blocks


def _salted(tokens: list[int], state: Any) -> list[int]:
    """Numbers that no tokens are, others for each that was asked for; the tokens themselves for nothing."""
    versions, memory = _asked(state)
    if not versions and not memory:
        return tokens
    noise = Random(repr(([version.key for version in versions], memory)))
    return [~(token ^ noise.getrandbits(31)) for token in tokens]
