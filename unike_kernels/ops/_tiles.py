"""Tile sizes of the Triton kernels: their own, or those that `unike tune` measured to be the fastest on this GPU.

The cache is a JSON file, `$UNIKE_CACHE/tiles.json` or `~/.cache/unike_kernels/tiles.json`:
GPU name -> operator -> form of the launch -> size -> number. Results are right with any of the candidates: a cache
costs or saves time only.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

Tiles = TypeVar("Tiles", bound=tuple)  # a NamedTuple of integers
Candidates = Mapping[str, Sequence[int]]  # size -> what it may be
BUCKETS = (1, 8, 64, 512)  # tokens up to which launches have the same sizes; the last one has all with more, too

_forced: dict[str, Any] = {}
_changes = 0


def path() -> Path:
    """Of the cache."""
    folder = os.environ.get("UNIKE_CACHE")
    return (Path(folder) if folder else Path.home() / ".cache" / "unike_kernels") / "tiles.json"


def form(tokens: int, dtype: torch.dtype) -> str:
    """Of launches that have the same sizes: of a bucket of tokens, and weights of this dtype."""
    most = next((most for most in BUCKETS if tokens <= most), BUCKETS[-1])
    return f"{str(dtype).removeprefix('torch.')}, up to {most}"


def read() -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    """The cache, empty where there is none. A file that is none of ours is left out with a warning."""
    file = path()
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        forms = [sizes for ops in found.values() for forms in ops.values() for sizes in forms.values()]
        well_formed = all(type(n) is int for sizes in forms for n in sizes.values())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError):
        well_formed = False
    if not well_formed:
        warnings.warn(f"{file}: not a cache of tile sizes; run `unike tune` again or delete it", stacklevel=2)
        return {}
    return dict(found)


@functools.cache
def _tuned(device: str, op: str) -> dict[str, dict[str, int]]:
    return read().get(device, {}).get(op, {})


def device_name() -> str:
    """Of the current GPU; "" where there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def tile_sizes(op: str, tokens: int, dtype: torch.dtype, default: Tiles, candidates: Candidates) -> Tiles:
    """The sizes for a launch of `op`: what `unike tune` has found for this GPU, else the defaults.

    Args:
        op: the operator.
        tokens: of the launch.
        dtype: of its weights.
        default: a named tuple of sizes.
        candidates: name -> sizes that a cache may give; others in it are ignored.
    """
    if op in _forced:
        return _forced[op]
    tuned = _tuned(device_name(), op).get(form(tokens, dtype), {})
    known = {n: v for n, v in tuned.items() if v in candidates.get(n, ())}
    return default._replace(**known) if known else default  # type: ignore[attr-defined]


@contextmanager
def forced(op: str, sizes: tuple[int, ...]) -> Iterator[None]:
    """Launches of `op` take these sizes inside the block."""
    _forced[op] = sizes
    _changed()
    try:
        yield
    finally:
        del _forced[op]
        _changed()


def forget() -> None:
    """Read the cache anew when next asked."""
    _tuned.cache_clear()
    _changed()


def changes() -> int:
    """How often sizes have changed: what was made of them before is made of others now."""
    return _changes


def _changed() -> None:
    global _changes
    _changes += 1
