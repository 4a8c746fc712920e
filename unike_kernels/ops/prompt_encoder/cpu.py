"""Keys of prompts by the native core: its calls on torch tensors (csrc/include/unike/prompt_key.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _native
from .reference import PromptEncoder, TextBlock
from .spelling import Vocabulary


class TextReader:
    """An encoder's blocks and a vocabulary, laid out once (unike_prompt_encoder); keeps the tensors alive."""

    def __init__(self, encoder: PromptEncoder, vocabulary: Vocabulary) -> None:
        """
        Args:
            encoder: on the CPU, its blocks of one size.
            vocabulary: of the model.

        Raises RuntimeError without the compiled extension.
        """
        blocks, block = len(encoder.blocks), TextBlock.together(encoder.blocks)
        hidden, (self._seen, e) = block.conv.shape[1], block.token_value.shape
        # The core reads the neighbours of a token one behind the other. A query's bias is the same for all tokens.
        block = block._replace(conv=block.conv.transpose(1, 2))
        tables = encoder.mean, 1 / encoder.spread, *(t for name, t in block._asdict().items() if name != "query_bias")
        spelled = vocabulary.tables(torch.device("cpu"))
        self._tensors = (*(_native.aligned(t.detach().float()) for t in tables), spelled.codes, spelled.marks)
        heads = len(block.query) // blocks
        sizes = e, blocks, hidden, heads, self._seen // (blocks * heads), len(spelled.codes)
        self._native = _native.core().PromptEncoder(sizes, [t.data_ptr() for t in self._tensors])
        self.anchor = _native.Anchor(self._tensors[0])

    def read(self, ids: Tensor, embeddings: Tensor, within: Tensor) -> Tensor:
        """What the queries see of each prompt, of each block scaled to norm 1.

        Args:
            ids: int64 [B, T] on the CPU, T >= 1.
            embeddings: float32 or bfloat16 [B, T, e], of these.
            within: bool [B, T], which of them are of the prompts.

        Returns:
            float32 [B, c].
        """
        batch, tokens = ids.shape
        ids, within = _native.aligned(ids), _native.aligned(within)
        rows = _native.table(embeddings.reshape(batch * tokens, -1), "embeddings")
        out = _native.allocate(batch, self._seen)
        _native.core().prompt_keys(
            self._native, batch, tokens, ids.data_ptr(), _native.rows(rows), within.data_ptr(), out.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return out
