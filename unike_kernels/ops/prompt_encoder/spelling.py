"""How words are spelled, as numbers: the same for a word, whatever tokens it is cut into."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SPELLING = 256  # numbers that tell a spelling
_GRAMS = 4  # characters of the longest run
_LONGEST = 24  # characters of a token that count
_BUCKETS = 2**13  # of runs of characters, each with signs of its own
_FIRST, _LAST = 0x110000, 0x110001  # mark a word's ends; no characters


class Vocabulary:
    """What a model's tokens spell.

    Args:
        pieces: for each token its text, with a space in front where a new word begins; "" for one that is no text.
    """

    def __init__(self, pieces: Sequence[str]) -> None:
        self.pieces = tuple(pieces)
        self._on: dict[torch.device, Tables] = {}

    def tables(self, device: torch.device) -> Tables:
        """What is looked up of each token, there."""
        if device not in self._on:
            self._on[device] = _tables(self.pieces, device)
        return self._on[device]

    def spelled(self, ids: Tensor, within: Tensor | None = None) -> Tensor:
        """float32 [B, T, 256]: the spelling of the word that each token is a part of, zeros for none.

        A word is spelled by the sum of random signs, others for each of its runs of 1 to 4 characters, in lower case
        and with its ends marked, scaled to norm 16. A sign is a word of its own. Nothing here waits for the device.

        Args:
            ids: int64 [B, T].
            within: bool [B, T], the tokens that there are; None: all.
        """
        tables = self.tables(ids.device)
        ids = ids if within is None else torch.where(within, ids, -1)
        ids = ids.clamp(-1, len(tables.codes) - 1)  # what is unknown is the last token, which is no text
        lengths, open_starts, open_ends = tables.marks[ids].unbind(-1)
        # A token goes on with the word before it if that ends, and it begins, with a letter or digit.
        joins = (open_starts & F.pad(open_ends[:, :-1], (1, 0))).flatten().bool()
        lengths = lengths.flatten()
        begins, there = ~joins, lengths > 0
        word = begins.cumsum(0)
        ends = ~F.pad(joins[1:], (0, 1))
        sizes = (lengths + begins + ends) * there
        places = F.pad(sizes.cumsum(0), (1, 0))
        at = places[:-1]

        # All characters, one token's behind the other's, and the word of each, counted from 1.
        place = (at + begins).unsqueeze(1) + tables.column
        place[:, 0], place[:, -1] = at, at + sizes - 1
        exists = tables.column < lengths.unsqueeze(1)
        exists[:, 0], exists[:, -1] = begins & there, ends & there
        room = _room(places)
        stream = torch.zeros(2, room + _GRAMS, dtype=torch.int64, device=ids.device)
        place = torch.where(exists, place, room).flatten()
        values = torch.stack([tables.codes[ids.flatten()], word.unsqueeze(1).expand_as(exists)]).flatten(1)
        stream.scatter_(1, place.expand(2, -1), values)
        stream[:, room] = 0

        # The runs of 1 to 4 that begin with each character: the bucket of each, 0 for one that leaves its word. A run's
        # hash is sum_j (c_j + 1) prime^(n - 1 - j) mod 2^64.
        codes, of = stream.unfold(1, _GRAMS, 1)
        hashes = ((codes + 1) * tables.inverses).cumsum(1) * tables.powers
        within_word = (of > 0) & (of == of[:, :1])
        within_word[:, 0] &= codes[:, 0] < _FIRST
        buckets = torch.where(within_word, (_mixed(hashes + tables.sizes) & (_BUCKETS - 1)) + 1, 0).flatten()
        sums = F.embedding_bag(  # of each token: integers, exact in any order
            buckets, _signs(ids.device), places * _GRAMS, mode="sum", include_last_offset=True
        )
        sums = torch.zeros_like(sums).index_add_(0, word - 1, sums)[word - 1] * there.unsqueeze(1)
        return (F.normalize(sums, dim=-1) * SPELLING**0.5).view(*ids.shape, SPELLING)


def _room(places: Tensor) -> int:
    """How many characters there may be, of tokens that begin at these places, int64 [n + 1]: those that there are; on a
    device, which is not waited for, as many as the longest tokens would have."""
    return int(places[-1]) if places.device.type == "cpu" else (len(places) - 1) * (_LONGEST + 2)


class Tables(NamedTuple):
    """Of a vocabulary, with a token behind the others that is no text.

    Attributes:
        codes: int64 [V + 1, 26], the characters of each token in lower case, between the marks of a word's ends.
        marks: int64 [V + 1, 3], how many characters; whether it may go on with a word, and that with the next one.
        column: int64 [26], from -1: the number of the character.
        inverses, powers: int64 [4], of a prime mod 2^64, from the power 0 on.
        sizes: int64 [4], from 0.
    """

    codes: Tensor
    marks: Tensor
    column: Tensor
    inverses: Tensor
    powers: Tensor
    sizes: Tensor


def _tables(pieces: Sequence[str], device: torch.device) -> Tables:
    texts = [*(piece.lstrip(" ").lower()[:_LONGEST] for piece in pieces), ""]
    codes = np.array(texts, dtype=f"<U{_LONGEST}").view(np.int32).reshape(len(texts), _LONGEST).astype(np.int64)
    codes = np.pad(codes, ((0, 0), (1, 1)), constant_values=((0, 0), (_FIRST, _LAST)))
    powers = [pow(_PRIME, n, 2**64) for n in range(_GRAMS)]
    inverses = [pow(power, -1, 2**64) for power in powers]
    starts = [not piece.startswith(" ") and text[:1].isalnum() for piece, text in zip(pieces, texts, strict=False)]
    ends = [text[-1:].isalnum() for text in texts]
    marks = np.array([[len(text) for text in texts], [*starts, False], ends], dtype=np.int64).T
    wrapped = [np.array(numbers, dtype=np.uint64).view(np.int64) for numbers in (inverses, powers)]
    arrays = codes, np.ascontiguousarray(marks), np.arange(-1, _LONGEST + 1), *wrapped, np.arange(_GRAMS)
    return Tables(*(torch.from_numpy(array).to(device) for array in arrays))


@functools.lru_cache(maxsize=16)
def _signs(device: torch.device) -> Tensor:
    """float32 [1 + 8192, 256]: random signs for each bucket, behind zeros. The same everywhere and for ever."""
    numbers = np.arange(_BUCKETS * SPELLING // 64, dtype=np.uint64)
    bits = np.unpackbits(_splitmix64(numbers).astype("<u8").view(np.uint8)).reshape(_BUCKETS, SPELLING)
    signs = torch.from_numpy(bits.astype(np.float32) * 2 - 1)
    return F.pad(signs, (0, 0, 1, 0)).to(device)


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """64 bits that look random, for each number."""
    x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


_PRIME = 1_000_003


def _mixed(x: Tensor) -> Tensor:
    """int64 -> 31 bits that look random."""
    x = x * -0x61C8864680B583EB  # 0x9E3779B97F4A7C15
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    return (x >> 33) & 0x7FFFFFFF
