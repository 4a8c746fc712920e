"""Changes of a patched model in place, while it is used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .. import backbones
from ..artifacts.edit import Edit
from ..artifacts.memory import MemoryBank
from ..errors import PatchError
from ..nn import LayerEdits
from .compatibility import check_artifacts
from .install import entries_of, make_router, make_tables, set_prompt_hooks
from .session import Installed, PatchedState, Running, log_event, outside_inference_mode, require_state


def add_edit(model: nn.Module, edit: Edit, *, override: bool = False, running: Running = "keep") -> None:
    """Add an edit to a patched model, in place, behind its other edits.

    A pass computes with what was installed when it began, in every layer. A generation that is running keeps that, as
    its key-value cache does, unless `running` is "switch": then its next pass computes with what is new.

    Args:
        model: a patched model; the edit's layers must be among those that were patched.
        edit: with an id that is not there yet.
        override: see `patch`.
        running: "keep" or "switch".

    Raises:
        PatchError: the model is not patched, is patched at other layers, or has an edit of this id.
        MismatchError: see `patch`.
        TypeError: `edit` is not an Edit.
        ValueError: an unknown `running`.
    """
    state = require_state(model)
    _check_running(running)
    if not isinstance(edit, Edit):
        raise TypeError(f"edit: expected an Edit, got {type(edit).__name__}")
    with state.lock, outside_inference_mode():
        if edit.id in state.edits:
            raise PatchError(f"edit: {edit.id!r} is installed already; remove it first")
        if missing := sorted(set(edit.layers) - set(state.ffns)):
            raise PatchError(f"edit {edit.id!r}: its layers {missing} are not patched; patch(model, layers=...) them")
        check_artifacts(backbones.unwrap(model), state.decoder, [edit], state.memory, state.config, override)
        stores = {}
        for i, layer in edit.layers.items():
            ffn = state.ffns[i]
            stores[i] = ffn.edits.with_edit(edit.id, layer, backbones.device_of(ffn.modules[0]))
        before = state.installed.router
        router = None if before is None else before.with_edits({edit.id: entries_of(edit)})
        _publish(state, running, edits=stores, router=router, artifacts={**state.edits, edit.id: edit})
        replaced = [] if router is None else [old for old, by in router.replaced.items() if by == edit.id]
        more = {"replaces": replaced} if replaced else {}
        log_event("add_edit", state, edit=edit.id, layers=sorted(edit.layers), nbytes=edit.nbytes, **more)


def remove_edit(model: nn.Module, id: str, *, running: Running = "keep") -> None:
    """Take an edit out of a patched model, in place.

    Args:
        model: a patched model.
        id: of an edit that it has.
        running: "keep": a running generation goes on with the edit; "switch": without it. See `add_edit`.

    Raises:
        PatchError: the model is not patched, or has no edit of this id.
        ValueError: an unknown `running`.
    """
    state = require_state(model)
    _check_running(running)
    with state.lock, outside_inference_mode():
        edit = _installed(state, id)
        stores = {i: state.ffns[i].edits.without(id) for i in edit.layers}
        artifacts = {name: e for name, e in state.edits.items() if name != id}
        router = state.installed.router
        _publish(state, running, edits=stores, router=router and router.without(id), artifacts=artifacts)
        log_event("remove_edit", state, edit=id)


def set_beta(model: nn.Module, id: str, beta: float, *, running: Running = "keep") -> None:
    """Give an installed edit another beta in all its layers: how strongly zeta' steers its values (Eq. 6).

    Args:
        model: a patched model.
        id: of an edit that it has.
        beta: the same for all layers; 0: zeta' does not steer.
        running: "keep": a running generation goes on with the beta of before; "switch": with this one. See `add_edit`.

    Raises:
        PatchError: the model is not patched, or has no edit of this id.
        ValueError: a beta that is not finite, or an unknown `running`.
    """
    state = require_state(model)
    _check_running(running)
    if not math.isfinite(beta):
        raise ValueError(f"beta: expected a finite number, got {beta!r}")
    with state.lock, outside_inference_mode():
        edit = _installed(state, id)
        layers = {i: replace(layer, beta=torch.full_like(layer.beta, beta)) for i, layer in edit.layers.items()}
        stores = {i: state.ffns[i].edits.with_beta(id, beta) for i in edit.layers}
        _publish(state, running, edits=stores, artifacts={**state.edits, id: replace(edit, layers=layers)})
        log_event("set_beta", state, edit=id, beta=beta)


def swap_memory(
    model: nn.Module, memory: MemoryBank | None, *, override: bool = False, running: Running = "keep"
) -> None:
    """Give a patched model another memory, or none, in place.

    Args:
        model: a patched model; the memory's layers must be among those that were patched.
        memory: None: no memory any more.
        override: accept a memory that was not made for this model, its config or its edits.
        running: "keep": a running generation goes on with the memory of before; "switch": with this one. See
            `add_edit`.

    Raises:
        PatchError: the model is not patched, or not at the memory's layers.
        MismatchError: the memory is for another model or config, or an installed edit was trained with another one.
        TypeError: `memory` is not a MemoryBank.
        ValueError: an unknown `running`.
    """
    state = require_state(model)
    _check_running(running)
    if memory is not None and not isinstance(memory, MemoryBank):
        raise TypeError(f"memory: expected a MemoryBank or None, got {type(memory).__name__}")
    with state.lock, outside_inference_mode():
        layers = memory.layers if memory else {}
        if missing := sorted(set(layers) - set(state.attentions)):
            raise PatchError(f"memory: its layers {missing} are not patched; patch(model, layers=...) them")
        edits = list(state.edits.values())
        check_artifacts(backbones.unwrap(model), state.decoder, edits, memory, state.config, override)
        tables = {
            i: make_tables(memory, i, state.config, backbones.device_of(attention.module), state.retriever)
            for i, attention in state.attentions.items()
        }
        router = make_router(memory, state.config, state.edits)
        _publish(state, running, memories=tables, router=router, memory=memory)
        set_prompt_hooks(backbones.unwrap(model), state.decoder, state.context, router)
        log_event("swap_memory", state)


def set_layers(model: nn.Module, layers: Mapping[int, Mapping[str, Any]]) -> None:
    """Let a patched model compute with these neurons, layer -> id -> `EditLayer`, as training does before each step.

    They replace the edits of these layers, without being edits of the model: see `selecting`. Gradients reach those
    that ask for them.
    """
    state = require_state(model)
    with state.lock:
        stores = {i: LayerEdits() for i in layers}
        for i, store in stores.items():
            store.set(layers[i])
        _publish(state, "keep", edits=stores)


def _check_running(running: str) -> None:
    if running not in ("keep", "switch"):
        raise ValueError(f"running: expected 'keep' or 'switch', got {running!r}")


def _installed(state: PatchedState, id: str) -> Edit:
    if id not in state.edits:
        raise PatchError(f"id: {id!r} is no edit of the model; it has {sorted(state.edits)}")
    return state.edits[id]


def _publish(
    state: PatchedState, running: Running, *, edits: Mapping[int, LayerEdits] | None = None, **more: Any
) -> None:
    """Install these stores, and what else an `Installed` has, at once."""
    version: Installed = state.installed
    state.context.publish(replace(version, edits={**version.edits, **(edits or {})}, **more))
    if running == "switch":
        state.context.forget_running()
