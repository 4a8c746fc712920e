"""Floating point as the PTX manual defines it: formats, rounding modes, exact fused multiply-add.

Values travel as float64, which holds every value of every smaller format. Where a result must be rounded once, the
float64 intermediate is rounded to odd, which makes the second rounding exact (Boldo and Melquiond, 2008).
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

import numpy as np

Array = np.ndarray


class Format(NamedTuple):
    """`digits` of significand with the leading one, the exponent of the smallest normal number, the largest value."""

    digits: int
    least: int
    largest: float


FORMATS = {
    "f32": Format(24, -126, float(np.finfo(np.float32).max)),
    "f16": Format(11, -14, 65504.0),
    "bf16": Format(8, -126, float.fromhex("0x1.fep127")),
    "tf32": Format(11, -126, float.fromhex("0x1.ffcp127")),
    "e4m3": Format(4, -6, 448.0),
    "e5m2": Format(3, -14, 57344.0),
}
_ROUND = {
    "rn": np.rint,
    "rz": np.trunc,
    "rm": np.floor,
    "rp": np.ceil,
    "rna": lambda x: np.copysign(np.floor(np.abs(x) + 0.5), x),
}


def rounded(x: Array, kind: str, mode: str = "rn", saturate: bool = False) -> Array:
    """The float64 `x` rounded once to format `kind`, still as float64."""
    digits, least, largest = FORMATS[kind]
    exponent = np.maximum(np.frexp(x)[1] - 1, least) - digits + 1  # of the last digit
    y = np.ldexp(_ROUND[mode](np.ldexp(x, -exponent)), exponent)
    overflow = np.abs(y) > largest
    if overflow.any():
        away = (mode == "rn") | (mode == "rna") | (np.signbit(y) if mode == "rm" else ~np.signbit(y) & (mode == "rp"))
        limit = np.where(np.isinf(x) | away, np.inf, largest) if not saturate else largest
        y = np.where(overflow & ~np.isnan(y), np.copysign(limit, y), y)
    return y


def encode(x: Array, kind: str, mode: str = "rn", saturate: bool = False) -> Array:
    """The bits of the float64 `x` in format `kind`; NaN becomes the canonical one of PTX."""
    if kind == "f64":
        return np.where(np.isnan(x), np.uint64(0x7FF8000000000000), x.view(np.uint64))
    y = rounded(x, kind, mode, saturate)
    nan = np.isnan(y)
    if kind == "f16":
        return np.where(nan, np.uint16(0x7FFF), y.astype(np.float16).view(np.uint16))
    if kind in ("e4m3", "e5m2"):
        return _encode_8bit(y, kind)
    single = np.where(nan, np.uint32(0x7FFFFFFF), y.astype(np.float32).view(np.uint32))
    return (single >> np.uint32(16)).astype(np.uint16) if kind == "bf16" else single


def _encode_8bit(y: Array, kind: str) -> Array:
    digits, least, _ = FORMATS[kind]
    magnitude = np.abs(np.where(np.isfinite(y), y, 0.0))
    exponent = np.where(magnitude > 0, np.maximum(np.frexp(magnitude)[1] - 1, least), least)
    significand = np.ldexp(magnitude, digits - 1 - exponent).astype(np.int64)
    # A subnormal number has significand below 2^(digits-1): the biased exponent 1 less the missing one gives 0.
    bits = ((exponent - least) << (digits - 1)) + significand
    bits = np.where(np.isnan(y), 0x7F, np.where(np.isinf(y), 0x7C if kind == "e5m2" else 0x7F, bits))
    sign = np.where(np.isnan(y), 0, np.signbit(y) * 0x80)
    return (bits | sign).astype(np.uint8)


def decode(bits: Array, kind: str) -> Array:
    """The float64 value of each pattern of format `kind`."""
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    if kind == "e5m2":
        return (bits.astype(np.uint16) << np.uint16(8)).view(np.float16).astype(np.float64)
    if kind == "e4m3":
        bits = bits.astype(np.int64)
        exponent, fraction = (bits >> 3) & 15, bits & 7
        value = np.where(exponent, np.ldexp(8.0 + fraction, exponent - 10), np.ldexp(1.0 * fraction, -9))
        value = np.where((bits & 0x7F) == 0x7F, np.nan, value)
        return np.where(bits & 0x80, -value, value)
    return bits.view({"f16": np.float16, "f32": np.float32, "tf32": np.float32, "f64": np.float64}[kind]).astype(
        np.float64
    )


def bf16_to_f32(bits: Array) -> Array:
    """Exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(x: Array) -> Array:
    """`encode(x, "bf16")`, faster: to the nearest, ties to even, in integers."""
    bits = x.view(np.uint32)
    near = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), near.astype(np.uint16))


def flushed(x: Array) -> Array:
    """Subnormal float32 or float16 numbers become zeros of their sign (.ftz)."""
    return np.where(np.abs(x) < np.finfo(x.dtype).tiny, np.copysign(x.dtype.type(0), x), x)


def odd_sum(a: Array, b: Array) -> Array:
    """a + b in float64, rounded to odd."""
    total = a + b
    back = total - a
    error = (a - (total - back)) + (b - back)
    fix = (error != 0) & np.isfinite(total) & ((total.view(np.int64) & 1) == 0)
    return np.where(fix, np.nextafter(total, np.copysign(np.inf, error)), total) if fix.any() else total


def fma(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of values that a smaller format holds, such that one further rounding gives the exact result."""
    return odd_sum(a * b, c)


def fma64(a: Array, b: Array, c: Array) -> Array:
    """a * b + c, rounded once to float64."""
    a, b, c = np.broadcast_arrays(a, b, c)
    high, low = _two_product(a, b)
    t_high, t_low = _two_sum(c, low)
    v_high, v_low = _two_sum(high, t_high)
    result = v_high + odd_sum(t_low, v_low)
    # Splitting overflows or loses digits near the ends of the range; exact rationals there.
    sizes = np.abs(np.stack([a, b, high, c]))
    hard = ((sizes != 0) & ((sizes < 2.0**-960) | (sizes > 2.0**960))).any(axis=0)
    hard |= (high == 0) & (a != 0) & (b != 0)
    hard &= np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
    result = np.where(np.isfinite(a) & np.isfinite(b) & np.isfinite(c), result, a * b + c)
    for i in np.flatnonzero(hard):
        exact = Fraction(a[i]) * Fraction(b[i]) + Fraction(c[i])
        try:
            result[i] = float(exact) if exact else a[i] * b[i] + c[i]
        except OverflowError:
            result[i] = np.inf if exact > 0 else -np.inf
    return result


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    total = a + b
    back = total - a
    return total, (a - (total - back)) + (b - back)


def _two_product(a: Array, b: Array) -> tuple[Array, Array]:
    product = a * b
    a_high, b_high = ((134217729.0 * x) - ((134217729.0 * x) - x) for x in (a, b))
    a_low, b_low = a - a_high, b - b_high
    return product, a_low * b_low - (((product - a_high * b_high) - a_low * b_high) - a_high * b_low)
