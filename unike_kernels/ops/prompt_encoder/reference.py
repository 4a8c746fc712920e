"""The definition of a prompt's key in operators of torch, which training differentiates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


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
    read = F.normalize(_read(TextBlock.together(encoder.blocks), text, seen), dim=-1)
    return joined(encoder, read, states)


def joined(encoder: PromptEncoder, read: Tensor, states: Tensor | None) -> Tensor:
    """The keys [B, c] of what n blocks see of the texts, [B, n, H c] of norm 1, and of the last token's states."""
    parts = [read.flatten(1)]
    if encoder.states is not None and states is not None:
        last = encoder.states
        hidden = F.gelu(F.linear(_sized(states.float() - last.means).flatten(1), last.w1, last.b1))
        parts.append(F.normalize(F.linear(hidden, last.w2, last.b2), dim=-1))
    count = read.shape[1] + len(parts) - 1
    return (parts[0] if len(parts) == 1 else torch.cat(parts, -1)) / count**0.5


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
