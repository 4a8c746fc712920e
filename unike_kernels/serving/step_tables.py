"""`StepTables`: what CUDA graphs of an engine's steps read, in tables that stay where they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from ..artifacts.edit import Edit
from ..config import Config
from ..nn import MemoryTables
from ..nn.layer_edits import token_rows
from ..ops import EditPool
from ..ops.patched_ffn import PreparedNeurons
from .bank import EditBank

Shift = Callable[..., Tensor]  # `shift_tokens`, or `SharedMemory.shift`

_NEURONS = 10  # of an edit's layer, where none tells
_OF_NEURONS = ("keys", "key_bias", "up", "up_bias", "values")
_OF_EDITS = ("zeta", "beta")


class StepTables:
    """The two functions of a `RaggedRuntime` for a CUDA graph, which is captured once and replayed for many steps.

    A replay runs no Python. So whose tokens these are, the edits of each and the entries that it may retrieve lie in
    tensors that stay where they are, and `write` writes a step into them, on the current stream. Neurons are copied
    there when the bank has changed. Tokens behind those of the step have no edits and retrieve nothing.

    Args:
        bank: of the edits.
        memories: layer -> its memory, searched exactly: any other search may run on the host.
        config: of the memory; None: there is none.
        shift: how these shift tokens.
        tokens: of a step, at most, padding included.
        rows: runs of tokens that share their edits, at most.
        edits: that there is room for, removed ones that still take some included.
        like: an edit that those to come resemble, in dtype, neurons and gates; None: float32, 10 plain neurons a layer.
    """

    def __init__(
        self,
        bank: EditBank,
        memories: Mapping[int, MemoryTables],
        config: Config | None,
        shift: Shift,
        *,
        tokens: int,
        rows: int,
        edits: int,
        like: Edit | None = None,
    ) -> None:
        self._bank, self._memories, self._config, self._shift, self._rows = bank, memories, config, shift, rows
        self._token_rows = torch.full((tokens,), rows, dtype=torch.int64, device=bank.device)  # the last one: of nobody
        self._bounds = torch.zeros(tokens, 2, dtype=torch.int64, device=bank.device)
        self._pools = {layer: self._room(layer, edits, like) for layer in bank.layers}
        self._copied: dict[int, EditPool] = {}  # the pool whose neurons they hold
        self._prepared: dict[tuple[int, int], PreparedNeurons] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the tables."""
        pools = (t for pool in self._pools.values() for t in pool if t is not None)
        return sum(t.nbytes for t in (self._token_rows, self._bounds, *pools))

    def _room(self, layer: int, edits: int, like: Edit | None) -> EditPool:
        of = None if like is None else like.layers.get(layer)
        neurons, dtype = (_NEURONS, torch.float32) if of is None else (len(of.keys), of.keys.dtype)
        room, d = edits * neurons, self._bank.hidden_size

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self._bank.device)

        ints = partial(zeros, dtype=torch.int64)
        up, up_bias = (None, None) if of is None or of.up is None else (zeros(room, d), zeros(room))
        return EditPool(
            zeros(room, d), zeros(room), up, up_bias, zeros(room, d), zeros(edits, d), zeros(edits), ints(edits + 1),
            ints(self._rows + 2), ints(self._rows * 8),
        )  # fmt: skip

    @torch.no_grad()
    def write(self, rows: Sequence[Sequence[str]], tokens: Sequence[int], bounds: Tensor | None) -> bool:
        """Write a step.

        Args:
            rows: the edits of each run of its tokens.
            tokens: of each run.
            bounds: int64 [T, 2] or [1, 2], the entries that each token may retrieve; None: none.

        Returns:
            False: there is no room for it, and a graph would compute something else.
        """
        total = sum(tokens)
        if total > len(self._token_rows) or len(rows) > self._rows:
            return False
        if not all(self._write(layer, rows) for layer in self._pools):
            return False
        self._token_rows[total:].fill_(self._rows)
        self._token_rows[:total].copy_(token_rows(tuple(tokens), self._bank.device))
        self._bounds[total:].zero_()
        if bounds is None:
            self._bounds[:total].zero_()
        else:
            self._bounds[:total].copy_(bounds)
        return True

    def _write(self, layer: int, rows: Sequence[Sequence[str]]) -> bool:
        mine = self._pools[layer]
        if not rows or not self._bank.has_neurons(layer):
            mine.row_indptr.zero_()
            return True
        pool, copied = self._bank.pool(layer, rows), self._copied.get(layer)
        if copied is None or any(a is not b for a, b in zip(pool[:8], copied[:8], strict=True)):
            if not self._copy(layer, pool):
                return False
            self._copied[layer] = pool
        if len(pool.row_edits) > len(mine.row_edits):
            return False
        mine.row_edits[: len(pool.row_edits)].copy_(pool.row_edits)
        mine.row_indptr[: len(rows) + 1].copy_(pool.row_indptr)
        mine.row_indptr[len(rows) + 1 :].copy_(pool.row_indptr[-1:].expand(self._rows + 1 - len(rows)))
        return True

    def _copy(self, layer: int, pool: EditPool) -> bool:
        """The neurons of a pool. False: they have no room, another dtype, or gates where there is no room for these."""
        mine, (neurons, edits) = self._pools[layer], self._bank.used(layer)
        if neurons > len(mine.keys) or edits > len(mine.beta) or pool.keys.dtype != mine.keys.dtype:
            return False
        if mine.up is None and pool.up is not None:
            return False
        for names, count in ((_OF_NEURONS, neurons), (_OF_EDITS, edits)):
            for name in names:
                to, new = getattr(mine, name), getattr(pool, name)
                if to is not None and new is not None:
                    to[:count].copy_(new[:count])
                elif to is not None:  # a plain neuron among gated ones has the factor q 0 + 1
                    to.fill_(name == "up_bias")
        mine.indptr[: edits + 1].copy_(pool.indptr[: edits + 1])
        mine.indptr[edits + 1 :].copy_(pool.indptr[edits : edits + 1].expand(len(mine.beta) - edits))
        return True

    def ffn(self, layer: int, x: Tensor, out: Tensor) -> None:
        """Add the neurons of each token's edits to an FFN's output, in place.

        Args:
            layer: index in the decoder.
            x: [..., d], the FFN's input. More tokens than the tables have are left as they are: no graph has them.
            out: [..., d], contiguous, the FFN's output on `x`.
        """
        x, out = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
        if layer not in self._pools or len(x) > len(self._token_rows):
            return
        key = layer, len(x)
        if key not in self._prepared:
            pool = self._pools[layer]._replace(token_rows=self._token_rows[: len(x)])
            self._prepared[key] = PreparedNeurons(pool, self._bank.activation)
        self._prepared[key](x, out, out)

    def attention(self, layer: int, hidden: Tensor, out: Tensor) -> None:
        """Shift an attention's output towards the memory, in place.

        Args:
            layer: index in the decoder; one without memory is left as it is.
            hidden: [..., d], the attention's input; see `ffn`.
            out: [..., d], contiguous, the attention's output on `hidden`.
        """
        h, o = hidden.reshape(-1, hidden.shape[-1]), out.view(-1, out.shape[-1])
        if self._config is None or layer not in self._memories or len(h) > len(self._bounds):
            return
        self._shift(self._memories[layer], self._config, h, h.unsqueeze(1), o, self._bounds[: len(h)], out=o)
