"""What decides where an edit acts: an encoder of prompts, the entries of other facts, and a threshold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import _check
from ..ops.cosine_topk import cosine_topk
from ..ops.prompt_encoder import SPELLING, PromptEncoder, StateBlock, TextBlock, nearest, surely_about
from . import files

OwnKey = Callable[[Sequence[Sequence[int]]], Tensor]  # token ids of n prompts -> [n, c]

_SAME_KEY = 0.999  # a cosine of keys that one function has made on different machines, in other batches, is more
_ROUNDING = 1e-5  # of the cosine of two keys of one prompt, which were computed in other batches


@dataclass(frozen=True)
class Scope:
    """The part of a memory that tells for which prompts an edit is meant.

    An edit acts in a row if the best cosine of its prompt's key with an entry of the edit, minus the best cosine with
    an entry of another fact or of another edit, is above `threshold`.

    Attributes:
        encoder: Enc_key; None: a function of the user's own makes the keys, see `with_key`.
        pieces: what the model's tokens spell, see `ops.prompt_encoder.Vocabulary`; none where Enc_key does not read.
        layers: decoder layers whose input at the last prompt token the key is made of, too, ascending; none where the
            text alone counts.
        entries: float32 [N, c], unit rows: keys of prompts that ask for other facts.
        facts: int64 [N], which fact each of them asks for, numbered from 0.
        threshold: of the margin.
        false_alarms: share of the prompts for neighbouring facts with a margin above `threshold`, on held-out facts.
        same_fact: cosine above which an edit that would act for another one's prompt is surely of the same fact: no two
            held-out prompts for different facts had more.
        names: of the facts, for people; None: they have none.
        samples: with a function of the user's own, the token ids of the prompts that the first entries are the keys of:
            by them another function is told from it.
        key: that function, which no file holds.
        own: int64 [F, 2], the entries [start, end) that each fact has in the memory's tables, [0, 0] for none: they
            shift the rows in which the fact wins. None: facts are there to be told from, and act nowhere.
    """

    encoder: PromptEncoder | None
    pieces: tuple[str, ...]
    layers: tuple[int, ...]
    entries: Tensor
    facts: Tensor
    threshold: float
    false_alarms: float
    same_fact: float
    names: tuple[str, ...] | None = None
    samples: tuple[tuple[int, ...], ...] = ()
    key: OwnKey | None = field(default=None, repr=False, compare=False)
    own: Tensor | None = None

    def __post_init__(self) -> None:
        if list(self.layers) != sorted({*self.layers}) or any(i < 0 for i in self.layers):
            raise ValueError(f"Scope.layers: expected ascending layer indices, got {list(self.layers)}")
        tensors: dict[str, Tensor] = {"entries": self.entries}
        expected: dict[str, tuple[int, ...]] = {"entries": (len(self.entries), self.entries.shape[-1])}
        if self.encoder is None:
            if self.layers or not 0 < len(self.samples) <= len(self.entries):
                raise ValueError(
                    "Scope.samples: expected prompts of the first entries, and no layers, where encoder is None; got "
                    f"{len(self.samples)} of {len(self.entries)}, and layers {list(self.layers)}"
                )
        else:
            if not self.encoder.blocks or (self.encoder.states is None) != (not self.layers):
                raise ValueError(
                    f"Scope.encoder: expected blocks for the text, and one for the states of the layers "
                    f"{list(self.layers)}"
                )
            tensors |= self.encoder.tensors()
            expected = {**_shapes(self.encoder, len(self.layers)), "entries": (len(self.entries), self.encoder.width)}
        for name, t in tensors.items():
            if t.dim() < 1 or tuple(t.shape) != expected[name]:
                raise ValueError(f"Scope.{name}: expected shape {list(expected[name])}, got {list(t.shape)}")
            if t.dtype != torch.float32 or not _check.finite(t):
                raise ValueError(f"Scope.{name}: expected finite float32, got {t.dtype} or NaN or infinity")
        if not ((self.entries.norm(dim=-1) - 1).abs() < 1e-3).all():
            raise ValueError("Scope.entries: expected unit rows")
        if self.facts.dtype != torch.int64 or self.facts.shape != self.entries.shape[:1]:
            raise ValueError(
                f"Scope.facts: expected int64 [{len(self.entries)}], got {self.facts.dtype} {list(self.facts.shape)}"
            )
        if len(self.facts) and int(self.facts.min()) < 0:
            raise ValueError("Scope.facts: expected numbers from 0, got a negative one")
        if self.names is not None and len(self.names) < self.count:
            raise ValueError(f"Scope.names: expected one for each of {self.count} facts, got {len(self.names)}")
        own = self.own
        if own is not None and (own.dtype != torch.int64 or tuple(own.shape) != (self.count, 2)):
            raise ValueError(f"Scope.own: expected int64 [{self.count}, 2], got {own.dtype} {list(own.shape)}")
        if own is not None and not ((own[:, 0] >= 0) & (own[:, 0] <= own[:, 1])).all():
            raise ValueError("Scope.own: expected [start, end) with 0 <= start <= end")
        for name in ("threshold", "false_alarms", "same_fact"):
            if not abs(getattr(self, name)) <= 2:
                raise ValueError(f"Scope.{name}: expected a number in -2..2, got {getattr(self, name)!r}")
            object.__setattr__(self, name, float(getattr(self, name)))  # as a file has it

    @cached_property
    def id(self) -> str:
        """A hash of the encoder: entries are of the same scope if they have been made with it."""
        told = "\0".join([*map(str, self.layers), *self.pieces, *map(str, self.samples)]).encode()
        spelled = torch.frombuffer(bytearray(told), dtype=torch.uint8)
        made = {"entries": self.entries[: len(self.samples)]} if self.encoder is None else self.encoder.tensors()
        return files.digest({**made, "pieces": spelled})

    @property
    def width(self) -> int:
        """c, of a key."""
        return self.entries.shape[1]

    def with_key(self, key: OwnKey) -> Scope:
        """With the function that made its entries, which a file does not hold.

        Raises ValueError where it is another one: it gives other keys to the prompts that the scope remembers.
        """
        if self.encoder is not None:
            raise ValueError("key: expected a scope that was built with one; this one has an encoder of its own")
        found = own_keys(key, self.samples, self.width)
        cosine = torch.cosine_similarity(found, self.entries[: len(found)], dim=-1)
        if not bool((cosine > _SAME_KEY).all()):
            raise ValueError(
                "key: expected the function that the scope was built with; for the prompts that it remembers, the "
                f"cosine with their keys is down to {float(cosine.min()):.3f}"
            )
        return replace(self, key=key)

    def needing_key(self) -> OwnKey | None:
        """`key`; None where Enc_key makes the keys. Raises ValueError where the function is missing."""
        if self.encoder is None and self.key is None:
            raise ValueError(
                "scope: its keys are made by a function that no file holds; give it: memory.with_key(function)"
            )
        return self.key

    @property
    def count(self) -> int:
        """Of the facts."""
        return int(self.facts.max()) + 1 if len(self.facts) else 0

    def extended(self, entries: Tensor, facts: Tensor, names: tuple[str, ...] | None = None) -> Scope:
        """With further facts, behind its own.

        Args:
            entries: float32 [n, c], unit rows.
            facts: int64 [n], numbered from 0.
            names: of the facts, for people.
        """
        count = self.count + (int(facts.max()) + 1 if len(facts) else 0)
        return replace(
            self,
            entries=torch.cat([self.entries, entries]),
            facts=torch.cat([self.facts, facts + self.count]),
            names=_named(self.names, names, self.count, count),
            own=None if self.own is None else _padded(self.own, count),
        )

    def with_own(self, entries: Tensor, own: Tensor, names: tuple[str, ...] | None = None) -> Scope:
        """With facts that have entries in the memory's tables. One that is surely known already gives these to the fact
        that is known, in the place of those that it has; see `same_fact`.

        Args:
            entries: float32 [n, c], unit rows, one for each fact.
            own: int64 [n, 2], see `Scope.own`.
            names: of the facts, for people.
        """
        numbers, new, known = self.facts.tolist(), list[int](), len(self.entries)
        every = torch.cat([self.entries, entries])
        ends = torch.arange(known, len(every), dtype=torch.int64, device="cpu")
        # So many that the nearest entry of a second fact is among them.
        widest = max(Counter(numbers).values(), default=0) + 2
        earlier = torch.stack([torch.zeros_like(ends), ends], 1)
        for i, found in enumerate(nearest(entries, every, widest, earlier)):
            near = [(cosine, numbers[place]) for cosine, place in found]
            fact = surely_about(near, self.same_fact, self.threshold)
            if fact is None:
                fact = self.count + len(new)
                new.append(i)
            numbers.append(fact)
        numbers = numbers[known:]
        count = self.count + len(new)
        ranges = _padded(self.own, count)
        for fact, pair in zip(numbers, own, strict=True):  # a later one counts
            ranges[fact] = pair
        named = _named(self.names, None if names is None else tuple(names[i] for i in new), self.count, count)
        facts = torch.cat([self.facts, torch.tensor(numbers, dtype=torch.int64, device="cpu")])
        return replace(self, entries=every, facts=facts, names=named, own=ranges)

    def joined(self, other: Scope, behind: int = 0) -> Scope:
        """With what another scope of the same encoder knows. Facts that have an entry in common are one: as two they
        would be each other's rivals. Where both have entries in the tables, those of the first one count.

        Args:
            other: the other one.
            behind: how many entries of the tables are in front of those of its memory.
        """
        known, number = torch.zeros(len(other.entries), dtype=torch.bool, device="cpu"), {}
        if len(self.entries) and len(other.entries):
            cosine, at = (t[:, 0] for t in cosine_topk(other.entries, self.entries, 1, normalized=True))
            known = cosine > 1 - _ROUNDING
            number = dict(zip(other.facts[known].tolist(), self.facts[at[known]].tolist(), strict=True))
        new = [fact for fact in other.facts.unique().tolist() if fact not in number]
        number |= {fact: self.count + i for i, fact in enumerate(new)}
        count = self.count + len(new)
        theirs = None if other.names is None else tuple(other.names[fact] for fact in new)
        own = None
        if self.own is not None or other.own is not None:
            own = _padded(self.own, count)
            for fact, (start, end) in enumerate(_padded(other.own, other.count).tolist()):
                if start < end and not bool(own[number[fact]].any()):
                    own[number[fact], 0], own[number[fact], 1] = start + behind, end + behind
        facts = torch.tensor([number[fact] for fact in other.facts[~known].tolist()], dtype=torch.int64, device="cpu")
        entries = torch.cat([self.entries, other.entries[~known]])
        names = _named(self.names, theirs, self.count, count)
        return replace(self, entries=entries, facts=torch.cat([self.facts, facts]), names=names, own=own)

    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor, as a file has them."""
        made = {} if self.encoder is None else self.encoder.tensors()
        return {f"scope.{name}": t for name, t in {**made, "entries": self.entries}.items()}

    def header(self) -> dict[str, Any]:
        """What a file says of it beside the tensors."""
        return {
            "blocks": 0 if self.encoder is None else len(self.encoder.blocks),
            "pieces": list(self.pieces),
            "layers": list(self.layers),
            "facts": self.facts.tolist(),
            "threshold": self.threshold,
            "false_alarms": self.false_alarms,
            "same_fact": self.same_fact,
            "names": None if self.names is None else list(self.names),
            "samples": [list(ids) for ids in self.samples],
            "own": None if self.own is None else self.own.tolist(),
        }

    @classmethod
    def read(cls, reader: files.Reader, header: Mapping[str, Any]) -> Scope:
        """From a file whose header says this of it. Raises ArtifactError."""
        kinds = {
            "blocks": int, "pieces": [str], "layers": [int], "facts": [int], "threshold": float, "false_alarms": float,
            "same_fact": float, "names": [str], "samples": [list], "own": [list],
        }  # fmt: skip
        if set(header) != set(kinds):
            raise reader.fail(f"header field 'scope': expected {sorted(kinds)}, got {sorted(header)}")
        for name, kind in kinds.items():
            value = header[name]
            if name in ("names", "own") and value is None:
                continue
            each = value if isinstance(kind, list) else [value]
            one: type = kind[0] if isinstance(kind, list) else kind  # type: ignore[assignment]
            if not isinstance(each, list) or not all(type(v) is one for v in each):
                raise reader.fail(f"header field 'scope': expected {name} of {one.__name__}, got {value!r:.80}")
        if not 0 <= header["blocks"] <= 16 or any(not 0 <= i < 2**31 for i in (*header["layers"], *header["facts"])):
            raise reader.fail("header field 'scope': expected 0 to 16 blocks, layers and facts from 0")
        blocks, names, samples, own = (header[name] for name in ("blocks", "names", "samples", "own"))
        if any(type(i) is not int or not 0 <= i < 2**31 for ids in samples for i in ids):
            raise reader.fail("header field 'scope': expected samples of token ids")
        if any(len(pair) != 2 or any(type(i) is not int or not 0 <= i < 2**31 for i in pair) for pair in own or ()):
            raise reader.fail("header field 'scope': expected own of pairs from 0")
        wide = {"token", "word", "query", "token_value", "word_value", "w1", "w2", "means"}
        wanted = ["mean", "spread", *(f"blocks.{i}.{name}" for i in range(blocks) for name in TextBlock._fields)]
        wanted += [f"states.{name}" for name in StateBlock._fields] if header["layers"] else []
        shape = {name: (None,) * (3 if name.endswith("conv") else 1 + (name.split(".")[-1] in wide)) for name in wanted}
        tensors = {name: reader.tensor(f"scope.{name}", shape[name]) for name in wanted} if blocks else {}
        scope: Scope = reader.build(
            cls,
            PromptEncoder.of(tensors, blocks, bool(header["layers"])) if blocks else None,
            tuple(header["pieces"]),
            tuple(header["layers"]),
            reader.tensor("scope.entries", (None, None)),
            torch.tensor(header["facts"], dtype=torch.int64, device="cpu"),
            header["threshold"],
            header["false_alarms"],
            header["same_fact"],
            None if names is None else tuple(names),
            tuple(map(tuple, samples)),
            None,
            None if own is None else torch.tensor(own, dtype=torch.int64, device="cpu").view(-1, 2),
        )
        return scope


def own_keys(key: OwnKey, prompts: Sequence[Sequence[int]], width: int | None = None) -> Tensor:
    """What the user's own function makes of prompts: float32 [n, c], unit rows, on its device.

    Args:
        key: the function.
        prompts: n, as token ids.
        width: c; None: whatever it gives.

    Raises ValueError where it gives something else.
    """
    found = key([list(ids) for ids in prompts])
    shape = [len(prompts), "c" if width is None else width]
    if not isinstance(found, Tensor) or found.dim() != 2 or found.shape[0] != len(prompts) or not found.shape[1]:
        raise ValueError(f"key: expected a function that returns a tensor {shape}, got {_told(found)}")
    if width not in (None, found.shape[1]) or not found.is_floating_point() or not _check.finite(found):
        raise ValueError(f"key: expected a function that returns finite numbers {shape}, got {_told(found)}")
    return F.normalize(found.detach().float(), dim=-1)


def _padded(own: Tensor | None, facts: int) -> Tensor:
    """int64 [F, 2], a copy: no entries where it is not said which."""
    ranges = torch.zeros(facts, 2, dtype=torch.int64, device="cpu")
    if own is not None:
        ranges[: len(own)] = own
    return ranges


def _named(
    names: tuple[str, ...] | None, more: tuple[str, ...] | None, known: int, count: int
) -> tuple[str, ...] | None:
    """Of `count` facts, of which `known` ones have these names, and the others more."""
    if names is None and more is None:
        return None
    return (*(names or ("",) * known)[:known], *(more or ("",) * (count - known)))


def _told(found: Any) -> str:
    return f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__


def _shapes(encoder: PromptEncoder, layers: int) -> dict[str, tuple[int, ...]]:
    """What the encoder's tensors must be, by the sizes that some of them say."""
    e = len(encoder.mean)
    found: dict[str, tuple[int, ...]] = {"mean": (e,), "spread": (e,)}
    for i in range(len(encoder.blocks)):
        block = encoder.blocks[0]  # they are read together
        h, (heads, c) = len(block.token), (len(block.query), len(block.word_value))
        shapes = {
            "token": (h, e), "word": (h, SPELLING), "bias": (h,), "conv": (h, h, 3), "conv_bias": (h,),
            "query": (heads, h), "query_bias": (heads,), "token_value": (c, e), "word_value": (c, SPELLING),
        }  # fmt: skip
        if not heads or c % heads:
            raise ValueError(f"Scope.blocks.{i}: expected a multiple of {heads} values, got {c}")
        found |= {f"blocks.{i}.{name}": shape for name, shape in shapes.items()}
    if encoder.states is not None:
        (_, d), r, c = encoder.states.means.shape, len(encoder.states.w1), len(encoder.states.w2)
        shapes = {"means": (layers, d), "w1": (r, layers * d), "b1": (r,), "w2": (c, r), "b2": (c,)}
        found |= {f"states.{name}": shape for name, shape in shapes.items()}
    return found
