"""An edit: extra key-value neurons for the FFNs of a few layers (paper, Eq. 3 and 6), as a value and as a file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import Config
from ..errors import ArtifactError, MismatchError
from ..ops import ACTIVATIONS, _check
from . import files, sharing
from .fingerprint import validate as validate_fingerprint

if TYPE_CHECKING:
    from .memory import MemoryBank


@dataclass(frozen=True)
class EditLayer:
    """The neurons of one layer.

    Attributes:
        keys: [n, d], W_K^extra, a neuron a row.
        key_bias: [n], b_K^extra.
        values: [n, d], W_V^extra.
        zeta: [d], zeta'.
        beta: [], the scalar of beta * zeta'.
        up, up_bias: [n, d] and [n], the second factor of gated neurons; None for plain ones.
    """

    keys: Tensor
    key_bias: Tensor
    values: Tensor
    zeta: Tensor
    beta: Tensor
    up: Tensor | None = None
    up_bias: Tensor | None = None

    def __post_init__(self) -> None:
        if self.keys.dim() != 2:
            raise ValueError(f"EditLayer.keys: expected shape [n, d], got {list(self.keys.shape)}")
        n, d = self.keys.shape
        expected = {"key_bias": (n,), "values": (n, d), "zeta": (d,), "beta": ()}
        if (self.up is None) != (self.up_bias is None):
            raise ValueError("EditLayer: gated neurons need both up and up_bias")
        if self.up is not None:
            expected |= {"up": (n, d), "up_bias": (n,)}
        for name, shape in expected.items():
            t = getattr(self, name)
            if tuple(t.shape) != shape:
                raise ValueError(f"EditLayer.{name}: expected shape {list(shape)}, got {list(t.shape)}")
            if t.dtype != self.keys.dtype or not t.is_floating_point():
                raise TypeError(f"EditLayer.{name}: expected {self.keys.dtype} as keys, got {t.dtype}")

    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor, without the absent ones."""
        return {name: t for name, t in vars(self).items() if t is not None}

    def to(self, device: torch.device | str) -> EditLayer:
        """On another device."""
        return EditLayer(**{name: t.to(device) for name, t in self.tensors().items()})

    def detached(self) -> EditLayer:
        """The same numbers on the CPU, without their history."""
        return EditLayer(**{name: t.detach().cpu().clone() for name, t in self.tensors().items()})


@dataclass(frozen=True)
class Edit(sharing.Shareable):
    """One edit, ready to patch in.

    Attributes:
        id: its name, unique among the edits of a model; printable characters.
        layers: decoder layer index -> neurons.
        activation: of the FFNs that it was made for.
        config: the semantics under which it was trained.
        base_model: fingerprint of the model, see `artifacts.fingerprint`.
        memory_id: `MemoryBank.id` of the memory that it was trained with; None: without one.
        notes: free text for people, such as the prompt and the target.
        entries: float32 [n, c], unit rows: the keys of the prompts that it is meant for, its own one first; None: it
            has none, and can act only wherever it is selected.
        scope_id: `Scope.id` of the scope that they were made with.
    """

    id: str
    layers: Mapping[int, EditLayer]
    activation: str
    config: Config
    base_model: dict[str, Any]
    memory_id: str | None
    notes: dict[str, str] = field(default_factory=dict)
    entries: Tensor | None = None
    scope_id: str | None = None

    def __post_init__(self) -> None:
        files.check_name("Edit.id", self.id)
        if (self.entries is None) != (self.scope_id is None):
            raise ValueError("Edit: expected entries and scope_id together, got one of them")
        if self.entries is not None:
            files.check_name("Edit.scope_id", self.scope_id)
            shape = list(self.entries.shape)
            if self.entries.dtype != torch.float32 or len(shape) != 2 or 0 in shape:
                raise ValueError(f"Edit.entries: expected float32 [n, c], got {self.entries.dtype} {shape}")
            if not ((self.entries.norm(dim=-1) - 1).abs() < 1e-3).all():
                raise ValueError("Edit.entries: expected unit rows")
        if self.memory_id is not None:
            files.check_name("Edit.memory_id", self.memory_id)
        if not self.layers:
            raise ValueError("Edit.layers: expected at least one layer, got none")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"Edit.activation: expected one of {', '.join(ACTIVATIONS)}; got {self.activation!r}")
        widths = {layer.keys.shape[1] for layer in self.layers.values()}
        if len(widths) != 1:
            raise ValueError(f"Edit.layers: expected one hidden size, got {sorted(widths)}")

    def __repr__(self) -> str:
        neurons = ", ".join(f"{i}: {len(layer.keys)}" for i, layer in sorted(self.layers.items()))
        parts = [f"{self.id!r}", f"neurons in layers {neurons}", f"{self.nbytes:,} bytes"]
        parts += [] if self.memory_id is None else [f"memory {self.memory_id}"]
        parts += [f"{name} {text!r}" for name, text in self.notes.items() if name in ("prompt", "answer")]
        return f"Edit({', '.join(parts)})"

    @property
    def hidden_size(self) -> int:
        """d, the width of the model's hidden states."""
        return int(next(iter(self.layers.values())).keys.shape[1])

    def shard(self, rank: int, world_size: int) -> Edit:
        """The neurons of one rank of a tensor-parallel FFN, whose partial outputs are summed over the ranks afterwards.

        Each neuron is on one rank, so that the sum over the ranks is what the whole edit adds. A rank may get none.

        Raises ValueError for a rank that is not in 0..world_size - 1.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: expected 0 to {world_size - 1}, got {rank}")

        def part(layer: EditLayer) -> EditLayer:
            n = layer.keys.shape[0]
            mine = slice(n * rank // world_size, n * (rank + 1) // world_size)
            whole = ("zeta", "beta")
            return EditLayer(**{name: t if name in whole else t[mine] for name, t in layer.tensors().items()})

        return replace(self, layers={i: part(layer) for i, layer in self.layers.items()})

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        own = 0 if self.entries is None else self.entries.nbytes
        return own + sum(t.nbytes for layer in self.layers.values() for t in layer.tensors().values())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, atomically. Raises ArtifactError for a tensor that is not finite."""
        tensors = self._tensors()
        for name, t in tensors.items():
            if not _check.finite(t):
                raise ArtifactError(f"edit {self.id!r}: {name} holds NaN or infinity")
        header = {
            "id": self.id,
            "layers": sorted(self.layers),
            "hidden_size": self.hidden_size,
            "activation": self.activation,
            "config": self.config.to_dict(),
            "base_model": self.base_model,
            "memory_id": self.memory_id,
            "scope_id": self.scope_id,
            "notes": self.notes,
        }
        files.save(path, "edit", header, tensors)

    def _tensors(self) -> dict[str, Tensor]:
        named = {f"layers.{i}.{name}": t for i, layer in self.layers.items() for name, t in layer.tensors().items()}
        return named if self.entries is None else named | {"entries": self.entries}

    FILE = "edit.safetensors"

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        memory: MemoryBank | None = None,
        picture: Any = None,
        name: str | None = None,
    ) -> None:
        """Write a folder that can be shared: the edit, and a model card that tells of it.

        Args:
            folder: made where there is none; files of these names are replaced, others stay.
            memory: that the edit was trained with, to lie beside it: `MemoryBank.from_pretrained` reads it from the
                same folder. None: it is shared elsewhere, or there is none.
            picture: a PIL image that the request is about, for the card.
            name: that the card calls the folder by, "owner/name" of a repository; None: its own.

        Raises:
            MismatchError: the edit was trained with another memory.
            ArtifactError: see `save`; there is a file in the folder's place.
        """
        if memory is not None:
            self._check_own(memory)
        beside = () if memory is None else (memory,)
        sharing.write_folder(folder, self, *beside, name=name, picture=picture)

    def _check_own(self, memory: MemoryBank) -> None:
        """Raises MismatchError for a memory, or a scope, that the edit was not trained with."""
        trained = self.memory_id in (memory.ids if memory.layers else (None,))
        if not trained or (self.scope_id is not None and (memory.scope is None or memory.scope.id != self.scope_id)):
            scope = memory.scope.id if memory.scope is not None else None
            raise MismatchError(
                f"edit {self.id!r}: it was trained with the memory {self.memory_id} and the scope {self.scope_id}; "
                f"this is the memory {memory.id} with the scope {scope}"
            )

    def card(self, name: str) -> list[str]:
        """See `Shareable`."""
        notes = dict(self.notes)
        lines = [f"# {sharing.plain(self.id)}: an edit of a {sharing.plain(self.base_model['model_type'])} model", ""]
        for what in ("prompt", "answer"):
            if what in notes:
                lines += [f"The request's {what}:", "", *sharing.verbatim(notes.pop(what))]
        neurons = ", ".join(f"{i}: {len(layer.keys)}" for i, layer in sorted(self.layers.items()))
        known = {
            **notes,
            "neurons of layers": neurons,
            "bytes": f"{self.nbytes:,}",
            "hash of the edit": files.digest(self._tensors()),
            "memory that it needs": self.memory_id or "none",
            **({} if self.scope_id is None else {"scope that it needs": self.scope_id}),
            **sharing.base_model(self.base_model),
            "config": self.config,
        }
        needed = self.memory_id is not None or self.scope_id is not None
        memory = f"memory = uk.MemoryBank.from_pretrained({json.dumps(name)})  # or where it is shared"
        return [
            *lines,
            *sharing.table("Edit", known),
            "```python",
            "import unike_kernels as uk",
            "",
            f"edit = uk.Edit.from_pretrained({json.dumps(name)})",
            *([memory] if needed else []),
            f"uk.patch(model, [edit]{', memory' if needed else ''})",
            "```",
            "",
        ]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Edit:
        """Read and validate a file that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ArtifactError: truncated, damaged, of another format or version, or any field or tensor missing, wrong or
                left over; no regular file.
        """
        with files.opened(path) as file:
            return cls.read(file, path)

    @classmethod
    def read(cls, file: IO[bytes], path: str | os.PathLike[str]) -> Edit:
        """`load` from a file that is open for reading in binary; `path` is what messages call it."""
        reader = files.Reader(path, *files.read(file, path, "edit"))
        d = reader.field("hidden_size", int)
        layers = {}
        for index in reader.layers():
            prefix = f"layers.{index}."
            keys = reader.tensor(prefix + "keys", (None, d))
            n = keys.shape[0]
            gated = reader.has(prefix + "up")
            layers[index] = reader.build(
                EditLayer,
                keys=keys,
                key_bias=reader.tensor(prefix + "key_bias", (n,)),
                values=reader.tensor(prefix + "values", (n, d)),
                zeta=reader.tensor(prefix + "zeta", (d,)),
                beta=reader.tensor(prefix + "beta", ()),
                up=reader.tensor(prefix + "up", (n, d)) if gated else None,
                up_bias=reader.tensor(prefix + "up_bias", (n,)) if gated else None,
            )
        edit: Edit = reader.build(
            cls,
            id=reader.field("id", str),
            layers=layers,
            activation=reader.field("activation", str),
            config=reader.build(Config.from_dict, reader.field("config", dict)),
            base_model=reader.build(validate_fingerprint, reader.field("base_model", dict)),
            memory_id=reader.field("memory_id", (str, type(None))),
            notes=reader.notes(),
            entries=reader.tensor("entries", (None, None)) if reader.has("entries") else None,
            scope_id=reader.field("scope_id", (str, type(None))) if reader.says("scope_id") else None,
        )
        reader.done()
        return edit


def fresh_layer(keys: Tensor, key_bias: Tensor, zeta: Tensor, *, gated: bool) -> EditLayer:
    """Neurons that do nothing yet: W_V = 0 and beta = 0.

    Args:
        keys: [n, d].
        key_bias: [n].
        zeta: [d].
        gated: give them the factor of gated FFNs too, which is 1 at first.
    """
    return EditLayer(
        keys=keys,
        key_bias=key_bias,
        values=torch.zeros_like(keys),
        zeta=zeta,
        beta=torch.zeros((), dtype=keys.dtype, device=keys.device),
        up=torch.zeros_like(keys) if gated else None,
        up_bias=torch.ones_like(key_bias) if gated else None,
    )
