"""Reading and writing the library's files: safetensors with a versioned JSON header, written atomically."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ArtifactError

VERSION = 1


def save(path: str | os.PathLike[str], kind: str, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write the tensors and the header to a temporary file beside `path`, then rename it."""
    metadata = {"format": f"unike.{kind}", "version": str(VERSION), "header": json.dumps(header)}
    with replacing(path) as name:
        save_file({k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}, name, metadata)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a file of text in the same way."""
    with replacing(path) as name:
        Path(name).write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[str]:
    """The name of a temporary file beside `path`, which takes its place when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(descriptor)
    try:
        yield name
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp's 0600 would hide the file from its other readers
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def load(
    path: str | os.PathLike[str], kind: str, only: Collection[str] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and tensors of a file that `save` wrote.

    Args:
        path, kind: of the file.
        only: the tensors of these names; None: all.

    Raises:
        FileNotFoundError: there is no such file.
        ArtifactError: not a safetensors file, truncated, of another kind or version, or without a JSON header.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            found = metadata.get("format")
            if found != f"unike.{kind}":
                raise ArtifactError(f"{path}: expected the format unike.{kind}, got {found!r}")
            if metadata.get("version") != str(VERSION):
                raise ArtifactError(f"{path}: expected version {VERSION}, got {metadata.get('version')!r}")
            wanted = file.keys() if only is None else only
            tensors = {name: file.get_tensor(name) for name in wanted}
    except (RuntimeError, OSError) as error:
        if path.is_file():
            raise
        raise FileNotFoundError(f"{path}: it was removed while it was read") from error
    except SafetensorError as error:
        raise ArtifactError(f"{path}: not a complete safetensors file: {error}") from error
    try:
        header = json.loads(metadata["header"])
    except (KeyError, ValueError) as error:
        raise ArtifactError(f"{path}: its header cannot be read: {error!r}") from error
    if not isinstance(header, dict):
        raise ArtifactError(f"{path}: expected a JSON object as header, got {type(header).__name__}")
    return header, tensors


class Reader:
    """Takes fields out of a header and tensors out of a file; whatever is missing, wrong or left over is an error."""

    def __init__(self, path: str | os.PathLike[str], header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.path, self._header, self._tensors = path, dict(header), dict(tensors)

    def fail(self, message: str) -> ArtifactError:
        return ArtifactError(f"{self.path}: {message}")

    def field(self, name: str, kind: type | tuple[type, ...]) -> Any:
        if name not in self._header:
            raise self.fail(f"the header lacks {name!r}")
        value = self._header.pop(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            wanted = kind.__name__ if isinstance(kind, type) else " or ".join(k.__name__ for k in kind)
            raise self.fail(f"header field {name!r}: expected {wanted}, got {value!r:.80}")
        return value

    def tensor(self, name: str, shape: tuple[int | None, ...]) -> Tensor:
        """A finite floating tensor of this shape."""
        if name not in self._tensors:
            raise self.fail(f"tensor {name!r} is missing")
        t = self._tensors.pop(name)
        fits = t.dim() == len(shape) and all(want in (None, have) for have, want in zip(t.shape, shape, strict=True))
        if not t.is_floating_point() or not fits:
            wanted = ["*" if n is None else n for n in shape]
            raise self.fail(f"tensor {name!r}: expected floating {wanted}, got {t.dtype} {list(t.shape)}")
        if not t.isfinite().all():
            raise self.fail(f"tensor {name!r} holds NaN or infinity")
        return t

    def has(self, name: str) -> bool:
        return name in self._tensors

    def layers(self) -> list[int]:
        """The header's layer indices: distinct, ascending, not negative."""
        layers = self.field("layers", list)
        if not layers or any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in layers):
            raise self.fail(f"header field 'layers': expected a list of layer indices, got {layers!r:.80}")
        if layers != sorted(set(layers)):
            raise self.fail(f"header field 'layers': expected distinct ascending indices, got {layers!r:.80}")
        return layers

    def build(self, make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """make(...), its complaint about a value turned into an ArtifactError that names the file."""
        try:
            return make(*args, **kwargs)
        except (TypeError, ValueError) as error:
            raise self.fail(str(error)) from error

    def done(self) -> None:
        if self._tensors:
            raise self.fail(f"unexpected tensors: {', '.join(sorted(self._tensors)[:8])}")
        if self._header:
            raise self.fail(f"unexpected header fields: {', '.join(sorted(self._header)[:8])}")


def digest(tensors: dict[str, Tensor]) -> str:
    """A hash of names, dtypes, shapes and contents: 32 hexadecimal digits."""
    h = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        h.update(f"{name}:{t.dtype}:{tuple(t.shape)};".encode())
        h.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return h.hexdigest()[:32]
