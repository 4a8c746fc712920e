"""The errors of the public API. Each subclasses the built-in error that a caller would expect to catch."""

from __future__ import annotations

__all__ = [
    "ArtifactError",
    "BackendUnavailableError",
    "MismatchError",
    "PatchError",
    "UnsupportedModelError",
]


class ArtifactError(ValueError):
    """A file is not a valid edit or memory: truncated, wrong format, a header that lies, NaN in a tensor."""


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name that this operator or this machine does not have."""


class MismatchError(ValueError):
    """An edit, a memory and a model that do not belong together."""


class PatchError(RuntimeError):
    """The model is not in the state that the call needs (already patched, not patched, unknown edit id)."""


class UnsupportedModelError(TypeError):
    """The structure of the model is not one that can be patched; the message says what was looked for and found."""
