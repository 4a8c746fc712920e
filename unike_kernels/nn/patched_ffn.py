"""An FFN with extra key-value neurons (paper, Eq. 3 and 6)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from ..errors import PatchError
from ..ops import ACTIVATIONS, EditPool
from ..ops._backend import compiles
from ..ops._workspace import capturing
from ..ops.patched_ffn import FUSED_TOKENS, PreparedNeurons, add_extra_neurons, fused_ffn, fuses
from ..ops.patched_ffn.reference import activate
from ._drop_in import DropIn, Record, adopt, base_class, check_free, first_argument, record_of
from .context import ModelContext
from .dense import Dense
from .layer_edits import LayerEdits
from .passes import Pass, on_gpu
from .routing import Routed, Rows, idle
from .trace import seconds_since


class ExtraNeurons(Record):
    """The extra neurons of one FFN.

    Attributes:
        modules: the FFN: one module, or the parts of one that stands inline in its layer.
        activation: of the extra neurons.
        dense: how the base's matrices are read, where it computes just what they say: then base and neurons of a batch
            of decode size are one launch on a GPU, and rows without edits lose the base's own bits. None: it does not,
            not any more, or nobody asked for that.
        context, layer: of the model, whose versions have the edits.
    """

    def __init__(
        self, modules: tuple[nn.Module, ...], activation: str, dense: Dense | None, context: ModelContext, layer: int
    ) -> None:
        self.modules, self.activation, self.dense, self.context, self.layer = modules, activation, dense, context, layer
        inside = [] if dense is None else [part for module in modules for part in module.modules()]
        self._probed = [(part, _state(part)) for part in inside]

    @property
    def edits(self) -> LayerEdits:
        """Those of the current version; empty at first, and the output is then the base module's own."""
        found: LayerEdits = self.context.current.edits[self.layer]
        return found

    @override
    def move(self, fn: Any) -> None:
        self.edits._apply(fn)

    @override
    def run(self, module: nn.Module, base: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        now, edits = self._now()
        if edits is None:
            return base(*args, **kwargs)
        hidden = first_argument(args, kwargs)
        if (fused := self._fused(now, edits, hidden)) is not None:
            return fused
        return self._with(now, edits, hidden, base(*args, **kwargs))

    def _now(self) -> tuple[Pass, LayerEdits | None]:
        """The pass that runs, and its edits; None: there are none."""
        now = self.context.now()
        edits: LayerEdits | None = now.version.edits.get(self.layer)
        return now, None if edits is None or edits.empty else edits

    def _with(self, now: Pass, edits: LayerEdits, hidden_states: Tensor, result: Any) -> Any:
        """What the base returns, and the neurons on top."""
        start = 0.0 if now.trace is None else time.perf_counter()
        if isinstance(result, tuple):  # experts: and what the router said
            out: Tensor = result[0]
            result = (self._add(now, edits, hidden_states.reshape(out.shape), out), *result[1:])
        else:
            result = self._add(now, edits, hidden_states, result)
        if now.trace is not None:
            record = now.trace.at(self.layer)
            record.neuron_seconds = seconds_since(start)
            found = self._activations(edits, *now.acting(), hidden_states)
            record.neurons = {name: t.view(*now.trace.shape, -1) for name, t in found.items()}
        return result

    def _add(self, now: Pass, edits: LayerEdits, hidden_states: Tensor, out: Tensor) -> Tensor:
        rows, token_rows = (None, None) if now.traced else now.acting()
        if now.scoped and not now.traced and idle(rows, edits.position):
            return out
        if now.traced or torch.is_grad_enabled():
            pool = self._pool(now, edits, rows)._replace(token_rows=token_rows)
            return add_extra_neurons(hidden_states, out, pool, self.activation)
        if token_rows is not None:
            return edits.of_tokens(self.activation, rows, token_rows)(hidden_states, out)
        return self._prepared(edits, rows, out)(hidden_states, out)

    def _prepared(self, edits: LayerEdits, rows: Rows | Routed | None, like: Tensor) -> PreparedNeurons:
        """The neurons and edits of these rows; for a pass that is captured into a CUDA graph what the one before it has
        laid out for that."""
        if not on_gpu(like) or isinstance(rows, Routed):
            return edits.view(self.activation, rows)
        if capturing(like.device):
            return self.context.captured.read(self.layer, edits, rows).prepared(self.activation)
        view = edits.view(self.activation, rows)
        self.context.captured.lay_out(self.layer, edits, rows, view.pool).prepared(self.activation)
        return view

    def _pool(self, now: Pass, edits: LayerEdits, rows: Rows | Routed | None) -> EditPool:
        """The neurons, and the edits of each row of this pass."""
        if now.traced:
            csr = now.selection.csr if now.decided is None else now.decided.csr
            return edits.pool(selected=None if csr is None else csr[self.layer])
        return edits.pool(rows)

    @torch.no_grad()
    def _activations(
        self,
        edits: LayerEdits,
        rows: Rows | Routed | None,
        token_rows: Tensor | None,
        hidden_states: Tensor,
    ) -> dict[str, Tensor]:
        """Edit id -> what its neurons put out, [..., n]; 0 for tokens that do not use it."""
        found = {}
        rows = rows.named() if isinstance(rows, Routed) else rows
        for name in edits.ids:
            layer = edits.layer(name)
            out = activate(self.activation, hidden_states.float() @ layer.keys.float().T + layer.key_bias.float())
            if layer.up is not None:
                out = out * (hidden_states.float() @ layer.up.float().T + layer.up_bias.float())
            if rows is not None:
                uses = torch.tensor([name in row for row in rows], dtype=torch.bool, device=out.device)
                tokens = out.shape[:-1].numel() // len(rows)
                of_tokens = uses.repeat_interleave(tokens) if token_rows is None else uses[token_rows]
                out = out * of_tokens.view(*out.shape[:-1], 1)
            found[name] = out.cpu()
        return found

    @torch.no_grad()
    def warm_up(self, tokens: int, dtype: torch.dtype) -> torch.device | None:
        """Compute once what passes of so many tokens do: of one row, and of as many rows.

        Returns the device; None where nothing is compiled, and the neurons are laid out alone.
        """
        edits = self.edits
        if edits.empty:
            return None
        plan = edits.view(self.activation, None)
        x = torch.zeros(tokens, edits.keys.shape[1], dtype=dtype, device=edits.keys.device)
        if not compiles(x):
            return None
        weights = None if self.dense is None else self.dense.weights()
        if weights is not None and (weights.w_in.device != x.device or not self._may_fuse(x)):
            weights = None  # offloaded, or its base is never computed with the neurons
        for each in (plan, plan.of_rows(*edits.csr((tuple(edits.ids),) * tokens), None)):
            each(x, x)
            if weights is not None:
                each.fused(x, weights)
        if self.context.config is not None and self.context.config.scope == "memory":
            edits.of_tokens(self.activation, None, torch.zeros(tokens, dtype=torch.int64, device=x.device))(x, x)
        return x.device

    # --- base and neurons in one launch ------------------------------------------------------------------------------

    def _fused(self, now: Pass, edits: LayerEdits, hidden_states: Tensor) -> Tensor | None:
        """Both together, or None where they may not be one launch."""
        if (
            not on_gpu(hidden_states)
            or self.dense is None
            or now.scoped
            or now.trace is not None
            or not self._may_fuse(hidden_states)
        ):
            return None
        weights, rows = self.dense.weights(), now.selection.edits
        if not now.traced:
            return self._prepared(edits, rows, hidden_states).fused(hidden_states, weights)
        operands = hidden_states, weights, self._pool(now, edits, rows), self.activation
        return fused_ffn(*operands) if fuses(*operands) else None

    def _may_fuse(self, hidden_states: Tensor) -> bool:
        """For few tokens, where nobody looks at what lies between and the FFN is the one that was probed."""
        if hidden_states.shape[:-1].numel() > FUSED_TOKENS or torch.is_grad_enabled():
            return False
        whole = self.modules[0] if len(self.modules) == 1 else None  # the hooks of an FFN run around all of it
        for part, state in self._probed:
            if _state(part) != state or (part is not whole and (part._forward_hooks or part._forward_pre_hooks)):
                return False
        return True


def _state(part: nn.Module) -> tuple[Any, ...]:
    """What tells that a part of an FFN is still what it was: its class, children, parameters and own forward."""
    parameters = map(type, part._parameters.values())
    return base_class(part), *part._modules.values(), *parameters, part.__dict__.get("forward")


class _Part(Record):
    """Of a part of an FFN that stands inline in its layer.

    What each part computes is its own, so that adapters, hooks and other activations between them are what they are
    anywhere. The first one notes what it gets, the last one adds the neurons of that.
    """

    def __init__(self, neurons: ExtraNeurons) -> None:
        self.neurons, self.context = neurons, neurons.context


class _First(_Part):
    def move(self, fn: Any) -> None:
        self.neurons.move(fn)

    def run(self, module: nn.Module, base: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        neurons = self.neurons
        now, edits = neurons._now()
        if edits is None:
            return base(*args, **kwargs)
        hidden = first_argument(args, kwargs)
        fused = neurons._fused(now, edits, hidden)
        self.context.inputs[neurons.layer] = (now, edits, hidden) if fused is None else None
        return base(*args, **kwargs) if fused is None else fused


class _Middle(_Part):
    def run(self, module: nn.Module, base: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = first_argument(args, kwargs)
        # Of this layer, or of another one that shares this activation.
        if on_gpu(hidden) and any(noted is None for noted in self.context.inputs.values()):
            return hidden
        return base(*args, **kwargs)


class _Last(_Part):
    def run(self, module: nn.Module, base: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        neurons, inputs = self.neurons, self.context.inputs
        if neurons.layer in inputs:
            noted = inputs.pop(neurons.layer)
            if noted is None:
                return first_argument(args, kwargs)
            now, edits, hidden = noted
            return neurons._with(now, edits, hidden, base(*args, **kwargs))
        if neurons._now()[1] is not None:
            raise PatchError(
                f"the last part of the FFN of layer {neurons.layer} was called without the first one: the input of its "
                "edits' neurons is not known"
            )
        return base(*args, **kwargs)


class PatchedFFN(DropIn):
    """The class of an FFN whose output has extra neurons, or of a part of one that stands inline in its layer."""

    @classmethod
    def from_module(
        cls,
        *base: nn.Module,
        activation: str,
        dense: Dense | None = None,
        context: ModelContext | None = None,
        layer: int = 0,
    ) -> nn.Module:
        """Give an FFN extra neurons, in place.

        Args:
            *base: an FFN module, or the parts of one that stands inline in its layer: two or more modules that are
                called one after the other, which together then compute the FFN and its neurons.
            activation: of the extra neurons.
            dense: see `ExtraNeurons`.
            context: of the model, whose versions hold the edits; None: one of this module's own, without edits.
            layer: index in the decoder, under which the versions hold them.

        Returns:
            The first of `base`, the same object; `extra_neurons` of it gives its neurons.

        Raises:
            ValueError: an unknown activation.
            TypeError: `base` is empty, or something in it is not a module.
            PatchError: one of them is patched already.
        """
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}; got {activation!r}")
        if not base or not all(isinstance(m, nn.Module) for m in base):
            raise TypeError(f"base: expected nn.Module, got {[type(m).__name__ for m in base]}")
        context = context or ModelContext()
        records: list[Record] = [neurons := ExtraNeurons(base, activation, dense, context, layer)]
        if len(base) > 1:
            records = [_First(neurons), *(_Middle(neurons) for _ in base[2:]), _Last(neurons)]
        own = [pair for pair in zip(base, records, strict=True) if not _shared(*pair)]
        for module, _ in own:
            check_free(module)
        if layer not in context.current.edits:
            context.install(layer, edits=LayerEdits())
        for module, record in own:
            adopt(module, cls, record)
        return base[0]


def _shared(module: nn.Module, record: Record) -> bool:
    """Whether it is an activation of several layers, which one record is enough for."""
    known = record_of(module)
    return isinstance(known, _Middle) and isinstance(record, _Middle) and known.context is record.context


def extra_neurons(module: nn.Module) -> ExtraNeurons:
    """Of a patched FFN or a part of one. Raises PatchError for another module."""
    record = record_of(module)
    if isinstance(record, _Part):
        return record.neurons
    if isinstance(record, ExtraNeurons):
        return record
    raise PatchError(f"{type(module).__name__} is not a patched FFN")
