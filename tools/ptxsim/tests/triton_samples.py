"""Triton kernels that together use what the interpreter must know: written as one would write them for a GPU."""

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def softmax(x, out, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    inside = offsets < columns
    values = tl.load(x + row * columns + offsets, mask=inside, other=float("-inf")).to(tl.float32)
    e = tl.exp(values - tl.max(values, 0))
    tl.store(out + row * columns + offsets, e / tl.sum(e, 0), mask=inside)


@triton.jit
def matmul(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    total = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        left = tl.load(
            a + rows[:, None] * K + (k + inner)[None, :],
            mask=(rows[:, None] < M) & ((k + inner)[None, :] < K),
            other=0.0,
        )
        right = tl.load(
            b + (k + inner)[:, None] * N + columns[None, :],
            mask=((k + inner)[:, None] < K) & (columns[None, :] < N),
            other=0.0,
        )
        total = tl.dot(left, right, total, input_precision=PRECISION)
    mask = (rows[:, None] < M) & (columns[None, :] < N)
    tl.store(c + rows[:, None] * N + columns[None, :], total.to(c.dtype.element_ty), mask=mask)


@triton.jit
def int8_matmul(a, b, c, K: tl.constexpr, N: tl.constexpr, M: tl.constexpr):
    rows = tl.arange(0, M)
    columns = tl.arange(0, N)
    inner = tl.arange(0, K)
    left = tl.load(a + rows[:, None] * K + inner[None, :])
    right = tl.load(b + columns[None, :] * K + inner[:, None])
    tl.store(c + rows[:, None] * N + columns[None, :], tl.dot(left, right, out_dtype=tl.int32))


@triton.jit
def fused_ffn(x, up, down, out, D: tl.constexpr, F: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr, BK: tl.constexpr):
    """out += gelu(x up) down, each block a slice of the hidden units; `out` starts at zero."""
    rows = tl.arange(0, BM)
    hidden = tl.program_id(0) * BF + tl.arange(0, BF)
    inner = tl.arange(0, BK)
    h = tl.zeros((BM, BF), tl.float32)
    for k in range(0, D, BK):
        left = tl.load(x + rows[:, None] * D + (k + inner)[None, :])
        right = tl.load(up + (k + inner)[:, None] * F + hidden[None, :])
        h = tl.dot(left, right, h)
    h = 0.5 * h * (1 + tl.erf(h * 0.7071067811865476))
    g = h.to(tl.bfloat16)
    for n in range(0, D, BK):
        weight = tl.load(down + hidden[:, None] * D + (n + inner)[None, :])
        tl.atomic_add(out + rows[:, None] * D + (n + inner)[None, :], tl.dot(g, weight), sem="relaxed")


@triton.jit
def histogram(x, counts, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size
    tl.atomic_add(counts + tl.load(x + offsets, mask=inside, other=0), 1, mask=inside)


@triton.jit
def scan(x, out, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + offsets, tl.cumsum(tl.load(x + offsets), 0))


@triton.jit
def sort(x, out, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + offsets, tl.sort(tl.load(x + offsets), descending=True))


@triton.jit
def topk(x, out, BLOCK: tl.constexpr, K: tl.constexpr):
    """Scores and positions packed into one 64-bit key each, so that ties go to the lower position."""
    row = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    bits = tl.load(x + row * BLOCK + offsets).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = (ordered.to(tl.int64) << 32) | (BLOCK - 1 - offsets)
    tl.store(out + row * K + tl.arange(0, K), tl.topk(keys, K))


@triton.jit
def split_k(a, b, partial, counter, c, K, SPLITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Each block multiplies a slice of K; the last one to finish adds the slices up in a fixed order."""
    split = tl.program_id(0)
    rows = tl.arange(0, BM)
    columns = tl.arange(0, BN)
    inner = split * BK + tl.arange(0, BK)
    product = tl.dot(
        tl.load(a + rows[:, None] * K + inner[None, :]), tl.load(b + inner[:, None] * BN + columns[None, :])
    )
    place = rows[:, None] * BN + columns[None, :]
    tl.store(partial + split * BM * BN + place, product)
    tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem="acq_rel") == SPLITS - 1:
        total = tl.zeros((BM, BN), tl.float32)
        for s in range(SPLITS):
            total += tl.load(partial + s * BM * BN + place, cache_modifier=".cg")
        tl.store(c + place, total)


@triton.jit
def spin_barrier(x, scratch, counter, out, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """Every block publishes a sum, waits for all others, then reads all sums."""
    block = tl.program_id(0)
    offsets = block * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + offsets)
    tl.store(scratch + block, tl.sum(values, 0))
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release")
    while tl.atomic_add(counter, 0, sem="acquire") < BLOCKS:
        pass
    total = tl.sum(tl.load(scratch + tl.arange(0, BLOCKS)), 0)
    tl.store(out + offsets, values / total)


@triton.jit
def fetched_ahead(x, out, BLOCK: tl.constexpr, AHEAD: tl.constexpr):
    at = x + tl.arange(0, BLOCK)
    if AHEAD:
        ask: tl.constexpr = "prefetch.global.L2 [$1]; mov.u32 $0, 0;"
        tl.inline_asm_elementwise(ask, "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1)
    tl.store(out + tl.arange(0, BLOCK), tl.load(at))


@triton.jit
def two_tickets(counter, x, out, STEP: tl.constexpr):
    """Two of a counter; of what they choose, the first is known before the launch."""
    first = tl.load(x + STEP * tl.atomic_add(counter, 1))
    second = tl.load(x + STEP * tl.atomic_add(counter, 1))
    tl.store(out, first + second)


@triton.jit
def functions(x, out, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    v = tl.load(x + offsets)
    total = tl.exp(v) + tl.log(v) + tl.sin(v) * tl.cos(v) + tl.sqrt(v) + tl.rsqrt(v) + tl.sigmoid(v) + tl.floor(v)
    total += libdevice.tanh(v) + libdevice.pow(v, 2.5) + libdevice.expm1(v) + libdevice.log1p(v) + tl.fdiv(v, 3.0)
    tl.store(out + offsets, total)


@triton.jit
def integers(x, out, divisor, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    v = tl.load(x + offsets)
    tl.store(out + offsets, v // divisor + v % divisor + (v >> 3) + tl.abs(v))


@triton.jit
def gathered_attention(q, table, ids, out, K: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr):
    """Over the K rows of `table` that each query names; -1 names none."""
    token = tl.program_id(0)
    k, d = tl.arange(0, PADDED), tl.arange(0, D)
    row = tl.load(ids + token * K + k, mask=k < K, other=-1)
    rows = tl.load(table + row[:, None] * D + d[None, :], mask=(row >= 0)[:, None], other=0.0).to(tl.float32)
    scores = tl.sum(rows * tl.load(q + token * D + d)[None, :].to(tl.float32), 1)
    weights = tl.exp(tl.where(row >= 0, scores - tl.max(scores, 0), float("-inf")))
    tl.store(out + token * D + d, tl.sum(weights[:, None] * rows, 0) / tl.sum(weights, 0))


@triton.jit
def locked_sum(lock, out):
    """Blocks add to one number, one at a time. Every warp loads it: the barrier keeps the store behind all loads."""
    while tl.atomic_cas(lock, 0, 1) == 1:
        pass
    total = tl.load(out) + tl.program_id(0)
    tl.debug_barrier()
    tl.store(out, total)
    tl.debug_barrier()
    tl.atomic_xchg(lock, 0)


@triton.jit
def nothing(out):
    pass


@triton.jit
def copy(x, out, per_block, BLOCK: tl.constexpr):
    """Each block its share, BLOCK numbers at a time."""
    first = tl.program_id(0) * per_block
    for at in range(first, first + per_block, BLOCK):
        offsets = at + tl.arange(0, BLOCK)
        tl.store(out + offsets, tl.load(x + offsets))


@triton.jit
def chase(following, out, steps):
    """Each load brings the address of the next one."""
    place = tl.load(following)
    for _ in range(steps):
        place = tl.load(following + place)
    tl.store(out, place)


@triton.jit
def sum_of_rows(x, out, rows, WIDTH: tl.constexpr):
    """One row after the other."""
    columns = tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    for row in range(rows):
        total += tl.load(x + row * WIDTH + columns, cache_modifier=".cg")
    tl.store(out + columns, total)


@triton.jit
def sum_at_once(x, out, rows, MOST: tl.constexpr, WIDTH: tl.constexpr):
    """All rows in one load."""
    row, columns = tl.arange(0, MOST), tl.arange(0, WIDTH)
    place = x + row[:, None] * WIDTH + columns[None, :]
    tile = tl.load(place, mask=(row < rows)[:, None], other=0.0, cache_modifier=".cg")
    tl.store(out + columns, tl.sum(tile, 0))


@triton.jit
def scattered(x, ids, out, divisor, BLOCK: tl.constexpr):
    """Places by division, by numbers that come from memory, in 32 and in 64 bits, some of them negative."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    id = tl.load(ids + at)
    place = tl.abs(id // divisor) * 8 + at % divisor + tl.minimum(id & 7, at >> 3).to(tl.int64)
    tl.store(out + at, tl.load(x + place, mask=id != 5, other=0.0), mask=at * 3 % 7 != 0)


@triton.jit
def halve(x, out):
    """As often as the data say."""
    v = tl.load(x)
    while v > 1:
        v *= 0.5
    tl.store(out, v)
