"""Edits as files in a folder, which is how the processes of a server share them, and how edits come and go."""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
import re
import shutil
import socket
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..artifacts.edit import Edit
from ..artifacts.files import lives, opened, replacing

_NAME = re.compile(r"\w[\w.-]*")
_RETAINED = ".retained"
_count = itertools.count()


@dataclass(frozen=True)
class Version:
    """One state of an edit's file.

    Attributes:
        key: "<id>@<state>"; a file that is replaced has another one.
        edit: what it held.
    """

    key: str
    edit: Edit


class Retained:
    """As long as it lives, a version's file is within reach of other processes."""


class EditFolder:
    """The edits `<id>.safetensors` of a folder.

    Adding or replacing an edit is `Edit.save` to its place, which is atomic; revoking it is removing the file. A
    version that somebody still holds can be had by its key, whatever has become of the file.

    Args:
        path: the folder.
        check: called with each edit that is loaded; raises if it does not fit.

    Raises:
        FileNotFoundError: there is no such folder.
    """

    def __init__(self, path: str | os.PathLike[str], check: Callable[[Edit], None] = lambda edit: None) -> None:
        self.path, self._check = Path(path), check
        if not self.path.is_dir():
            raise FileNotFoundError(f"edits: there is no folder {self.path}")
        self._held: weakref.WeakValueDictionary[str, Version] = weakref.WeakValueDictionary()
        self._last: dict[str, Version] = {}
        self._retained: weakref.WeakValueDictionary[str, Retained] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()

    def get(self, id: str) -> Version:
        """The version of an edit that is there now; the next call need not load it again.

        Raises:
            ValueError: there is no edit of this id, or its file is not valid or does not fit; the message names it.
        """
        before = self._last.pop(id, None)  # held until it is known whether it is still the current one
        version = self._last[id] = self._current(id)
        del before
        return version

    def _current(self, id: str) -> Version:
        if not isinstance(id, str) or not _NAME.fullmatch(id):
            raise ValueError(f"edit: expected an id of letters, digits, '_', '.' and '-', got {id!r:.80}")
        file = self.path / f"{id}.safetensors"
        try:
            with opened(file) as content:  # of one file, whatever takes its place meanwhile
                key = _key(id, os.fstat(content.fileno()))
                version = self._held.get(key)
                if version is not None:
                    return version
                edit = Edit.read(content, file)
                if _key(id, os.fstat(content.fileno())) != key:
                    raise ValueError(f"edit: {file.name} was written to while it was read; replace it by renaming")
        except FileNotFoundError:
            raise ValueError(f"edit: there is no edit {id!r}") from None
        if edit.id != id:
            raise ValueError(f"edit: {file.name} holds the edit {edit.id!r}; its name must be its id")
        self._check(edit)
        version = self._held[key] = Version(key, edit)
        return version

    def held(self, key: str) -> Version:
        """The version of this key: from whoever holds it in this process, the folder, or what a process retains.

        Raises ValueError if there is none any more.
        """
        version = self._held.get(key)
        if version is not None:
            return version
        id = key.rpartition("@")[0]
        with contextlib.suppress(ValueError):
            version = self._current(id)
        if version is None or version.key != key:
            retained = next(self._retained_files(key), None)
            if retained is None:
                raise ValueError(f"edit: {id!r} was replaced or revoked before its request began")
            version = self._held[key] = Version(key, Edit.load(retained))
        return version

    def retain(self, key: str) -> Retained:
        """Keep the file of a version within reach of other processes, which have it by `held`.

        Raises ValueError if there is none any more.
        """
        with self._lock:
            found = self._retained.get(key)
            if found is None:
                own = self.path / _RETAINED / f"{socket.gethostname()}-{os.getpid()}"
                if not own.exists():
                    self._sweep()
                    own.mkdir(parents=True)
                # Each its own name: the last one of this key may be about to be unlinked.
                place = own / f"{key}~{next(_count)}.safetensors"
                self._copy(key, place)
                found = self._retained[key] = Retained()
                weakref.finalize(found, place.unlink, missing_ok=True)
        return found

    def _copy(self, key: str, place: Path) -> None:
        """A version's file, from the folder, from those who retain it, or made anew from what this process holds."""
        id = key.rpartition("@")[0]
        current = self.path / f"{id}.safetensors"
        for source in (current, *self._retained_files(key)):
            with contextlib.suppress(FileNotFoundError), source.open("rb") as file:
                content = file.read()
                if source != current or _key(id, os.fstat(file.fileno())) == key:
                    with replacing(place, durable=False) as part:
                        part.write(content)
                    return
        self.held(key).edit.save(place)

    def _retained_files(self, key: str) -> Iterator[Path]:
        # Not Path.glob, which fails where a folder is swept meanwhile.
        names = glob.iglob(f"{_RETAINED}/*/{key}~*.safetensors", root_dir=self.path)
        return (self.path / name for name in names)

    def _sweep(self) -> None:
        """Remove what processes of this machine left behind that are no more."""
        for folder in (self.path / _RETAINED).glob(f"{socket.gethostname()}-*"):
            pid = folder.name.rpartition("-")[2]
            if pid.isdecimal() and not lives(int(pid)):
                shutil.rmtree(folder, ignore_errors=True)


def _key(id: str, state: os.stat_result) -> str:
    return f"{id}@{state.st_mtime_ns:x}-{state.st_size:x}-{state.st_ino:x}"
