"""Runs one instruction on arrays, and rounds exact rational numbers: the independent side of the comparisons."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
from ptxsim import Session, load

KINDS = {"u1": "u8", "i1": "s8", "u2": "b16", "i2": "b16", "u4": "b32", "i4": "b32", "u8": "b64", "i8": "b64"}
KINDS |= {"f2": "b16", "f4": "b32", "f8": "b64"}


def kind_of(dtype) -> str:
    return KINDS[np.dtype(dtype).str[1:]]


def execute(text: str, inputs: list[np.ndarray], outputs: list, schedule: str = "lockstep") -> list[np.ndarray]:
    """Run `text` on every element: $a0, $a1... are the inputs, $d0, $d1... the outputs; bool stands for a predicate."""
    size = len(inputs[0])
    padded = -(-size // 32) * 32
    declarations, loads, stores, parameters, arguments = [], [], [], [], []

    def register(name: str, dtype) -> str:
        if np.dtype(dtype) == bool:
            declarations.append(f".reg .pred {name};\n.reg .b16 {name}_byte;")
            return "u8"
        width = max(np.dtype(dtype).itemsize, 2)
        declarations.append(f".reg .b{8 * width} {name};")
        return kind_of(dtype)

    for i, values in enumerate(inputs):
        kind, item = register(f"a{i}", values.dtype), values.dtype.itemsize
        parameters.append(f".param .u64 in{i}")
        arguments.append(np.concatenate([values, np.repeat(values[:1], padded - size)]))
        loads.append(f"ld.param.u64 base, [in{i}]; mad.wide.u32 at, thread, {item}, base;")
        if values.dtype == bool:
            loads.append(f"ld.global.u8 a{i}_byte, [at]; setp.ne.b16 a{i}, a{i}_byte, 0;")
        else:
            loads.append(f"ld.global.{kind} a{i}, [at];")
    session = Session(schedule)
    for i, dtype in enumerate(outputs):
        kind, item = register(f"d{i}", dtype), np.dtype(dtype).itemsize
        parameters.append(f".param .u64 out{i}")
        arguments.append(session.empty(padded, dtype))
        stores.append(f"ld.param.u64 base, [out{i}]; mad.wide.u32 at, thread, {item}, base;")
        if np.dtype(dtype) == bool:
            stores.append(f"selp.b16 d{i}_byte, 1, 0, d{i}; st.global.u8 [at], d{i}_byte;")
        else:
            stores.append(f"st.global.{kind} [at], d{i};")
    body = text.replace("$", "")
    ptx = f"""
.version 8.7
.target sm_80
.address_size 64
.visible .entry one({", ".join(parameters)})
{{
.reg .b32 thread; .reg .b32 lane; .reg .b32 block; .reg .b64 base; .reg .b64 at;
{chr(10).join(declarations)}
mov.u32 lane, %tid.x; mov.u32 block, %ctaid.x; mad.lo.u32 thread, block, 32, lane;
{chr(10).join(loads)}
{body}
{chr(10).join(stores)}
ret;
}}
"""
    session.launch(load(ptx)["one"], (padded // 32,), (32,), arguments)
    return [array[:size] for array in arguments[len(inputs) :]]


EDGES = {
    "f2": [0.0, 1.0, 1.5, 65504.0, 2**-14, 2**-24, 2**-24 * 3, 0.1, 2049.0, np.inf],
    "f4": [0.0, 1.0, 1.0 + 2**-23, 3.4028235e38, 2**-126, 2**-149, 2**-127 * 1.5, 0.1, 65520.0, 0.5, 1.5, 2.5, np.inf],
    "f8": [0.0, 1.0, 1.0 + 2**-52, 1.7e308, 2**-1022, 5e-324, 0.1, 2.0**31, 2.0**63, 0.5, 1.5, 2.5, np.inf],
}


def samples(dtype, size: int, seed: int) -> np.ndarray:
    """Random values of every magnitude, and the edges."""
    dtype = np.dtype(dtype)
    rng = np.random.default_rng(seed)
    bits = np.frombuffer(rng.bytes(size * dtype.itemsize), f"u{dtype.itemsize}")
    if dtype.kind == "f":
        edges = np.array(EDGES[dtype.str[1:]], dtype)
        edges = np.concatenate([edges, -edges, np.array([np.nan], dtype)])
        usual = (rng.standard_normal(size // 2) * 4.0 ** rng.integers(-3, 4, size // 2)).astype(dtype)
        values = np.concatenate([edges, usual, bits.view(dtype)])
    else:
        limits = np.iinfo(dtype)
        edges = np.array([0, 1, 2, 7, limits.max, limits.max - 1, limits.min, limits.min + 1], dtype)
        values = np.concatenate([edges, (bits % 97).astype(dtype), bits.view(dtype)])
    return rng.permutation(np.concatenate([np.repeat(edges, 4), values]))[:size]


def bf16(values: np.ndarray) -> np.ndarray:
    """The patterns of float32 values cut to bf16."""
    return (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


FORMATS = {  # digits, smallest exponent of a normal number, largest finite number
    "f16": (11, -14, Fraction(65504)),
    "bf16": (8, -126, Fraction(float.fromhex("0x1.fep127"))),
    "tf32": (11, -126, Fraction(float.fromhex("0x1.ffcp127"))),
    "f32": (24, -126, Fraction(float.fromhex("0x1.fffffep127"))),
    "f64": (53, -1022, Fraction(float.fromhex("0x1.fffffffffffffp1023"))),
    "e4m3": (4, -6, Fraction(448)),
    "e5m2": (3, -14, Fraction(57344)),
}


def round_exactly(x: Fraction, kind: str, mode: str = "rn") -> float:
    """A rational number in a format, by the definition of each rounding mode."""
    digits, least, largest = FORMATS[kind]
    if x == 0:
        return 0.0
    sign = 1 if x > 0 else -1
    magnitude = abs(x)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if magnitude < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, least) - digits + 1)
    floor = x / unit // 1
    rest = x / unit - floor
    up = {
        "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and floor % 2 == 1),
        "rna": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and x > 0),
        "rz": x < 0 and rest > 0,
        "rm": False,
        "rp": rest > 0,
    }[mode]
    result = (floor + up) * unit
    if abs(result) > largest:
        stays = mode == "rz" or (mode == "rm" and x > 0) or (mode == "rp" and x < 0)
        return math.copysign(float(largest) if stays else math.inf, sign)
    return math.copysign(float(result), sign)


def exactly(compute, kind: str, *columns: np.ndarray, mode: str = "rn") -> np.ndarray:
    """`compute` on rationals, rounded once; where an operand or a zero needs IEEE rules, the float64 result."""
    result = []
    with np.errstate(all="ignore"):
        for values in zip(*(column.astype(np.float64) for column in columns), strict=True):
            plain = compute(*values)
            if all(math.isfinite(v) for v in values) and not math.isnan(plain):
                try:
                    exact = compute(*(Fraction(float(v)) for v in values))
                except ZeroDivisionError:
                    exact = Fraction(0)
                plain = round_exactly(exact, kind, mode) if exact else plain
            result.append(plain)
    return np.array(result)


def assert_same(got: np.ndarray, expected: np.ndarray, *inputs: np.ndarray) -> None:
    """Equal bit for bit; any NaN equals any other."""
    expected = np.asarray(expected)
    if got.dtype.kind == "f":
        with np.errstate(all="ignore"):
            expected = expected.astype(got.dtype)
        bits = f"u{got.dtype.itemsize}"
        same = (got.view(bits) == expected.view(bits)) | (np.isnan(got) & np.isnan(expected))
    else:
        same = got == expected
    if not same.all():
        i = int(np.flatnonzero(~same)[0])
        shown = [column[i] for column in inputs]
        raise AssertionError(f"{(~same).sum()} differ; element {i}: {shown} gives {got[i]!r}, expected {expected[i]!r}")
