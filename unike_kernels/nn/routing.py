"""Which edits act in a row: those whose entry its prompt is nearest to, if that is near enough.

The rule: the best cosine of the prompt's key with an entry of an edit, minus the best cosine with an entry of anything
else (the memory's other facts, and the other edits), is above a threshold. Else no edit acts.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.cosine_topk import PreparedSearch
from ..ops.prompt_encoder import PreparedEncoder, PromptEncoder, Vocabulary, nearest, surely_about
from ._drop_in import Tables

if TYPE_CHECKING:
    from .passes import Pass

Rows = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Route:
    """What was decided for a row, and why.

    Attributes:
        edit: the one that acts, or None.
        nearest: the edit with the nearest entry; None: there is no edit that the row may use.
        score: the cosine of the prompt's key with that entry.
        other: what else is nearest: the number of one of the memory's other facts, or another edit; None: nothing.
        other_score: its cosine; 0 for nothing.
        threshold: that score - other_score must exceed.
        fact: the memory's fact whose own entries act, see `Scope.own`; None: none.
        named: what the scope calls that fact, or else the `other` one; "": it has no name.
    """

    edit: str | None
    nearest: str | None
    score: float
    other: int | str | None
    other_score: float
    threshold: float
    fact: int | None = None
    named: str = ""

    @property
    def margin(self) -> float:
        """By how much the edit is nearer than anything else."""
        return self.score - self.other_score

    def __str__(self) -> str:
        if self.fact is not None:
            return f"{self._fact(self.fact)} acts, and no edit"
        if self.nearest is None:
            return "no edit acts: the row may use none"
        if self.other is None:
            than = "the memory has no other facts"
        else:
            what = f"edit {self.other!r}" if isinstance(self.other, str) else self._fact(self.other)
            than = f"{what} {self.other_score:.3f}"
        sides = f"cosine with {self.nearest!r} {self.score:.3f}, {than}: margin {self.margin:.3f}"
        if self.edit is None:
            return f"no edit acts: {sides}, at most the threshold {self.threshold:.3f}"
        return f"{self.edit!r} acts: {sides}, above the threshold {self.threshold:.3f}"

    def _fact(self, number: int) -> str:
        return f"fact {number} of the memory{f' ({self.named!r})' if self.named else ''}"


class Routes(NamedTuple):
    """What is decided for each of B rows, on the device that decided it.

    Attributes:
        acts: int64 [B], number of the edit that acts, -1 for none; see `Router.names`.
        nearest: int64 [B], number of the edit with the nearest entry, -1 where there is none.
        score: float32 [B], the cosine with that entry.
        other: int64 [B], what else is nearest: the number of an edit, -1 for nothing, -2 - f for the memory's fact f.
        other_score: float32 [B], its cosine; 0 for nothing.
        fact: int64 [B], the memory's fact whose own entries act, -1 for none.
    """

    acts: Tensor
    nearest: Tensor
    score: Tensor
    other: Tensor
    other_score: Tensor
    fact: Tensor


@dataclass(frozen=True, eq=False)
class Routed:
    """Rows in each of which one edit acts, or none.

    Attributes:
        names: of the edits, by number.
        acts: int64 [R], -1 for none.
        entries: int64 [R, 2], those that shift the row where it may retrieve them; [-1, -1]: all.
    """

    names: list[str]
    acts: Tensor
    entries: Tensor

    def with_none(self) -> Routed:
        """With a row behind them in which none acts."""
        return Routed(self.names, F.pad(self.acts, (0, 1), value=-1), F.pad(self.entries, (0, 0, 0, 1)))

    def named(self) -> Rows:
        """The same as ids; waits for the device."""
        return tuple((self.names[i],) if i >= 0 else () for i in self.acts.tolist())

    def idle(self, among: Container[str] | None = None) -> bool:
        """Whether it is known, without waiting for a device, that none of these edits acts; None: no entry either."""
        if self.acts.device.type != "cpu":
            return False
        if among is None:
            return not bool(self.entries.any())
        return not any(i >= 0 and self.names[i] in among for i in self.acts.tolist())


def idle(rows: Rows | Routed | None, among: Container[str] | None = None) -> bool:
    """See `Routed.idle`; of rows that name their edits, too."""
    if isinstance(rows, Routed):
        return rows.idle(among)
    return not any(among is None or name in among for row in rows or () for name in row)


@dataclass(eq=False)
class Seen:
    """What a router has seen of the prompts of a generation.

    Attributes:
        tokens: of each pass: ids int64 [B, T], embeddings [B, T, e], and bool [B, T], which of them the prompts are of.
        states: layer -> [B, d] of the last tokens.
        key: [B, c] of the prompts that have ended.
        ended: bool [B], which have.
        scope: id of the one whose encoder made the key.
        routes, routed: of each row, as the router `decided` for the selected edits and a batch.
    """

    tokens: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    states: dict[int, Tensor] = field(default_factory=dict)
    key: Tensor | None = None
    ended: Tensor | None = None
    scope: str = ""
    routes: Routes | None = None
    routed: Routed | None = None
    decided: tuple[Router, Rows | None, int] | None = None


class Router(Tables):
    """The entries of a model's edits, and those of other facts.

    Args:
        scope: id of the scope that they are of.
        encoder: Enc_key, or what makes float32 keys [n, c], unit rows, from the token ids of n prompts.
        vocabulary: of the model.
        layers: whose input its last states are, ascending; none where the text alone counts.
        others: float32 [N, c], unit rows: entries of other facts.
        facts: int64 [N], the fact of each.
        threshold: a margin above which an edit acts.
        same_fact: a cosine above which two prompts surely ask for one fact, where the margin says so, too.
        own: int64 [F, 2], see `Scope.own`, or None.
        called: what the facts are called, or None.

    Attributes:
        names: of the edits, by number.
        entries: float32 [E, c], unit rows, of the edits.
        owner: int64 [E], number of the edit that each is of.
        most: entries of one edit.
        replaced: an edit -> the newer one of the same fact.
        retired: an edit -> the memory's fact that it is about.
    """

    others: Tensor
    facts: Tensor
    entries: Tensor
    owner: Tensor
    own: Tensor | None

    def __init__(
        self,
        scope: str,
        encoder: PromptEncoder | Callable[[list[list[int]]], Tensor],
        vocabulary: Vocabulary,
        layers: Sequence[int],
        others: Tensor,
        facts: Tensor,
        threshold: float,
        same_fact: float,
        own: Tensor | None = None,
        called: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__()
        self.scope, self.vocabulary, self.layers = scope, vocabulary, tuple(layers)
        self.threshold, self.same_fact, self.called = threshold, same_fact, called
        self._own: Callable[[list[list[int]]], Tensor] | None = None
        if isinstance(encoder, PromptEncoder):
            self._blocks = len(encoder.blocks)
            for name, t in encoder.tensors().items():
                self.table(_key(name), t)
        else:
            self._own = encoder
        self.table("others", others)
        self.table("facts", facts)
        self.table("own", own)
        self.table("entries", others[:0])
        self.table("owner", torch.empty(0, dtype=torch.int64, device=facts.device))
        self.names: list[str] = []
        self.most = 0
        self.replaced: dict[str, str] = {}
        self.retired: dict[str, int] = {}
        self._widest = max(Counter(facts.tolist()).values(), default=0)  # entries of one fact
        self._tables: dict[tuple[str, ...] | None, _Candidates] = {}

    @property
    def places(self) -> list[int]:
        """The layers whose inputs `see` must see."""
        return sorted({0, *self.layers})

    @property
    def encoder(self) -> PreparedEncoder:
        """Enc_key, from its tensors."""
        if self._plan is None:
            tensors = {name.replace("/", "."): t for name, t in self._buffers.items() if t is not None}
            found = PromptEncoder.of(tensors, self._blocks, bool(self.layers))
            self._plan = PreparedEncoder(found, self.vocabulary)
        encoder: PreparedEncoder = self._plan
        return encoder

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._tables.clear()
        return super()._apply(fn, recurse)

    # --- what is installed -------------------------------------------------------------------------------------------

    def with_edits(self, edits: Mapping[str, Tensor]) -> Router:
        """A new router with these edits, too, given as name -> entries [n, c], the own prompt's first.

        Where one is surely about the fact of an earlier edit, it takes that one's place; where about one of the
        memory's, that does not count as another fact.
        """
        new, given = self._copied(), [entries.to(self.entries) for entries in edits.values()]
        counts = torch.tensor([len(own) for own in given], dtype=torch.int64, device=self.owner.device)
        numbers = torch.arange(len(given), dtype=torch.int64, device=self.owner.device) + len(self.names)
        new.entries = torch.cat([self.entries, *given])
        new.owner = torch.cat([self.owner, numbers.repeat_interleave(counts)])
        new.names = [*self.names, *edits]
        new.most = max([self.most, *map(len, given)])
        new.replaced, new.retired = dict(self.replaced), dict(self.retired)
        if given:
            new._find_facts(list(edits), len(self.entries) + counts.cumsum(0) - counts)
        return new

    def _find_facts(self, names: list[str], own: Tensor) -> None:
        """Note what these edits are about, by their own prompts' entries, which are in these places: the fact of the
        edit, or of the memory, that would win there, if its entry is near enough to be surely of the same fact."""
        prompts, earlier = self.entries[own], torch.stack([torch.zeros_like(own), own], 1)
        edits = nearest(prompts, self.entries, self.most + 1, earlier)
        facts = nearest(prompts, self.others, self._widest + 1)
        owners, numbers = self.owner.tolist(), self.facts.tolist()
        about = {fact: name for name, fact in self.retired.items()}

        def live(name: str) -> str:
            while name in self.replaced:
                name = self.replaced[name]
            return name

        for name, found, known in zip(names, edits, facts, strict=True):
            near: list[tuple[float, str | int]] = [(s, live(self.names[owners[i]])) for s, i in found]
            for s, i in known:
                fact = numbers[i]
                near.append((s, live(about[fact]) if fact in about else fact))
            old = surely_about(near, self.same_fact, self.threshold)
            if isinstance(old, str):
                self.replaced[old] = name
            fact_of = self.retired.get(old) if isinstance(old, str) else old
            if fact_of is not None:
                self.retired[name] = fact_of
                about[fact_of] = name

    def without(self, name: str) -> Router:
        """A new router without this edit; what it had taken the place of is back."""
        new = self._copied()
        number = self.names.index(name)
        kept = self.owner != number
        new.entries, owner = self.entries[kept], self.owner[kept]
        new.owner = owner - (owner > number).long()
        new.names = [other for other in self.names if other != name]
        passed_on = {old: self.replaced.get(name) if by == name else by for old, by in self.replaced.items()}
        new.replaced = {old: by for old, by in passed_on.items() if old != name and by is not None}
        new.retired = {edit: fact for edit, fact in self.retired.items() if edit != name}
        return new

    def _copied(self) -> Router:
        new = copy.copy(self)
        new.__dict__.update(_buffers=dict(self._buffers), _tables={})
        return new

    # --- what is decided ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def see(self, now: Pass, layer: int, hidden: Tensor, embedded: tuple[Tensor, Tensor] | None) -> None:
        """Take what tells something about the prompts, where a layer begins.

        Args:
            now: the pass.
            layer: one of `places`.
            hidden: [B, T, d], its input.
            embedded: the ids int64 [B, T] that were embedded last, and their embeddings [B, T, e].

        Raises ValueError where these are not of this pass.
        """
        assert now.last is not None
        if self.entries.device != hidden.device:
            self._apply(lambda t: t.to(hidden.device))
        generation, last = now.generation, now.last
        seen = generation.seen = generation.seen or Seen()
        batch, tokens = hidden.shape[:2]
        if layer == 0:
            if embedded is None or batch % len(embedded[0]) or embedded[0].shape[1] != tokens:
                raise ValueError("inputs_embeds: scope='memory' tells prompts apart by input_ids; give those")
            ids, embeddings = embedded
            if batch > len(ids):
                ids, embeddings = (t.repeat_interleave(batch // len(t), 0) for t in embedded)
            within = torch.arange(tokens, dtype=torch.int64, device=hidden.device) <= last.unsqueeze(1)
            seen.tokens.append((ids, embeddings, within if now.visible is None else within & now.visible))
        if layer in self.layers:
            rows = torch.arange(batch, dtype=torch.int64, device=hidden.device)
            seen.states[layer] = hidden[rows, last.clamp(0, tokens - 1)]
        if layer == self.places[-1]:
            states = torch.stack([seen.states[i] for i in self.layers], 1) if self.layers else None
            ids, embeddings, within = (
                parts[0] if len(parts) == 1 else torch.cat(parts, 1) for parts in zip(*seen.tokens, strict=True)
            )
            key = self.key(ids, embeddings, within, states)
            ended = (last >= 0) & (last < tokens)
            if seen.key is not None and seen.ended is not None:  # of prompts that ended in earlier passes
                key, ended = torch.where(ended.unsqueeze(1), key, seen.key), ended | seen.ended
            seen.key, seen.ended, seen.scope, seen.decided = key, ended, self.scope, None

    def key(self, ids: Tensor, embeddings: Tensor, within: Tensor, states: Tensor | None = None) -> Tensor:
        """The keys [B, c] of prompts.

        Args:
            ids: int64 [B, T].
            embeddings: [B, T, e], of these.
            within: bool [B, T], which of them are of the prompts.
            states: [B, L, d], of the last token in each of the layers, if there are any.
        """
        if self._own is not None:
            rows = zip(ids.tolist(), within.tolist(), strict=True)
            prompts = [[i for i, there in zip(*row, strict=True) if there] for row in rows]
            return self._own(prompts).to(ids.device)
        return self.encoder(ids, embeddings, within, states).nan_to_num()

    def routes(self, now: Pass, batch: int) -> tuple[Routes, Routed]:
        """What is decided for each of `batch` rows."""
        seen, rows = now.generation.seen, now.selection.edits
        if seen is None or seen.key is None or seen.ended is None:
            raise ValueError("the prompt itself was not seen; start with the prompt, in the same uk.rows(...) block")
        if seen.routes is None or seen.routed is None or seen.decided != (self, rows, batch):
            prompts = len(seen.key)
            if batch % prompts:
                raise ValueError(f"the prompts had {prompts} rows, a later pass has {batch}")
            routes = nothing = _nothing(seen.key)
            if seen.scope == self.scope:  # else another memory has come, which cannot read the key
                beams = 1 if rows is None else prompts // len(rows)
                named = [None] * prompts if rows is None else [row for row in rows for _ in range(beams)]
                routes = self.decide(seen.key, named)
            routes = Routes(*(torch.where(seen.ended, yes, no) for yes, no in zip(routes, nothing, strict=True)))
            if batch > prompts:
                routes = Routes(*(t.repeat_interleave(batch // prompts) for t in routes))
            seen.routes = routes
            seen.routed, seen.decided = self._routed(seen.routes), (self, rows, batch)
        return seen.routes, seen.routed

    def decide(self, keys: Tensor, rows: Sequence[tuple[str, ...] | None]) -> Routes:
        """For each key [B, c] among the edits that its row names, or all. Nothing waits for the device."""
        groups, order = _grouped(tuple(rows), keys.device)
        if len(groups) == 1:
            return self._among(keys, rows[0])
        found = [_nothing(keys[:0]), *(self._among(keys[at], names) for names, at in groups)]
        return Routes(*(torch.cat(parts)[order] for parts in zip(*found, strict=True)))

    def _routed(self, routes: Routes) -> Routed:
        entries = torch.where(routes.acts < 0, 0, -1).unsqueeze(1).expand(-1, 2)
        if self.own is not None:
            entries = torch.where(routes.fact.unsqueeze(1) < 0, entries, F.pad(self.own, (0, 0, 0, 1))[routes.fact])
        return Routed(self.names, routes.acts, entries)

    def _among(self, keys: Tensor, names: tuple[str, ...] | None) -> Routes:
        of = self._competing(names)
        edit, score, second, second_score = _two(keys, *of.edits, self.most + 1)
        fact, best, _, next_best = _two(keys, *of.others, 1 if self.own is None else self._widest + 1)
        other = torch.where(best > second_score, -2 - fact, second)
        rival = torch.maximum(best, second_score)
        missing = edit < 0
        alone = missing | (rival < _LOWEST)
        other, rival = torch.where(alone, -1, other), torch.where(alone, 0.0, rival)
        acts = torch.where(self._wins(score, rival), edit, -1)
        none = torch.full_like(fact, -1)
        if self.own is not None:
            next_best = torch.maximum(score, next_best)
            wins = self._wins(best, torch.where(next_best < _LOWEST, 0.0, next_best)) & (acts < 0)
            wins &= (self.own[:, 0] < self.own[:, 1])[fact] if len(self.own) else False
            none = torch.where(wins, fact, -1)
        return Routes(acts, edit, torch.where(missing, 0.0, score), other, rival, none)

    def _wins(self, score: Tensor, rival: Tensor) -> Tensor:
        """By more than the threshold; what there is not, at -inf, never does."""
        return score.double() - rival > self.threshold

    def explained(self, routes: Routes) -> list[Route]:
        """For people; waits for the device."""
        name = [*self.names, None]  # -1: none
        return [
            Route(
                name[acts],
                name[near],
                score,
                name[other] if other >= -1 else -2 - other,
                rival,
                self.threshold,
                None if fact < 0 else fact,
                self._name_of(fact if fact >= 0 else -2 - other),
            )
            for acts, near, score, other, rival, fact in zip(*(t.tolist() for t in routes), strict=True)
        ]

    def _name_of(self, fact: int) -> str:
        """What a fact is called; "" for a number below 0, which is none's."""
        return self.called[fact] if self.called is not None and fact >= 0 else ""

    def _newer(self, name: str) -> set[str]:
        """The edits of this one's fact that came after it."""
        found = set()
        while name in self.replaced:
            name = self.replaced[name]
            found.add(name)
        return found

    def _competing(self, names: tuple[str, ...] | None) -> _Candidates:
        """What competes in a row: its edits, but for those that a newer one of them has replaced, and the other facts,
        but for those that one of them is about."""
        if names not in self._tables:
            if len(self._tables) >= _TABLES:
                self._tables.clear()
            if names is None and not self.replaced and not self.retired:
                self._tables[names] = _Candidates.of(self.entries, self.owner, self.others, self.facts)
                return self._tables[names]
            among = set(self.names if names is None else names)
            live = [number for number, name in enumerate(self.names) if name in among and not self._newer(name) & among]
            about = [fact for name, fact in self.retired.items() if name in among]
            mine = torch.isin(self.owner, torch.tensor(live, dtype=torch.int64, device=self.owner.device))
            rest = ~torch.isin(self.facts, torch.tensor(about, dtype=torch.int64, device=self.facts.device))
            own, others = (self.entries[mine], self.owner[mine]), (self.others[rest], self.facts[rest])
            self._tables[names] = _Candidates.of(*own, *others)
        return self._tables[names]


class _Candidates(NamedTuple):
    """The search among entries and the group of each: of edits, which is int64 [E], and of other facts, int64 [N]."""

    edits: tuple[PreparedSearch, Tensor]
    others: tuple[PreparedSearch, Tensor]

    @classmethod
    def of(cls, entries: Tensor, owner: Tensor, others: Tensor, facts: Tensor) -> _Candidates:
        """Of unit rows [E, c] and [N, c]."""
        return cls((PreparedSearch(entries, None), owner), (PreparedSearch(others, None), facts))


@functools.lru_cache(maxsize=64)
def _grouped(
    rows: tuple[tuple[str, ...] | None, ...], device: torch.device
) -> tuple[list[tuple[tuple[str, ...] | None, Tensor]], Tensor]:
    """The rows of each set of edits, int64, and where each row is among all of these."""
    groups: dict[tuple[str, ...] | None, list[int]] = {}
    for row, names in enumerate(rows):
        groups.setdefault(names, []).append(row)
    at = [torch.tensor(own, dtype=torch.int64, device="cpu") for own in groups.values()]
    order = torch.cat([*at, torch.empty(0, dtype=torch.int64, device="cpu")]).argsort()
    return list(zip(groups, (own.to(device) for own in at), strict=True)), order.to(device)


def _key(name: str) -> str:
    """What a buffer may be called."""
    return name.replace(".", "/")


_TABLES = 64  # sets of edits that rows may use, whose tables are kept
_LOWEST = -2.0  # below every cosine, above -inf


def _nothing(keys: Tensor) -> Routes:
    """For rows that may use no edit."""
    none = torch.full((len(keys),), -1, dtype=torch.int64, device=keys.device)
    zero = torch.zeros(len(keys), dtype=torch.float32, device=keys.device)
    return Routes(none, none, zero, none, zero, none)


def _two(keys: Tensor, search: PreparedSearch, groups: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each key the group of the nearest entry and its cosine, and the same for another group among the k nearest;
    -1 and -inf where there is none. Nothing waits for the device."""
    if not len(groups):
        none, low = _nowhere(len(keys), keys.device)
        return none, low, none, low
    scores, ids = search(keys, min(k, len(groups)), None)
    found = groups[ids]
    if found.shape[1] == 1:
        return found[:, 0], scores[:, 0], *_nowhere(len(keys), keys.device)
    differs = found != found[:, :1]
    at, there = differs.long().argmax(1, keepdim=True), differs.any(1)
    other = torch.where(there, found.gather(1, at)[:, 0], -1)
    return found[:, 0], scores[:, 0], other, torch.where(there, scores.gather(1, at)[:, 0], -torch.inf)


def _nowhere(rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each row no group, and a cosine below all."""
    none = torch.full((rows,), -1, dtype=torch.int64, device=device)
    return none, torch.full((rows,), -torch.inf, dtype=torch.float32, device=device)


def behind_prompts(last: Tensor, tokens: int) -> Tensor:
    """int64 [B * T]: the row of each token that is its prompt's last one or comes later, B for the others.

    Args:
        last: int64 [B], see `Pass.last`.
        tokens: T.
    """
    batch = len(last)
    rows, position = (torch.arange(n, dtype=torch.int64, device=last.device) for n in (batch, tokens))
    return torch.where(position >= last.unsqueeze(1), rows.unsqueeze(1), batch).flatten()
