"""A model whose engine computes the tokens of all requests behind one another, [T, d], as vLLM and others do."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..artifacts.compatibility import check_compatibility
from ..artifacts.edit import Edit
from ..artifacts.memory import MemoryBank
from ..nn import MemoryTables, Ranks, Router, SharedMemory, shift_tokens
from ..ops import _check
from ..patching.install import entries_of, make_router, make_tables
from ..retrieval import Retriever
from .bank import EditBank
from .repository import Version
from .step_tables import Shift, StepTables


@dataclass(frozen=True)
class RequestSlice:
    """What a step computes for one request.

    Attributes:
        tokens: how many of the step's tokens are its own.
        edits: keys of the edits that are added to them, with Config(scope="memory") from the last one of the prompt on.
        memory: whether the memory shifts them, or the tenant whose entries alone may (see `MemoryBank.joined`).
        prompt: of the tokens, how many come before the last one of the prompt: with Config(tokens="answer") these are
            not shifted, and with Config(scope="memory") not edited.
    """

    tokens: int
    edits: tuple[str, ...] = ()
    memory: bool | str = True
    prompt: int = 0


class RaggedRuntime:
    """Edits and a memory for such a model. An engine says what a step holds, and calls two functions in each layer.

    Args:
        layers: decoder layers that edits may name.
        hidden_size: d.
        activation: of the FFNs; see `ops.patched_ffn`.
        memory: for all requests that do not decline it; None: none.
        resident: edits that are kept when no request asks for them.
        retriever: makes the index of a layer's retrieval keys, see `patch`; None: what the memory's `search` says.
        own: the decoder layers that are computed here, where a pipeline's other stages compute the rest; None: all.
        ranks: that share the memory's entries, each of which computes the same steps; None: all entries are here.
        device: where the model is.

    Attributes:
        graphs: what CUDA graphs of whole steps read; None before `for_graphs`.

    Raises:
        ValueError: a memory whose config needs more than flat tokens tell: alpha="last", retrieval="sequence",
            tokens="text" or values="projected"; fewer entries than ranks; or as `EditBank` does.
    """

    def __init__(
        self,
        layers: Sequence[int],
        hidden_size: int,
        activation: str,
        memory: MemoryBank | None = None,
        *,
        resident: int = 1024,
        retriever: Callable[[Tensor], Retriever] | None = None,
        own: Collection[int] | None = None,
        ranks: Ranks | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.bank = EditBank(layers, hidden_size, activation, own=own, device=device)
        self.memory, self._resident = memory, resident
        self._device = torch.device(device)
        self._tables: dict[int, MemoryTables] = {}
        self._shift: Shift = shift_tokens
        entries = 0 if memory is None else len(memory)
        self._whole = torch.tensor([[0, entries]], dtype=torch.int64, device="cpu").to(self._device)
        if memory is not None:
            check_memory(memory)
            part = None
            if ranks is not None and memory.layers:
                self._shift, part = SharedMemory(entries, ranks).shift, ranks.part(entries)
            here = [i for i in memory.layers if own is None or i in own]
            made = {i: make_tables(memory, i, memory.config, self._device, retriever, part) for i in here}
            self._tables = {i: tables for i, tables in made.items() if tables is not None}
        self._scoped = memory is not None and memory.config.scope == "memory"
        router = make_router(memory, memory.config, {}) if memory is not None else None
        self._router = None if router is None else router.to(self._device)
        self._routers: dict[tuple[str, ...], Router] = {}
        self._rows: tuple[tuple[str, ...], ...] = ()
        self._tokens: tuple[int, ...] = ()
        self._shifted = False
        self._bounds: Tensor | None = None
        self._routed = {True: 0, False: 0}
        self._memory_seconds = 0.0
        self.graphs: StepTables | None = None

    @property
    def stats(self) -> dict[str, float]:
        """For a monitor: `edits_resident`; `prompts_routed` to an edit by a scope and `prompts_not_routed`;
        `memory_seconds`, what retrieval and attention over it took, on a GPU until they were launched;
        `memory_entries`, those that are here."""
        return {
            "edits_resident": len(self.bank),
            "prompts_routed": self._routed[True],
            "prompts_not_routed": self._routed[False],
            "memory_seconds": self._memory_seconds,
            "memory_entries": max((tables.entries for tables in self._tables.values()), default=0),
        }

    @property
    def layers(self) -> list[int]:
        """Those computed here that may have neurons, or have a memory."""
        return sorted({*self.bank.layers, *self.remembering})

    @property
    def routes(self) -> bool:
        """Whether the memory decides in which prompts an edit acts."""
        return self._router is not None

    @property
    def remembering(self) -> list[int]:
        """Those computed here whose attention the memory shifts."""
        return sorted(self._tables)

    def check(self, edit: Edit) -> None:
        """Raises MismatchError for an edit that cannot be served: other layers, sizes or memory."""
        check_compatibility(edit, self.bank.description, **in_force(self.memory))

    def hold(self, version: Version, needed: Sequence[str] = ()) -> None:
        """Make an edit resident under its key. Where too many are, the oldest that are not `needed` go."""
        if version.key in self.bank:
            return
        if len(self.bank) >= self._resident:
            idle = [key for key in self.bank if key not in set(needed)]
            for key in idle[: max(len(idle) - self._resident // 2, 0)] or idle[:1]:
                self.bank.remove(key)
        self.bank.add(replace(version.edit, id=version.key))

    @torch.no_grad()
    def decide(
        self, prompt: Sequence[int], versions: Sequence[Version], embed: Callable[[Tensor], Tensor]
    ) -> tuple[Version, ...]:
        """Of a request's edits those that act: with Config(scope="memory") the one whose entry wins, or none.

        Args:
            prompt: its token ids.
            versions: its edits.
            embed: ids int64 [T] -> [T, e], the model's embedding.
        """
        if self._router is None or not versions:
            return tuple(versions)
        names = tuple(version.key for version in versions)
        router = self._routers.get(names)
        if router is None:
            router = self._router.with_edits({version.key: entries_of(version.edit) for version in versions})
            if len(self._routers) >= _ROUTERS:
                self._routers.clear()
            self._routers[names] = router
        ids = torch.tensor([list(prompt)], dtype=torch.int64, device=self._device)
        key = router.key(ids, embed(ids[0]).unsqueeze(0), torch.ones_like(ids, dtype=torch.bool))
        (route,) = router.explained(router.decide(key, [None]))
        self._routed[route.edit is not None] += 1
        return tuple(version for version in versions if version.key == route.edit)

    def begin(self, shares: Sequence[RequestSlice]) -> None:
        """Say what the next passes hold: the requests' tokens in this order; what is behind them is padding.

        Raises ValueError for a share that names an edit more than once.
        """
        for i, share in enumerate(shares):
            if len(set(share.edits)) != len(share.edits):
                raise ValueError(f"shares[{i}].edits: expected distinct keys, got {list(share.edits)}")
        runs = [run for share in shares for run in self._runs(share)]
        self._rows, self._tokens = tuple(rows for rows, _ in runs), tuple(tokens for _, tokens in runs)
        self._shifted = bool(self._tables) and any(self._remembers(share) for share in shares)
        self._bounds = self._entries(shares) if self._shifted else None

    def _runs(self, share: RequestSlice) -> list[tuple[tuple[str, ...], int]]:
        """Edits and tokens: with a scope, the prompt but for its last token is not edited."""
        before = min(share.prompt, share.tokens) if self._scoped and share.edits else 0
        return [*([((), before)] if before else []), (tuple(share.edits), share.tokens - before)]

    def _remembers(self, share: RequestSlice) -> bool | str:
        """Whether the memory shifts a request; with a scope, only where an edit acts."""
        return share.memory if share.edits or not self._scoped else False

    def _entries(self, shares: Sequence[RequestSlice]) -> Tensor | None:
        """int64 [T, 2]: the entries that each token may retrieve; None: all of them, each token."""
        assert self.memory is not None
        answers = self.memory.config.tokens == "answer" or self._scoped
        if all(self._remembers(share) is True and not (answers and share.prompt) for share in shares):
            return None
        bounds, start = torch.zeros(sum(self._tokens), 2, dtype=torch.int64, device="cpu"), 0
        for share in shares:
            asked = self._remembers(share)
            first = share.tokens if not asked else min(share.prompt, share.tokens) if answers else 0
            whole = range(len(self.memory) if asked else 0)
            entries = self.memory.entries(asked) if isinstance(asked, str) else whole
            own = bounds[start + first : start + share.tokens]
            own[:, 0], own[:, 1] = entries.start, entries.stop
            start += share.tokens
        return bounds.to(self._device)

    def for_graphs(self, tokens: int, requests: int, edits: int = 256, like: Edit | None = None) -> StepTables:
        """Lay out what CUDA graphs of steps read, and let `write` write steps there.

        Args:
            tokens: of a step, at most, padding included.
            requests: of a step, at most.
            edits: that there is room for; no more stay resident when no request asks for them.
            like: see `StepTables`.

        Returns:
            What computes in the place of this object in a pass that is captured.

        Raises:
            ValueError: a memory that is not searched exactly, which no graph holds.
        """
        if any(tables.retriever is not None for tables in self._tables.values()):
            raise ValueError("memory: expected one that is searched exactly: no CUDA graph holds another search")
        config = None if self.memory is None else self.memory.config
        self._resident = min(self._resident, edits)
        self.graphs = StepTables(
            self.bank, self._tables, config, self._shift, tokens=tokens, rows=2 * requests, edits=2 * edits + 1,
            like=like,
        )  # fmt: skip
        return self.graphs

    @property
    def acting(self) -> bool:
        """Whether the step that `begin` has told of is edited or shifted at all."""
        return any(self._rows) or self._shifted

    def write(self) -> bool:
        """Write the step that `begin` has told of where graphs read it; see `StepTables.write`."""
        bounds = self._bounds
        if self._shifted and bounds is None:
            bounds = self._whole
        return self.graphs is not None and self.graphs.write(self._rows, self._tokens, bounds)

    @torch.no_grad()
    def warm_up(self, dtype: torch.dtype, tokens: Iterable[int] = (1, 8, 64, 512)) -> float:
        """Have Triton compile now what steps will launch, as `unike_kernels.warm_up` does for a patched model.

        Each layer computes with zeros, for each number of tokens of a step, with the edits that are resident, and with
        the memory for all or for some. How many requests a step has makes no difference. On a CPU tables are laid out.

        Args:
            dtype: of the activations.
            tokens: of a step, all of its requests together.

        Returns:
            The seconds that it took.

        Raises:
            ValueError: `tokens` are no integers of at least 1.
        """
        start, edits = time.perf_counter(), tuple(self.bank)
        declines = RequestSlice(0, memory=False)
        for count in _check.counts("tokens", tokens):
            x = torch.zeros(count, self.bank.hidden_size, dtype=dtype, device=self._device)
            for others in ([], [declines]):
                self.begin([RequestSlice(count, edits), *others])
                for layer in self.layers:
                    self.ffn(layer, x, x.clone())
                    self.attention(layer, x, x.clone())
        self.end()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - start

    def end(self) -> None:
        """No pass is edited any more, until the next `begin`."""
        self._rows, self._tokens, self._shifted, self._bounds = (), (), False, None

    def ffn(self, layer: int, x: Tensor, out: Tensor) -> None:
        """Add the neurons of each request's edits to an FFN's output, in place.

        Args:
            layer: index in the decoder.
            x: [..., d], the FFN's input; the step's tokens come first, padding behind them.
            out: [..., d], contiguous, the FFN's output on `x`.

        Raises:
            RuntimeError: fewer tokens than the step holds.
        """
        if not self.bank.has_neurons(layer) or not any(self._rows):
            return
        x, o = self._own(x, out)
        self.bank.prepared(layer, self._rows, self._tokens)(x, o, o)

    def _own(self, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """The step's tokens, [T, d], of a layer's input and output, without the padding behind them.

        Raises RuntimeError where a layer computes a part of them, as ranks of an engine may.
        """
        x, out, total = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1]), sum(self._tokens)
        if len(x) < total:
            raise RuntimeError(f"the step holds {total} tokens, a layer got {len(x)} of them")
        return x[:total], out[:total]

    def attention(self, layer: int, hidden: Tensor, out: Tensor) -> None:
        """Shift an attention's output towards the memory, in place.

        Args:
            layer: index in the decoder; one without memory is left as it is.
            hidden: [..., d], the attention's input; the step's tokens come first, padding behind them.
            out: [..., d], contiguous, the attention's output on `hidden`.

        Raises:
            RuntimeError: fewer tokens than the step holds.
        """
        tables = self._tables.get(layer)
        if tables is None or not self._shifted or self.memory is None:
            return
        h, o = self._own(hidden, out)
        begun = time.perf_counter()
        self._shift(tables, self.memory.config, h, h.unsqueeze(1), o, self._bounds, out=o)
        self._memory_seconds += time.perf_counter() - begun


_ROUTERS = 256  # sets of edits whose entries are kept together


def in_force(memory: MemoryBank | None) -> dict[str, Any]:
    """What `check_compatibility` must know of a server's memory."""
    if memory is None:
        return {"memories": (None,)}
    scope = memory.scope.id if memory.scope is not None and memory.config.scope == "memory" else None
    return {"memories": memory.ids if memory.layers else (None,), "scope": scope}


def check_memory(memory: MemoryBank) -> None:
    """Raises ValueError for a memory whose config needs more than flat tokens tell."""
    config = memory.config
    if config.scope == "memory" and memory.scope is not None and memory.scope.layers:
        raise ValueError(
            f"memory: an engine of flat tokens serves a scope of the text alone; this one reads layers "
            f"{list(memory.scope.layers)}, too (build_scope(layers=[]))"
        )
    if memory.scope is not None and memory.scope.own is not None:
        raise ValueError(
            "memory: its entries act by themselves where a prompt is about them, which an engine of flat tokens does "
            "not serve; expected one whose Scope.own is None"
        )
    if config.needs_whole_prompts or config.tokens == "text" or config.values == "projected":
        raise ValueError(
            "memory: an engine of flat tokens serves retrieval='token', alpha='token' or a number, "
            f"tokens='all' or 'answer' and values other than 'projected'; got {config}"
        )


def remembers(memory: MemoryBank | None, asked: bool | str | None) -> bool | str:
    """What a request's `RequestSlice.memory` is.

    Args:
        memory: the server's.
        asked: whether it shall shift the request, or the tenant whose entries alone shall; None: it does, unless it
            has tenants.

    Raises ValueError for an unknown tenant, a tenant where there is no memory, a memory of tenants of which none is
    named, or another type. Messages name no tenant but the one that was asked for.
    """
    if asked is None:
        return memory is not None and not memory.tenants
    if isinstance(asked, str):
        if memory is None:
            raise ValueError(f"unike_memory: there is no memory for the tenant {asked!r:.80}")
        if asked not in memory.tenants:
            raise ValueError(f"unike_memory: unknown tenant {asked!r:.80}")
        return asked
    if not isinstance(asked, int | float) or asked not in (True, False):
        raise ValueError(f"unike_memory: expected true, false or the name of a tenant, got {asked!r:.80}")
    if asked and memory is not None and memory.tenants:
        raise ValueError(f"unike_memory: this memory has tenants: expected false or the name of one, got {asked!r}")
    return bool(asked) and memory is not None
