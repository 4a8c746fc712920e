"""Leading directions of keys: where a few hold most of what distinguishes them, a search reads these first.

Hidden states of language models are of this kind, random vectors are not. Whatever the directions are, results are
exact (csrc/cpu/EXACTNESS.md); they only decide how many keys must be looked at again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import _native, _pages

TILE, BOUNDS = 64, 5  # keys that lie together, and numbers that bound what each is (csrc/include/unike/cosine_topk.h)
_STEP = 64  # numbers of directions are multiples of it
FEWEST = 8192  # keys; fewer are read at once anyway
_MOST = 256  # directions
_SAMPLE = 4096  # keys that tell the directions
_PROBES = 64  # of them, which play the queries
_K = 40  # keys that a query wants
# What a key costs whose codes are all read, for each of its bytes: the threshold of a search leaves more keys than the
# one that is meant here. And the share of a whole scan that must not be exceeded.
_SCATTERED, _WORTH = 4.0, 0.6
_ORTHONORMAL = 2.0**-19  # csrc/include/unike/cosine_topk.h


class Leading(NamedTuple):
    """What keys are in their leading directions (unike_leading)."""

    directions: Tensor  # float32 [1 + p, d]
    codes: Tensor  # uint8 [ceil(N / 64) or more, p / 4, 64, 4]
    bounds: Tensor  # float32 [ceil(N / 64) or more, 5, 64]


def leading_of(keys: Tensor | None, packed: tuple[Tensor, Tensor, Tensor] | None) -> Leading | None:
    """What a search of few queries reads first, or None where that would not pay.

    Args:
        keys: float32 [N, d], unit rows; None: there are none beside what is packed.
        packed: of these; None: nothing is.
    """
    if (
        keys is None
        or packed is None
        or packed[0].dtype != torch.uint8
        or keys.device.type != "cpu"
        or not _native.available()
    ):
        return None
    directions = leading_directions(keys, packed[2])
    return None if directions is None else pack_leading(keys, directions)


def leading_directions(keys: Tensor, direction: Tensor) -> Tensor | None:
    """Directions in which few keys can be among the best of a query, or None where reading them would not pay.

    Args:
        keys: float32 [N, d], unit rows.
        direction: float32 [d], of norm 1 or zero, which they share.

    Returns:
        float32 [1 + p, d]: `direction`, and p others at right angles to it and to each other.
    """
    n, d = keys.shape
    most = min(_MOST, d // 2 // _STEP * _STEP)
    if n < FEWEST or most == 0:
        return None
    sample = keys[:: -(-n // _SAMPLE)]
    found = _principal(sample, direction, most)
    p = _best_number(sample, found, n)
    if p is None:
        return None
    directions = _mixed(found[: 1 + p])
    wide = directions.double()
    off = wide @ wide.T
    off.diagonal().sub_(1)
    off[0, 0] = off[0, 0] if wide[0].any() else 0
    return directions if float(off.norm()) <= _ORTHONORMAL else None


def pack_leading(keys: Tensor, directions: Tensor) -> Leading:
    """What keys, float32 [N, d] on the CPU, are in directions that `leading_directions` found."""
    leading = _room(directions, -(-len(keys) // TILE))
    _fill(leading, keys, 0)
    return leading


def appended(leading: Leading, keys: Tensor, first: int) -> Leading:
    """With the keys, float32 [M, d], behind the `first` that are there; their memory is shared while it has room."""
    there, tiles = -(-first // TILE), -(-(first + len(keys)) // TILE)
    grown = leading
    if tiles > len(leading.codes):
        grown = _room(leading.directions, max(tiles, 2 * there))
        grown.codes[:there], grown.bounds[:there] = leading.codes[:there], leading.bounds[:there]
    _fill(grown, keys, first)
    return grown


def _room(directions: Tensor, tiles: int) -> Leading:
    codes = _pages.empty(tiles, (len(directions) - 1) // 4, TILE, 4, dtype=torch.uint8)
    return Leading(directions, codes, _pages.empty(tiles, BOUNDS, TILE, dtype=torch.float32))


def _fill(leading: Leading, keys: Tensor, first: int) -> None:
    """Write what the keys with the positions first, first + 1, ... are (unike_pack_leading)."""
    keys = _native.table(keys, "keys", (torch.float32,))
    n, d = keys.shape
    _native.core().pack_leading(
        keys.data_ptr(), first, n, d, keys.stride(0), len(leading.directions) - 1, *(t.data_ptr() for t in leading),
        torch.get_num_threads(),
    )  # fmt: skip


def _principal(sample: Tensor, direction: Tensor, count: int) -> Tensor:
    """float64 [1 + count, d]: `direction` and, behind it, those of most variance, by subspace iteration."""
    u = direction.double()
    rest = sample - (sample @ direction).unsqueeze(1) * direction
    generator = torch.Generator("cpu").manual_seed(0)
    basis = torch.randn(rest.shape[1], count, generator=generator, dtype=torch.float32, device="cpu")
    for _ in range(3):
        basis = torch.linalg.qr(rest.T @ (rest @ basis)).Q
    _, turn = torch.linalg.eigh((rest @ basis).double().T @ (rest @ basis).double())
    ordered = basis.double() @ turn.flip(1)
    whole = torch.linalg.qr(torch.cat([u.unsqueeze(1), ordered], 1)).Q.T
    whole[0] = u  # its sign, or zero
    return whole


def _mixed(directions: Tensor) -> Tensor:
    """float32: others of the same space, behind the first; what a key is in each is of one size, as codes want it."""
    p = len(directions) - 1
    generator = torch.Generator("cpu").manual_seed(1)
    turn = torch.linalg.qr(torch.randn(p, p, generator=generator, dtype=torch.float64, device="cpu")).Q
    return torch.cat([directions[:1], turn @ directions[1:]]).float()


def _best_number(sample: Tensor, directions: Tensor, n: int) -> int | None:
    """How many of the directions to read first, by what they leave of the sample for queries that are like it."""
    step = max(1, len(sample) // _PROBES)
    place = max(2, round(_K * len(sample) / n) + 1)  # of the last key that is wanted; a probe finds itself, too
    scores = sample[::step] @ sample.T
    wanted = scores.topk(min(place, len(sample))).values[:, -1:]
    inside = sample.double() @ directions.T
    most = len(directions) - 1
    cost = {0: _WORTH * sample.shape[1]}
    for p in range(_STEP, most + 1, _STEP):
        y = inside[:, : 1 + p]
        tail = (1 - y.square().sum(1)).clamp(min=0).sqrt()
        bounds = y[::step] @ y.T + tail[::step].unsqueeze(1) * tail
        share = float((bounds >= wanted).double().mean())
        cost[p] = p + _SCATTERED * share * sample.shape[1]
    best = min(cost, key=cost.__getitem__)
    return best or None
