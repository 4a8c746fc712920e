"""Floating-point instructions against exact rational arithmetic and one rounding, by the definition of the formats."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from one_instruction import EDGES, FORMATS, assert_same, bf16, exactly, execute, from_bf16, round_exactly, samples
from ptxsim import UnsupportedInstructionError

SIZE = 384
BINARY = {"add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b}
DTYPES = {"f16": "f2", "f32": "f4", "f64": "f8"}


def numbers(kind: str, seed: int, size: int = SIZE) -> np.ndarray:
    """Samples as the numbers of a format."""
    return from_bf16(bf16(samples("f4", size, seed))) if kind == "bf16" else samples(DTYPES[kind], size, seed)


def stored(kind: str, values: np.ndarray) -> np.ndarray:
    return bf16(values) if kind == "bf16" else values


def loaded(kind: str, got: np.ndarray) -> np.ndarray:
    return from_bf16(got) if kind == "bf16" else got


def run(text: str, kind: str, *columns: np.ndarray) -> np.ndarray:
    arguments = [stored(kind, column) for column in columns]
    return loaded(kind, execute(text, arguments, [arguments[0].dtype])[0])


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32", "f64"])
@pytest.mark.parametrize("name", BINARY)
def test_arithmetic(name, kind):
    a, b = numbers(kind, 1), numbers(kind, 2)
    got = run(f"{name}.rn.{kind} $d0, $a0, $a1;", kind, a, b)
    assert_same(got, exactly(BINARY[name], kind, a, b), a, b)


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
@pytest.mark.parametrize("name", BINARY)
def test_directed_rounding(name, mode):
    a, b = numbers("f32", 1), numbers("f32", 2)
    inexact = exactly(BINARY[name], "f32", a, b, mode=mode)
    got = run(f"{name}.{mode}.f32 $d0, $a0, $a1;", "f32", a, b)
    zero = inexact == 0  # the sign of an exact zero depends on the mode: compared without it
    assert_same(np.where(zero, np.abs(got), got), np.where(zero, 0.0, inexact), a, b)


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32", "f64"])
def test_fused_multiply_add_rounds_once(kind):
    a, b = numbers(kind, 1), numbers(kind, 2)
    with np.errstate(all="ignore"):  # half of the sums nearly cancel
        c = np.where(np.arange(SIZE) % 2 == 0, -(a * b), numbers(kind, 3)).astype(a.dtype)
    c = from_bf16(bf16(c)) if kind == "bf16" else c
    got = run(f"fma.rn.{kind} $d0, $a0, $a1, $a2;", kind, a, b, c)
    assert_same(got, exactly(lambda x, y, z: x * y + z, kind, a, b, c), a, b, c)


def test_fused_multiply_add_at_the_ends_of_double():
    a = np.array([2.0**-600, 2.0**1000, 1 + 2.0**-52, 2.0**-1022, -(2.0**1023), 5e-324] * 8)
    b = np.array([2.0**-470, 2.0**-60, 1 - 2.0**-53, 0.5, 2.0, 0.75] * 8)
    c = np.array([2.0**-1074, -1.0, -1.0, 2.0**-1074, np.inf, 0.0] * 8)
    got = run("fma.rn.f64 $d0, $a0, $a1, $a2;", "f64", a, b, c)
    assert_same(got, exactly(lambda x, y, z: x * y + z, "f64", a, b, c), a, b, c)


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
def test_directed_fused_multiply_add(mode):
    a, b, c = (numbers("f32", seed) for seed in (1, 2, 3))
    expected = exactly(lambda x, y, z: x * y + z, "f32", a, b, c, mode=mode)
    got = run(f"fma.{mode}.f32 $d0, $a0, $a1, $a2;", "f32", a, b, c)
    zero = expected == 0
    assert_same(np.where(zero, np.abs(got), got), np.where(zero, 0.0, expected), a, b, c)


def flushed(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < 2.0**-126, np.copysign(0.0, x), x)


def test_flushing_of_subnormal_numbers():
    a, b = numbers("f32", 1), numbers("f32", 2)
    tiny = np.float32(2.0**-126)
    a[:4], b[:4] = [tiny / 2, tiny, -tiny / 2, tiny * 1.5], [tiny, -tiny * 0.75, tiny, -tiny]
    for name, compute in BINARY.items():
        expected = flushed(exactly(compute, "f32", flushed(a), flushed(b)))
        assert_same(run(f"{name}.ftz.f32 $d0, $a0, $a1;", "f32", a, b), expected, a, b)
    got = run("fma.rn.ftz.f32 $d0, $a0, $a1, $a0;", "f32", a, b)
    assert_same(got, flushed(exactly(lambda x, y: x * y + x, "f32", flushed(a), flushed(b))), a, b)


def test_saturation():
    a, b = numbers("f32", 1), numbers("f32", 2)
    expected = exactly(BINARY["add"], "f32", a, b)
    clamped = np.where(expected > 0, np.minimum(expected, 1.0), 0.0)
    assert_same(run("add.sat.f32 $d0, $a0, $a1;", "f32", a, b), clamped, a, b)
    half = numbers("f16", 1)
    product = exactly(lambda x: x * 2, "f16", half)
    product = np.where(np.isnan(product) | (product > 0), product, 0.0)
    got = run("fma.rn.relu.f16 $d0, $a0, $a1, $a2;", "f16", half, np.full(SIZE, 2, "f2"), np.zeros(SIZE, "f2"))
    assert_same(got, product, half)


PACKED = {"f16x2": ("f16", "u4"), "bf16x2": ("bf16", "u4"), "f32x2": ("f32", "u8")}


@pytest.mark.parametrize("packed", PACKED)
def test_packed_arithmetic_is_that_of_the_elements(packed):
    kind, word = PACKED[packed]
    columns = [numbers(kind, seed) for seed in (1, 2, 3)]
    words = [stored(kind, column).view(word) for column in columns]
    for name, compute in BINARY.items():
        (got,) = execute(f"{name}.{packed} $d0, $a0, $a1;", words[:2], [word])
        got = loaded(kind, got.view(stored(kind, columns[0]).dtype))
        assert_same(got, exactly(compute, kind, *columns[:2]), *columns)
    (got,) = execute(f"fma.rn.{packed} $d0, $a0, $a1, $a2;", words, [word])
    got = loaded(kind, got.view(stored(kind, columns[0]).dtype))
    assert_same(got, exactly(lambda x, y, z: x * y + z, kind, *columns), *columns)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_mixed_precision(kind):
    """Of sm_100: operands of 16 bits, a sum in f32."""
    a, b, c = numbers(kind, 1), numbers(kind, 2), numbers("f32", 3)
    halves = [stored(kind, a), stored(kind, b)]
    (got,) = execute(f"fma.rn.f32.{kind} $d0, $a0, $a1, $a2;", [*halves, c], ["f4"])
    assert_same(got, exactly(lambda x, y, z: x * y + z, "f32", a, b, c), a, b, c)
    for name in ("add", "sub"):
        (got,) = execute(f"{name}.rn.f32.{kind} $d0, $a0, $a1;", [halves[0], c], ["f4"])
        assert_same(got, exactly(BINARY[name], "f32", a, c), a, c)


@pytest.mark.parametrize("kind", ["f16x2", "bf16x2"])
def test_packed_comparison(kind):
    element, word = PACKED[kind]
    a, b = numbers(element, 1), numbers(element, 2)
    words = [stored(element, column).view(word) for column in (a, b)]
    low, high = execute(f"setp.gt.{kind} $d0|$d1, $a0, $a1;", words, [bool, bool])
    assert_same(low, (a > b)[::2]) or assert_same(high, (a > b)[1::2])


@pytest.mark.parametrize("name", ["div.rn", "div.full", "div.approx"])
def test_division(name):
    a, b = numbers("f32", 1), numbers("f32", 2)
    with np.errstate(all="ignore"):
        plain = a / b
    exact = exactly(lambda x, y: x / y if y else math.nan, "f32", a, b)
    expected = np.where((b == 0) | ~np.isfinite(a) | ~np.isfinite(b), plain, exact)
    assert_same(run(f"{name}.f32 $d0, $a0, $a1;", "f32", a, b), expected, a, b)


FUNCTIONS = {
    "rcp.approx": lambda x: math.copysign(math.inf, x) if x == 0 else 1 / x,
    "rcp.rn": lambda x: math.copysign(math.inf, x) if x == 0 else 1 / x,
    "sqrt.rn": lambda x: x if x == 0 else math.sqrt(x) if x > 0 else math.nan,
    "sqrt.approx": lambda x: x if x == 0 else math.sqrt(x) if x > 0 else math.nan,
    "rsqrt.approx": lambda x: math.copysign(math.inf, x) if x == 0 else x**-0.5 if x > 0 else math.nan,
    "sin.approx": lambda x: math.sin(x) if math.isfinite(x) else math.nan,
    "cos.approx": lambda x: math.cos(x) if math.isfinite(x) else math.nan,
    "lg2.approx": lambda x: -math.inf if x == 0 else math.log2(x) if x > 0 else math.nan,
    "ex2.approx": lambda x: 2**x if x < 1100 else math.inf,
    "tanh.approx": math.tanh,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_the_true_ones_rounded(name):
    a = numbers("f32", 1)
    a = np.where(np.abs(a) < 1e5, a, np.copysign(np.where(np.isfinite(a), 7, a), a)).astype("f4")
    got = run(f"{name}.f32 $d0, $a0;", "f32", a)
    with np.errstate(all="ignore"):
        expected = np.array([x if math.isnan(x) else FUNCTIONS[name](float(x)) for x in a]).astype("f4")
        near = np.isclose(got, expected, rtol=2.0**-23, atol=2.0**-149, equal_nan=True)  # the last digit of libm
    assert near.all(), (a[~near][0], got[~near][0], expected[~near][0])


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32", "f64"])
@pytest.mark.parametrize("name", ["min", "max"])
def test_extrema(name, kind):
    edges = np.array([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 0.5])
    pairs = np.array(list(itertools.product(edges, edges))).astype("f4" if kind == "bf16" else DTYPES[kind])
    a, b = np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1])
    if kind == "f32":
        a.view("u4")[np.isnan(a)] = 0x7F800001  # a signalling NaN

    def pick(x: float, y: float, keeps_nan: bool) -> float:
        if math.isnan(x) or math.isnan(y):
            return math.nan if keeps_nan or (math.isnan(x) and math.isnan(y)) else (y if math.isnan(x) else x)
        return (min if name == "min" else max)(x, y, key=lambda v: (v, math.copysign(1, v)))  # -0 is below +0

    for suffix, keeps in (("", False), (".NaN", True)):
        expected = np.array([pick(float(x), float(y), keeps) for x, y in pairs])
        assert_same(run(f"{name}{suffix}.{kind} $d0, $a0, $a1;", kind, a, b), expected, a, b)


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32", "f64"])
def test_signs(kind):
    a, b = numbers(kind, 1), numbers(kind, 2)
    assert_same(run(f"neg.{kind} $d0, $a0;", kind, a), -a, a)
    assert_same(run(f"abs.{kind} $d0, $a0;", kind, a), np.abs(a), a)
    if kind in ("f32", "f64"):
        assert_same(run(f"copysign.{kind} $d0, $a0, $a1;", kind, a, b), np.copysign(b, a), a, b)


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32", "f64"])
def test_comparisons(kind):
    a, b = numbers(kind, 1), numbers(kind, 2)
    b[::3] = a[::3]
    unordered = np.isnan(a) | np.isnan(b)
    plain = {"eq": a == b, "ne": (a < b) | (a > b), "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}
    names = plain | {f"{name}u": holds | unordered for name, holds in plain.items()}
    names |= {"num": ~unordered, "nan": unordered}
    for name, expected in names.items():
        arguments = [stored(kind, a), stored(kind, b)]
        assert_same(execute(f"setp.{name}.{kind} $d0, $a0, $a1;", arguments, [bool])[0], expected, a, b)


def test_classes():
    a = numbers("f32", 1)
    tiny = np.abs(a) < np.float32(2.0**-126)
    classes = {
        "finite": np.isfinite(a),
        "infinite": np.isinf(a),
        "number": ~np.isnan(a),
        "notanumber": np.isnan(a),
        "normal": np.isfinite(a) & ~tiny,
        "subnormal": tiny & (a != 0),
    }
    for name, expected in classes.items():
        assert_same(execute(f"testp.{name}.f32 $d0, $a0;", [a], [bool])[0], expected, a)


INTEGERS = {"s8": "i1", "u8": "u1", "s16": "i2", "u16": "u2", "s32": "i4", "u32": "u4", "s64": "i8", "u64": "u8"}
ROUNDING = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}


@pytest.mark.parametrize("mode", ROUNDING)
@pytest.mark.parametrize("target", INTEGERS)
@pytest.mark.parametrize("source", ["f16", "f32", "f64"])
def test_reals_to_integers(source, target, mode):
    a = numbers(source, 1)
    dtype = np.dtype(INTEGERS[target])
    limits = np.iinfo(dtype)

    def convert(x: float) -> int:
        if math.isnan(x):
            wide = source == "f64" and dtype.itemsize == 8
            return (limits.min if dtype.kind == "i" else 1 << 63) if wide else 0
        if math.isinf(x):
            return limits.max if x > 0 else limits.min
        return min(max(ROUNDING[mode](x), limits.min), limits.max)

    (got,) = execute(f"cvt.{mode}.{target}.{source} $d0, $a0;", [a], [dtype])
    assert_same(got, np.array([convert(float(x)) for x in a], object).astype(dtype), a)


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("target", ["f16", "f32", "f64"])
@pytest.mark.parametrize("source", INTEGERS)
def test_integers_to_reals(source, target, mode):
    a = samples(INTEGERS[source], SIZE, 1)
    if mode != "rn" and a.dtype.itemsize == 8:
        with pytest.raises(UnsupportedInstructionError, match=rf"modifier \.{mode}"):
            execute(f"cvt.{mode}.{target}.{source} $d0, $a0;", [a], [DTYPES[target]])
        return
    (got,) = execute(f"cvt.{mode}.{target}.{source} $d0, $a0;", [a], [DTYPES[target]])
    assert_same(got, np.array([round_exactly(Fraction(int(x)), target, mode) for x in a]), a)


MODES = {"f16": ["rn", "rz", "rm", "rp"], "bf16": ["rn", "rz"], "f32": ["rn", "rz", "rm", "rp"], "tf32": ["rn", "rna"]}
NARROWING = [("f32", "f16"), ("f64", "f16"), ("f32", "bf16"), ("f64", "f32"), ("f32", "tf32")]


@pytest.mark.parametrize(("source", "target", "mode"), [(*pair, mode) for pair in NARROWING for mode in MODES[pair[1]]])
def test_narrowing(source, target, mode):
    a = numbers(source, 1, 768)
    digits = FORMATS[target][0]
    # Ties, and the numbers beside them.
    ties = np.array([(1 + (2 * i + 1) * 2.0**-digits) * 2.0**e for i in range(4) for e in (-130, -20, -5, 0, 9)])
    ties = np.concatenate([ties, ties * (1 + 2.0**-20), -ties]).astype(a.dtype)
    a[: len(ties)] = ties
    out = {"f16": "f2", "bf16": "u2", "f32": "f4", "tf32": "f4"}[target]
    (got,) = execute(f"cvt.{mode}.{target}.{source} $d0, $a0;", [a], [out])
    assert_same(loaded(target, got), exactly(lambda x: x, target, a, mode=mode), a)


@pytest.mark.parametrize(("source", "target"), [("f16", "f32"), ("f16", "f64"), ("f32", "f64"), ("bf16", "f32")])
def test_widening_is_exact(source, target):
    a = numbers(source, 1)
    (got,) = execute(f"cvt.{target}.{source} $d0, $a0;", [stored(source, a)], [DTYPES[target]])
    assert_same(got, a.astype(DTYPES[target]), a)


@pytest.mark.parametrize("mode", ROUNDING)
def test_rounding_to_whole_numbers(mode):
    a = numbers("f32", 1)
    whole = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode]
    assert_same(run(f"cvt.{mode}.f32.f32 $d0, $a0;", "f32", a), whole(a), a)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_two_numbers_into_one_register(kind):
    a, b = numbers("f32", 1), numbers("f32", 2)
    (got,) = execute(f"cvt.rn.{kind}x2.f32 $d0, $a0, $a1;", [a, b], ["u4"])
    halves = loaded(kind, got.view("u2" if kind == "bf16" else "f2"))
    assert_same(halves[1::2], exactly(lambda x: x, kind, a), a)  # the first one is the upper half
    assert_same(halves[::2], exactly(lambda x: x, kind, b), b)
    (got,) = execute(f"cvt.rn.relu.{kind}x2.f32 $d0, $a0, $a1;", [a, b], ["u4"])
    halves = loaded(kind, got.view("u2" if kind == "bf16" else "f2"))
    kept = np.where(np.isnan(a) | (a > 0), a, np.float32(0))
    assert_same(halves[1::2], exactly(lambda x: x, kind, kept), a)


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_numbers_of_8_bits(kind):
    torch = pytest.importorskip("torch")
    dtype = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[kind]
    every = torch.arange(256, dtype=torch.uint8)
    values = every.view(dtype).float().numpy()
    pairs = every.numpy().view("u2")
    (got,) = execute(f"cvt.rn.f16x2.{kind}x2 $d0, $a0;", [pairs], ["u4"])
    assert_same(got.view("f2"), values, every.numpy())
    a, b = numbers("f32", 1), numbers("f32", 2)
    (got,) = execute(f"cvt.rn.satfinite.{kind}x2.f32 $d0, $a0, $a1;", [a, b], ["u2"])
    back = torch.from_numpy(got.view("u1").copy()).view(dtype).float().numpy()
    largest = float(FORMATS[kind][2])
    for column, found in ((a, back[1::2]), (b, back[::2])):
        expected = exactly(lambda x: x, kind, column)
        assert_same(found, np.where(np.isnan(expected), expected, np.clip(expected, -largest, largest)), column)


def test_the_edges_are_there():
    assert all(np.isnan(samples(kind, SIZE, 1)).any() and np.isinf(samples(kind, SIZE, 1)).any() for kind in EDGES)
    assert (np.abs(samples("f4", SIZE, 1)) == np.float32(2.0**-149)).any()
