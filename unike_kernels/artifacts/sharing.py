"""Folders that artifacts are shared as, on a disk or on the Hugging Face hub: files of fixed names, and a card."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import tempfile
from abc import ABC, abstractmethod
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import torch
from typing_extensions import Self

from .._version import __version__
from ..errors import ArtifactError
from . import files

CARD, PICTURE = "README.md", "request.png"
_LISTED = 8  # names of a folder that a message lists


class Shareable(ABC):
    """An artifact that can be a folder's only one, or stand in it beside others."""

    FILE: ClassVar[str]  # its name in a folder

    @abstractmethod
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write its file."""

    @abstractmethod
    def save_pretrained(self, folder: str | os.PathLike[str], *, name: str | None = None) -> None:
        """Write a folder with its file and a model card, which `from_pretrained` reads."""

    @classmethod
    @abstractmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read its file."""

    @abstractmethod
    def card(self, name: str) -> list[str]:
        """Lines of Markdown about it; `name` is that of the folder or the repository."""

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> Self:
        """Read and validate what `save_pretrained` wrote, from a folder or the Hugging Face hub.

        With HF_HUB_OFFLINE=1 nothing but folders and the hub's cache is read.

        Args:
            name: of a folder, or "owner/name" of a repository of the hub.
            revision: of the repository: a branch, a tag or a commit; None: its main branch.
            token: for a private repository; None: the one that is stored.
            cache_dir: where what is downloaded stays; None: the hub's cache.

        Raises:
            FileNotFoundError: there is neither such a folder nor, as far as can be told, such a repository.
            ArtifactError: it holds no such artifact, or one that is damaged, see `load`.
            ImportError: no folder has this name, and huggingface_hub is not installed.
        """
        if os.path.isdir(name):
            path = Path(name) / cls.FILE
            if not path.exists():
                held = sorted(os.listdir(name))[:_LISTED]
                raise ArtifactError(f"{name}: expected a folder with {cls.FILE}, found {', '.join(held) or 'nothing'}")
            return cls.load(path)
        if os.path.exists(name):
            raise ArtifactError(f"{name}: expected a folder, found a file, which {cls.__name__}.load reads")
        hub = _hub()
        try:
            path = hub.hf_hub_download(str(name), cls.FILE, revision=revision, token=token, cache_dir=cache_dir)
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"{name}: neither a folder nor a repository of the hub that holds {cls.FILE}: {error}"
            ) from error
        return cls.load(path)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        **saving: Any,
    ) -> str:
        """Upload what `save_pretrained` writes to a repository of the Hugging Face hub, which is made if need be.

        Args:
            repo_id: "owner/name".
            private: whether a new repository is; None: as its owner has set it.
            token: None: the one that is stored.
            revision: a branch that exists; None: the main one.
            commit_message: None: "Upload with unike_kernels".
            **saving: of `save_pretrained`.

        Returns:
            The address of the commit.

        Raises:
            ImportError: huggingface_hub is not installed.
            OSError: the hub cannot be reached, or refuses.
        """
        api = _hub().HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, name=repo_id, **saving)
            made = api.create_repo(repo_id, private=private, exist_ok=True)
            done = api.upload_folder(
                repo_id=made.repo_id,
                folder_path=folder,
                commit_message=commit_message or "Upload with unike_kernels",
                revision=revision,
            )
        return str(done.commit_url)


def write_folder(
    folder: str | os.PathLike[str], *artifacts: Shareable, name: str | None = None, picture: Any = None
) -> None:
    """Write the artifacts, a picture and the card that tells of them; the first one gives it its title.

    Args:
        folder: made where there is none; other files in it stay.
        *artifacts: of different classes.
        name: that the card calls the folder by; None: its own.
        picture: a PIL image; None: none.

    Raises:
        ArtifactError: there is a file in the folder's place.
        OSError: from the system.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(f"{folder}: expected a folder, found a file")
    for artifact in artifacts:
        artifact.save(folder / artifact.FILE)
    if picture is not None:
        with files.replacing(folder / PICTURE) as file:
            picture.save(file, format="PNG")
    name = name or folder.absolute().name
    shown = [f"![The picture that the request is about]({PICTURE})", ""] if picture is not None else []
    about = [line for artifact in artifacts for line in artifact.card(name)]
    files.write_text(folder / CARD, "\n".join([*_HEAD, *about[:2], *shown, *about[2:], *_versions(), ""]))


_HEAD = ["---", "library_name: unike_kernels", "tags:", "- unike", "- knowledge-editing", "---", ""]


def _versions() -> list[str]:
    versions = {"unike_kernels": __version__, "torch": torch.__version__, "Python": platform.python_version()}
    with contextlib.suppress(metadata.PackageNotFoundError):
        versions["transformers"] = metadata.version("transformers")
    return table("Written with", versions)


def table(title: str, fields: dict[str, Any]) -> list[str]:
    """Lines of a table of Markdown."""
    rows = [f"| {plain(name)} | {plain(value)} |" for name, value in fields.items()]
    return [f"| {title} | |", "|---|---|", *rows, ""]


def plain(value: Any) -> str:
    """Whatever it says, in one line, and without a meaning to Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>|#!~$&])", r"\\\1", " ".join(str(value).split()))


def verbatim(text: str) -> list[str]:
    """Lines of Markdown that show a text as it is, whatever it says."""
    return [*(f"    {line}" for line in text.splitlines()), ""]


def base_model(told: dict[str, Any]) -> dict[str, Any]:
    """What a card says of the model that a fingerprint is of."""
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]
    kind = f"{told['model_type']}, {told['layers']} layers, d = {told['hidden_size']}"
    return {"base model": kind, "fingerprint of the base model": digest}


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError("the Hugging Face hub needs huggingface_hub: pip install 'unike-kernels[hf]'") from error
    return huggingface_hub
