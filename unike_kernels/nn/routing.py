"""Which edits act in a row: those whose entry its prompt is nearest to, if that is near enough.

The rule: the best cosine of the prompt's key with an entry of an edit, minus the best cosine with an entry of anything
else (the memory's other facts, and the other edits), is above a threshold. Else no edit acts.
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..ops.cosine_topk import cosine_topk
from ..ops.prompt_encoder import SPELLING, PromptEncoder, Text, Vocabulary, encode_prompts
from ._drop_in import Tables

if TYPE_CHECKING:
    from .context import Pass

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
    """

    edit: str | None
    nearest: str | None
    score: float
    other: int | str | None
    other_score: float
    threshold: float

    @property
    def margin(self) -> float:
        """By how much the edit is nearer than anything else."""
        return self.score - self.other_score

    def __str__(self) -> str:
        if self.nearest is None:
            return "no edit acts: the row may use none"
        if self.other is None:
            than = "the memory has no other facts"
        else:
            what = f"edit {self.other!r}" if isinstance(self.other, str) else f"fact {self.other} of the memory"
            than = f"{what} {self.other_score:.3f}"
        sides = f"cosine with {self.nearest!r} {self.score:.3f}, {than}: margin {self.margin:.3f}"
        if self.edit is None:
            return f"no edit acts: {sides}, at most the threshold {self.threshold:.3f}"
        return f"{self.edit!r} acts: {sides}, above the threshold {self.threshold:.3f}"


@dataclass(eq=False)
class Seen:
    """What a router has seen of the prompts of a generation.

    Attributes:
        tokens: of each pass: ids int64 [B, T], embeddings [B, T, e], and bool [B, T], which of them the prompts are of.
        states: layer -> [B, d] of the last tokens.
        key: [B, c] of the prompts that have ended.
        ended: bool [B], which have.
        scope: id of the one whose encoder made the key.
        routes: of each row, as the router `decided` for the selected edits.
    """

    tokens: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    states: dict[int, Tensor] = field(default_factory=dict)
    key: Tensor | None = None
    ended: Tensor | None = None
    scope: str = ""
    routes: tuple[Route, ...] = ()
    decided: tuple[Router, Rows | None] | None = None


class Router(Tables):
    """The entries of a model's edits, and those of other facts.

    Args:
        scope: id of the scope that they are of.
        encoder: Enc_key.
        vocabulary: of the model.
        layers: whose input its last states are, ascending; none where the text alone counts.
        others: float32 [N, c], unit rows: entries of other facts.
        facts: int64 [N], the fact of each.
        threshold: a margin above which an edit acts.
        same: a margin above which a prompt surely asks for a fact.
    """

    others: Tensor
    facts: Tensor
    entries: Tensor

    def __init__(
        self,
        scope: str,
        encoder: PromptEncoder,
        vocabulary: Vocabulary,
        layers: Sequence[int],
        others: Tensor,
        facts: Tensor,
        threshold: float,
        same: float,
    ) -> None:
        super().__init__()
        self.scope, self.vocabulary, self.layers = scope, vocabulary, tuple(layers)
        self.threshold, self.same = threshold, same
        self._blocks = len(encoder.blocks)
        for name, t in encoder.tensors().items():
            self.table(_key(name), t)
        self.table("others", others)
        self.table("facts", facts)
        self.table("entries", others[:0])
        self.owners: list[str] = []  # of the entries
        self.most = 0  # entries of one edit
        self.replaced: dict[str, str] = {}  # an edit -> the newer one of the same fact
        self.retired: dict[str, int] = {}  # an edit -> the memory's fact that it is about
        self._fact: list[int] = facts.tolist()
        self._widest = max(Counter(self._fact).values(), default=0)  # entries of one fact
        self._tables: dict[tuple[str, ...] | None, _Candidates] = {}

    @property
    def places(self) -> list[int]:
        """The layers whose inputs `see` must see."""
        return sorted({0, *self.layers})

    @property
    def encoder(self) -> PromptEncoder:
        """Enc_key, from its tensors."""
        tensors = {name.replace("/", "."): t for name, t in self._buffers.items() if t is not None}
        return PromptEncoder.of(tensors, self._blocks, bool(self.layers))

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
        first = [*itertools.accumulate(map(len, given), initial=len(self.owners))]
        new.entries = torch.cat([self.entries, *given])
        new.owners = [*self.owners, *(name for name, own in zip(edits, given, strict=True) for _ in own)]
        new.most = max([self.most, *map(len, given)])
        new.replaced, new.retired = dict(self.replaced), dict(self.retired)
        if given:
            new._find_facts(list(edits), first[:-1])
        return new

    def _find_facts(self, names: list[str], first: list[int]) -> None:
        """Note what these edits are about, by the places of their own prompts' entries."""
        own = torch.tensor(first, dtype=torch.int64, device=self.entries.device)
        prompts, earlier = self.entries[own], torch.stack([torch.zeros_like(own), own], 1)
        hidden = sum(owner in self.replaced for owner in self.owners) if self.replaced else 0
        most = min(self.most + 1 + hidden, len(self.owners))
        edits = cosine_topk(prompts, self.entries, most, normalized=True, ranges=earlier)
        facts: list[list[tuple[float, int]]] = [[] for _ in names]
        if self._fact:
            widest = min(self._widest + 1, len(self._fact))
            facts = [*_pairs(cosine_topk(prompts, self.others, widest, normalized=True))]
        retired = set(self.retired.values())
        for name, found, known in zip(names, _pairs(edits), facts, strict=True):
            near: list[tuple[float, str | int]] = [(s, self.owners[i]) for s, i in found]
            near = [pair for pair in near if pair[1] not in self.replaced]
            near += [(s, self._fact[i]) for s, i in known if self._fact[i] not in retired]
            score, about = max(near, key=lambda pair: pair[0], default=(0.0, None))
            rival = max((s for s, what in near if what != about), default=0.0)
            if score - rival <= self.same:
                continue
            if isinstance(about, str):
                self.replaced[about] = name
                if about in self.retired:
                    self.retired[name] = self.retired[about]
            elif about is not None:
                self.retired[name] = about
                retired.add(about)

    def without(self, name: str) -> Router:
        """A new router without this edit; what it had taken the place of is back."""
        new = self._copied()
        kept = [i for i, owner in enumerate(self.owners) if owner != name]
        new.entries = self.entries[torch.tensor(kept, dtype=torch.int64, device=self.entries.device)]
        new.owners = [self.owners[i] for i in kept]
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
            ids, embeddings = (t.repeat_interleave(batch // len(t), 0) for t in embedded)
            within = torch.arange(tokens, dtype=torch.int64, device=hidden.device) <= last.unsqueeze(1)
            seen.tokens.append((ids, embeddings, within if now.visible is None else within & now.visible))
        if layer in self.layers:
            rows = torch.arange(batch, dtype=torch.int64, device=hidden.device)
            seen.states[layer] = hidden[rows, last.clamp(0, tokens - 1)]
        if layer == self.places[-1]:
            states = torch.stack([seen.states[i] for i in self.layers], 1) if self.layers else None
            ids, embeddings, within = (torch.cat(parts, 1) for parts in zip(*seen.tokens, strict=True))
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
        words = torch.zeros(*ids.shape, SPELLING, dtype=torch.float32, device="cpu")
        for row, (of_row, there) in enumerate(zip(ids.tolist(), within.tolist(), strict=True)):
            own = [i for i, t in enumerate(there) if t]
            words[row, own] = self.vocabulary.spelled([of_row[i] for i in own])
        each = torch.arange(ids.numel(), dtype=torch.int64, device=ids.device).view(ids.shape)
        text = Text(embeddings.flatten(0, 1), words.flatten(0, 1).to(ids.device), each, each, within)
        return encode_prompts(self.encoder, text, states).nan_to_num()

    def routes(self, now: Pass, batch: int) -> tuple[Route, ...]:
        """What is decided for each of `batch` rows."""
        seen, rows = now.generation.seen, now.selection.edits
        if seen is None or seen.key is None or seen.ended is None:
            raise ValueError("the prompt itself was not seen; start with the prompt, in the same uk.rows(...) block")
        if seen.decided != (self, rows):
            if seen.scope == self.scope:
                beams = 1 if rows is None else len(seen.key) // len(rows)
                named = [None] * len(seen.key) if rows is None else [row for row in rows for _ in range(beams)]
                routes = self.decide(seen.key, named)
            else:  # another memory has come, which cannot read the key
                routes = [_nothing(self.threshold)] * len(seen.key)
            ended = seen.ended.tolist()
            seen.routes = tuple(r if e else _nothing(self.threshold) for r, e in zip(routes, ended, strict=True))
            seen.decided = self, rows
        if batch % len(seen.routes):
            raise ValueError(f"the prompts had {len(seen.routes)} rows, a later pass has {batch}")
        return tuple(route for route in seen.routes for _ in range(batch // len(seen.routes)))

    def decide(self, keys: Tensor, rows: Sequence[tuple[str, ...] | None]) -> list[Route]:
        """For each key [B, c] among the edits that its row names, or all."""
        found: list[Route | None] = [None] * len(rows)
        for names in dict.fromkeys(rows):
            mine = [b for b, row in enumerate(rows) if row == names]
            queries = keys[torch.tensor(mine, dtype=torch.int64, device=keys.device)]
            for b, route in zip(mine, self._among(queries, names), strict=True):
                found[b] = route
        return [route for route in found if route is not None]

    def _among(self, keys: Tensor, names: tuple[str, ...] | None) -> list[Route]:
        of = self._candidates(names)
        if not of.owners:
            return [_nothing(self.threshold)] * len(keys)
        # So many that the best entry of a second edit is among them.
        found = cosine_topk(keys, of.entries, min(self.most + 1, len(of.owners)), normalized=True)
        best = [t.tolist() for t in cosine_topk(keys, of.others, 1, normalized=True)] if of.facts else None
        routes = []
        for b, (scores, ids) in enumerate(zip(*(t.tolist() for t in found), strict=True)):
            nearest = of.owners[ids[0]]
            second = [(s, of.owners[i]) for s, i in zip(scores, ids, strict=True) if of.owners[i] != nearest][:1]
            rivals: list[tuple[float, str | int]] = [*second]
            if best is not None:
                rivals.append((best[0][b][0], of.facts[best[1][b][0]]))
            rival, other = max(rivals, key=lambda pair: pair[0]) if rivals else (0.0, None)
            acts = nearest if scores[0] - rival > self.threshold else None
            routes.append(Route(acts, nearest, scores[0], other, rival, self.threshold))
        return routes

    def _newer(self, name: str) -> set[str]:
        """The edits of this one's fact that came after it."""
        found = set()
        while name in self.replaced:
            name = self.replaced[name]
            found.add(name)
        return found

    def _candidates(self, names: tuple[str, ...] | None) -> _Candidates:
        """What competes in a row: its edits, but for those that a newer one of them has replaced, and the other facts,
        but for those that one of them is about."""
        if names is None and not self.replaced and not self.retired:
            return _Candidates(self.entries, self.owners, self.others, self._fact)
        if names not in self._tables:
            among = set(self.owners if names is None else names)
            live = [i for i, name in enumerate(self.owners) if name in among and not self._newer(name) & among]
            about = {fact for name, fact in self.retired.items() if name in among}
            others = [i for i, fact in enumerate(self._fact) if fact not in about]
            rows, rest = (torch.tensor(i, dtype=torch.int64, device=self.entries.device) for i in (live, others))
            if len(self._tables) >= _TABLES:
                self._tables.clear()
            self._tables[names] = _Candidates(
                self.entries[rows], [self.owners[i] for i in live], self.others[rest], [self._fact[i] for i in others]
            )
        return self._tables[names]


def _pairs(found: tuple[Tensor, Tensor]) -> Iterator[list[tuple[float, int]]]:
    """Of each query the scores and ids of what it has found."""
    for scores, ids in zip(*(t.tolist() for t in found), strict=True):
        yield [(score, i) for score, i in zip(scores, ids, strict=True) if i >= 0]


class _Candidates(NamedTuple):
    """Unit rows [E, c] and the edit of each, and unit rows [N, c] and the fact of each."""

    entries: Tensor
    owners: list[str]
    others: Tensor
    facts: list[int]


def _key(name: str) -> str:
    """What a buffer may be called."""
    return name.replace(".", "/")


_TABLES = 64  # sets of edits that rows may use, whose tables are kept


def _nothing(threshold: float) -> Route:
    return Route(None, None, 0.0, None, 0.0, threshold)


def behind_prompts(last: Tensor, tokens: int) -> Tensor:
    """int64 [B * T]: the row of each token that is its prompt's last one or comes later, B for the others.

    Args:
        last: int64 [B], see `Pass.last`.
        tokens: T.
    """
    batch = len(last)
    rows, position = (torch.arange(n, dtype=torch.int64, device=last.device) for n in (batch, tokens))
    return torch.where(position >= last.unsqueeze(1), rows.unsqueeze(1), batch).flatten()
