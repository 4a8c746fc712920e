"""The memory of UniKE in one operator: top-K retrieval, latent attention, gate and blend (paper, section 3.2-3.3).

`unike::memory_attention(...) -> (out, alpha, ids)`
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import _native
from .. import _backend, _check, _library
from ..cosine_topk import Leading, PackedKeys, PreparedSearch, check_retrieval, packed_of
from ..cosine_topk.cpu import Keys
from ..cosine_topk.reference import SearchOperands
from ..latent_attention import reference as latent
from ..latent_attention.api import PreparedAttention, alpha_dtype, backward_of, blend_of, check_tables, with_heads
from ..latent_attention.cpu import Gate, Memory
from ..latent_attention.reference import Blend, LatentOperands, SemanticEncoder
from . import cpu, reference
from .reference import MemoryOperands


def _apart(
    hidden: Tensor, index: Tensor, k: int, ranges: Tensor | None, queries: Tensor, inputs: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The fastest cosine_topk followed by the fastest latent_attention that there are."""
    keys, values, encoder, alpha, anchor, blend, packed, projected = rest
    _, ids = _backend.call("cosine_topk", SearchOperands(hidden.detach(), index, k, True, ranges, packed))
    operands = LatentOperands(queries, inputs, keys, values, ids, encoder, alpha, anchor, blend, projected)
    out, opened = _backend.call("latent_attention", operands)
    return out, opened, ids


def _launch_apart(o: MemoryOperands) -> Callable[..., None] | None:
    """`_apart` for such operands with both launches looked up; called as what `launch_of` of triton.py returns."""
    ids = o.inputs.new_empty((len(o.inputs), o.k), dtype=torch.int64)
    latent_operands = o.queries, o.inputs, o.keys, o.values, ids, o.encoder, o.alpha, o.anchor, o.blend, o.projected
    launch = _backend.launch_of("latent_attention", LatentOperands(*latent_operands))
    searched = SearchOperands(o.hidden, o.retrieval_keys, o.k, True, o.ranges, o.packed)
    search = _backend.launch_of("cosine_topk", searched)
    if launch is None or search is None:
        return None
    shape = len(o.inputs), o.k  # and nothing of the example

    def call(
        hidden: Tensor, ranges: Tensor | None, queries: Tensor, inputs: Tensor, alpha: Tensor | None,
        anchor: Tensor | None, out: Tensor,
    ) -> None:  # fmt: skip
        scores, opened = inputs.new_empty(shape, dtype=torch.float32), inputs.new_empty(shape[:1], dtype=torch.float32)
        ids = inputs.new_empty(shape, dtype=torch.int64)
        search(hidden, ranges, scores, ids)
        launch(queries, inputs, ids, alpha, anchor, out, opened)

    return call


def _better_apart(o: MemoryOperands) -> str | None:
    """Why not one launch, where nobody insists: a search in fewer bits can save more than the second launch costs.

    That is 3 us, or 10 MB of an H100's memory.
    """
    if _backend.forced_backend() is not None or o.retrieval_keys.numel() <= 2**21:
        return None
    search = SearchOperands(o.hidden, o.retrieval_keys, o.k, True, o.ranges, o.packed)
    return "a search in fewer bits is faster" if _backend.takes("cosine_topk", "cuda", search) else None


_backend.register("memory_attention", "reference", reference.memory_attention)
_backend.register_native("memory_attention", cpu.memory_attention)
_backend.register_triton("memory_attention", f"{__package__}.triton", refuse=_better_apart)
_backend.register("memory_attention", _backend.COMPOSED, _apart, launch_of=_launch_apart)


def _run(
    hidden: Tensor,
    index: Tensor,
    k: int,
    ranges: Tensor | None,
    codes: Tensor | None,
    key_bounds: Tensor | None,
    direction: Tensor | None,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    queries, inputs, keys, values, projected, *rest = args
    encoder, blend = SemanticEncoder(*rest[:4]), Blend(*rest[6:])
    operands = MemoryOperands(
        hidden, index, k, ranges, queries, inputs, keys, values, encoder, rest[4], rest[5], blend,
        packed_of(codes, key_bounds, direction), projected,
    )  # fmt: skip
    out, alpha, ids = _backend.call("memory_attention", operands)
    return out, alpha, ids


def _composed(
    hidden: Tensor, index: Tensor, k: int, ranges: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Found by a kernel, since ids have no derivative; `args` begins with what packs the index."""
    packed, (queries, inputs, keys, values, _, *rest) = args[:3], args[3:]
    _, ids = torch.ops.unike.cosine_topk(hidden.detach(), index.detach(), k, True, ranges, *packed)
    encoder, blend = SemanticEncoder(*rest[:4]), Blend(*rest[6:])
    out, alpha = latent.latent_attention(queries, inputs, keys, values, ids, encoder, rest[4], rest[5], blend)
    return out, alpha, ids


def _fake(
    hidden: Tensor,
    index: Tensor,
    k: int,
    ranges: Tensor | None,
    codes: Tensor | None,
    key_bounds: Tensor | None,
    direction: Tensor | None,
    queries: Tensor,
    inputs: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    m = inputs.shape[0]
    alpha = inputs.new_empty(m, dtype=alpha_dtype(inputs))
    return torch.empty_like(inputs), alpha, inputs.new_empty((m, k), dtype=torch.int64)


_RETRIEVAL = 7  # arguments of the schema before those of the latent attention


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    queries, states, keys, values, projected, *rest = inputs[_RETRIEVAL:]
    ids = output[2]
    ctx.save_for_backward(queries, states, keys, values, projected, ids, *rest[:6])
    ctx.switches = rest[6:]
    ctx.mark_non_differentiable(ids)


def _backward(ctx: Any, grad: Tensor, grad_alpha: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    to_latent = backward_of(ctx, grad, grad_alpha)
    return (*(None,) * _RETRIEVAL, *to_latent[:5], *to_latent[6:])  # ids are no argument here


_library.define(
    "memory_attention(Tensor hidden, Tensor index, int k, Tensor? ranges, Tensor? codes, Tensor? key_bounds, "
    "Tensor? direction, Tensor queries, Tensor inputs, Tensor keys, Tensor values, Tensor? projected, Tensor w1, "
    "Tensor b1, Tensor w2, Tensor b2, Tensor? alpha, Tensor? anchor, float scale, str convention, str norm) "
    "-> (Tensor, Tensor, Tensor)",
    _run,
    _fake,
    _composed,
    setup_context=_setup,
    backward=_backward,
)


def attend(o: MemoryOperands) -> tuple[Tensor, Tensor, Tensor]:
    """`memory_attention` unchecked and with heads: for callers that made the tables themselves."""
    out, gate, ids = _library.call(
        "memory_attention", o.inputs, o.hidden, o.retrieval_keys, o.k, o.ranges, *(o.packed or (None,) * 3),
        o.queries, o.inputs, o.keys, o.values, o.projected, *o.encoder, o.alpha, o.anchor, *o.blend,
    )  # fmt: skip
    return out, gate, ids


class PreparedMemory:
    """The tables of a memory for many calls: laid out once for the native kernel, where that can be.

    Attributes:
        search: of the index alone.
        attention: to entries that are known.
    """

    def __init__(
        self,
        index: Tensor,
        packed: PackedKeys | None,
        keys: Tensor,
        values: Tensor,
        projected: Tensor | None,
        encoder: SemanticEncoder,
        leading: Leading | None = None,
    ) -> None:
        """Shapes are checked by the caller.

        Args:
            index: [N, d], unit rows.
            packed: of the index.
            keys: [N, H, c].
            values: [N, H, d].
            projected: [N, H, r].
            encoder: Enc_sem.
            leading: of the index, where few tokens are to read it first.
        """
        self._tables = index, packed, keys, values, projected, encoder, leading
        self.search = PreparedSearch(index, packed, leading)
        self.attention = PreparedAttention(keys, values, projected, encoder)
        self._native = self._laid_out()
        self._launches = _backend.Launches("memory_attention", (index, keys, values, projected, *encoder))

    def _laid_out(self) -> tuple[Keys, Memory] | None:
        index, packed, keys, values, projected, encoder, leading = self._tables
        given = [t for t in (index, keys, values, projected, *encoder) if t is not None]
        native = _native.available() and index.device.type == "cpu" and not any(map(_library.wrapped, given))
        if not native or any(t.dtype == torch.float64 for t in given):
            return None
        with _library.outside():
            return Keys(index, packed, leading), Memory(keys, values, projected, encoder)

    def __reduce__(self) -> Any:  # a copy is laid out anew, at addresses of its own
        return type(self), self._tables

    def __call__(
        self,
        hidden: Tensor,
        queries: Tensor,
        inputs: Tensor,
        k: int,
        ranges: Tensor | None,
        alpha: Tensor | None,
        anchor: Tensor | None,
        blend: Blend,
        out: Tensor | None = None,
    ) -> Tensor:
        """The shifted output [M, d], by the shortest way that computes it.

        Args:
            hidden: [M, d], what retrieves.
            queries: [M, H, c].
            inputs: [M, d], what is shifted.
            k: entries a token.
            ranges: int64 [M, 2], the entries that each token may retrieve; None: all.
            alpha: [1] or [M], a given gate; None: it is computed.
            anchor: [R, d], compared with Enc_sem(h_know), R dividing M; None: the inputs are.
            blend: scale, convention and norm.
            out: [M, d] in the dtype of the inputs with contiguous rows, written and returned; may be the inputs. Not
                where gradients are asked for. None: a new one.
        """
        native = self._native
        if native is not None and (native[0].anchor.moved() or native[1].anchor.moved()):
            native = self._native = self._laid_out()
        if native is not None and _library.direct(inputs) and _backend.takes_native(hidden, queries, inputs):
            gate = Gate.of(blend, alpha, anchor)
            flat = queries.flatten(1)
            return cpu.attend(hidden, flat, inputs, k, ranges, *native, gate, out=out, details=False)[0]

        def operands() -> MemoryOperands:
            index, packed, keys, values, projected, encoder, _ = self._tables
            return MemoryOperands(
                hidden, index, k, ranges, queries, inputs, keys, values, encoder, alpha, anchor, blend, packed,
                projected,
            )  # fmt: skip

        given = hidden, ranges, queries, inputs, alpha, anchor
        form = _library.form(*given) if _library.direct(inputs) and inputs.shape[0] else None
        launch = None if form is None else self._launches.of((k, blend, form), operands)
        if launch is None:
            result = attend(operands())[0]
        else:
            result = torch.empty_like(inputs)
            launch(*given, result)
        return result if out is None else out.copy_(result)


def memory_attention(
    hidden: Tensor,
    inputs: Tensor,
    index: Tensor,
    keys: Tensor,
    values: Tensor,
    encoder: SemanticEncoder,
    *,
    k: int,
    queries: Tensor | None = None,
    ranges: Tensor | None = None,
    scale: float | None = None,
    alpha: Tensor | None = None,
    anchor: Tensor | None = None,
    convention: str = "inclusion",
    norm: str = "match",
    packed: PackedKeys | None = None,
    projected: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each token retrieves its own k entries and is shifted towards them: `cosine_topk`, then `latent_attention`.

    Args:
        hidden: [M, d], the attention module's input h_pre, which retrieves.
        inputs: [M, d], the attention module's output h_input, which is shifted.
        index: float32 [N, d], the retrieval keys h_sem as `ops.normalize_rows` gives them.
        keys: [N, d] or [N, H, c], what the queries attend to.
        values: [N, d] or [N, H, d]; with several heads their outputs are summed.
        encoder: Enc_sem.
        k: entries per token.
        queries: [M, H, c], what attends to `keys`; None: `hidden`.
        ranges: int64 [M, 2], the entries that each token may retrieve (an empty range: the token is not shifted).
        scale: of the logits; None: 1 / sqrt(c).
        alpha: [1] or [M], a given gate instead of the computed one.
        anchor: [R, d], compared with Enc_sem(h_know) instead of `inputs`; each row serves M / R tokens.
        convention: "inclusion" or "eq7"; see `Config`.
        norm: "match" or "none"; see `Config`.
        packed: `ops.pack_keys(index, ...)`, for a faster scan on the CPU.
        projected: [N, r] or [N, H, r], `project_values(values, encoder)`; see `latent_attention`.

    Returns:
        out [M, d] in the dtype of `inputs`, alpha [M], ids int64 [M, k].

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or switch.
    """
    _check.rows("hidden", hidden)
    _check.floating("index", index, (None, hidden.shape[1]))
    k = check_retrieval(hidden, "index", index, k, ranges)
    queries, keys = with_heads(hidden if queries is None else queries), with_heads(keys_given := keys)
    values = keys if values is keys_given else with_heads(values)
    projected = None if projected is None else with_heads(projected)
    check_tables(inputs, queries, keys, values, projected, encoder, alpha, anchor, convention, norm)
    _check.sized("hidden", hidden, (inputs.shape[0], None))
    _check.sized("index", index, (keys.shape[0], None))
    _check.same_device("inputs", inputs, hidden=hidden)
    if index.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"index: expected the float32 rows of normalize_rows, got {_check.shape_of(index)}")
    return attend(MemoryOperands(
        hidden, index, k, ranges, queries, inputs, keys, values, encoder, alpha, anchor,
        blend_of(queries, scale, convention, norm), packed, projected,
    ))  # fmt: skip
