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
_BUCKETS = 8192  # of runs of characters, each with signs of its own
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
        known = (ids >= 0) & (ids < len(tables.lengths))
        ids = torch.where(known if within is None else known & within, ids, len(tables.lengths) - 1)  # no text
        lengths = tables.lengths[ids].flatten()
        # A token goes on with the word before it if that ends, and it begins, with a letter or digit.
        before = F.pad(tables.open_ends[ids][:, :-1], (1, 0))
        joins = (tables.open_starts[ids] & before).flatten()
        word = (~joins).cumsum(0) - 1
        ends = ~F.pad(joins[1:], (0, 1))
        sizes = torch.where(lengths > 0, lengths + (~joins).long() + ends.long(), 0)
        at = sizes.cumsum(0) - sizes

        # All characters, one token's behind the other's, with room for the longest ones.
        stream = torch.zeros(2, len(lengths) * (_LONGEST + 2) + _GRAMS, dtype=torch.int64, device=ids.device)
        end = stream.shape[1] - 1

        def put(there: Tensor, places: Tensor, codes: Tensor) -> None:
            places = torch.where(there, places, end)
            for row, values in ((0, codes), (1, word.view(-1, *[1] * (places.dim() - 1)) + 1)):
                stream[row].scatter_(0, places.flatten(), values.expand(places.shape).flatten())

        column = torch.arange(_LONGEST, dtype=torch.int64, device=ids.device)
        first = at + (~joins).long()
        put(column < lengths.unsqueeze(1), first.unsqueeze(1) + column, tables.codes[ids.flatten()].long())
        put((lengths > 0) & ~joins, at, torch.full_like(at, _FIRST))
        put((lengths > 0) & ends, at + sizes - 1, torch.full_like(at, _LAST))
        stream[:, end] = 0

        # The runs that begin with each character: the bucket of each, 0 for one that leaves its word.
        codes, of = stream
        length = stream.shape[1] - _GRAMS + 1
        runs, found = torch.zeros_like(codes[:length]), []
        for n in range(_GRAMS):
            runs = runs * _PRIME + codes[n : n + length] + 1
            there = (of[:length] > 0) & (of[:length] == of[n : n + length])
            if n == 0:
                there &= codes[:length] < _FIRST
            found.append(torch.where(there, _mixed(runs + n) % _BUCKETS + 1, 0))
        buckets = torch.stack(found, 1)
        slots = torch.arange(_LONGEST + 2, dtype=torch.int64, device=ids.device)
        own = torch.where(slots < sizes.unsqueeze(1), at.unsqueeze(1) + slots, length - 1)
        sums = F.embedding_bag(buckets[own].flatten(1), _signs(ids.device), mode="sum")  # integers: exact in any order
        sums = torch.zeros_like(sums).index_add_(0, word, sums)[word] * (lengths > 0).unsqueeze(1)
        return (F.normalize(sums, dim=-1) * SPELLING**0.5).view(*ids.shape, SPELLING)


class _Tables(NamedTuple):
    """Of a vocabulary, with a token behind the others that is no text.

    Attributes:
        codes: int32 [V + 1, 24], the characters of each token in lower case.
        lengths: int64 [V + 1], how many of them.
        open_starts: bool [V + 1], whether it may go on with a word.
        open_ends: bool [V + 1], whether the word may go on behind it.
    """

    codes: Tensor
    lengths: Tensor
    open_starts: Tensor
    open_ends: Tensor


def _tables(pieces: Sequence[str], device: torch.device) -> _Tables:
    texts = [*(piece.lstrip(" ").lower()[:_LONGEST] for piece in pieces), ""]
    codes = np.array(texts, dtype=f"<U{_LONGEST}").view(np.int32).reshape(len(texts), _LONGEST)
    starts = [not piece.startswith(" ") and text[:1].isalnum() for piece, text in zip(pieces, texts, strict=False)]
    lengths = torch.tensor(list(map(len, texts)), dtype=torch.int64, device="cpu")
    ends = [text[-1:].isalnum() for text in texts]
    open_starts, open_ends = (torch.tensor(t, dtype=torch.bool, device="cpu") for t in ([*starts, False], ends))
    return _Tables(*(t.to(device) for t in (torch.from_numpy(codes), lengths, open_starts, open_ends)))


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
        blocks: that read the text.
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
        tokens: [U, e], embeddings, any float dtype.
        words: float32 [W, 256], spellings.
        token: int64 [B, T], which of the embeddings each token has.
        word: int64 [B, T], which of the spellings.
        within: bool [B, T], the tokens that there are.
    """

    tokens: Tensor
    words: Tensor
    token: Tensor
    word: Tensor
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
    tokens = _sized((text.tokens.float() - encoder.mean) / encoder.spread)
    seen = text.within if attended is None else text.within & attended
    parts = [_read(block, tokens, text, seen) for block in encoder.blocks]
    if encoder.states is not None and states is not None:
        last = encoder.states
        hidden = F.gelu(F.linear(_sized(states.float() - last.means).flatten(1), last.w1, last.b1))
        parts.append(F.normalize(F.linear(hidden, last.w2, last.b2), dim=-1))
    return torch.cat(parts, -1) / len(parts) ** 0.5


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


def _read(block: TextBlock, tokens: Tensor, text: Text, seen: Tensor) -> Tensor:
    """What a block's queries see, [B, H c], of unit length. Distinct tokens and words are projected once."""
    of_token, of_word = F.linear(tokens, block.token, block.bias), F.linear(text.words, block.word)
    h = (of_token[text.token] + of_word[text.word]) * text.within.unsqueeze(-1)
    around = F.conv1d(h.transpose(1, 2), block.conv, block.conv_bias, padding=1).transpose(1, 2)
    h = F.gelu(h + F.gelu(around))
    logits = F.linear(h, block.query, block.query_bias).masked_fill(~seen.unsqueeze(-1), float("-inf"))
    weights = logits.softmax(1).nan_to_num()  # of a prompt without tokens: nothing
    values = F.linear(tokens, block.token_value)[text.token] + F.linear(text.words, block.word_value)[text.word]
    heads = values.unflatten(-1, (len(block.query), -1))
    return F.normalize(torch.einsum("bth,bthc->bhc", weights, heads).flatten(1), dim=-1)


def _sized(x: Tensor) -> Tensor:
    """Each vector [..., d] scaled to the norm sqrt(d)."""
    return F.normalize(x, dim=-1) * x.shape[-1] ** 0.5
