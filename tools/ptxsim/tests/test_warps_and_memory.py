"""Warp operations, matrix fragments, atomics and memory instructions against loops over lanes."""

from __future__ import annotations

import numpy as np
import pytest
from one_instruction import assert_same, bf16, execute, from_bf16, samples
from ptxsim import Session, load

pytestmark = pytest.mark.smoke

WARPS = 8
LANES = 32 * WARPS


def by_warp(function, *columns: np.ndarray) -> np.ndarray:
    """`function` of the lanes of each warp gives a value for each lane."""
    return np.concatenate([function(*(c[w : w + 32] for c in columns)) for w in range(0, LANES, 32)])


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("segment", [32, 16, 8, 4])
def test_shuffle(mode, segment):
    values = samples("u4", LANES, 1)
    by = np.random.default_rng(2).integers(0, 32, LANES).astype("u4")
    if mode != "idx":
        by = by_warp(lambda b: np.repeat(b[:1] % segment, 32), by)
    mask = 32 - segment
    clamp = mask << 8 | (0 if mode == "up" else 31)

    def expected(v, b):
        """The loop of the PTX manual."""
        result, valid = np.zeros(32, "u4"), np.zeros(32, bool)
        for lane in range(32):
            n, high, low = int(b[lane]), lane & mask | 31 & ~mask & clamp, lane & mask
            j, ok = {
                "up": (lane - n, lane - n >= high),
                "down": (lane + n, lane + n <= high),
                "bfly": (lane ^ n, lane ^ n <= high),
                "idx": (low | n & ~mask, (low | n & ~mask) <= high),
            }[mode]
            result[lane], valid[lane] = v[j if ok else lane], ok
        return np.rec.fromarrays([result, valid])

    both = by_warp(expected, values, by)
    got, valid = execute(f"shfl.sync.{mode}.b32 $d0|$d1, $a0, $a1, {clamp}, -1;", [values, by], ["u4", bool])
    assert_same(got, both["f0"], values, by)
    assert_same(valid, both["f1"])


def test_votes():
    p = np.random.default_rng(1).random(LANES) < 0.5
    p[:32], p[32:64] = True, False
    bits = by_warp(lambda w: np.repeat(np.uint32(sum(int(x) << i for i, x in enumerate(w))), 32), p)
    assert_same(execute("vote.sync.ballot.b32 $d0, $a0, -1;", [p], ["u4"])[0], bits)
    assert_same(execute("vote.sync.any.pred $d0, $a0, -1;", [p], [bool])[0], bits != 0)
    assert_same(execute("vote.sync.all.pred $d0, $a0, -1;", [p], [bool])[0], bits == 0xFFFFFFFF)
    assert_same(execute("vote.sync.uni.pred $d0, $a0, -1;", [p], [bool])[0], (bits == 0) | (bits == 0xFFFFFFFF))


def test_votes_of_a_part_of_the_warp():
    p = np.random.default_rng(1).random(LANES) < 0.5
    text = """
    .reg .pred low; .reg .b32 lane; mov.u32 lane, %laneid; setp.lt.u32 low, lane, 8; mov.b32 $d0, 0; mov.b32 $d1, 0;
    @!low bra past;
    vote.sync.ballot.b32 $d0, $a0, 0xff;
    activemask.b32 $d1;
    past:
    """
    ballots, active = execute(text, [p], ["u4", "u4"])
    low = np.arange(LANES) % 32 < 8
    assert_same(active, np.where(low, 0xFF, 0).astype("u4"))
    bits = by_warp(lambda w: np.repeat(np.uint32(sum(int(x) << i for i, x in enumerate(w[:8]))), 32), p)
    assert_same(ballots, np.where(low, bits, 0).astype("u4"))


def test_match():
    values = np.random.default_rng(1).integers(0, 5, LANES).astype("u4")
    values[:32] = 3
    same = by_warp(lambda w: np.array([sum(int(x == y) << i for i, x in enumerate(w)) for y in w], "u4"), values)
    assert_same(execute("match.any.sync.b32 $d0, $a0, -1;", [values], ["u4"])[0], same)
    everybody = same == 0xFFFFFFFF
    got, p = execute("match.all.sync.b32 $d0|$d1, $a0, -1;", [values], ["u4", bool])
    assert_same(got, np.where(everybody, same, 0).astype("u4")) or assert_same(p, everybody)


def test_reductions_of_a_warp():
    a = samples("i4", LANES, 1)
    for kind, column in (("s32", a), ("u32", a.view("u4"))):
        for name, function in (("add", np.add), ("min", np.minimum), ("max", np.maximum)):
            expected = by_warp(lambda w, f=function: np.repeat(f.reduce(w, dtype=w.dtype), 32), column)
            assert_same(execute(f"redux.sync.{name}.{kind} $d0, $a0, -1;", [column], [column.dtype])[0], expected)
    for name, function in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)):
        expected = by_warp(lambda w, f=function: np.repeat(f.reduce(w), 32), a.view("u4"))
        assert_same(execute(f"redux.sync.{name}.b32 $d0, $a0, -1;", [a.view("u4")], ["u4"])[0], expected)
    x = samples("f4", LANES, 2)
    for suffix, function in (("", lambda w: w[~np.isnan(w)].max()), (".NaN", np.max)):
        expected = by_warp(lambda w, f=function: np.repeat(f(w), 32), x)
        assert_same(execute(f"redux.sync.max{suffix}.f32 $d0, $a0, -1;", [x], ["f4"])[0], expected)


def test_elected_lane():
    lane, elected = execute("elect.sync $d0|$d1, -1;", [np.zeros(LANES, "u4")], ["u4", bool])
    assert_same(elected, np.arange(LANES) % 32 == 0) or assert_same(lane, np.zeros(LANES, "u4"))


def test_special_registers():
    registers = ["%tid.x", "%ntid.x", "%ctaid.x", "%nctaid.x", "%laneid", "%warpid", "%ctaid.y", "%ntid.y"]
    registers += ["%lanemask_eq", "%lanemask_lt", "%lanemask_le", "%lanemask_gt", "%lanemask_ge"]
    text = "".join(f"mov.u32 $d{i}, {name};" for i, name in enumerate(registers))
    lane, block, zero = np.arange(LANES) % 32, np.arange(LANES) // 32, np.zeros(LANES, int)
    eq = 1 << lane
    expected = [lane, zero + 32, block, zero + WARPS, lane, zero, zero, zero + 1]
    expected += [eq, eq - 1, 2 * eq - 1, 0xFFFFFFFF ^ (2 * eq - 1), 0xFFFFFFFF ^ (eq - 1)]
    for got, want in zip(execute(text, [np.zeros(LANES, "u4")], ["u4"] * len(registers)), expected, strict=True):
        assert_same(got, want.astype("u4"))


# Row and column of element i of a lane, as the manual's figures word them.
def quad(lane: int) -> tuple[int, int]:
    return lane // 4, lane % 4


def place_a(i: int, lane: int, bits: int) -> tuple[int, int]:
    group, in_group = quad(lane)
    each = 32 // bits if bits <= 32 else 1
    register, e = divmod(i, each)
    return group + 8 * (register % 2), in_group * each + e + 4 * each * (register // 2)


def place_b(i: int, lane: int, bits: int) -> tuple[int, int]:
    group, in_group = quad(lane)
    each = 32 // bits if bits <= 32 else 1
    register, e = divmod(i, each)
    return in_group * each + e + 4 * each * register, group


def place_c(i: int, lane: int) -> tuple[int, int]:
    group, in_group = quad(lane)
    return group + 8 * (i // 2), in_group * 2 + i % 2


MMA = [
    ("m16n8k8", "f16", "f32", 16),
    ("m16n8k16", "f16", "f32", 16),
    ("m16n8k16", "f16", "f16", 16),
    ("m16n8k8", "bf16", "f32", 16),
    ("m16n8k16", "bf16", "f32", 16),
    ("m16n8k4", "tf32", "f32", 32),
    ("m16n8k8", "tf32", "f32", 32),
    ("m16n8k16", "s8", "s32", 8),
    ("m16n8k32", "s8", "s32", 8),
    ("m16n8k32", "u8", "s32", 8),
    ("m16n8k32", "e4m3", "f32", 8),
    ("m16n8k32", "e5m2", "f32", 8),
    ("m8n8k4", "f64", "f64", 64),
    ("m16n8k4", "f64", "f64", 64),
    ("m16n8k8", "f64", "f64", 64),
    ("m16n8k16", "f64", "f64", 64),
]
E4M3 = np.array([0x00, 0x38, 0x40, 0x44, 0x48, 0x4A, 0x4C, 0x4E, 0x50], "u1")  # 0 to 8


def held_as(values: np.ndarray, kind: str) -> np.ndarray:
    """The numbers in the format of a multiplicand."""
    if kind == "bf16":
        return bf16(values)
    if kind == "e5m2":
        return (values.astype("f2").view("u2") >> 8).astype("u1")
    if kind == "e4m3":
        return E4M3[np.abs(values)] | ((values < 0) * 0x80).astype("u1")
    return values.astype({"f16": "f2", "tf32": "f4", "s8": "i1", "u8": "u1", "f64": "f8"}[kind])


@pytest.mark.parametrize(("shape", "kind", "sums", "bits"), MMA)
def test_matrix_product(shape, kind, sums, bits):
    m, k = 8 if shape.startswith("m8") else 16, int(shape.split("k")[1])
    rng = np.random.default_rng(0)
    total = {"f32": "f4", "f16": "f2", "s32": "i4", "f64": "f8"}[sums]
    if bits == 8:
        least, beyond = {"s8": (-128, 128), "u8": (0, 256), "e4m3": (-8, 9), "e5m2": (-4, 5)}[kind]
        a, b = (rng.integers(least, beyond, s) for s in ((m, k), (k, 8)))
    else:
        a, b = (rng.integers(-64, 64, s) / 16 for s in ((m, k), (k, 8)))  # exact in every format, and so is the sum
    c = rng.integers(-64, 64, (m, 8))
    spread = []
    for matrix, place in ((a, place_a), (b, place_b), (c, None)):
        count = matrix.size // 32
        at = [[place(i, lane, bits) if place else place_c(i, lane) for i in range(count)] for lane in range(32)]
        held = np.array([[matrix[rc] for rc in row] for row in at])
        held = held_as(held, kind) if place else held.astype(total)
        words = np.ascontiguousarray(held).view("u8" if bits == 64 else "u4")
        spread.append([np.ascontiguousarray(words[:, i]) for i in range(words.shape[1])])
    inputs = [column for part in spread for column in part]
    names, first = [], 0
    for part in spread:
        names.append("{" + ", ".join(f"$a{first + i}" for i in range(len(part))) + "}")
        first += len(part)
    results = "{" + ", ".join(f"$d{i}" for i in range(len(spread[2]))) + "}"
    text = f"mma.sync.aligned.{shape}.row.col.{sums}.{kind}.{kind}.{sums} {results}, {', '.join(names)};"
    got = np.stack(execute(text, inputs, [inputs[0].dtype] * len(spread[2])), axis=1).view(total)
    expected = (a @ b + c).astype(total)
    for lane in range(32):
        for i in range(expected.size // 32):
            assert got[lane, i] == expected[place_c(i, lane)], (lane, i)


def test_integer_product_clamps():
    ones = np.full(32, 0x7F7F7F7F, "u4")
    c = np.full(32, 2**31 - 1, "u4")
    regs = "{$d0, $d1, $d2, $d3}, {$a0, $a0, $a0, $a0}, {$a0, $a0}, {$a1, $a1, $a1, $a1};"
    for suffix, expected in ((".satfinite", 2**31 - 1), ("", (2**31 - 1 + 32 * 127**2) % 2**32)):
        got = execute(f"mma.sync.aligned.m16n8k32.row.col{suffix}.s32.s8.s8.s32 {regs}", [ones, c], ["u4"] * 4)
        assert_same(got[0], np.full(32, expected, "u4"))


@pytest.mark.parametrize("transposed", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices_in_shared_memory(count, transposed):
    """Each thread fills a row; what ldmatrix spreads, stmatrix puts back."""
    data = np.random.default_rng(0).integers(0, 2**32, (32, 4)).astype("u4")
    registers = "{" + ", ".join(f"%v{i}" for i in range(count)) + "}"
    ptx = f"""
.version 8.7
.target sm_90
.address_size 64
.visible .entry one(.param .u64 in, .param .u64 spread, .param .u64 back)
{{
.reg .b32 %v<4>; .reg .b32 %r<4>; .reg .b64 %rd<4>;
.shared .align 16 .b8 tile[1024];
ld.param.u64 %rd0, [in]; mov.u32 %r0, %tid.x; mad.wide.u32 %rd0, %r0, 16, %rd0;
mov.u32 %r1, tile; mad.lo.u32 %r1, %r0, 16, %r1;
ld.global.v4.b32 {{%v0, %v1, %v2, %v3}}, [%rd0];
st.shared.v4.b32 [%r1], {{%v0, %v1, %v2, %v3}};
bar.sync 0;
ldmatrix.sync.aligned.m8n8.x{count}{transposed}.shared.b16 {registers}, [%r1];
ld.param.u64 %rd1, [spread]; mad.wide.u32 %rd1, %r0, {4 * count}, %rd1;
{"".join(f"st.global.b32 [%rd1+{4 * i}], %v{i};" for i in range(count))}
stmatrix.sync.aligned.m8n8.x{count}{transposed}.shared.b16 [%r1+512], {registers};
bar.sync 0;
ld.param.u64 %rd2, [back]; mad.wide.u32 %rd2, %r0, 16, %rd2;
setp.lt.u32 %p0, %r0, {8 * count};
@!%p0 bra done;
ld.shared.v4.b32 {{%v0, %v1, %v2, %v3}}, [%r1+512];
st.global.v4.b32 [%rd2], {{%v0, %v1, %v2, %v3}};
done: ret;
}}
""".replace(".reg .b32 %v<4>;", ".reg .pred %p<1>; .reg .b32 %v<4>;")
    session = Session()
    spread, back = session.empty((32, count), "u4"), session.empty((32, 4), "u4")
    session.launch(load(ptx)["one"], (1,), (32,), [data, spread, back])
    assert_same(back[: 8 * count].reshape(-1), data[: 8 * count].reshape(-1))
    halves = data.view("u2").reshape(4, 8, 8)  # matrix, row, column
    for lane in range(32):
        for i in range(count):
            matrix = halves[i].T if transposed else halves[i]
            pair = matrix[lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2]
            assert spread[lane, i] == pair[0] | np.uint32(pair[1]) << 16


def test_transposed_fragment():
    data = samples("u4", 32, 1)
    (got,) = execute("movmatrix.sync.aligned.m8n8.trans.b16 $d0, $a0;", [data], ["u4"])
    assert_same(got.view("u2").reshape(8, 8).reshape(-1), data.view("u2").reshape(8, 8).T.reshape(-1))


def atomically(operation: str, kind: str, memory: np.ndarray, at: np.ndarray, *values: np.ndarray) -> np.ndarray:
    """Run an atomic on places `at` of `memory`, in place; what each lane got back."""
    width, word = memory.dtype.itemsize, f"b{8 * memory.dtype.itemsize}"
    loads = "".join(
        f"ld.param.u64 %rd1, [value{i}]; mad.wide.u32 %rd1, %r0, {width}, %rd1; ld.global.{word} %v{i}, [%rd1];\n"
        for i in range(len(values))
    )
    ptx = f"""
.version 8.7
.target sm_90
.address_size 64
.visible .entry one(.param .u64 memory, .param .u64 at, .param .u64 old, {
        ", ".join(f".param .u64 value{i}" for i in range(len(values)))
    })
{{
.reg .b32 %r<4>; .reg .b64 %rd<4>; .reg .{word} %v<3>;
mov.u32 %r0, %tid.x;
{loads}
ld.param.u64 %rd1, [at]; mad.wide.u32 %rd1, %r0, 4, %rd1; ld.global.b32 %r1, [%rd1];
ld.param.u64 %rd0, [memory]; mad.wide.u32 %rd0, %r1, {width}, %rd0;
atom.global.{operation}.{kind} %v2, [%rd0], {", ".join(f"%v{i}" for i in range(len(values)))};
ld.param.u64 %rd1, [old]; mad.wide.u32 %rd1, %r0, {width}, %rd1; st.global.{word} [%rd1], %v2;
ret;
}}
"""
    session = Session()
    old = session.empty(len(at), memory.dtype)
    session.launch(load(ptx)["one"], (1,), (len(at),), [memory, at, old, *values])
    return old


def wrap(value: int, dtype) -> np.generic:
    dtype = np.dtype(dtype)
    return np.array([value % 256**dtype.itemsize], f"u{dtype.itemsize}").view(dtype)[0]


INTEGER_ATOMICS = {
    "add": lambda old, v: old + v,
    "min": min,
    "max": max,
    "and": lambda old, v: old & v,
    "or": lambda old, v: old | v,
    "xor": lambda old, v: old ^ v,
    "exch": lambda old, v: v,
    "inc": lambda old, v: 0 if old >= v else old + 1,
    "dec": lambda old, v: v if old == 0 or old > v else old - 1,
}


ATOMIC_TYPES = {"s32": "i4", "u32": "u4", "s64": "i8", "u64": "u8"}


@pytest.mark.parametrize(
    ("operation", "kind"),
    [(name, kind) for name in INTEGER_ATOMICS for kind in ATOMIC_TYPES if name not in ("inc", "dec") or kind == "u32"],
)
def test_integer_atomics_one_lane_after_another(operation, kind):
    dtype = ATOMIC_TYPES[kind]
    logical = operation in ("and", "or", "xor", "exch")
    at = np.random.default_rng(1).integers(0, 6, 64).astype("u4")
    memory, values = samples(dtype, 6, 2), samples(dtype, 64, 3)
    expected, returned = memory.copy(), []
    for place, value in zip(at, values, strict=True):
        returned.append(expected[place])
        expected[place] = wrap(INTEGER_ATOMICS[operation](int(expected[place]), int(value)), dtype)
    old = atomically(operation, f"b{kind[1:]}" if logical else kind, memory, at, values)
    assert_same(old, np.array(returned)) or assert_same(memory, expected)


def test_reduction_without_a_result():
    ptx = """
.version 8.7
.target sm_80
.address_size 64
.visible .entry one(.param .u64 out)
{
.reg .b32 %r<4>; .reg .b64 %rd<2>;
mov.u32 %r0, %tid.x; and.b32 %r1, %r0, 3; ld.param.u64 %rd0, [out]; mad.wide.u32 %rd0, %r1, 4, %rd0;
red.relaxed.gpu.global.add.u32 [%rd0], %r0;
ret;
}
"""
    out = np.zeros(4, "u4")
    Session().launch(load(ptx)["one"], (2,), (64,), [out])
    assert_same(out, (2 * np.arange(64).reshape(16, 4).sum(axis=0)).astype("u4"))


def test_compare_and_swap():
    at = np.random.default_rng(1).integers(0, 4, 64).astype("u4")
    memory = np.zeros(4, "u4")
    compare = np.random.default_rng(2).integers(0, 3, 64).astype("u4")
    values = np.random.default_rng(3).integers(0, 3, 64).astype("u4")
    expected, returned = memory.copy(), []
    for place, c, v in zip(at, compare, values, strict=True):
        returned.append(expected[place])
        expected[place] = v if expected[place] == c else expected[place]
    old = atomically("cas", "b32", memory, at, compare, values)
    assert_same(old, np.array(returned)) or assert_same(memory, expected)


@pytest.mark.parametrize(("kind", "dtype"), [("f32", "f4"), ("f64", "f8"), ("noftz.f16", "f2"), ("noftz.f16x2", "u4")])
def test_floating_atomics(kind, dtype):
    rng = np.random.default_rng(1)
    at = rng.integers(0, 6, 64).astype("u4")
    number = "f2" if "f16" in kind else dtype
    memory, values = (rng.standard_normal(n).astype(number).repeat(2 if "x2" in kind else 1) for n in (6, 64))
    memory, values = memory.view(dtype), values.view(dtype)
    expected = memory.copy()
    for place, value in zip(at, values, strict=True):
        expected[place : place + 1] = (expected[place : place + 1].view(number) + np.array([value]).view(number)).view(
            dtype
        )
    atomically("add", kind, memory, at, values)
    assert_same(memory, expected)


def test_bf16_atomics():
    rng = np.random.default_rng(1)
    at = rng.integers(0, 6, 64).astype("u4")
    memory, values = bf16(rng.standard_normal(6)), bf16(rng.integers(-8, 8, 64))
    expected = from_bf16(memory).astype("f8")
    memory[:] = bf16(np.rint(expected))  # whole numbers: every sum is exact
    expected = np.rint(expected)
    np.add.at(expected, at, from_bf16(values))
    atomically("add", "noftz.bf16", memory, at, values)
    assert_same(from_bf16(memory), expected)


@pytest.mark.parametrize("width", [4, 8, 16])
def test_asynchronous_copy_with_zeros_behind(width):
    """cp.async reads `size` bytes and fills up with zeros."""
    data = np.random.default_rng(0).integers(1, 256, (32, width)).astype("u1")
    sizes = np.random.default_rng(1).integers(0, width + 1, 32).astype("u4")
    ptx = f"""
.version 8.7
.target sm_80
.address_size 64
.visible .entry one(.param .u64 in, .param .u64 sizes, .param .u64 out)
{{
.reg .b32 %r<8>; .reg .b64 %rd<4>;
.shared .align 16 .b8 tile[512];
mov.u32 %r0, %tid.x;
ld.param.u64 %rd1, [sizes]; mad.wide.u32 %rd1, %r0, 4, %rd1; ld.global.b32 %r2, [%rd1];
ld.param.u64 %rd0, [in]; mad.wide.u32 %rd0, %r0, {width}, %rd0;
mov.u32 %r1, tile; mad.lo.u32 %r1, %r0, {width}, %r1;
cp.async.ca.shared.global [%r1], [%rd0], {width}, %r2;
cp.async.wait_all;
ld.param.u64 %rd2, [out]; mad.wide.u32 %rd2, %r0, {width}, %rd2;
{"".join(f"ld.shared.b32 %r3, [%r1+{i}]; st.global.b32 [%rd2+{i}], %r3;" for i in range(0, width, 4))}
ret;
}}
"""
    session = Session()
    out = session.empty((32, width), "u1")
    session.launch(load(ptx)["one"], (1,), (32,), [data, sizes, out])
    expected = np.where(np.arange(width) < sizes[:, None], data, 0).astype("u1")
    assert_same(out.reshape(-1), expected.reshape(-1))


def test_generic_addresses_and_narrow_accesses():
    ptx = """
.version 8.7
.target sm_80
.address_size 64
.global .align 4 .b8 table[8] = {10, 11, 12, 13, 14, 15, 16, 0xff};
.const .align 4 .u32 words[2] = {7, 0x80000000};
.visible .entry one(.param .u64 out)
{
.reg .b16 %h<8>; .reg .b32 %r<8>; .reg .b64 %rd<8>; .reg .pred %p<4>;
.shared .align 16 .b8 tile[128];
.local .align 8 .b8 mine[16];
mov.u32 %r0, %tid.x;
mov.u64 %rd0, tile; cvta.shared.u64 %rd0, %rd0; cvt.u64.u32 %rd1, %r0; add.s64 %rd0, %rd0, %rd1;
cvt.u16.u32 %h0, %r0; st.u8 [%rd0], %h0;
isspacep.shared %p0, %rd0; isspacep.global %p1, %rd0;
cvta.to.shared.u64 %rd2, %rd0; ld.shared.s8 %r1, [%rd2];
mov.u64 %rd3, mine; cvta.local.u64 %rd4, %rd3; st.b64 [%rd4+8], %rd1; ld.local.u32 %r2, [%rd3+8];
isspacep.local %p2, %rd4;
and.b32 %r3, %r0, 7; cvt.u64.u32 %rd5, %r3; mov.u64 %rd6, table; add.s64 %rd6, %rd6, %rd5; ld.s8 %r3, [%rd6];
add.s32 %r1, %r1, %r2; mad.lo.s32 %r1, %r3, 1000, %r1;
ld.const.u32 %r4, [words]; add.s32 %r1, %r1, %r4;
@%p0 add.s32 %r1, %r1, 100000; @%p1 add.s32 %r1, %r1, 200000; @%p2 add.s32 %r1, %r1, 400000;
ld.param.u64 %rd7, [out]; mad.wide.u32 %rd7, %r0, 4, %rd7; st.global.b32 [%rd7], %r1;
ret;
}
"""
    session = Session()
    out = session.empty(64, "i4")
    session.launch(load(ptx)["one"], (1,), (64,), [out])
    lane = np.arange(64)
    table = np.array([10, 11, 12, 13, 14, 15, 16, -1])
    assert_same(out, (2 * lane + 1000 * table[lane % 8] + 7 + 500000).astype("i4"))


def test_branches_by_a_table():
    ptx = """
.version 8.7
.target sm_80
.address_size 64
.visible .entry one(.param .u64 out)
{
.reg .b32 %r<4>; .reg .b64 %rd<2>;
mov.u32 %r0, %tid.x; rem.u32 %r1, %r0, 3;
choices: .branchtargets A, B, C;
brx.idx %r1, choices;
A: mov.u32 %r2, 10; bra done;
B: mov.u32 %r2, 20; bra done;
C: mov.u32 %r2, 30;
done:
{ .reg .b32 %r0; mov.u32 %r0, 1; add.u32 %r2, %r2, %r0; }
add.u32 %r2, %r2, %r0;
ld.param.u64 %rd0, [out]; mad.wide.u32 %rd0, %r0, 4, %rd0; st.global.b32 [%rd0], %r2;
ret;
}
"""
    session = Session()
    out = session.empty(64, "u4")
    session.launch(load(ptx)["one"], (1,), (64,), [out])
    lane = np.arange(64)
    assert_same(out, (lane % 3 * 10 + 11 + lane).astype("u4"))
