"""`Served`: a server's edits and memory, and what it makes of a request that names some of them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import warnings
from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..artifacts.compatibility import ModelDescription, check_compatibility
from ..artifacts.edit import Edit
from ..artifacts.fingerprint import Identity, samples_of_checkpoint
from ..artifacts.memory import MemoryBank
from ..backbones import configured_activation
from ..config import ANNConfig
from ..nn import Ranks
from .access import Access, anybody, headers, load_hook
from .ragged import RaggedRuntime, check_memory, in_force, remembers
from .repository import MOST_EDITS, EditRepository, Version, VersionPin, check_ids, check_most

KEY = "unike"  # of a server's settings, and of what its front-end tells a worker about a request
_LAYERS = 4
SETTINGS = frozenset({"edits", "memory", "layers", "max_edits", "search", "sharded_memory", "authorize", "updating"})
_ON_ITS_WAY = 60.0  # seconds that a request may take from the front-end to the engine


class Served:
    """A server's edits and memory, as each of its processes needs them.

    Args:
        name: of the settings, where a user gives them, for messages.
        settings: "edits", a folder; "memory", a file; and the others of `SETTINGS`.
        config: the model's, of Hugging Face.
        text: the one of its language model.
        path: of its checkpoint.
        known: the settings that this engine has.

    Raises:
        ValueError: a setting that is unknown or no such value, or a memory that no engine of flat tokens serves.
        FileNotFoundError, ArtifactError, MismatchError: no such folder or memory, or not one for this model.
    """

    def __init__(
        self, name: str, settings: dict[str, Any], config: Any, text: Any, path: str, known: Collection[str] = SETTINGS
    ) -> None:
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise ValueError(f"{name}: expected {', '.join(sorted(known))}, got {unknown}")
        self.authorize = load_hook(settings["authorize"]) if settings.get("authorize") else anybody
        self.updating = bool(settings.get("updating"))
        self.asked: Counter[str] = Counter()  # requests by edit, "" for none
        self._most = check_most(settings.get("max_edits", MOST_EDITS))
        self.config = config
        self.total, self.hidden_size = int(text.num_hidden_layers), int(text.hidden_size)
        self.activation = configured_activation(text)
        # One that is to be a part of what it is remains in its file, whose pages the processes share.
        self.sharded = bool(settings.get("sharded_memory"))
        if self.sharded and not settings.get("memory"):
            raise ValueError(f"{name}: expected a memory where sharded_memory is asked for")
        self.memory = MemoryBank.load(settings["memory"], mmap=self.sharded) if settings.get("memory") else None
        last = range(max(self.total - _LAYERS, 0), self.total)
        self.layers = sorted(settings.get("layers") or (self.memory.layers if self.memory else ()) or last)
        if not set(self.layers) <= set(range(self.total)):
            raise ValueError(f"layers: expected indices in 0..{self.total - 1}, got {self.layers}")
        self._path = path
        if self.memory is not None:
            if settings.get("search"):
                self.memory = replace(self.memory, search=ANNConfig(**settings["search"]))
            check_memory(self.memory)
            self._judge(self.memory)
        self.model: RaggedRuntime | None = None
        self.folder = EditRepository(settings["edits"], self.check) if settings.get("edits") else None
        self._admitted: deque[tuple[float, VersionPin]] = deque()

    def _judge(self, artifact: Edit | MemoryBank) -> None:
        """Whether it was made for this model: by its config, and by its checkpoint where that lies in a folder."""
        samples = lambda names: samples_of_checkpoint(self._path, names) if os.path.isdir(self._path) else {}  # noqa: E731
        identity = Identity(self.config.model_type, self.hidden_size, self.total, samples)
        description = ModelDescription(
            self.hidden_size, lambda _: self.activation, self.total, self.layers, identity, what="server"
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an engine casts and quantises as it likes
            check_compatibility(artifact, description, **in_force(self.memory))

    def flat(
        self, device: torch.device | str = "cpu", own: Sequence[int] | None = None, ranks: Ranks | None = None
    ) -> RaggedRuntime:
        """Of the worker alone, which has its own layers: the tables of a memory take time and room."""
        if self.model is None:
            sizes = self.layers, self.hidden_size, self.activation
            self.model = RaggedRuntime(*sizes, self.memory, own=own, ranks=ranks, device=device)
        return self.model

    def check(self, edit: Edit) -> None:
        """Raises MismatchError for an edit that cannot be served. Builds nothing."""
        self._judge(edit)

    def first_edit(self) -> Version | None:
        """Of the folder; None: it is empty, or has another error than those of requests."""
        with contextlib.suppress(ValueError):  # an error of its requests, should there be any
            return self.folder.get(self.folder.ids()[0]) if self.folder is not None and self.folder.ids() else None
        return None

    def told(
        self, asked: Mapping[str, Any], salt: str | None, prompt: Sequence[int] | None = None
    ) -> tuple[dict[str, Any], str | None]:
        """Look up what a request asks for.

        Args:
            asked: with "unike_edit", ids, and "unike_memory", both optional.
            salt: of the prefix cache, as the client sent it.
            prompt: token ids, where the cache may hold a part of what is computed from a prompt's last token on: where
                a memory or its scope depends on that, only equal prompts share a salt. None: it does not.

        Returns:
            What the worker needs, {"edits": keys of versions, "memory": see `RequestSlice`}, and the salt that keeps
            the request apart from those whose keys and values differ.

        Raises:
            ValueError: what is not there or does not fit, anything else than ids, or too many.
            PermissionError: the client may not have it.
        """
        memory = remembers(self.memory, asked.get("unike_memory"))
        ids = check_ids("unike_edit", asked.get("unike_edit", []), self._most)
        self.authorize(Access("use", tuple(ids), memory if isinstance(memory, str) else None, headers.get()))
        if ids and self.folder is None:
            raise ValueError("unike_edit: this server was started without a folder of edits")
        versions = [self.folder.get(id) for id in ids] if self.folder is not None else []
        keys = [version.key for version in versions]
        self.asked.update(ids or [""])
        if self.folder is not None:
            # Whatever becomes of the files until the engine's process has got hold of them.
            now = time.monotonic()
            self._admitted.extend((now, self.folder.retain(key)) for key in keys)
            while self._admitted and self._admitted[0][0] < now - _ON_ITS_WAY:
                self._admitted.popleft()
        # No salt is that of a request as everybody sends it; a client's own is never taken as it came.
        ends = self.memory is not None and self.memory.config.needs_prompt_ends and bool(keys or memory)
        own = list(prompt) if prompt is not None and ends else None
        if keys or memory != remembers(self.memory, None) or salt is not None or own is not None:
            parts = [salt, keys, memory, *([] if own is None else [own])]
            salt = f"{KEY}|{hashlib.sha256(json.dumps(parts).encode()).hexdigest()}"
        return {"edits": keys, "memory": memory}, salt
