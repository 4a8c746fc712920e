"""Integer instructions against Python's unbounded integers."""

from __future__ import annotations

import numpy as np
import pytest
from one_instruction import assert_same, execute, samples

SIZE = 256
TYPES = {"s16": "i2", "u16": "u2", "s32": "i4", "u32": "u4", "s64": "i8", "u64": "u8"}


def wrapped(values, dtype) -> np.ndarray:
    """Python integers into a type, modulo its range."""
    width = np.dtype(dtype).itemsize
    return np.array([int(v) % 256**width for v in values], f"u{width}").view(dtype)


def by_element(function, dtype, *columns) -> np.ndarray:
    return wrapped([function(*map(int, values)) for values in zip(*columns, strict=True)], dtype)


def truncated(a: int, b: int) -> int:
    """The quotient towards zero; all ones for a division by zero."""
    if b == 0:
        return -1
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


ARITHMETIC = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "div": truncated,
    "rem": lambda a, b: a if b == 0 else a - b * truncated(a, b),
    "min": min,
    "max": max,
}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic(name, kind):
    a, b = samples(TYPES[kind], SIZE, 1), samples(TYPES[kind], SIZE, 2)
    if name in ("div", "rem") and kind[0] == "s":
        b[(a == np.iinfo(a.dtype).min) & (b == -1)] = 1  # overflows: undefined
    (got,) = execute(f"{name}.{kind} $d0, $a0, $a1;", [a, b], [a.dtype])
    assert_same(got, by_element(ARITHMETIC[name], a.dtype, a, b), a, b)


@pytest.mark.parametrize("kind", TYPES)
def test_upper_half_of_a_product(kind):
    a, b = samples(TYPES[kind], SIZE, 1), samples(TYPES[kind], SIZE, 2)
    bits = 8 * a.dtype.itemsize
    (got,) = execute(f"mul.hi.{kind} $d0, $a0, $a1;", [a, b], [a.dtype])
    assert_same(got, by_element(lambda x, y: x * y >> bits, a.dtype, a, b), a, b)


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32"])
def test_wide_product(kind):
    a, b = samples(TYPES[kind], SIZE, 1), samples(TYPES[kind], SIZE, 2)
    wide = f"{a.dtype.kind}{2 * a.dtype.itemsize}"
    c = samples(wide, SIZE, 3)
    (got,) = execute(f"mul.wide.{kind} $d0, $a0, $a1;", [a, b], [wide])
    assert_same(got, by_element(lambda x, y: x * y, wide, a, b), a, b)
    (got,) = execute(f"mad.wide.{kind} $d0, $a0, $a1, $a2;", [a, b, c], [wide])
    assert_same(got, by_element(lambda x, y, z: x * y + z, wide, a, b, c), a, b, c)


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
def test_multiply_add(kind):
    a, b, c = (samples(TYPES[kind], SIZE, seed) for seed in (1, 2, 3))
    bits = 8 * a.dtype.itemsize
    (low,) = execute(f"mad.lo.{kind} $d0, $a0, $a1, $a2;", [a, b, c], [a.dtype])
    (high,) = execute(f"mad.hi.{kind} $d0, $a0, $a1, $a2;", [a, b, c], [a.dtype])
    assert_same(low, by_element(lambda x, y, z: x * y + z, a.dtype, a, b, c), a, b, c)
    assert_same(high, by_element(lambda x, y, z: (x * y >> bits) + z, a.dtype, a, b, c), a, b, c)


@pytest.mark.parametrize("kind", ["s16", "s32", "s64"])
def test_sign(kind):
    a = samples(TYPES[kind], SIZE, 1)
    for name, function in (("neg", lambda x: -x), ("abs", abs)):
        (got,) = execute(f"{name}.{kind} $d0, $a0;", [a], [a.dtype])
        assert_same(got, by_element(function, a.dtype, a), a)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_logic(bits):
    a, b = samples(f"u{bits // 8}", SIZE, 1), samples(f"u{bits // 8}", SIZE, 2)
    for name, expected in (("and", a & b), ("or", a | b), ("xor", a ^ b)):
        assert_same(execute(f"{name}.b{bits} $d0, $a0, $a1;", [a, b], [a.dtype])[0], expected, a, b)
    assert_same(execute(f"not.b{bits} $d0, $a0;", [a], [a.dtype])[0], ~a, a)
    assert_same(execute(f"cnot.b{bits} $d0, $a0;", [a], [a.dtype])[0], (a == 0).astype(a.dtype), a)


def test_logic_on_predicates():
    p, q = np.array([0, 0, 1, 1] * 8, bool), np.array([0, 1, 0, 1] * 8, bool)
    for name, expected in (("and", p & q), ("or", p | q), ("xor", p ^ q)):
        assert_same(execute(f"{name}.pred $d0, $a0, $a1;", [p, q], [bool])[0], expected)
    assert_same(execute("not.pred $d0, $a0;", [p], [bool])[0], ~p)
    assert_same(execute("mov.pred $d0, -1;", [p], [bool])[0], np.ones(32, bool))


@pytest.mark.parametrize("table", [0x00, 0x80, 0x96, 0xCA, 0xFE, 0xFF])
def test_any_function_of_three_bits(table):
    a, b, c = (samples("u4", SIZE, seed) for seed in (1, 2, 3))
    (got,) = execute(f"lop3.b32 $d0, $a0, $a1, $a2, {table};", [a, b, c], ["u4"])
    expected = [
        sum((table >> ((x >> i & 1) << 2 | (y >> i & 1) << 1 | (z >> i & 1)) & 1) << i for i in range(32))
        for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
    ]
    assert_same(got, wrapped(expected, "u4"), a, b, c)


@pytest.mark.parametrize("kind", ["b16", "b32", "b64", "s16", "s32", "s64", "u32"])
def test_shifts(kind):
    width = int(kind[1:]) // 8
    a = samples(f"{'i' if kind[0] == 's' else 'u'}{width}", SIZE, 1)
    by = np.random.default_rng(2).integers(0, 70, SIZE).astype("u4")
    if kind[0] == "b":
        (got,) = execute(f"shl.{kind} $d0, $a0, $a1;", [a, by], [a.dtype])
        assert_same(got, by_element(lambda x, n: x << n, a.dtype, a, by), a, by)
    (got,) = execute(f"shr.{kind} $d0, $a0, $a1;", [a, by], [a.dtype])
    assert_same(got, by_element(lambda x, n: x >> n, a.dtype, a, by), a, by)


@pytest.mark.parametrize("mode", ["clamp", "wrap"])
def test_funnel_shift(mode):
    low, high = samples("u4", SIZE, 1), samples("u4", SIZE, 2)
    by = np.random.default_rng(3).integers(0, 70, SIZE).astype("u4")

    def amount(n: int) -> int:
        return min(n, 32) if mode == "clamp" else n & 31

    (left,) = execute(f"shf.l.{mode}.b32 $d0, $a0, $a1, $a2;", [low, high, by], ["u4"])
    (right,) = execute(f"shf.r.{mode}.b32 $d0, $a0, $a1, $a2;", [low, high, by], ["u4"])
    assert_same(left, by_element(lambda x, y, n: (y << 32 | x) << amount(n) >> 32, "u4", low, high, by))
    assert_same(right, by_element(lambda x, y, n: (y << 32 | x) >> amount(n), "u4", low, high, by))


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bit_fields(kind):
    bits = int(kind[1:])
    a, b = samples(TYPES[kind], SIZE, 1), samples(f"u{bits // 8}", SIZE, 2)
    rng = np.random.default_rng(3)
    position, length = (rng.integers(0, 80, SIZE).astype("u4") for _ in range(2))

    def extract(x: int, start: int, count: int) -> int:
        # The manual's own definition, bit by bit.
        x %= 1 << bits
        last = min(start + count - 1, bits - 1)
        sign = 0 if kind[0] == "u" or count == 0 else x >> last & 1
        return sum((x >> (start + i) & 1 if i < count and start + i < bits else sign) << i for i in range(bits))

    def insert(x: int, y: int, start: int, count: int) -> int:
        for i in range(count):
            if start + i < bits:
                y = y & ~(1 << start + i) | (x >> i & 1) << start + i
        return y

    (got,) = execute(f"bfe.{kind} $d0, $a0, $a1, $a2;", [a, position, length], [a.dtype])
    assert_same(got, by_element(extract, a.dtype, a, position, length), a, position, length)
    unsigned = a.view(b.dtype)
    (got,) = execute(f"bfi.b{bits} $d0, $a0, $a1, $a2, $a3;", [unsigned, b, position, length], [b.dtype])
    assert_same(got, by_element(insert, b.dtype, unsigned, b, position, length), unsigned, b, position, length)


@pytest.mark.parametrize("bits", [32, 64])
def test_counting_bits(bits):
    a = samples(f"u{bits // 8}", SIZE, 1) >> np.random.default_rng(2).integers(0, bits, SIZE).astype(f"u{bits // 8}")
    signed = a.view(f"i{bits // 8}")
    assert_same(execute(f"popc.b{bits} $d0, $a0;", [a], ["u4"])[0], by_element(lambda x: x.bit_count(), "u4", a), a)
    assert_same(
        execute(f"clz.b{bits} $d0, $a0;", [a], ["u4"])[0], by_element(lambda x: bits - x.bit_length(), "u4", a), a
    )
    reverse = by_element(lambda x: int(f"{x:0{bits}b}"[::-1], 2), a.dtype, a)
    assert_same(execute(f"brev.b{bits} $d0, $a0;", [a], [a.dtype])[0], reverse, a)
    highest = by_element(lambda x: x.bit_length() - 1, "u4", a)
    assert_same(execute(f"bfind.u{bits} $d0, $a0;", [a], ["u4"])[0], highest, a)
    amount = by_element(lambda x: bits - x.bit_length() if x else -1, "u4", a)
    assert_same(execute(f"bfind.shiftamt.u{bits} $d0, $a0;", [a], ["u4"])[0], amount, a)
    highest = by_element(lambda x: (~x if x < 0 else x).bit_length() - 1, "u4", signed)
    assert_same(execute(f"bfind.s{bits} $d0, $a0;", [signed], ["u4"])[0], highest, signed)


def test_permuted_bytes():
    a, b, selector = (samples("u4", SIZE, seed) for seed in (1, 2, 3))

    def permute(x: int, y: int, s: int) -> int:
        both, result = (y << 32 | x).to_bytes(8, "little"), 0
        for i in range(4):
            nibble = s >> 4 * i & 15
            byte = both[nibble & 7]
            result |= ((255 if byte & 128 else 0) if nibble & 8 else byte) << 8 * i
        return result

    (got,) = execute("prmt.b32 $d0, $a0, $a1, $a2;", [a, b, selector], ["u4"])
    assert_same(got, by_element(permute, "u4", a, b, selector), a, b, selector)


@pytest.mark.parametrize("kinds", ["s32.s32", "u32.u32", "s32.u32", "u32.s32"])
def test_dot_product_of_bytes(kinds):
    a, b, c = (samples("u4", SIZE, seed) for seed in (1, 2, 3))
    (got,) = execute(f"dp4a.{kinds} $d0, $a0, $a1, $a2;", [a, b, c], ["u4"])
    left, right = (
        column.view("i1" if kind == "s32" else "u1").reshape(-1, 4).astype("i8")
        for column, kind in zip((a, b), kinds.split("."), strict=True)
    )
    assert_same(got, wrapped((left * right).sum(axis=1) + c, "u4"), a, b, c)


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32", "s64", "u64"])
def test_comparisons(kind):
    a, b = samples(TYPES[kind], SIZE, 1), samples(TYPES[kind], SIZE, 2)
    b[::3] = a[::3]
    names = {"eq": a == b, "ne": a != b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}
    if kind[0] == "u":
        names |= {"lo": a < b, "ls": a <= b, "hi": a > b, "hs": a >= b}
    for name, expected in names.items():
        assert_same(execute(f"setp.{name}.{kind} $d0, $a0, $a1;", [a, b], [bool])[0], expected, a, b)
        got, opposite = execute(f"setp.{name}.{kind} $d0|$d1, $a0, $a1;", [a, b], [bool, bool])
        assert_same(got, expected) or assert_same(opposite, ~expected)
        assert_same(
            execute(f"set.{name}.u32.{kind} $d0, $a0, $a1;", [a, b], ["u4"])[0], expected * np.uint32(0xFFFFFFFF), a, b
        )


def test_combined_comparison():
    a, b = samples("i4", SIZE, 1), samples("i4", SIZE, 2)
    p = np.random.default_rng(3).random(SIZE) < 0.5
    for name, combine in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)):
        first, second = execute(f"setp.lt.{name}.s32 $d0|$d1, $a0, $a1, !$a2;", [a, b, p], [bool, bool])
        assert_same(first, combine(a < b, ~p)) or assert_same(second, combine(a >= b, ~p))


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_select_and_move(bits):
    a, b = samples(f"u{bits // 8}", SIZE, 1), samples(f"u{bits // 8}", SIZE, 2)
    p = np.random.default_rng(3).random(SIZE) < 0.5
    assert_same(execute(f"selp.b{bits} $d0, $a0, $a1, $a2;", [a, b, p], [a.dtype])[0], np.where(p, a, b))
    assert_same(
        execute(f"@$a1 mov.b{bits} $d0, $a0;\n@!$a1 mov.b{bits} $d0, 7;", [a, p], [a.dtype])[0], np.where(p, a, 7)
    )


def test_packing():
    low, high = samples("u4", SIZE, 1), samples("u4", SIZE, 2)
    both = low.astype("u8") | high.astype("u8") << np.uint64(32)
    assert_same(execute("mov.b64 $d0, {$a0, $a1};", [low, high], ["u8"])[0], both)
    first, second = execute("mov.b64 {$d0, $d1}, $a0;", [both], ["u4", "u4"])
    assert_same(first, low) or assert_same(second, high)
    assert_same(execute("mov.b64 {_, $d0}, $a0;", [both], ["u4"])[0], high)
    halves = execute("mov.b32 {$d0, $d1}, $a0;", [low], ["u2", "u2"])
    assert_same(np.stack(halves, axis=1).view("u4")[:, 0], low)


INTEGERS = {"s8": "i1", "u8": "u1", **TYPES}


@pytest.mark.parametrize("source", INTEGERS)
@pytest.mark.parametrize("target", INTEGERS)
def test_conversions_between_integers(source, target):
    a = samples(INTEGERS[source], SIZE, 1)
    dtype = np.dtype(INTEGERS[target])
    assert_same(execute(f"cvt.{target}.{source} $d0, $a0;", [a], [dtype])[0], wrapped(a, dtype), a)
    limits = np.iinfo(dtype)
    clamped = wrapped([min(max(int(v), limits.min), limits.max) for v in a], dtype)
    assert_same(execute(f"cvt.sat.{target}.{source} $d0, $a0;", [a], [dtype])[0], clamped, a)


@pytest.mark.parametrize("bits", [32, 64])
def test_carries(bits):
    """Sums, differences and products of numbers in two registers."""
    kind, dtype = f"u{bits}", f"u{bits // 8}"
    low_a, high_a, low_b, high_b = (samples(dtype, SIZE, seed) for seed in (1, 2, 3, 4))
    a, b = (
        [int(high) << bits | int(low) for low, high in zip(*parts, strict=True)]
        for parts in ((low_a, high_a), (low_b, high_b))
    )
    texts = {
        "add": f"add.cc.{kind} $d0, $a0, $a2; addc.{kind} $d1, $a1, $a3;",
        "sub": f"sub.cc.{kind} $d0, $a0, $a2; subc.{kind} $d1, $a1, $a3;",
        "mad": f"mad.lo.cc.{kind} $d0, $a0, $a2, $a1; madc.hi.{kind} $d1, $a0, $a2, $a3;",
    }
    for name, text in texts.items():
        low, high = execute(text, [low_a, high_a, low_b, high_b], [dtype, dtype])
        for i in range(SIZE):
            wide = int(low_a[i]) * int(low_b[i]) + int(high_a[i]) + (int(high_b[i]) << bits)
            expected = {"add": a[i] + b[i], "sub": a[i] - b[i], "mad": wide}[name] % (1 << 2 * bits)
            assert int(high[i]) << bits | int(low[i]) == expected, (name, i)
