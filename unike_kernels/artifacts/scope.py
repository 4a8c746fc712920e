"""What decides where an edit acts: an encoder of prompts, the entries of other facts, and a threshold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..ops.prompt_encoder import PromptEncoder
from . import files


@dataclass(frozen=True)
class Scope:
    """The part of a memory that tells for which prompts an edit is meant.

    An edit acts in a row if the best cosine of its prompt's key with an entry of the edit, minus the best cosine with
    an entry of another fact or of another edit, is above `threshold`.

    Attributes:
        layers: decoder layers whose input at the last prompt token the key is made of, ascending.
        encoder: Enc_key.
        entries: float32 [N, c], unit rows: keys of prompts that ask for other facts.
        facts: int64 [N], which fact each of them asks for, numbered from 0.
        threshold: of the margin.
        false_alarms: share of the prompts for neighbouring facts with a margin above `threshold`, on held-out facts.
        same: margin above which a prompt surely asks for a fact: no held-out prompt for another one had more.
        names: of the facts, for people; None: they have none.
    """

    layers: tuple[int, ...]
    encoder: PromptEncoder
    entries: Tensor
    facts: Tensor
    threshold: float
    false_alarms: float
    same: float
    names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not self.layers or list(self.layers) != sorted({*self.layers}) or self.layers[0] < 0:
            raise ValueError(f"Scope.layers: expected ascending layer indices, got {list(self.layers)}")
        encoder, d = self.encoder, self.encoder.mean.shape[-1]
        (h, c), layers = (len(encoder.queries), encoder.w2.shape[0]), len(self.layers)
        r = encoder.w1.shape[0]
        expected = {
            "mean": (d,), "spread": (d,), "queries": (h, d), "means": (layers, d), "w1": (r, (h + layers) * d),
            "b1": (r,), "w2": (c, r), "b2": (c,),
        }  # fmt: skip
        found = {**encoder._asdict(), "entries": self.entries}
        expected["entries"] = (len(self.entries), c)
        for name, t in found.items():
            if tuple(t.shape) != expected[name]:
                raise ValueError(f"Scope.{name}: expected shape {list(expected[name])}, got {list(t.shape)}")
            if t.dtype != torch.float32 or not t.isfinite().all():
                raise ValueError(f"Scope.{name}: expected finite float32, got {t.dtype} or NaN or infinity")
        if self.facts.dtype != torch.int64 or self.facts.shape != self.entries.shape[:1]:
            raise ValueError(
                f"Scope.facts: expected int64 [{len(self.entries)}], got {self.facts.dtype} {list(self.facts.shape)}"
            )
        count = int(self.facts.max()) + 1 if len(self.facts) else 0
        if len(self.facts) and int(self.facts.min()) < 0:
            raise ValueError("Scope.facts: expected numbers from 0, got a negative one")
        if self.names is not None and len(self.names) < count:
            raise ValueError(f"Scope.names: expected one for each of {count} facts, got {len(self.names)}")
        for name in ("threshold", "false_alarms", "same"):
            if not abs(getattr(self, name)) <= 2:
                raise ValueError(f"Scope.{name}: expected a number in -2..2, got {getattr(self, name)!r}")

    @property
    def id(self) -> str:
        """A hash of the encoder: entries are of the same scope if they have been made with it."""
        return files.digest(self._encoder() | {"layers": torch.tensor(self.layers, dtype=torch.int64, device="cpu")})

    @property
    def width(self) -> int:
        """c, of an entry."""
        return int(self.entries.shape[1])

    @property
    def hidden_size(self) -> int:
        """d, the width of the model's hidden states."""
        return int(self.encoder.mean.shape[-1])

    def extended(self, entries: Tensor, facts: Tensor, names: tuple[str, ...] | None = None) -> Scope:
        """With further facts, behind its own.

        Args:
            entries: float32 [n, c], unit rows.
            facts: int64 [n], numbered from 0.
            names: of the facts, for people.
        """
        have = int(self.facts.max()) + 1 if len(self.facts) else 0
        known = (self.names or ("",) * have)[:have]
        return replace(
            self,
            entries=torch.cat([self.entries, entries]),
            facts=torch.cat([self.facts, facts + have]),
            names=(*known, *(names or ("",) * (int(facts.max()) + 1))),
        )

    def _encoder(self) -> dict[str, Tensor]:
        return {f"scope.{name}": t for name, t in self.encoder._asdict().items()}

    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor, as a file has them."""
        return {**self._encoder(), "scope.entries": self.entries}

    def header(self) -> dict[str, Any]:
        """What a file says of it beside the tensors."""
        return {
            "layers": list(self.layers),
            "facts": self.facts.tolist(),
            "threshold": self.threshold,
            "false_alarms": self.false_alarms,
            "same": self.same,
            "names": None if self.names is None else list(self.names),
        }

    @classmethod
    def read(cls, reader: files.Reader, header: Mapping[str, Any]) -> Scope:
        """From a file whose header says this of it. Raises ArtifactError."""
        if set(header) != {"layers", "facts", "threshold", "false_alarms", "same", "names"}:
            raise reader.fail(f"header field 'scope': expected its six fields, got {sorted(header)}")
        layers, facts, names = header["layers"], header["facts"], header["names"]
        for name in ("layers", "facts"):
            if not isinstance(header[name], list) or not all(type(i) is int and 0 <= i < 2**31 for i in header[name]):
                raise reader.fail(f"header field 'scope': expected numbers from 0 as {name}")
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise reader.fail("header field 'scope': expected texts as names")
        if not all(type(header[name]) in (int, float) for name in ("threshold", "false_alarms", "same")):
            raise reader.fail("header field 'scope': expected numbers as threshold, false_alarms and same")
        shapes = {"queries": (None, None), "means": (None, None), "w1": (None, None), "w2": (None, None)}
        encoder = {name: reader.tensor(f"scope.{name}", shapes.get(name, (None,))) for name in PromptEncoder._fields}
        scope: Scope = reader.build(
            cls,
            tuple(layers),
            PromptEncoder(**encoder),
            reader.tensor("scope.entries", (None, None)),
            torch.tensor(facts, dtype=torch.int64, device="cpu"),
            float(header["threshold"]),
            float(header["false_alarms"]),
            float(header["same"]),
            None if names is None else tuple(names),
        )
        return scope
