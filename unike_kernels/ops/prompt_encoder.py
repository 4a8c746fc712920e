"""The key of a prompt, by which the memory decides where an edit acts.

Blocks that learn to tell what a prompt is about and what is asked of that read its text: learned queries attend to its
tokens, each with its embedding and with the spelling of the whole word that it is a part of. For names are cut into
other tokens at the start of a line than within a sentence, but they are spelled alike, and embeddings alone would not
tell that they are one. Where prompts have images, the last token's states tell what these show.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .cosine_topk import cosine_topk

T = TypeVar("T")

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
        self._on: dict[torch.device, _Tables] = {}

    def spelled(self, ids: Tensor, within: Tensor | None = None) -> Tensor:
        """float32 [B, T, 256]: the spelling of the word that each token is a part of, zeros for none.

        A word is spelled by the sum of random signs, others for each of its runs of 1 to 4 characters, in lower case
        and with its ends marked, scaled to norm 16. A sign is a word of its own. Nothing here waits for the device.

        Args:
            ids: int64 [B, T].
            within: bool [B, T], the tokens that there are; None: all.
        """
        tables = self._on.get(ids.device)
        if tables is None:
            tables = self._on[ids.device] = _tables(self.pieces, ids.device)
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


class _Tables(NamedTuple):
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


def _tables(pieces: Sequence[str], device: torch.device) -> _Tables:
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
    return _Tables(*(torch.from_numpy(array).to(device) for array in arrays))


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


class TextBlock(NamedTuple):
    """One reading of a prompt's tokens: H queries that attend to them.

    Or n of them, one behind the other in each tensor, which `conv` alone tells: [n h, h, 3].

    Attributes:
        token: [h, e], of the embeddings.
        word: [h, 256], of the spellings.
        bias: [h].
        conv: [h, h, 3], over neighbouring tokens.
        conv_bias: [h].
        query: [H, h].
        query_bias: [H].
        token_value: [H c, e], of the embeddings.
        word_value: [H c, 256], of the spellings.
    """

    token: Tensor
    word: Tensor
    bias: Tensor
    conv: Tensor
    conv_bias: Tensor
    query: Tensor
    query_bias: Tensor
    token_value: Tensor
    word_value: Tensor

    @classmethod
    def together(cls, blocks: Sequence[TextBlock]) -> TextBlock:
        """All of them as one."""
        return blocks[0] if len(blocks) == 1 else cls(*map(torch.cat, zip(*blocks, strict=True)))


class StateBlock(NamedTuple):
    """A reading of the last token's states.

    Attributes:
        means: [L, d], which each layer's states are centred by.
        w1: [r, L d], of the first layer.
        b1: [r].
        w2: [c, r], of the second one.
        b2: [c].
    """

    means: Tensor
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor


class PromptEncoder(NamedTuple):
    """Enc_key: from prompts to unit vectors.

    Attributes:
        mean, spread: [e], of the embeddings, which are brought to 0 and 1.
        blocks: that read the text; at least one.
        states: reads the last token's states; None: these do not count.
    """

    mean: Tensor
    spread: Tensor
    blocks: tuple[TextBlock, ...]
    states: StateBlock | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor."""
        named = {"mean": self.mean, "spread": self.spread}
        for i, block in enumerate(self.blocks):
            named |= {f"blocks.{i}.{name}": t for name, t in block._asdict().items()}
        if self.states is not None:
            named |= {f"states.{name}": t for name, t in self.states._asdict().items()}
        return named

    @classmethod
    def of(cls, tensors: dict[str, Tensor], blocks: int, states: bool) -> PromptEncoder:
        """The inverse of `tensors`. Raises KeyError for a name that is missing."""
        read = [TextBlock(*(tensors[f"blocks.{i}.{name}"] for name in TextBlock._fields)) for i in range(blocks)]
        last = StateBlock(*(tensors[f"states.{name}"] for name in StateBlock._fields)) if states else None
        return cls(tensors["mean"], tensors["spread"], tuple(read), last)

    @property
    def width(self) -> int:
        """Of a key."""
        text = sum(len(block.word_value) for block in self.blocks)
        return text + (0 if self.states is None else len(self.states.w2))


class Text(NamedTuple):
    """The text of B prompts of at most T tokens.

    Attributes:
        tokens: [U, e], embeddings, any float dtype; or [B, T, e], of each token.
        words: float32 [W, 256], spellings; or [B, T, 256].
        token: int64 [B, T], which of the embeddings each token has; None: they are in place.
        word: int64 [B, T], which of the spellings; None: they are in place.
        within: bool [B, T], the tokens that there are.
    """

    tokens: Tensor
    words: Tensor
    token: Tensor | None
    word: Tensor | None
    within: Tensor


def encode_prompts(
    encoder: PromptEncoder, text: Text, states: Tensor | None = None, attended: Tensor | None = None
) -> Tensor:
    """The keys [B, c] of prompts, unit vectors.

    Args:
        encoder: Enc_key.
        text: the prompts.
        states: [B, L, d], the last token's in each layer; needed where the encoder reads them.
        attended: bool [B, T], the tokens that queries may attend to; None: all that there are.
    """
    text = text._replace(tokens=_sized((text.tokens.float() - encoder.mean) / encoder.spread))
    seen = text.within if attended is None else text.within & attended
    parts = [_read(TextBlock.together(encoder.blocks), text, seen)]
    if encoder.states is not None and states is not None:
        last = encoder.states
        hidden = F.gelu(F.linear(_sized(states.float() - last.means).flatten(1), last.w1, last.b1))
        parts.append(F.linear(hidden, last.w2, last.b2).unsqueeze(1))
    units = [F.normalize(part, dim=-1) for part in parts]
    return torch.cat([unit.flatten(1) for unit in units], -1) / sum(unit.shape[1] for unit in units) ** 0.5


def nearest(keys: Tensor, entries: Tensor, k: int, ranges: Tensor | None = None) -> list[list[tuple[float, int]]]:
    """For each key [n, c] the k best cosines with entries [N, c], and which they are; waits for the device.

    Args:
        keys: [n, c], unit rows.
        entries: [N, c], unit rows.
        k: where there are fewer, all of them.
        ranges: int64 [n, 2], the entries of each key; None: all.
    """
    if not len(entries) or not len(keys):
        return [[] for _ in keys]
    found = cosine_topk(keys, entries, min(k, len(entries)), normalized=True, ranges=ranges)
    both = zip(*(t.tolist() for t in found), strict=True)
    return [[(s, i) for s, i in zip(scores, ids, strict=True) if i >= 0] for scores, ids in both]


def surely_about(near: Sequence[tuple[float, T]], same_fact: float, threshold: float) -> T | None:
    """What a prompt surely asks for, of these cosines with what they are of: the nearest, if it is near enough, and
    nearer than anything else by more than the threshold. None: nothing."""
    if not near:
        return None
    score, about = max(near, key=lambda pair: pair[0])
    rival = max((s for s, what in near if what != about), default=0.0)
    return about if score > same_fact and score - rival > threshold else None


def _read(block: TextBlock, text: Text, seen: Tensor) -> Tensor:
    """What the queries of each of n blocks see, [B, n, H c].

    Distinct tokens and words are projected once. What a query sees is linear in them, so that they are averaged by its
    weights first, and then multiplied.
    """
    width = block.conv.shape[1]
    n = len(block.conv) // width
    of_token = _in_place(F.linear(text.tokens, block.token, block.bias), text.token)
    of_word = _in_place(F.linear(text.words, block.word), text.word)
    h = ((of_token + of_word) * text.within.unsqueeze(-1)).unflatten(-1, (n, width)).transpose(1, 2)  # [B, n, T, h]
    around = F.pad(h, (0, 0, 1, 1)).unfold(2, 3, 1).flatten(-2)  # the neighbours of each token, [B, n, T, 3 h]
    conv, bias = block.conv.view(n, width, -1).transpose(1, 2), block.conv_bias.view(n, 1, width)
    h = F.gelu(h + F.gelu(around @ conv + bias))
    logits = h @ block.query.view(n, -1, width).transpose(1, 2) + block.query_bias.view(n, 1, -1)
    logits = logits.transpose(2, 3).flatten(1, 2).masked_fill(~seen.unsqueeze(1), float("-inf"))  # [B, n H, T]
    weights = logits.softmax(-1).nan_to_num()  # of a prompt without tokens: nothing

    def averaged(of: Tensor, which: Tensor | None, value: Tensor) -> Tensor:  # [B, n H, c]
        heads = value.unflatten(0, (len(block.query), -1))
        return torch.einsum("bhe,hce->bhc", weights @ _in_place(of, which), heads)

    found = averaged(text.tokens, text.token, block.token_value) + averaged(text.words, text.word, block.word_value)
    return found.flatten(1).unflatten(1, (n, -1))


def _in_place(distinct: Tensor, which: Tensor | None) -> Tensor:
    """[U, c] -> [B, T, c]."""
    return distinct if which is None else distinct[which]


def _sized(x: Tensor) -> Tensor:
    """Each vector [..., d] scaled to the norm sqrt(d)."""
    return F.rms_norm(x, x.shape[-1:], eps=torch.finfo(x.dtype).tiny)  # 0 stays 0
