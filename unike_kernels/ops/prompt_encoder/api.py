"""Keys of prompts, by the shortest way that computes them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ... import _native
from .. import _backend, _library
from .cpu import TextReader
from .reference import PromptEncoder, Text, TextBlock, encode_prompts, joined
from .spelling import Vocabulary


class PreparedEncoder:
    """Enc_key and a vocabulary for many calls: laid out once for the native kernel, where that can be."""

    def __init__(self, encoder: PromptEncoder, vocabulary: Vocabulary) -> None:
        """
        Args:
            encoder: Enc_key.
            vocabulary: of the model.
        """
        self._made = encoder, vocabulary
        self.encoder = encoder._replace(blocks=(TextBlock.together(encoder.blocks),))
        self._native: TextReader | None = None

    def _laid_out(self) -> TextReader | None:
        encoder, vocabulary = self._made
        if self._native is None or self._native.anchor.moved():
            here = _native.available() and encoder.mean.device.type == "cpu"
            self._native = TextReader(encoder, vocabulary) if here else None
        return self._native

    def __reduce__(self) -> Any:  # a copy is laid out anew, at addresses of its own
        return type(self), self._made

    def __call__(self, ids: Tensor, embeddings: Tensor, within: Tensor, states: Tensor | None = None) -> Tensor:
        """The keys of prompts, unit vectors.

        Args:
            ids: int64 [B, T].
            embeddings: [B, T, e], of these, any float dtype.
            within: bool [B, T], which of them are of the prompts.
            states: [B, L, d], of the last token in each of the encoder's layers, if there are any.

        Returns:
            float32 [B, c]; but for rounding the same on every device, and whatever other prompts there are.
        """
        native = self._laid_out() if _library.direct(embeddings) and _backend.takes_native(embeddings) else None
        if native is None:
            text = Text(embeddings, self._made[1].spelled(ids, within), None, None, within)
            return encode_prompts(self.encoder, text, states)
        read = native.read(ids, embeddings, within).unflatten(1, (len(self._made[0].blocks), -1))
        return joined(self.encoder, read, states)
