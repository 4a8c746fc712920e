"""Floating-point arithmetic and conversions. Approximate instructions are computed exactly and rounded once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .errors import UnsupportedInstructionError
from .floats import FORMATS, bf16_to_f32, decode, encode, f32_to_bf16, flushed, fma, fma64, odd_sum, rounded
from .integers import INTEGER, integer_arithmetic, integer_mul
from .parser import Instruction, Operand
from .registers import NUMPY, UNSIGNED, WIDTHS, Mask, Modifiers, Read, Step, Write, reader, writer
from .table import implements

# packed type -> its element
PACKED = {"f16x2": "f16", "bf16x2": "bf16", "f32x2": "f32", "e4m3x2": "e4m3", "e5m2x2": "e5m2"}
WIDTHS.update({"f32x2": 8, "tf32": 4, "e4m3x2": 2, "e5m2x2": 2})
NUMPY.update({kind: UNSIGNED[WIDTHS[kind]] for kind in ("f32x2", "tf32", "e4m3x2", "e5m2x2")})
MODES = ("rn", "rz", "rm", "rp", "rna")
Function = Callable[..., np.ndarray]


def real_reader(operand: Operand, kind: str, ftz: bool = False) -> Read:
    """Numbers as (lane, element): float32 for bf16, else the numpy type of the format."""
    element = PACKED.get(kind, kind)
    read = reader(operand, kind)
    if element == "bf16":
        return lambda group: bf16_to_f32(read(group).view(np.uint16)).reshape(-1, WIDTHS[kind] // 2)
    dtype = NUMPY[element]
    count = WIDTHS[kind] // dtype.itemsize
    if ftz:
        return lambda group: flushed(read(group).view(dtype)).reshape(-1, count)
    return lambda group: read(group).view(dtype).reshape(-1, count)


def real_writer(operand: Operand, kind: str, ftz: bool = False, sat: bool = False, relu: bool = False) -> Write:
    """Write numbers that `real_reader` gives, or float64 ones, which are rounded to nearest here."""
    element = PACKED.get(kind, kind)
    write = writer(operand, kind)
    dtype = NUMPY[element]

    def store(group, mask: Mask, value: np.ndarray) -> None:
        if element == "bf16":
            bits = f32_to_bf16(value) if value.dtype == np.float32 else encode(value, "bf16")
            if sat or relu:
                bits = encode(_clamped(decode(bits, "bf16"), sat), "bf16")
        else:
            value = value.astype(dtype, copy=False)
            if ftz:
                value = flushed(value)
            if sat or relu:
                value = _clamped(value, sat)
            bits = value
        write(group, mask, np.ascontiguousarray(bits).view(UNSIGNED[WIDTHS[kind]]).reshape(-1))

    return store


def _clamped(value: np.ndarray, sat: bool) -> np.ndarray:
    """.sat: to [0, 1] with NaN to 0; .relu: to [0, inf] with NaN kept."""
    if sat:
        return np.where(value > 0, np.minimum(value, value.dtype.type(1)), value.dtype.type(0))
    return np.where(np.isnan(value) | (value > 0), value, value.dtype.type(0))


def real_step(instruction: Instruction, modifiers: Modifiers, kind: str, compute: Function) -> Step:
    """destination = compute(sources) on numbers of `kind`, with the common modifiers."""
    ftz, sat, relu = modifiers.flag("ftz"), modifiers.flag("sat"), modifiers.flag("relu")
    modifiers.done()
    reads = [
        real_reader(operand, kind, ftz and PACKED.get(kind, kind) != "bf16") for operand in instruction.operands[1:]
    ]
    write = real_writer(instruction.operands[0], kind, ftz, sat, relu)
    if len(reads) == 1:
        (one,) = reads
        return lambda group, mask: write(group, mask, compute(one(group)))
    if len(reads) == 2:
        one, two = reads
        return lambda group, mask: write(group, mask, compute(one(group), two(group)))
    return lambda group, mask: write(group, mask, compute(*(read(group) for read in reads)))


def _directed(kind: str, mode: str, exact: Function, instruction: Instruction) -> Function:
    """`exact` gives a float64 that is rounded to odd; round that to `kind` in `mode`."""
    if kind not in FORMATS:
        raise UnsupportedInstructionError(f"modifier .{mode} of: {instruction.text}")
    return lambda *args: rounded(exact(*(arg.astype(np.float64) for arg in args)), kind, mode)


@implements("add", "sub", "mul")
def arithmetic(instruction: Instruction) -> Step:
    """Both numbers and integers."""
    modifiers = Modifiers(instruction)
    kind = modifiers.type()
    if "f" not in kind:
        return integer_mul(instruction) if instruction.opcode == "mul" else integer_arithmetic(instruction)
    if "f32" in modifiers.left:
        return _mixed(instruction, modifiers, kind)
    mode = modifiers.one_of(*MODES) or "rn"
    modifiers.ignore("noftz")
    plain = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[instruction.opcode]
    if mode == "rn":
        return real_step(instruction, modifiers, kind, plain)
    exact = {"add": odd_sum, "sub": lambda a, b: odd_sum(a, -b), "mul": np.multiply}[instruction.opcode]
    return real_step(instruction, modifiers, kind, _directed(PACKED.get(kind, kind), mode, exact, instruction))


@implements("fma", "mad")
def fused(instruction: Instruction) -> Step:
    """a * b + c, rounded once."""
    modifiers = Modifiers(instruction)
    kind = modifiers.type()
    if "f" not in kind:
        return integer_mul(instruction)
    if "f32" in modifiers.left:
        return _mixed(instruction, modifiers, kind)
    mode = modifiers.one_of(*MODES) or "rn"
    element = PACKED.get(kind, kind)
    if element == "f64":
        if mode != "rn":
            raise UnsupportedInstructionError(f"modifier .{mode} of: {instruction.text}")
        return real_step(instruction, modifiers, kind, lambda *abc: fma64(*(x.reshape(-1) for x in abc)))
    return real_step(
        instruction,
        modifiers,
        kind,
        _directed(element, mode, fma, instruction)
        if mode != "rn"
        else lambda a, b, c: fma(a.astype(np.float64), b.astype(np.float64), c.astype(np.float64)),
    )


def _mixed(instruction: Instruction, modifiers: Modifiers, kind: str) -> Step:
    """fma, add and sub in f32 of operands in f16 or bf16 and a last one in f32."""
    modifiers.type()
    mode, sat = modifiers.one_of(*MODES) or "rn", modifiers.flag("sat")
    modifiers.done()
    reads = [real_reader(operand, kind) for operand in instruction.operands[1:-1]]
    reads.append(real_reader(instruction.operands[-1], "f32"))
    sign = -1.0 if instruction.opcode == "sub" else 1.0
    write = real_writer(instruction.operands[0], "f32", sat=sat)

    def step(group, mask: Mask) -> None:
        *factors, last = (read(group).astype(np.float64) for read in reads)
        exact = odd_sum(factors[0] * factors[1] if len(factors) == 2 else factors[0], sign * last)
        write(group, mask, rounded(exact, "f32", mode))

    return step


@implements("div")
def divide(instruction: Instruction) -> Step:
    """.approx and .full are exact here."""
    modifiers = Modifiers(instruction)
    kind = modifiers.type()
    if "f" not in kind:
        return integer_arithmetic(instruction)
    modifiers.one_of("rn", "approx", "full")
    return real_step(instruction, modifiers, kind, np.divide)


def _in_double(function: Function) -> Function:
    return lambda x: function(x.astype(np.float64))


UNARY = {
    "rcp": lambda x: 1.0 / x,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "sin": np.sin,
    "cos": np.cos,
    "lg2": np.log2,
    "ex2": np.exp2,
    "tanh": np.tanh,
}


@implements(*UNARY)
def unary(instruction: Instruction) -> Step:
    """Functions: in float64, rounded once."""
    modifiers = Modifiers(instruction)
    kind = modifiers.type()
    modifiers.one_of("approx", "rn")
    return real_step(instruction, modifiers, kind, _in_double(UNARY[instruction.opcode]))


def extremum(larger: bool, keeps_nan: bool) -> Function:
    """min and max: -0 is below +0; NaN loses against a number unless .NaN is given."""
    pick = np.maximum if larger else np.minimum

    def compute(first: np.ndarray, *others: np.ndarray) -> np.ndarray:
        result = first
        for other in others:
            bits = UNSIGNED[result.dtype.itemsize]
            a, b = (x.view(bits) for x in np.broadcast_arrays(result, other))
            zero = (a & b if larger else a | b).view(result.dtype)
            best = np.where(result == other, zero, pick(result, other))
            if not keeps_nan:  # np.fmax would return the NaN that is a signalling one
                best = np.where(np.isnan(result), other, np.where(np.isnan(other), result, best))
            result = best
        return result

    return compute


@implements("min", "max", "neg", "abs", "copysign")
def signs_and_order(instruction: Instruction) -> Step:
    """Both numbers and integers."""
    modifiers = Modifiers(instruction)
    kind = modifiers.type()
    if "f" not in kind:
        if instruction.opcode not in INTEGER:
            raise UnsupportedInstructionError(instruction.text)
        return integer_arithmetic(instruction)
    opcode = instruction.opcode
    if opcode in ("min", "max"):
        return real_step(instruction, modifiers, kind, extremum(opcode == "max", modifiers.flag("NaN")))
    compute = {"neg": np.negative, "abs": np.abs, "copysign": lambda a, b: np.copysign(b, a)}[opcode]
    return real_step(instruction, modifiers, kind, compute)


@implements("testp")
def classify(instruction: Instruction) -> Step:
    """A predicate: the class of a number."""
    modifiers = Modifiers(instruction)
    kind = modifiers.type()
    tests: dict[str, Function] = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda x: ~np.isnan(x),
        "notanumber": np.isnan,
        "normal": lambda x: np.isfinite(x) & (np.abs(x) >= np.finfo(x.dtype).tiny),
        "subnormal": lambda x: (x != 0) & (np.abs(x) < np.finfo(x.dtype).tiny),
    }
    name = modifiers.one_of(*tests)
    modifiers.done()
    if name is None:
        raise UnsupportedInstructionError(instruction.text)
    read, write = real_reader(instruction.operands[1], kind), writer(instruction.operands[0], "pred")
    return lambda group, mask: write(group, mask, tests[name](read(group)).reshape(-1))


TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@implements("cvt")
def convert(instruction: Instruction) -> Step:
    """Between any two types; two sources give a packed result, the first one its upper half."""
    modifiers = Modifiers(instruction)
    source = modifiers.type()
    target = modifiers.type()
    ftz, sat, relu = modifiers.flag("ftz"), modifiers.flag("sat"), modifiers.flag("relu")
    finite = modifiers.flag("satfinite")
    mode = modifiers.one_of(*MODES, *TO_INTEGER)
    modifiers.done()
    from_real, to_real = ("f" in source or source[0] == "e"), ("f" in target or target[0] == "e")
    write = writer(instruction.operands[0], target)
    if not from_real and not to_real:
        read = reader(instruction.operands[1], source)
        return lambda group, mask: write(group, mask, _to_integer_type(read(group), target, sat))
    if not to_real:
        number = real_reader(instruction.operands[1], source, ftz)
        kind = NUMPY[target]
        to_whole = TO_INTEGER[mode or "rzi"]
        wide_nan = source == "f64" and kind.itemsize == 8
        return lambda group, mask: write(group, mask, _real_to_integer(number(group), to_whole, kind, wide_nan))
    if not from_real:
        read = reader(instruction.operands[1], source)
        if mode not in (None, "rn") and WIDTHS[source] == 8:
            raise UnsupportedInstructionError(f"modifier .{mode} of: {instruction.text}")
        return lambda group, mask: write(group, mask, _integer_to_real(read(group), target, mode or "rn", sat))
    numbers = [_any_real_reader(operand, source, ftz) for operand in instruction.operands[1:]]
    element = PACKED.get(target, target)
    width = UNSIGNED[WIDTHS[target]]
    flush_result = ftz and element == "f32"

    def step(group, mask: Mask) -> None:
        parts = [number(group) for number in numbers[::-1]]  # the last operand is the lowest
        x = parts[0] if len(parts) == 1 else np.concatenate(np.broadcast_arrays(*parts), axis=1)
        bits = _encode_number(x, element, mode, finite, sat, relu)
        if flush_result:
            bits = flushed(bits.view(np.float32)).view(np.uint32)
        write(group, mask, np.ascontiguousarray(bits).view(width).reshape(-1))

    return step


def _encode_number(x, element: str, mode: str | None, finite: bool, sat: bool, relu: bool) -> np.ndarray:
    if mode in TO_INTEGER:
        x, mode = TO_INTEGER[mode](x), None
    if sat or relu:
        x = _clamped(x, sat)
    if mode in (None, "rn") and not finite and x.dtype == np.float32 and element in ("bf16", "f32"):
        return f32_to_bf16(x) if element == "bf16" else x.view(np.uint32)
    return encode(x.astype(np.float64), element, mode or "rn", finite)


def _any_real_reader(operand: Operand, kind: str, ftz: bool) -> Read:
    if PACKED.get(kind, kind) in ("e4m3", "e5m2"):
        read = reader(operand, kind)
        return lambda group: decode(np.ascontiguousarray(read(group)).view(np.uint8), PACKED[kind]).reshape(-1, 2)
    return real_reader(operand, kind, ftz and kind == "f32")


def _to_integer_type(value: np.ndarray, target: str, sat: bool) -> np.ndarray:
    dtype = NUMPY[target]
    if sat:
        limits = np.iinfo(dtype)
        value = np.array([min(max(int(v), limits.min), limits.max) for v in value], dtype=object)
    return value.astype(dtype)


def _real_to_integer(x: np.ndarray, to_whole: Function, dtype: np.dtype, wide_nan: bool) -> np.ndarray:
    """Out of range goes to the nearest end; NaN to 0, or from f64 to 64 bits to the sign bit alone."""
    whole = to_whole(x.reshape(-1).astype(np.float64))
    limits = np.iinfo(dtype)
    low, high = float(limits.min), float(limits.max)  # `high` may round up to 2^63 or 2^64
    inside = np.isfinite(whole) & (whole >= low) & (whole < high)
    result = np.where(inside, whole, 0).astype(dtype)
    result = np.where(whole >= high, dtype.type(limits.max), np.where(whole < low, dtype.type(limits.min), result))
    nan = np.array([1 << (8 * dtype.itemsize - 1) if wide_nan else 0], UNSIGNED[dtype.itemsize]).view(dtype)
    return np.where(np.isnan(whole), nan, result)


def _integer_to_real(value: np.ndarray, target: str, mode: str, sat: bool) -> np.ndarray:
    if target in ("f32", "f64") and mode == "rn":
        result = value.astype(NUMPY[target])
        return _clamped(result, True) if sat else result
    # Below 64 bits a float64 holds every integer. Above, an odd last bit keeps the second rounding exact.
    exact = value.astype(np.float64)
    if value.dtype.itemsize == 8:
        error = [int(v) - int(e) for v, e in zip(value, exact, strict=True)]
        exact = odd_sum(exact, np.array(error, np.float64))
    return encode(_clamped(exact, True) if sat else exact, target, mode)
