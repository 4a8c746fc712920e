"""What decides where an edit acts: an encoder of prompts, the entries of other facts, and a threshold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..ops.cosine_topk import cosine_topk
from ..ops.prompt_encoder import SPELLING, PromptEncoder, StateBlock, TextBlock
from . import files

_ROUNDING = 1e-5  # of the cosine of two keys of one prompt, which were computed in other batches


@dataclass(frozen=True)
class Scope:
    """The part of a memory that tells for which prompts an edit is meant.

    An edit acts in a row if the best cosine of its prompt's key with an entry of the edit, minus the best cosine with
    an entry of another fact or of another edit, is above `threshold`.

    Attributes:
        encoder: Enc_key.
        pieces: what the model's tokens spell, see `ops.prompt_encoder.Vocabulary`.
        layers: decoder layers whose input at the last prompt token the key is made of, too, ascending; none where the
            text alone counts.
        entries: float32 [N, c], unit rows: keys of prompts that ask for other facts.
        facts: int64 [N], which fact each of them asks for, numbered from 0.
        threshold: of the margin.
        false_alarms: share of the prompts for neighbouring facts with a margin above `threshold`, on held-out facts.
        same_fact: cosine above which an edit that would act for another one's prompt is surely of the same fact: no two
            held-out prompts for different facts had more.
        names: of the facts, for people; None: they have none.
    """

    encoder: PromptEncoder
    pieces: tuple[str, ...]
    layers: tuple[int, ...]
    entries: Tensor
    facts: Tensor
    threshold: float
    false_alarms: float
    same_fact: float
    names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if list(self.layers) != sorted({*self.layers}) or any(i < 0 for i in self.layers):
            raise ValueError(f"Scope.layers: expected ascending layer indices, got {list(self.layers)}")
        if not self.encoder.blocks or (self.encoder.states is None) != (not self.layers):
            raise ValueError(
                f"Scope.encoder: expected blocks for the text, and one for the states of the layers {list(self.layers)}"
            )
        expected = {**_shapes(self.encoder, len(self.layers)), "entries": (len(self.entries), self.encoder.width)}
        for name, t in {**self.encoder.tensors(), "entries": self.entries}.items():
            if tuple(t.shape) != expected[name]:
                raise ValueError(f"Scope.{name}: expected shape {list(expected[name])}, got {list(t.shape)}")
            if t.dtype != torch.float32 or not t.isfinite().all():
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
        for name in ("threshold", "false_alarms", "same_fact"):
            if not abs(getattr(self, name)) <= 2:
                raise ValueError(f"Scope.{name}: expected a number in -2..2, got {getattr(self, name)!r}")
            object.__setattr__(self, name, float(getattr(self, name)))  # as a file has it

    @cached_property
    def id(self) -> str:
        """A hash of the encoder: entries are of the same scope if they have been made with it."""
        told = "\0".join([*map(str, self.layers), *self.pieces]).encode()
        spelled = torch.frombuffer(bytearray(told), dtype=torch.uint8)
        return files.digest({**self.encoder.tensors(), "pieces": spelled})

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
        more = replace(
            self,
            entries=torch.cat([self.entries, entries]),
            facts=torch.cat([self.facts, facts + self.count]),
            names=None,
        )
        if self.names is None and names is None:
            return more
        known, new = (self.names or ("",) * self.count)[: self.count], names or ("",) * (more.count - self.count)
        return replace(more, names=(*known, *new))

    def joined(self, other: Scope) -> Scope:
        """With what another scope of the same encoder knows. Facts that have an entry in common are one: as two they
        would be each other's rivals."""
        known, number = torch.zeros(len(other.entries), dtype=torch.bool, device="cpu"), {}
        if len(self.entries) and len(other.entries):
            cosine, nearest = (t[:, 0] for t in cosine_topk(other.entries, self.entries, 1, normalized=True))
            known = cosine > 1 - _ROUNDING
            number = dict(zip(other.facts[known].tolist(), self.facts[nearest[known]].tolist(), strict=True))
        new = [fact for fact in other.facts.unique().tolist() if fact not in number]
        number |= {fact: self.count + i for i, fact in enumerate(new)}
        names = None
        if self.names is not None or other.names is not None:
            own = (self.names or ("",) * self.count)[: self.count]
            names = (*own, *(other.names[fact] if other.names else "" for fact in new))
        facts = torch.tensor([number[fact] for fact in other.facts[~known].tolist()], dtype=torch.int64, device="cpu")
        entries = torch.cat([self.entries, other.entries[~known]])
        return replace(self, entries=entries, facts=torch.cat([self.facts, facts]), names=names)

    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor, as a file has them."""
        return {f"scope.{name}": t for name, t in {**self.encoder.tensors(), "entries": self.entries}.items()}

    def header(self) -> dict[str, Any]:
        """What a file says of it beside the tensors."""
        return {
            "blocks": len(self.encoder.blocks),
            "pieces": list(self.pieces),
            "layers": list(self.layers),
            "facts": self.facts.tolist(),
            "threshold": self.threshold,
            "false_alarms": self.false_alarms,
            "same_fact": self.same_fact,
            "names": None if self.names is None else list(self.names),
        }

    @classmethod
    def read(cls, reader: files.Reader, header: Mapping[str, Any]) -> Scope:
        """From a file whose header says this of it. Raises ArtifactError."""
        kinds = {
            "blocks": int, "pieces": [str], "layers": [int], "facts": [int], "threshold": float, "false_alarms": float,
            "same_fact": float, "names": [str],
        }  # fmt: skip
        if set(header) != set(kinds):
            raise reader.fail(f"header field 'scope': expected {sorted(kinds)}, got {sorted(header)}")
        for name, kind in kinds.items():
            value = header[name]
            if name == "names" and value is None:
                continue
            each = value if isinstance(kind, list) else [value]
            one: type = kind[0] if isinstance(kind, list) else kind  # type: ignore[assignment]
            if not isinstance(each, list) or not all(type(v) is one for v in each):
                raise reader.fail(f"header field 'scope': expected {name} of {one.__name__}, got {value!r:.80}")
        if not 1 <= header["blocks"] <= 16 or any(not 0 <= i < 2**31 for i in (*header["layers"], *header["facts"])):
            raise reader.fail("header field 'scope': expected 1 to 16 blocks, layers and facts from 0")
        blocks, names = header["blocks"], header["names"]
        wide = {"token", "word", "query", "token_value", "word_value", "w1", "w2", "means"}
        wanted = ["mean", "spread", *(f"blocks.{i}.{name}" for i in range(blocks) for name in TextBlock._fields)]
        wanted += [f"states.{name}" for name in StateBlock._fields] if header["layers"] else []
        shape = {name: (None,) * (3 if name.endswith("conv") else 1 + (name.split(".")[-1] in wide)) for name in wanted}
        tensors = {name: reader.tensor(f"scope.{name}", shape[name]) for name in wanted}
        scope: Scope = reader.build(
            cls,
            PromptEncoder.of(tensors, blocks, bool(header["layers"])),
            tuple(header["pieces"]),
            tuple(header["layers"]),
            reader.tensor("scope.entries", (None, None)),
            torch.tensor(header["facts"], dtype=torch.int64, device="cpu"),
            header["threshold"],
            header["false_alarms"],
            header["same_fact"],
            None if names is None else tuple(names),
        )
        return scope


def _shapes(encoder: PromptEncoder, layers: int) -> dict[str, tuple[int, ...]]:
    """What the encoder's tensors must be, by the sizes that some of them say."""
    e = len(encoder.mean)
    found: dict[str, tuple[int, ...]] = {"mean": (e,), "spread": (e,)}
    for i, block in enumerate(encoder.blocks):
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
