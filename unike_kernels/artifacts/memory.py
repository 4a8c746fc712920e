"""The memory of in-context knowledge (paper, section 3.2): h_sem and h_pos per layer, as a value and as a file."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..config import ANNConfig, Config
from ..errors import ArtifactError, MismatchError
from ..ops import SemanticEncoder, _check
from . import files, sharing
from .fingerprint import agree
from .fingerprint import validate as validate_fingerprint
from .pictures import Pictures
from .scope import OwnKey, Scope


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
            if not _check.finite(t):
                row = int(t.isfinite().logical_not().nonzero()[0, 0])
                raise ValueError(f"MemoryLayer.{name}: row {row} holds NaN or infinity")

    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor; `values` only where it is a table of its own."""
        named = {"index": self.index, "keys": self.keys, "zeta": self.zeta, "zeta_prime": self.zeta_prime}
        if self.values is not None:
            named["values"] = self.values
        return named | {f"encoder.{name}": t for name, t in self.encoder._asdict().items()}


# The first layer of a memory -> the layers that were hashed together, and their hash.
_HASHED: MutableMapping[MemoryLayer, tuple[tuple[tuple[int, weakref.ref[MemoryLayer]], ...], str]] = (
    WeakIdKeyDictionary()
)


@dataclass(frozen=True)
class MemoryBank(sharing.Shareable):
    """The memory of a model: the same N entries at every edited layer, and what decides where edits act.

    Attributes:
        layers: decoder layer index -> tables; none where the memory has a scope alone.
        config: the semantics under which it was built.
        base_model: fingerprint of the model that it was extracted from.
        notes: how it was made, for people.
        id: a hash of the layers' tables (of the scope, where there are none), computed whatever is given; an `Edit`
            records it.
        tenants: name -> entries that belong to it alone; see `joined`.
        parts: tenant -> id of the memory that it came from.
        search: how entries are retrieved where that need not be exact; None: exactly. A setting of this object, not of
            the file.
        scope: what decides where edits act, see Config.scope; None: edits act wherever they are selected.
        texts: what each of the N entries says, for people, "" where that is not known; None: of no entry. They have no
            part in the id.
        pictures: small ones of what entries are about, for people; None: of no entry. They have no part in the id.
    """

    layers: Mapping[int, MemoryLayer]
    config: Config
    base_model: dict[str, Any]
    notes: dict[str, str] = field(default_factory=dict)
    id: str = ""
    tenants: Mapping[str, range] = field(default_factory=dict)
    parts: Mapping[str, str] = field(default_factory=dict)
    search: ANNConfig | None = None
    scope: Scope | None = None
    texts: tuple[str, ...] | None = None
    pictures: Pictures | None = None

    def __post_init__(self) -> None:
        if not self.layers and self.scope is None:
            raise ValueError("MemoryBank.layers: expected at least one layer, or a scope; got none")
        if self.config.scope == "memory" and self.scope is None:
            raise ValueError("MemoryBank.scope: Config(scope='memory') needs one, got None")
        sizes = {tuple(layer.index.shape) for layer in self.layers.values()}
        if len(sizes) > 1:
            raise ValueError(f"MemoryBank.layers: expected the same [N, d] in every layer, got {sorted(sizes)}")
        for i, layer in self.layers.items():
            if (layer.values is None) != (self.config.values == "pre"):
                raise ValueError(
                    f"MemoryBank.layers: with Config(values={self.config.values!r}) layer {i} should "
                    f"{'take its keys as values' if layer.values is not None else 'have values of its own'}"
                )
        own = self.scope.own if self.scope is not None else None
        if own is not None and len(own) and int(own.max()) > len(self):
            raise ValueError(f"Scope.own: the memory has {len(self)} entries, a fact has up to number {int(own.max())}")
        if self.texts is not None:
            object.__setattr__(self, "texts", _checked(self.texts, len(self)))
        if self.pictures is not None and len(self.pictures) != len(self):
            raise ValueError(f"MemoryBank.pictures: expected those of {len(self)} entries, got of {len(self.pictures)}")
        object.__setattr__(self, "id", self._digest())
        for what, name in [("id", self.id), *(("tenants", name) for name in self.tenants)]:
            files.check_name(f"MemoryBank.{what}", name)
        if set(self.tenants) != set(self.parts):
            raise ValueError(
                f"MemoryBank.tenants: expected those of parts, {sorted(self.parts)}, got {sorted(self.tenants)}"
            )
        for name, entries in self.tenants.items():
            files.check_name(f"MemoryBank.parts[{name!r}]", self.parts[name])
            if not 0 <= entries.start <= entries.stop <= len(self) or entries.step != 1:
                raise ValueError(f"MemoryBank.tenants: {name!r} has {entries}, the memory {len(self)} entries")

    def __repr__(self) -> str:
        layers = ", ".join(map(str, sorted(self.layers))) or "none"
        parts = [self.id, f"{len(self):,} entries in layers {layers}", f"{self.nbytes:,} bytes"]
        parts += [f"tenants {', '.join(map(repr, self.tenants))}"] if self.tenants else []
        parts += [] if self.scope is None else [f"a scope of {self.scope.count:,} facts"]
        return f"MemoryBank({', '.join(parts)})"

    def __len__(self) -> int:
        return int(next(iter(self.layers.values())).index.shape[0]) if self.layers else 0

    def with_key(self, key: OwnKey) -> MemoryBank:
        """With the function that makes the keys of its scope, see `Scope.with_key`. Raises ValueError for another one,
        and without a scope."""
        if self.scope is None:
            raise ValueError("MemoryBank.scope: expected one whose keys a function makes, got None")
        return replace(self, scope=self.scope.with_key(key))

    def __bool__(self) -> bool:  # one of a scope alone has no entries, and is there all the same
        return True

    @classmethod
    def joined(cls, banks: Mapping[str, MemoryBank]) -> MemoryBank:
        """The memories of several tenants as one, in which a row names whose entries it uses.

        `uk.rows(model, memory=["acme", "globex", False])`: a row retrieves from the entries of its tenant alone, and no
        other tenant's entries change a bit of it. Edits that were trained with one of the memories fit the joined one.
        What their scopes know of other facts, the joined one's knows, for the rows of all tenants.

        Raises:
            ValueError: no memories.
            MismatchError: they differ in config, layers, base model, Enc_sem, zeta', or in a scope's encoder or
                thresholds.
        """
        if not banks:
            raise ValueError("banks: expected at least one memory, got none")
        (name, first), *rest = banks.items()
        for other, bank in rest:
            if differing := _differences(first, bank):
                raise MismatchError(f"banks: {name!r} and {other!r} differ in {' and '.join(differing)}")
        layers = {i: _concatenated([bank.layers[i] for bank in banks.values()]) for i in first.layers}
        tenants, start = {}, 0
        for tenant, bank in banks.items():
            tenants[tenant] = range(start, start + len(bank))
            start += len(bank)
        parts = {tenant: bank.id for tenant, bank in banks.items()}
        scope = first.scope
        for tenant, bank in rest:
            scope = scope and bank.scope and scope.joined(bank.scope, behind=tenants[tenant].start)
        return cls(
            layers,
            first.config,
            first.base_model,
            {"joined": ", ".join(banks)},
            tenants=tenants,
            parts=parts,
            scope=scope,
            texts=joined_texts([(bank.texts, len(bank)) for bank in banks.values()]),
            pictures=Pictures.joined([(bank.pictures, len(bank)) for bank in banks.values()]),
        )

    @property
    def ids(self) -> tuple[str, ...]:
        """Of this memory and of those that it was joined from: an edit that was trained with one of them fits."""
        return (self.id, *self.parts.values())

    def entries(self, tenant: str) -> range:
        """Raises ValueError for an unknown tenant."""
        if tenant not in self.tenants:
            raise ValueError(f"memory: unknown tenant {tenant!r}; the memory has {sorted(self.tenants)}")
        return self.tenants[tenant]

    @property
    def hidden_size(self) -> int:
        """d, the width of the model's hidden states."""
        if self.layers:
            return int(next(iter(self.layers.values())).index.shape[1])
        return int(self.base_model["hidden_size"] or 0)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored. Patched in, the index is kept once more as normalised float32 rows."""
        return sum(t.nbytes for t in self._tensors().values())

    def _digest(self) -> str:
        """A hash of the tables, kept with them: another object of the same ones, in other settings, has it at once."""
        if not self.layers:
            return files.digest(self._tensors())
        first, layers = next(iter(self.layers.values())), self.layers.items()
        together, found = _HASHED.get(first, ((), ""))
        if [(i, id(known())) for i, known in together] != [(i, id(layer)) for i, layer in layers]:
            found = files.digest(self._tables())
            _HASHED[first] = tuple((i, weakref.ref(layer)) for i, layer in layers), found
        return found

    def _tables(self) -> dict[str, Tensor]:
        return {f"layers.{i}.{name}": t for i, layer in self.layers.items() for name, t in layer.tensors().items()}

    def _tensors(self) -> dict[str, Tensor]:
        return self._tables() | (self.scope.tensors() if self.scope is not None else {})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, atomically, with checksums of all that is in it."""
        header = {
            "id": self.id,
            "layers": sorted(self.layers),
            "entries": len(self),
            "hidden_size": self.hidden_size,
            "config": self.config.to_dict(),
            "base_model": self.base_model,
            "notes": self.notes,
            "tenants": {name: [r.start, r.stop, self.parts[name]] for name, r in self.tenants.items()},
            "scope": None if self.scope is None else self.scope.header(),
        }
        texts = {} if self.texts is None else {"texts": files.spelled(self.texts)}
        pictures = {} if self.pictures is None else self.pictures.tensors()
        files.save(path, "memory", header, self._tensors() | texts | pictures)

    FILE = "memory.safetensors"

    def save_pretrained(self, folder: str | os.PathLike[str], *, name: str | None = None) -> None:
        """Write a folder that can be shared: the memory, and a model card that tells of it.

        Args:
            folder: made where there is none; files of these names are replaced, others stay.
            name: that the card calls the folder by, "owner/name" of a repository; None: its own.

        Raises:
            ArtifactError: see `save`; there is a file in the folder's place.
        """
        sharing.write_folder(folder, self, name=name)

    def card(self, name: str) -> list[str]:
        """See `Shareable`."""
        known = {
            **self.notes,
            "entries": f"{len(self):,}",
            "layers": ", ".join(map(str, sorted(self.layers))) or "none",
            "bytes": f"{self.nbytes:,}",
            **({} if self.texts is None else {"texts": f"of {sum(map(bool, self.texts)):,} entries"}),
            **({} if self.pictures is None else {"pictures": f"of {int((self.pictures.of >= 0).sum()):,} entries"}),
            **({"tenants": ", ".join(self.tenants)} if self.tenants else {}),
            "hash of the memory": self.id,
            **({} if self.scope is None else {"scope": f"{self.scope.id}, {self.scope.count:,} facts"}),
            **sharing.base_model(self.base_model),
            "config": self.config,
        }
        kind = sharing.plain(self.base_model["model_type"])
        loaded = f"memory = uk.MemoryBank.from_pretrained({json.dumps(name)})"
        usage = ["```python", "import unike_kernels as uk", "", loaded, "uk.patch(model, [], memory)", "```", ""]
        return [f"# A memory of a {kind} model", "", *sharing.table("Memory", known), *usage]

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, mmap: bool = False) -> MemoryBank:
        """Read and validate a file that `save` wrote; the contents are hashed and compared with the id.

        Args:
            path: of the file.
            mmap: leave the tables in the file, once they are verified; processes then share them. The file must not
                change as long as the memory lives: what is written to it shows in a running model, and reading what
                was cut off ends the process. (`save` and renaming are safe: they leave the old file to its readers.)

        Raises:
            FileNotFoundError: there is no such file.
            ArtifactError: truncated, damaged, of another format or version, or any field or tensor missing, wrong or
                left over; no regular file.
        """
        reader = files.Reader(path, *files.load(path, "memory", mmap=mmap))
        n, d = reader.field("entries", int), reader.field("hidden_size", int)
        layers = {}
        told = reader.field("scope", (dict, type(None))) if reader.says("scope") else None
        scope = None if told is None else Scope.read(reader, told)
        for index in reader.layers(least=0 if scope else 1):
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
        tenants = reader.field("tenants", dict)
        for name, told in tenants.items():
            kinds = [type(part) for part in told] if isinstance(told, list) else []
            if kinds != [int, int, str]:
                raise reader.fail(f"header field 'tenants': expected start, stop and id of {name!r}, got {told!r:.80}")
        stated = reader.field("id", str)
        bank: MemoryBank = reader.build(
            cls,
            layers=layers,
            config=reader.build(Config.from_dict, reader.field("config", dict)),
            base_model=reader.build(validate_fingerprint, reader.field("base_model", dict)),
            notes=reader.notes(),
            tenants={name: range(start, stop) for name, (start, stop, _) in tenants.items()},
            parts={name: id for name, (_, _, id) in tenants.items()},
            scope=scope,
            texts=reader.texts("texts") if reader.has("texts") else None,
            pictures=Pictures.read(reader),
        )
        reader.done()
        if bank.id != stated:
            raise ArtifactError(f"{path}: its contents have the id {bank.id}, the header says {stated!r:.80}")
        return bank


def joined_texts(parts: Sequence[tuple[tuple[str, ...] | None, int]]) -> tuple[str, ...] | None:
    """Those of entries behind one another, given as texts, or None, and their number; see `MemoryBank.texts`."""
    if all(texts is None for texts, _ in parts):
        return None
    return tuple(text for texts, count in parts for text in (texts if texts is not None else ("",) * count))


def _checked(texts: Sequence[str], count: int) -> tuple[str, ...]:
    """Raises TypeError, ValueError unless these are the texts of so many entries."""
    if isinstance(texts, str) or len(texts) != count:
        raise ValueError(f"MemoryBank.texts: expected one for each of {count} entries, got {len(texts)}")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"MemoryBank.texts[{i}]: expected a string, got {text!r:.80}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # a lone surrogate
            raise ValueError(f"MemoryBank.texts[{i}]: expected what UTF-8 can hold, got {text!a:.80}") from None
    return tuple(texts)


def _differences(one: MemoryBank, other: MemoryBank) -> list[str]:
    """In what the two differ that a joined memory has once."""
    found = []
    if one.config != other.config:
        found.append("config")
    if not agree(one.base_model, other.base_model):
        found.append("base model")
    scopes = [s and (s.id, s.threshold, s.same_fact) for s in (one.scope, other.scope)]
    if scopes[0] != scopes[1]:
        found.append("scope")
    if one.layers.keys() != other.layers.keys():
        return [*found, "layers"]
    for i, a in one.layers.items():
        b = other.layers[i]
        pairs = [*zip(a.encoder, b.encoder, strict=True), (a.zeta, b.zeta), (a.zeta_prime, b.zeta_prime)]
        if any(x.shape != y.shape or not torch.equal(x, y) for x, y in pairs):
            return [*found, "Enc_sem or zeta'"]
    return found


def _concatenated(layers: Sequence[MemoryLayer]) -> MemoryLayer:
    first, tables = layers[0], [layer.values for layer in layers if layer.values is not None]
    return MemoryLayer(
        torch.cat([layer.index for layer in layers]),
        torch.cat([layer.keys for layer in layers]),
        torch.cat(tables) if tables else None,
        first.encoder,
        first.zeta,
        first.zeta_prime,
    )
