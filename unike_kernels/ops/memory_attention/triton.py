"""Retrieval, latent attention, gate and blend on a GPU in one launch, for batches of decode size (paper, 3.2 and 3.3).

Work. All blocks search, as in ops/cosine_topk/triton.py; they meet; they attend to what was found, as in
ops/latent_attention/triton.py. Nothing goes from one to the other but the ids, k for each token.

Bound. The keys of the retrieval, 4 N d bytes, are all but 1 or 2% of what moves: 246 MB and 73 us of an H100 at
N = 15,000 and d = 4096. What one launch saves is the second one, about 3 us. The search keeps some 50 KB of keys in
flight with one block of eight warps a multiprocessor.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import (
    COUNTERS,
    EVERYBODYS,
    GIVEN,
    SCRATCH,
    Launch,
    Place,
    Workspace,
    given,
    last_contiguous,
    meet,
    multiprocessors,
    options,
)
from ..cosine_topk import triton as retrieval
from ..latent_attention import triton as latent
from ..latent_attention.reference import Blend, SemanticEncoder
from .reference import MemoryOperands

MOST_TOKENS = 64  # beyond, a second launch costs nothing beside the rest

search, attend = retrieval.search, latent.latent_attention_kernel


@triton.jit(
    do_not_specialize=[
        "n", "splits", "per_split", "attending",
        "tokens", "heads", "per_row", "per_anchor", "tiles_per_row", "tiles", "pass_tiles", "teams",
    ]
)  # fmt: skip
def memory_attention_kernel(
    searched, index, ranges, units, halves, estimates, maxima, thresholds, found, known, everybody, searched_stride,
    index_stride, n, splits, per_split, error, attending,
    queries, inputs, keys, values, projected, ids, w1, b1, w2, b2, given, anchor, out, alpha,
    scores, weights, know, hidden, squares, cosines, counters,
    query_stride, input_stride, key_stride, value_stride, projected_stride, anchor_stride, given_stride,
    tokens, heads, c, d, r, scale, per_row, per_anchor, tiles_per_row, tiles, pass_tiles, teams,
    TOGETHER: tl.constexpr, SLOTS: tl.constexpr, SPLITS: tl.constexpr,
    EQ7: tl.constexpr, MATCH: tl.constexpr, k: tl.constexpr, BM: tl.constexpr, SLICES: tl.constexpr,
    GROUPS: tl.constexpr, CUTS: tl.constexpr, WIDTHS: tl.constexpr, ENTRIES: tl.constexpr, GM: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, COLUMN_TILES: tl.constexpr,
):  # fmt: skip
    """See above."""
    search(
        searched, index, ranges, None, ids, units, halves, estimates, maxima, thresholds, found, known, everybody,
        tokens, n, d, searched_stride, index_stride, k, splits, per_split, error, True, TOGETHER, SLOTS, SPLITS,
    )  # fmt: skip
    meet(everybody, tl.num_programs(0), tl.program_id(0) == 0)
    if tl.program_id(0) < attending:
        attend(
            attending, queries, inputs, keys, values, projected, ids, w1, b1, w2, b2, given, anchor, out, alpha,
            scores, weights, know, hidden, squares, cosines, counters,
            query_stride, input_stride, key_stride, value_stride, projected_stride, anchor_stride, given_stride,
            heads, c, d, r, scale, per_row, per_anchor, tiles_per_row, tiles, pass_tiles, teams,
            EQ7, MATCH, k, BM, SLICES, GROUPS, CUTS, WIDTHS, ENTRIES, GM, FIRST, SECOND, COLUMN_TILES,
        )  # fmt: skip


def memory_attention(
    hidden: Tensor,
    index: Tensor,
    k: int,
    ranges: Tensor | None,
    queries: Tensor,
    inputs: Tensor,
    keys: Tensor,
    values: Tensor,
    encoder: SemanticEncoder,
    alpha: Tensor | None,
    anchor: Tensor | None,
    blend: Blend,
    packed: tuple[Tensor, Tensor, Tensor] | None = None,
    projected: Tensor | None = None,
    *,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
    workspace: Workspace | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The shifted output, alpha and the ids. Any dtypes but float64; see `reference.memory_attention`.

    In one launch for up to 64 tokens that retrieve up to 256 entries each, else in two. Ranges are not read back to be
    checked, so that nothing waits for the device: they are clipped to the index.

    Args:
        hidden: [M, d], what retrieves.
        index: [N, d], unit rows.
        k: entries a token.
        ranges: int64 [M, 2], the entries start, ..., stop - 1 that each token may retrieve; None: all.
        queries: [M, H, c].
        inputs: [M, d], what is shifted.
        keys: [N, H, c].
        values: [N, H, d].
        encoder: Enc_sem.
        alpha: [1] or [M], a given gate; None: it is computed.
        anchor: [R, d], compared with Enc_sem(h_know), R dividing M; None: the inputs are.
        blend: scale, convention and norm.
        packed: not read; the index is.
        projected: [N, H, r], the values multiplied by w1; None: the kernel multiplies.
        out: [M, d], float32 [M] and int64 [M, k], contiguous; None: new ones.
        workspace: None: that of the current stream.
    """
    m, n, d = len(inputs), *index.shape
    if out is None:
        shifted = torch.empty_like(inputs, memory_format=torch.contiguous_format)
        out = shifted, inputs.new_empty(m, dtype=torch.float32), inputs.new_empty((m, k), dtype=torch.int64)
    if m == 0:
        return out
    if not _one_launch(m, n, d, k):
        gate = encoder, alpha, anchor, blend, projected
        found = torch.empty((m, k), dtype=torch.float32, device=index.device), out[2]
        retrieval.cosine_topk(hidden, index, k, True, ranges, out=found, workspace=workspace)
        latent.latent_attention(queries, inputs, keys, values, out[2], *gate, out=out[:2], workspace=workspace)
        return out
    hidden, inputs, queries = last_contiguous(hidden), last_contiguous(inputs), latent.heads_in_rows(queries)
    ranges = None if ranges is None else ranges.contiguous()
    anchor = None if anchor is None else last_contiguous(anchor)
    o = MemoryOperands(
        hidden, index, k, ranges, queries, inputs, keys, values, encoder, alpha, anchor, blend, packed, projected
    )
    _launch(o, GIVEN)(hidden, ranges, queries, inputs, out[2], alpha, anchor, *out[:2], workspace=workspace)
    return out


def _one_launch(m: int, n: int, d: int, k: int) -> bool:
    return m <= MOST_TOKENS and retrieval.takes(n, d, k) and m <= retrieval.queries_of_launch(n)


def launch_of(o: MemoryOperands) -> Launch | None:
    """What `memory_attention` launches for such operands, M >= 1, whose rows are contiguous; None: more than one.

    It is given hidden, ranges, queries, inputs, alpha, anchor and out. What else it finds nobody is told.
    """
    n, d = o.retrieval_keys.shape
    return _launch(o, SCRATCH) if _one_launch(len(o.inputs), n, d, o.k) else None


def _launch(o: MemoryOperands, details: Place) -> Launch:
    """One launch; the ids that it finds and its alpha, behind inputs and out, are given to it, or scratch."""
    hidden, index, k, ranges, queries, inputs, keys, values, encoder, alpha, anchor, blend, _, projected = o
    m, n, d = len(inputs), *index.shape
    heads, c, r = *queries.shape[1:], encoder.w1.shape[0]
    s = retrieval.tiling(m, n, k)
    t = latent.tiling(
        queries, inputs, keys, values, projected, encoder, anchor, m, k, multiprocessors(), retrieval.WARPS
    )
    index = last_contiguous(index)
    queries, inputs, keys, values, encoder, anchor, projected = latent.operands(
        queries, inputs, keys, values, encoder, anchor, projected
    )
    found, own = retrieval.scratch_of(s, m, n, d), (2 * m * k, m) if details is SCRATCH else ()

    def typed(scratch: list[Tensor]) -> list[Tensor]:
        searching, rest = retrieval.typed(scratch[: len(found)]), scratch[len(found) :]
        if own:
            rest[0] = rest[0].view(torch.int64)  # the ids
        return [*searching, *rest]

    arguments = (
        GIVEN, index, given(ranges), *(SCRATCH for _ in found), EVERYBODYS,
        hidden.stride(0), index.stride(0), n, *s.sizes, retrieval.error_bound(d), t.blocks,
        GIVEN, GIVEN, keys, values, projected, details, *encoder, given(alpha), given(anchor), GIVEN, details,
        *(SCRATCH for _ in t.scratch), COUNTERS,
        *latent.strides(queries, inputs, keys, values, projected, anchor, alpha),
        m, heads, c, d, r, blend.scale, *t.sizes, *s.shapes, *latent.switches(blend),
        *t.shapes,
    )  # fmt: skip
    return Launch(
        memory_attention_kernel, max(s.blocks, t.blocks), arguments, (*found, *own, *t.scratch), typed,
        num_warps=retrieval.WARPS, **options(cooperative=True), enable_fp_fusion=False,
    )  # fmt: skip
