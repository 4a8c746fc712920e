"""The memory of in-context knowledge (paper, section 3.2): h_sem and h_pos per layer, as a value and as a file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from . import artifacts
from .config import Config
from .errors import ArtifactError
from .fingerprint import validate as validate_fingerprint
from .ops import SemanticEncoder


@dataclass(frozen=True)
class MemoryLayer:
    """The memory of one layer: N entries of hidden size d.

    Attributes:
        index: [N, d], h_sem at the attention's input; what retrieval compares with.
        keys: [N, H, c], what the latent attention attends to (one head of width d unless the values are projected).
        values: [N, H, d], what it returns; None: the same tensor as `keys`.
        encoder: Enc_sem.
        zeta: [t], the editing direction in truthfulness space.
        zeta_prime: [d], W_zeta zeta.
    """

    index: Tensor
    keys: Tensor
    values: Tensor | None
    encoder: SemanticEncoder
    zeta: Tensor
    zeta_prime: Tensor

    def __post_init__(self) -> None:
        if self.index.dim() != 2 or self.keys.dim() != 3:
            raise ValueError(
                f"MemoryLayer: expected index [N, d] and keys [N, H, c], got {list(self.index.shape)} and "
                f"{list(self.keys.shape)}"
            )
        n, d = self.index.shape
        heads, width = self.keys.shape[1:]
        if self.keys.shape[0] != n:
            raise ValueError(f"MemoryLayer.keys: expected {n} entries as index, got {self.keys.shape[0]}")
        if self.values is None and (heads, width) != (1, d):
            raise ValueError(f"MemoryLayer.values: keys of shape {list(self.keys.shape)} cannot serve as values")
        r = self.encoder.w1.shape[0]
        expected = {"w1": (r, d), "b1": (r,), "w2": (d, r), "b2": (d,)}
        found = {**self.encoder._asdict(), "zeta_prime": self.zeta_prime}
        expected["zeta_prime"] = (d,)
        if self.values is not None:
            found["values"], expected["values"] = self.values, (n, heads, d)
        for name, shape in expected.items():
            if tuple(found[name].shape) != shape:
                raise ValueError(f"MemoryLayer.{name}: expected shape {list(shape)}, got {list(found[name].shape)}")
        for name, t in self.tensors().items():
            if not t.is_floating_point():
                raise TypeError(f"MemoryLayer.{name}: expected a floating dtype, got {t.dtype}")
            finite = t.isfinite()
            bad = (~(finite.flatten(1).all(-1) if t.dim() > 1 else finite)).nonzero()
            if len(bad):
                raise ValueError(f"MemoryLayer.{name}: row {int(bad[0])} holds NaN or infinity")

    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor; `values` only where it is a table of its own."""
        named = {"index": self.index, "keys": self.keys, "zeta": self.zeta, "zeta_prime": self.zeta_prime}
        if self.values is not None:
            named["values"] = self.values
        return named | {f"encoder.{name}": t for name, t in self.encoder._asdict().items()}


@dataclass(frozen=True)
class MemoryBank:
    """The memory of a model: the same N entries at every edited layer.

    Attributes:
        layers: decoder layer index -> tables.
        config: the semantics under which it was built.
        base_model: fingerprint of the model that it was extracted from.
        notes: how it was made, for people.
        id: a hash of the contents; an `Edit` records it.
    """

    layers: Mapping[int, MemoryLayer]
    config: Config
    base_model: dict[str, Any]
    notes: dict[str, str] = field(default_factory=dict)
    id: str = ""

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("MemoryBank.layers: expected at least one layer, got none")
        sizes = {tuple(layer.index.shape) for layer in self.layers.values()}
        if len(sizes) != 1:
            raise ValueError(f"MemoryBank.layers: expected the same [N, d] in every layer, got {sorted(sizes)}")
        for i, layer in self.layers.items():
            if (layer.values is None) != (self.config.values == "pre"):
                raise ValueError(
                    f"MemoryBank.layers: with Config(values={self.config.values!r}) layer {i} should "
                    f"{'take its keys as values' if layer.values is not None else 'have values of its own'}"
                )
        if not self.id:
            object.__setattr__(self, "id", artifacts.digest(self._tensors()))

    def __len__(self) -> int:
        return int(next(iter(self.layers.values())).index.shape[0])

    @property
    def hidden_size(self) -> int:
        return int(next(iter(self.layers.values())).index.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored. Patched in, the index is kept once more as normalised float32 rows."""
        return sum(t.nbytes for t in self._tensors().values())

    def _tensors(self) -> dict[str, Tensor]:
        return {f"layers.{i}.{name}": t for i, layer in self.layers.items() for name, t in layer.tensors().items()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, atomically."""
        header = {
            "id": self.id,
            "layers": sorted(self.layers),
            "entries": len(self),
            "hidden_size": self.hidden_size,
            "config": self.config.to_dict(),
            "base_model": self.base_model,
            "notes": self.notes,
        }
        artifacts.save(path, "memory", header, self._tensors())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MemoryBank:
        """Read and validate a file that `save` wrote; the contents are hashed and compared with the id.

        Raises:
            FileNotFoundError: there is no such file.
            ArtifactError: truncated, of another format or version, or any field or tensor missing, wrong or left over.
        """
        reader = artifacts.Reader(path, *artifacts.load(path, "memory"))
        n, d = reader.field("entries", int), reader.field("hidden_size", int)
        layers = {}
        for index in reader.layers():
            prefix = f"layers.{index}."
            keys = reader.tensor(prefix + "keys", (n, None, None))
            w1 = reader.tensor(prefix + "encoder.w1", (None, d))
            shapes = {"b1": (w1.shape[0],), "w2": (d, w1.shape[0]), "b2": (d,)}
            rest = {name: reader.tensor(f"{prefix}encoder.{name}", shape) for name, shape in shapes.items()}
            own_values = reader.has(prefix + "values")
            layers[index] = reader.build(
                MemoryLayer,
                index=reader.tensor(prefix + "index", (n, d)),
                keys=keys,
                values=reader.tensor(prefix + "values", (n, keys.shape[1], d)) if own_values else None,
                encoder=SemanticEncoder(w1, **rest),
                zeta=reader.tensor(prefix + "zeta", (None,)),
                zeta_prime=reader.tensor(prefix + "zeta_prime", (d,)),
            )
        notes = reader.field("notes", dict)
        stated = reader.field("id", str)
        bank: MemoryBank = reader.build(
            cls,
            layers=layers,
            config=reader.build(Config.from_dict, reader.field("config", dict)),
            base_model=reader.build(validate_fingerprint, reader.field("base_model", dict)),
            notes={str(k): str(v) for k, v in notes.items()},
        )
        reader.done()
        if bank.id != stated:
            raise ArtifactError(f"{path}: its contents have the id {bank.id}, the header says {stated!r:.80}")
        return bank
