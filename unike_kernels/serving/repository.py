"""Edits as files in a folder, which is how the processes of a server share them, and how edits come and go."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import itertools
import logging
import os
import re
import secrets
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..artifacts.edit import Edit
from ..artifacts.files import machine, opened, replacing
from ..errors import ArtifactError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MOST_EDITS = 16  # of one request, unless a server is told otherwise

_NAME = re.compile(r"\w[\w.-]{0,198}")
_RETAINED = ".retained"
_RECENT = 1024  # versions that are kept loaded for the requests to come
_STALE = 24 * 3600  # seconds after which what has no lock is taken for abandoned
_count = itertools.count()
_log = logging.getLogger("unike_kernels")


class NoSuchEditError(ValueError):
    """A request names an edit that is not there."""


def check_ids(what: str, asked: object, most: int | None = None) -> list[str]:
    """The ids of a request's edits, as a client may name them: one, or several.

    Args:
        what: names them in messages.
        asked: whatever came.
        most: how many there may be; None: any number.

    Raises ValueError for anything but an id or a list of distinct ones.
    """
    ids = [asked] if isinstance(asked, str) else asked
    if not isinstance(ids, list | tuple):
        raise ValueError(f"{what}: expected the id of an edit or a list of distinct ones, got {asked!r:.80}")
    if most is not None and len(ids) > most:
        raise ValueError(f"{what}: expected at most {most} edits, got {len(ids)}")
    ids = [_check_id(id) for id in ids]
    if len(set(ids)) != len(ids):
        raise ValueError(f"{what}: expected distinct ids, got {ids!r:.80}")
    return ids


def check_most(most: object) -> int:
    """Raises ValueError for anything but a limit to the edits of one request."""
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise ValueError(f"max_edits: expected an integer of at least 1, got {most!r:.80}")
    return most


def _check_id(id: object) -> str:
    if not isinstance(id, str) or not _NAME.fullmatch(id):
        raise ValueError(
            f"edit: expected an id of letters, digits, '_', '.' and '-', at most 199 of them, got {id!r:.80}"
        )
    return id


@dataclass(frozen=True)
class Version:
    """One state of an edit's file.

    Attributes:
        key: "<id>@<state>"; a file that is replaced has another one.
        edit: what it held.
    """

    key: str
    edit: Edit


class _Own:
    """A process's own folder among those of what is retained; its lock file is locked for as long as it is in use."""

    def __init__(self, parent: Path) -> None:
        parent.mkdir(exist_ok=True)
        self.pid = os.getpid()
        while True:
            self.folder = parent / f"{machine()}-{self.pid}-{secrets.token_hex(8)}"
            lock = _lock_of(self.folder)
            self.descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                taken = _take(self.descriptor) and lock.exists()
                if taken:
                    self.folder.mkdir()
            except OSError:  # such as that of a file system without locks: nobody could tell that it is in use
                os.close(self.descriptor)
                lock.unlink(missing_ok=True)
                raise
            if taken:
                break
            os.close(self.descriptor)  # a sweep came between the file and its lock
        weakref.finalize(self, _leave, self.folder, self.descriptor, self.pid)


class VersionPin:
    """As long as it lives, a version's file is within reach of other processes.

    Attributes:
        owner: whose folder the file is in; None: there is no file, the folder of the edits cannot be written.
        version: held instead of a file, for this process.
    """

    def __init__(self, owner: _Own | None, version: Version | None = None) -> None:
        self.owner, self.version = owner, version


class EditRepository:
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
        self._unwritable = False
        self._begin()
        _folders.add(self)

    def _begin(self) -> None:
        """What a process retains is its own: a forked child begins anew."""
        self._own: _Own | None = None
        self._retained: weakref.WeakValueDictionary[str, VersionPin] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()

    def _forked(self) -> None:
        if self._own is not None:
            os.close(self._own.descriptor)  # the lock is the parent's alone
        self._begin()

    def ids(self) -> list[str]:
        """Of the edits that are there now, in order. What their files hold is not looked at."""
        return sorted(file.stem for file in self.path.glob("*.safetensors") if _NAME.fullmatch(file.stem))

    def add(self, edit: Edit, *, replacing: bool = False) -> None:
        """Put an edit there under its id; `replacing` the one that has it.

        Raises:
            ValueError: no id, or there is an edit of this id.
            MismatchError: it does not fit.
        """
        file = self.path / f"{_check_id(edit.id)}.safetensors"
        self._check(edit)
        if file.exists() and not replacing:
            raise ValueError(f"edit: there is an edit {edit.id!r} already; replacing it has to be asked for")
        edit.save(file)

    def remove(self, id: str) -> None:
        """Revoke an edit. Requests that have begun keep the version that they have.

        Raises:
            NoSuchEditError: there is no edit of this id.
            ValueError: no id.
        """
        try:
            (self.path / f"{_check_id(id)}.safetensors").unlink()
        except FileNotFoundError:
            raise NoSuchEditError(f"edit: there is no edit {id!r}") from None

    def get(self, id: str) -> Version:
        """The version of an edit that is there now; one that was asked for lately need not be loaded again.

        Raises:
            NoSuchEditError: there is no edit of this id.
            ValueError: no id; its file cannot be read, is not valid or does not fit. The message names the edit, and
                nothing else of the file.
        """
        _check_id(id)
        before = self._last.pop(id, None)  # held until it is known whether it is still the current one
        version = self._last[id] = self._current(id)
        if version is not before:
            ids = list(self._last)
            present = [id for id in ids if (self.path / f"{id}.safetensors").exists()]
            for other in {*ids}.difference(present[-_RECENT:]):
                self._last.pop(other, None)
        return version

    def _current(self, id: str) -> Version:
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
            raise NoSuchEditError(f"edit: there is no edit {id!r}") from None
        except (ArtifactError, OSError) as error:  # these name the path, which is not for clients
            _log.warning("edit %s: %s", id, error)
            if isinstance(error, OSError):
                raise ValueError(f"edit: the file of {id!r} cannot be read") from None
            raise ArtifactError(f"edit: the file of {id!r} is not valid") from None
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

    def retain(self, key: str) -> VersionPin:
        """Keep the file of a version within reach of other processes, which have it by `held`.

        Raises ValueError if there is none any more.
        """
        with self._lock:
            found = self._retained.get(key)
            if found is None:
                try:
                    found = self._kept(key)
                except OSError as error:
                    if not self._unwritable:
                        _log.warning("edits: versions that are replaced cannot be kept for other processes: %s", error)
                    self._unwritable = True
                    found = VersionPin(None, self.held(key))
                self._retained[key] = found
        return found

    def _kept(self, key: str) -> VersionPin:
        parent = self.path / _RETAINED
        if self._own is None:
            _sweep(parent)
            self._own = _Own(parent)
        # Each its own name: the last one of this key may be about to be unlinked.
        place = self._own.folder / f"{_short(key)}~{next(_count)}.safetensors"
        self._copy(key, place)
        found = VersionPin(self._own)
        weakref.finalize(found, _let_go, place, self._own.pid)
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
        names = glob.iglob(f"{_RETAINED}/*/{_short(key)}~*.safetensors", root_dir=self.path)
        return (self.path / name for name in names)


_folders: weakref.WeakSet[EditRepository] = weakref.WeakSet()


def _forked() -> None:
    for folder in _folders:
        folder._forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def _take(descriptor: int) -> bool:
    """Lock an open file, unless somebody else has. Raises OSError where files cannot be locked."""
    if fcntl is None:
        raise OSError(errno.ENOTSUP, "files cannot be locked here")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _let_go(place: Path, owner: int) -> None:
    if os.getpid() == owner:  # and not a child that was forked while it was retained
        with contextlib.suppress(OSError):
            place.unlink()


def _leave(folder: Path, descriptor: int, owner: int) -> None:
    if os.getpid() == owner:
        _remove(folder)
        os.close(descriptor)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        _lock_of(folder).unlink()


def _sweep(parent: Path) -> None:
    """Remove what processes left behind that are surely no more: nobody holds their locks.

    Not every file system shows a lock to other machines, and older versions had none: theirs must be a day old, too.
    """
    for entry in parent.glob("*"):
        folder = entry.with_suffix("") if entry.suffix == ".lock" else entry
        with contextlib.suppress(OSError):
            if entry == folder:
                if not _lock_of(folder).exists() and _is_old(folder):
                    _remove(folder)
            elif folder.name.startswith(f"{machine()}-") or _is_old(folder):
                descriptor = os.open(entry, os.O_RDWR)
                try:
                    if _take(descriptor):
                        _remove(folder)
                finally:
                    os.close(descriptor)


def _is_old(folder: Path) -> bool:
    """Whether it and its lock file, if there are such, have not been touched for a day."""
    states = [path.stat() for path in (folder, _lock_of(folder)) if path.exists()]
    return all(time.time() - state.st_mtime > _STALE for state in states)


def _short(key: str) -> str:
    """A key as a part of a file's name, whose length is limited."""
    return hashlib.sha256(key.encode()).hexdigest()[:32]


def _key(id: str, state: os.stat_result) -> str:
    return f"{id}@{state.st_mtime_ns:x}-{state.st_size:x}-{state.st_ino:x}"
