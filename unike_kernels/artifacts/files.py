"""Reading and writing the library's files: safetensors with a versioned JSON header and checksums, written atomically.

Every byte of a file is under a checksum: each tensor's under its own, so that a part of a file can be read and
verified, and the rest, which says where they are, under one that stands at a fixed place. Checksums tell damage, not
forgery. Files of version 1 have none and are read without.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import math
import mmap as mapping
import os
import secrets
import socket
import stat
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from .. import _pages
from ..errors import ArtifactError
from ..ops import _check

VERSION = 2

_HEADER_BYTES = 1 << 24  # at most; what is parsed must not be as large as a file claims
_DEPTH = 16  # of a header's JSON
_MOST = 1 << 60  # of a size, so that its bytes can be counted
_FIRST = b'{"__metadata__": {"checksum": "'  # how a file of version 2 goes on after its first 8 bytes
_BLANK = b"0" * 32  # in the checksum's place while it is computed
_TEMPORARY = ".unike-"  # prefix of the names of files that are being written
_STALE = 24 * 3600  # seconds after which the temporary file of another machine's writer is taken for abandoned

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def save(path: str | os.PathLike[str], kind: str, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write the tensors and the header to a temporary file beside `path`, then rename it; see `replacing`.

    Args:
        path: of the file; one that is there is replaced.
        kind: of artifact, "edit", "memory", "index" or "states"; `load` must be asked for the same one.
        header: what JSON can hold.
        tensors: name -> tensor, on any device.

    Raises:
        ArtifactError: the header is too large or cannot be written as JSON; `path` is not that of a regular file.
        OSError: from the system, such as a full disk; the message names the path.
    """
    try:
        _plain(header)
        metadata = {"format": f"unike.{kind}", "version": str(VERSION), "header": json.dumps(header)}
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{path}: its header cannot be written: {error}") from error
    with replacing(path) as file:
        try:
            _write(file, metadata, tensors)
        except ValueError as error:
            raise ArtifactError(f"{path}: {error}") from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a file of text in the same way."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


def _write(file: IO[bytes], metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
    """A safetensors file of version 2. Raises ValueError for a header of more than `_HEADER_BYTES`."""
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    # The widest first: so each is aligned.
    names = sorted(plain, key=lambda name: (-plain[name].element_size(), name))
    table, at = {}, 0
    for name in names:
        t = plain[name]
        offsets = [at, at := at + t.nbytes]
        table[name] = {"dtype": _NAMES[t.dtype], "shape": list(t.shape), "data_offsets": offsets}
    digests = {name: _hash(_bytes(t)) for name, t in plain.items()}
    metadata = {"checksum": _BLANK.decode(), **metadata, "digests": json.dumps(digests)}
    text = json.dumps({"__metadata__": metadata, **table}).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _HEADER_BYTES:
        raise ValueError(f"its header has {len(text):,} bytes, more than {_HEADER_BYTES:,}")
    checksum = _hash(text).encode()
    file.write(len(text).to_bytes(8, "little") + _FIRST + checksum + text[len(_FIRST) + len(checksum) :])
    for name in names:
        file.write(_bytes(plain[name]))


@contextmanager
def replacing(path: str | os.PathLike[str], *, durable: bool = True) -> Iterator[IO[bytes]]:
    """A temporary file beside `path`, open for writing, which takes its place when the block ends without an error.

    A file that is replaced keeps its mode, and its owner where that is allowed; a symbolic link stays, and what it
    leads to is replaced; other hard links keep the old contents. What killed writers have left in the folder is
    removed.

    Args:
        path: of the file; its folder is made where there is none.
        durable: whether file and folder are on the disk when the block ends, so that a power cut cannot undo it.

    Raises:
        ArtifactError: there is something at the path that is no regular file.
        OSError: of the system; the message names the path.
    """
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target.parent)
    name = target.parent / f"{_TEMPORARY}{machine()}-{os.getpid()}-{secrets.token_hex(8)}.tmp"
    try:
        before = _state(target)
        descriptor = os.open(name, _WRITE, 0o666 if before is None else stat.S_IMODE(before.st_mode))
        try:
            with open(descriptor, "wb") as file:
                yield file
                file.flush()
                if before is not None:
                    _take_over(descriptor, before)
                if durable:
                    os.fsync(descriptor)
            os.replace(name, target)
        except BaseException:
            name.unlink(missing_ok=True)
            raise
        if durable:
            _sync_folder(target.parent)
    except OSError as error:
        if error.errno is not None:
            error.filename, error.filename2 = str(path), None
        raise


_WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)


def _state(path: Path) -> os.stat_result | None:
    """Of the regular file at the path; None: there is nothing. Raises ArtifactError for anything else."""
    try:
        state = os.stat(path)
    except FileNotFoundError:
        return None
    check_regular(path, state)
    return state


def check_regular(path: str | os.PathLike[str], state: os.stat_result) -> None:
    """Raises ArtifactError for what is no regular file: a folder, a device, a pipe, a socket."""
    if not stat.S_ISREG(state.st_mode):
        kinds = {
            stat.S_IFDIR: "a folder", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFIFO: "a pipe",
            stat.S_IFSOCK: "a socket",
        }  # fmt: skip
        raise ArtifactError(f"{path}: expected a file, found {kinds.get(stat.S_IFMT(state.st_mode), 'something else')}")


def _take_over(descriptor: int, before: os.stat_result) -> None:
    """Give a new file the owner and the mode of the one that it replaces."""
    if os.name == "nt":
        return
    if (before.st_uid, before.st_gid) != (os.geteuid(), os.getegid()):
        with contextlib.suppress(PermissionError):
            os.fchown(descriptor, before.st_uid, before.st_gid)
    os.fchmod(descriptor, stat.S_IMODE(before.st_mode))


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # a folder cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that knows no such thing
            raise
    finally:
        os.close(descriptor)


@functools.cache
def machine() -> str:
    """Tells apart the places where a process id means another process: machines, their starts, containers."""
    known = [socket.gethostname()]
    with contextlib.suppress(OSError):
        known.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        known.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\n".join(known).encode()).hexdigest()[:12]


def _sweep(folder: Path) -> None:
    """Remove the temporary files of writers that are surely no more."""
    with contextlib.suppress(OSError):  # a folder that may be written but not listed
        for entry in os.scandir(folder):
            if entry.name.startswith(_TEMPORARY) and _abandoned(entry):
                with contextlib.suppress(OSError):
                    os.unlink(entry)


def _abandoned(entry: os.DirEntry[str]) -> bool:
    parts = entry.name.removeprefix(_TEMPORARY).removesuffix(".tmp").split("-")
    try:
        state = entry.stat(follow_symlinks=False)
    except OSError:
        return False
    if len(parts) != 3 or not parts[1].isdecimal() or not stat.S_ISREG(state.st_mode):
        return False
    gone = parts[0] == machine() and os.name != "nt" and not lives(int(parts[1]))
    return gone or time.time() - state.st_mtime > _STALE


def lives(pid: int) -> bool:
    """Whether there is such a process on this machine."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _at_once(name: str, flags: int) -> int:
    return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A regular file, open for reading; never waits for a pipe's writer.

    Raises:
        FileNotFoundError: there is no such file.
        ArtifactError: it is no regular file.
    """
    try:
        check_regular(path, os.stat(path))
        file = open(path, "rb", opener=_at_once)  # noqa: SIM115 (closed below)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such file") from None
    except ValueError as error:  # of the system's, such as a NUL in the path
        raise error if isinstance(error, ArtifactError) else ArtifactError(f"{path!r}: {error}") from None
    with file:
        check_regular(path, os.fstat(file.fileno()))
        yield file


def load(
    path: str | os.PathLike[str],
    kind: str,
    only: Collection[str] | None = None,
    *,
    mmap: bool = False,
    verify: bool = True,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and tensors of a file that `save` wrote.

    Args:
        path: of the file.
        kind: of artifact that it must hold: "edit", "memory", "index" or "states".
        only: names of the tensors to read; None: all.
        mmap: leave the tensors in the file, which must not change as long as they live: what is written to it shows in
            them, and reading a part that was cut off kills the process. Otherwise they are read into memory.
        verify: compare the tensors with their checksums.

    Raises:
        FileNotFoundError: there is no such file.
        ArtifactError: not a safetensors file, truncated, damaged, of another kind or version, or without a JSON header;
            or not a regular file.
    """
    with opened(path) as file:
        return read(file, path, kind, only, mmap=mmap, verify=verify)


def read(
    file: IO[bytes],
    path: str | os.PathLike[str],
    kind: str,
    only: Collection[str] | None = None,
    *,
    mmap: bool = False,
    verify: bool = True,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`load` from an open file.

    Args:
        file: opened for reading in binary mode.
        path: what messages call it.
        kind: of artifact that it must hold; see `load`.
        only: names of the tensors to read; None: all.
        mmap: leave the tensors in the file; see `load`.
        verify: compare the tensors with their checksums.

    Raises ArtifactError as `load` does.
    """
    metadata, table, start = _complete(file, path)
    found, version = metadata.get("format"), metadata.get("version")
    if found != f"unike.{kind}":
        raise ArtifactError(f"{path}: expected the format unike.{kind}, got {found!r:.80}")
    if version not in ("1", str(VERSION)):
        raise ArtifactError(f"{path}: expected version {VERSION}, got {version!r:.80}")
    try:
        header, digests = json.loads(metadata["header"]), None
        if version != "1" or "checksum" in metadata:
            if metadata["checksum"] is None:
                raise ValueError("it does not agree with its checksum")
            digests = json.loads(metadata["digests"])
        _plain(header)
    except (KeyError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: its header cannot be read: {error!r:.200}") from error
    if not isinstance(header, dict):
        raise ArtifactError(f"{path}: expected a JSON object as header, got {type(header).__name__}")
    if digests is not None and (not isinstance(digests, dict) or digests.keys() != table.keys()):
        raise ArtifactError(f"{path}: its header cannot be read: it has the checksums of other tensors")
    tensors = {}
    whole = mapping.mmap(file.fileno(), 0, access=mapping.ACCESS_COPY) if mmap and table else None
    for name in table if only is None else only:
        if name not in table:
            raise ArtifactError(f"{path}: tensor {name!r} is missing")
        dtype, shape, at = table[name]
        count = math.prod(shape)
        if whole is not None and count and not (start + at) % dtype.itemsize:
            t = torch.frombuffer(whole, dtype=dtype, count=count, offset=start + at).view(shape)
        else:
            t = _pages.empty(*shape, dtype=dtype)
            file.seek(start + at)
            if _fill(file, _bytes(t)):
                raise ArtifactError(f"{path}: not a complete safetensors file: it became shorter while it was read")
        if verify and digests is not None and digests[name] != _hash(_bytes(t)):
            raise ArtifactError(f"{path}: tensor {name!r} does not agree with its checksum")
        tensors[name] = t
    return header, tensors


def kind_of(path: str | os.PathLike[str]) -> str:
    """Which kind of artifact a file says that it holds, "" for none. Raises as `load` does."""
    with opened(path) as file:
        return str(_complete(file, path)[0].get("format", "")).removeprefix("unike.")


def _complete(file: IO[bytes], path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any], int]:
    """`_parsed`. Raises ArtifactError."""
    try:
        return _parsed(file)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not a complete safetensors file: {error}") from error


def _parsed(file: IO[bytes]) -> tuple[dict[str, Any], dict[str, tuple[torch.dtype, list[int], int]], int]:
    """Metadata, name -> dtype, shape and place of its bytes, and where these begin.

    The metadata's checksum becomes None where it is wrong. Raises ValueError, RecursionError.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    start = 8 + length
    if size < 8 or start > size:
        raise ValueError(f"it has {size:,} bytes, its header alone claims {length:,}")
    if length > _HEADER_BYTES:
        raise ValueError(f"its header claims {length:,} bytes, more than {_HEADER_BYTES:,}")
    text = file.read(length)
    fields = json.loads(text.decode("utf-8"), object_pairs_hook=_distinct)
    if len(text) < length or not isinstance(fields, dict):
        raise ValueError("its header is no JSON object")
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its metadata are not texts")
    table, end = {}, 0
    for name, told in sorted(fields.items(), key=_begin):
        dtype, shape, (first, last) = _DTYPES[told["dtype"]], told["shape"], told["data_offsets"]
        beyond = math.prod(n or 1 for n in shape) >= _MOST
        if beyond or first != end or last != first + math.prod(shape) * dtype.itemsize:
            raise ValueError(f"tensor {name!r:.80} has the wrong place or size")
        table[name], end = (dtype, shape, first), last
    if start + end != size:
        raise ValueError(f"it has {size:,} bytes, its header tells of {start + end:,}")
    rest = len(_FIRST) + len(_BLANK)
    if "checksum" in metadata and (
        not text.startswith(_FIRST) or metadata["checksum"] != _hash(text[: len(_FIRST)] + _BLANK + text[rest:])
    ):
        metadata["checksum"] = None
    return metadata, table, start


def _begin(named: tuple[str, Any]) -> tuple[int, int]:
    """Where a tensor's bytes begin and end. Raises ValueError unless it is told as safetensors tells it."""
    name, told = named
    if not isinstance(told, dict) or told.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r:.80} is not described")
    if not isinstance(told["dtype"], str) or told["dtype"] not in _DTYPES:
        raise ValueError(f"tensor {name!r:.80} has the unknown dtype {told['dtype']!r:.80}")
    for key, counts in (("shape", range(65)), ("data_offsets", (2,))):
        numbers = told[key]
        listed = isinstance(numbers, list) and len(numbers) in counts
        if not listed or not all(type(n) is int and 0 <= n < _MOST for n in numbers):
            raise ValueError(f"tensor {name!r:.80} has no valid {key}")
    first, last = told["data_offsets"]
    return first, last


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name in its header stands twice")
    return found


def _plain(value: Any, depth: int = 0) -> None:
    """Raises ValueError for JSON that is nested deeply, or holds text or numbers that are none elsewhere."""
    if depth > _DEPTH:
        raise ValueError(f"it is nested more than {_DEPTH} deep")
    if isinstance(value, str):
        value.encode("utf-8")  # a lone surrogate is no text
    elif isinstance(value, dict | list | tuple):
        for key in value if isinstance(value, dict) else ():
            _plain(key, depth + 1)
        for each in value.values() if isinstance(value, dict) else value:
            _plain(each, depth + 1)
    elif isinstance(value, int | float) and not abs(value) < 1e308:  # NaN, too; and an int that is no float
        raise ValueError(f"it holds the number {value!r:.20}")


def _fill(file: IO[bytes], room: memoryview) -> int:
    """Read bytes into the room; how many are missing."""
    while len(room):
        got: int = file.readinto(room)  # type: ignore[attr-defined]
        if not got:
            break
        room = room[got:]
    return len(room)


def _bytes(t: Tensor) -> memoryview:
    """Of a contiguous tensor on the CPU."""
    found: memoryview = t.reshape(-1).view(torch.uint8).numpy().data
    return found


def _hash(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def check_name(what: str, name: object) -> str:
    """`name` if it can stand in a line of a log: some characters, all of them printable. Else ValueError."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"{what}: expected a non-empty string, got {name!r:.80}")
    if not name.isprintable():
        raise ValueError(f"{what}: expected printable characters, got {name!a:.80}")
    return name


class Reader:
    """Takes fields out of a header and tensors out of a file; whatever is missing, wrong or left over is an error.

    Args:
        path: of the file, for messages.
        header: as `load` returns it.
        tensors: as `load` returns them.
    """

    def __init__(self, path: str | os.PathLike[str], header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.path, self._header, self._tensors = path, dict(header), dict(tensors)

    def fail(self, message: str) -> ArtifactError:
        """The error to raise, with the file's path in front of the message."""
        return ArtifactError(f"{self.path}: {message}")

    def field(self, name: str, kind: type | tuple[type, ...]) -> Any:
        """Take a field out of the header. Raises ArtifactError if it is missing or of another type."""
        if name not in self._header:
            raise self.fail(f"the header lacks {name!r}")
        value = self._header.pop(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            wanted = kind.__name__ if isinstance(kind, type) else " or ".join(k.__name__ for k in kind)
            raise self.fail(f"header field {name!r}: expected {wanted}, got {value!r:.80}")
        return value

    def tensor(self, name: str, shape: tuple[int | None, ...]) -> Tensor:
        """A finite floating tensor of this shape."""
        t = self._taken(name)
        fits = t.dim() == len(shape) and all(want in (None, have) for have, want in zip(t.shape, shape, strict=True))
        if not t.is_floating_point() or not fits:
            wanted = ["*" if n is None else n for n in shape]
            raise self.fail(f"tensor {name!r}: expected floating {wanted}, got {t.dtype} {list(t.shape)}")
        if not _check.finite(t):
            raise self.fail(f"tensor {name!r} holds NaN or infinity")
        return t

    def integers(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor of this integer dtype, of any shape."""
        t = self._taken(name)
        if t.dtype != dtype:
            raise self.fail(f"tensor {name!r}: expected {dtype}, got {t.dtype} {list(t.shape)}")
        return t

    def texts(self, name: str) -> tuple[str, ...]:
        """Texts that `spelled` made a tensor of."""
        t = self._taken(name)
        if t.dtype != torch.uint8 or t.dim() != 1:
            raise self.fail(f"tensor {name!r}: expected uint8 [*], got {t.dtype} {list(t.shape)}")
        try:
            found = json.loads(bytes(_bytes(t)).decode("utf-8"))
            _plain(found)
        except (ValueError, RecursionError) as error:
            raise self.fail(f"tensor {name!r} holds no JSON: {error!r:.200}") from error
        if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
            raise self.fail(f"tensor {name!r}: expected a JSON list of strings, got {found!r:.80}")
        return tuple(found)

    def _taken(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise self.fail(f"tensor {name!r} is missing")
        return self._tensors.pop(name)

    def has(self, name: str) -> bool:
        """Whether the file has a tensor of this name that has not been taken yet."""
        return name in self._tensors

    def says(self, name: str) -> bool:
        """Whether the header has a field of this name that has not been taken yet."""
        return name in self._header

    def layers(self, least: int = 1) -> list[int]:
        """The header's layer indices, so many at least: distinct, ascending, not negative."""
        layers = self.field("layers", list)
        if len(layers) < least or any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in layers):
            raise self.fail(f"header field 'layers': expected a list of layer indices, got {layers!r:.80}")
        if layers != sorted(set(layers)):
            raise self.fail(f"header field 'layers': expected distinct ascending indices, got {layers!r:.80}")
        return layers

    def notes(self) -> dict[str, str]:
        """The header's notes, as text."""
        return {str(k): str(v) for k, v in self.field("notes", dict).items()}

    def build(self, make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """make(*args, **kwargs).

        Raises ArtifactError, which names the file, in place of its TypeError or ValueError.
        """
        try:
            return make(*args, **kwargs)
        except (TypeError, ValueError) as error:
            raise self.fail(str(error)) from error

    def done(self) -> None:
        """Raises ArtifactError if any tensor or header field has not been taken."""
        if self._tensors:
            raise self.fail(f"unexpected tensors: {', '.join(sorted(self._tensors)[:8])}")
        if self._header:
            raise self.fail(f"unexpected header fields: {', '.join(sorted(self._header)[:8])}")


def spelled(texts: Sequence[str]) -> Tensor:
    """uint8 [bytes]: texts as JSON, of which a file's header would not hold as many. See `Reader.texts`."""
    return torch.frombuffer(bytearray(json.dumps(texts, ensure_ascii=False).encode("utf-8")), dtype=torch.uint8)


def digest(tensors: dict[str, Tensor]) -> str:
    """A hash of names, dtypes, shapes and contents: 32 hexadecimal digits."""
    h = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        h.update(f"{name}:{t.dtype}:{tuple(t.shape)};".encode())
        h.update(_bytes(t))
    return h.hexdigest()[:32]
