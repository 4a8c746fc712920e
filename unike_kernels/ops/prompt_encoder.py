"""The key of a prompt, by which the memory decides where an edit acts.

Blocks that learn to tell what a prompt is about and what is asked of that read its text: learned queries attend to its
tokens, each with its embedding and with the spelling of the whole word that it is a part of. For names are cut into
other tokens at the start of a line than within a sentence, but they are spelled alike, and embeddings alone would not
tell that they are one. Where prompts have images, the last token's states tell what these show.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SPELLING = 256  # numbers that tell a spelling
_GRAMS = (1, 2, 3, 4)  # characters
_WORDS = 65536  # whose spelling is kept


class Vocabulary:
    """What a model's tokens spell.

    Args:
        pieces: for each token its text, with a space in front where a new word begins; "" for one that is no text.
    """

    def __init__(self, pieces: Sequence[str]) -> None:
        self.pieces = tuple(pieces)
        self._known: dict[str, Tensor] = {}

    def spelled(self, ids: Sequence[int]) -> Tensor:
        """float32 [T, 256] on the CPU: the spelling of the word that each token is a part of, zeros for none."""
        found = [self._spelling(word) for word in self.words(ids)]
        return torch.stack(found) if found else torch.zeros(0, SPELLING, dtype=torch.float32, device="cpu")

    def words(self, ids: Sequence[int]) -> list[str]:
        """The word that each token is a part of, in lower case. A sign is a word of its own."""
        found: list[str] = []
        word, length = "", 0
        for i in ids:
            piece = self.pieces[i] if i < len(self.pieces) else ""
            text = piece.lstrip(" ")
            if not (text == piece and text[:1].isalnum() and word[-1:].isalnum()):
                found += [word] * length
                word, length = "", 0
            word, length = word + text.lower(), length + 1
        return found + [word] * length

    def _spelling(self, word: str) -> Tensor:
        known = self._known.get(word)
        if known is None:
            if len(self._known) >= _WORDS:
                self._known.clear()
            known = self._known[word] = _spelling(word)
        return known


def _spelling(word: str) -> Tensor:
    """The sum of random signs [256], others for each of the word's runs of 1 to 4 characters, scaled to norm 16."""
    if not word:
        return torch.zeros(SPELLING, dtype=torch.float32, device="cpu")
    marked = f"<{word}>"
    grams = [f"{n}{marked[i : i + n]}" for n in _GRAMS for i in range(len(marked) - n + 1)]
    hashes = np.array([zlib.crc32(g.encode()) for g in grams if g not in ("1<", "1>")], dtype=np.uint64)
    bits = _mixed(hashes[:, None] * np.uint64(SPELLING // 64) + np.arange(SPELLING // 64, dtype=np.uint64))
    signs = np.unpackbits(bits.astype("<u8").view(np.uint8), axis=1).astype(np.float32) * 2 - 1
    return F.normalize(torch.from_numpy(signs.sum(0)), dim=0) * SPELLING**0.5


def _mixed(x: np.ndarray) -> np.ndarray:
    """splitmix64: 64 bits that look random, for each number."""
    x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


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
