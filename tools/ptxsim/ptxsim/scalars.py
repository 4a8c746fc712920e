"""What the integer instructions of SASS compute: addresses, trip counts, conditions. Of floats nothing is known.

A value is None where it is not known, an int where all lanes have the same, else an array of 32 int64; all are unsigned
32-bit words. A predicate is None, a bool or an array of bool.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .sass import SassInstruction

LANES = np.arange(32)
WORD = (1 << 32) - 1
Value = Any  # None | int | np.ndarray | a load that nobody has read yet: something with `word()`
Read = Callable[[Any], Value]
PREDICATE = re.compile(r"!?U?P(T|\d)$")
_REGISTER = re.compile(r"U?R(Z|\d+)$")


def signed(x: Value) -> Value:
    """A word as a number of two's complement."""
    return x - ((x >> 31) << 32)


def both(x: Value, y: Value) -> Value:
    """`and` of predicates of which some are not known."""
    if x is False or y is False:
        return False
    return None if x is None or y is None else x & y


def inverted(x: Value) -> Value:
    """`not` of a predicate."""
    return None if x is None else not x if isinstance(x, bool) else ~x


def either(x: Value, y: Value) -> Value:
    """`or` of predicates."""
    return inverted(both(inverted(x), inverted(y)))


def _bool(x: Value) -> Value:
    return x.astype(bool, copy=False) if isinstance(x, np.ndarray) else bool(x)


def choose(condition: Value, x: Value, y: Value) -> Value:
    """`x` where the condition holds, else `y`."""
    if isinstance(condition, bool):
        return x if condition else y
    return None if condition is None or x is None or y is None else np.where(condition, x, y)


def predicate(operand: str) -> Read:
    """The reader of a predicate operand."""
    name = operand.lstrip("!")
    if name.endswith("PT"):
        return (lambda warp: False) if operand[0] == "!" else (lambda warp: True)
    if operand[0] == "!":
        return lambda warp: inverted(warp.get(name))
    return lambda warp: warp.get(name)


def word(operand: str, minus: int = WORD, offset: int = 0) -> Read:
    """The reader of an operand, or of the word `offset` behind it; `minus` masks a negated one: sums need its carry."""
    if operand[0] in "-~" and not re.match(r"-?\d", operand):
        inner = word(operand[1:], offset=offset)
        if operand[0] == "~":
            return lambda warp: None if (x := inner(warp)) is None else x ^ WORD
        return lambda warp: None if (x := inner(warp)) is None else ((1 << 32) - x) & minus
    if match := _REGISTER.match(operand):
        if match[1] == "Z":
            return lambda warp: 0
        name = f"{operand[: match.start(1)]}{int(match[1]) + offset}"
        return lambda warp: warp.get(name)
    if match := re.match(r"c\[0x0\]\[0x([0-9a-f]+)\]$", operand):
        place = int(match[1], 16) + 4 * offset
        return lambda warp: warp.constant(place)
    if re.match(r"-?0x[0-9a-f]+$", operand):
        value = int(operand, 16) >> 32 * offset & WORD
        return lambda warp: value
    return lambda warp: None  # a float


def wide(operand: str, is_signed: bool = True) -> Read:
    """The reader of 64 bits, as a number below 2^63 in absolute value."""
    low, high = word(operand), word(operand, offset=1)

    def read(warp: Any) -> Value:
        a, b = low(warp), high(warp)
        return None if a is None or b is None else (signed(b) << 32) | a

    return read


def unsigned64(x: Value) -> Value:
    """64 bits as a number of at least 0."""
    return x.astype(np.uint64) if isinstance(x, np.ndarray) else x & (1 << 64) - 1


def _narrow64(x: Value) -> Value:
    """Below 2^63 in absolute value, so that it may meet an array."""
    return x if isinstance(x, np.ndarray) else ((x + (1 << 63)) & (1 << 64) - 1) - (1 << 63)


def _known(compute: Callable[..., Value], *reads: Read) -> Read:
    def run(warp: Any) -> Value:
        values = [read(warp) for read in reads]
        return None if any(value is None for value in values) else compute(*values)

    return run


class Parts:
    """The operands of an instruction: predicates that it writes beside its result, sources, predicates it reads."""

    def __init__(self, instruction: SassInstruction):
        operands = list(instruction.operands)
        self.flags: list[str] = []
        while operands and PREDICATE.match(operands[0]):
            self.flags.append(operands.pop(0))
        self.result = operands.pop(0) if operands else "RZ"
        while operands and PREDICATE.match(operands[0]):
            self.flags.append(operands.pop(0))
        self.conditions: list[str] = []
        while operands and PREDICATE.match(operands[-1]):
            self.conditions.insert(0, operands.pop())
        self.sources = operands


_COMPARE: dict[str, Callable[[Value, Value], Value]] = {
    "LT": lambda a, b: a < b, "LE": lambda a, b: a <= b, "GT": lambda a, b: a > b, "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b, "NE": lambda a, b: a != b, "F": lambda a, b: False, "T": lambda a, b: True,
}  # fmt: skip
_JOIN = {"AND": both, "OR": either, "XOR": lambda x, y: None if x is None or y is None else x ^ y}

Effect = Callable[[Any], list[tuple[str, Value]]]  # registers and what they hold


def _compare(i: SassInstruction) -> Effect:
    first, second, a, b, *conditions = i.operands
    compare, join = _COMPARE[i.modifiers[0]], _JOIN[next(m for m in i.modifiers if m in _JOIN)]
    view = (lambda x: x) if "U32" in i.modifiers else signed
    left, right = word(a), word(b)
    test = _known(lambda x, y: _bool(compare(view(x), view(y))), left, right)
    equal = _known(lambda x, y: _bool(x == y), left, right)
    others = [predicate(each) for each in conditions]
    decided = i.modifiers[0] not in ("EQ", "NE")  # by the upper words, unless they are equal

    def run(warp: Any) -> list[tuple[str, Value]]:
        result = test(warp)
        if "EX" in i.modifiers:
            low, same = others[-1](warp), equal(warp)
            if decided:
                result = choose(same, low, result) if same is not None else None
            else:
                result = both(result, low) if i.modifiers[0] == "EQ" else either(result, low)
        other = others[0](warp) if others else True
        return [(first, join(result, other)), (second, join(inverted(result), other))]

    return run


def _sum(i: SassInstruction) -> Effect:
    parts = Parts(i)
    reads = [word(each, minus=(1 << 33) - 1) for each in parts.sources]
    carries = [predicate(each) for each in parts.conditions] if "X" in i.modifiers else []

    def run(warp: Any) -> list[tuple[str, Value]]:
        values = [read(warp) for read in reads] + [carry(warp) for carry in carries]
        if any(value is None for value in values):
            return [(name, None) for name in (parts.result, *parts.flags)]
        total = sum(value * 1 for value in values)
        flags = [(name, _bool(total >> 32 > n)) for n, name in enumerate(parts.flags)]
        return [(parts.result, total & WORD), *flags]

    return run


def _sum64(i: SassInstruction) -> Effect:
    parts = Parts(i)
    total = _known(lambda *values: sum(values), *map(wide, parts.sources))
    return lambda warp: _pair(parts.result, total(warp))


def _pair(result: str, value: Value) -> list[tuple[str, Value]]:
    if result.endswith("Z"):
        return []
    stem, number = re.match(r"(U?R)(\d+)", result).groups()
    value = None if value is None else _narrow64(value)
    low, high = (None, None) if value is None else (value & WORD, value >> 32 & WORD)
    return [(result, low), (f"{stem}{int(number) + 1}", high)]


def _product(i: SassInstruction) -> Effect:
    parts = Parts(i)
    a, b, c = parts.sources
    view = (lambda x: x) if "U32" in i.modifiers else signed
    is_wide, high = "WIDE" in i.modifiers, "HI" in i.modifiers
    carry = predicate(parts.conditions[0]) if "X" in i.modifiers and parts.conditions else (lambda warp: False)
    left, right = word(a), word(b)
    added = wide(c) if is_wide or high else word(c, minus=(1 << 33) - 1)

    def run(warp: Any) -> list[tuple[str, Value]]:
        x, y, z, one = left(warp), right(warp), added(warp), carry(warp)
        if x is None or y is None or z is None or one is None:
            total = None
        else:
            product = view(x) * view(y)
            if isinstance(product, int) and not (isinstance(z, int) and isinstance(one, int)):
                product = _narrow64(product)
            total = product + z + one * 1
        if is_wide or high:
            words = _pair("R0", total)
            flag = None if total is None or not parts.flags else _carry64(x, y, z, view)
            if high:
                return [(parts.result, words[1][1]), *((name, flag) for name in parts.flags)]
            return [*_pair(parts.result, total), *((name, flag) for name in parts.flags)]
        flags = [(name, None if total is None else _bool(total >> 32 > 0)) for name in parts.flags]
        return [(parts.result, None if total is None else total & WORD), *flags]

    return run


def _carry64(x: Value, y: Value, z: Value, view: Callable[[Value], Value]) -> Value:
    """Whether x y + z leaves 64 bits; arrays are taken one by one, as this is rare."""
    if not any(isinstance(each, np.ndarray) for each in (x, y, z)):
        return (view(x) * view(y) & (1 << 64) - 1) + (z & (1 << 64) - 1) >> 64 > 0
    each = np.broadcast_arrays(*(np.asarray(v, dtype=object) for v in (x, y, z)), LANES)[:3]
    return np.array([bool(_carry64(int(a), int(b), int(c), view)) for a, b, c in zip(*each, strict=True)])


def _shift_add(i: SassInstruction) -> Effect:
    parts = Parts(i)
    *sources, shift = parts.sources
    count, high = int(shift, 16), "HI" in i.modifiers
    extended = "SX32" in i.modifiers
    top = word(sources[2]) if high and not extended else (lambda warp: 0)
    carry = predicate(parts.conditions[0]) if "X" in i.modifiers else (lambda warp: False)
    shifted, base = word(sources[0]), word(sources[1], minus=(1 << 33) - 1)

    def run(warp: Any) -> list[tuple[str, Value]]:
        x, y, z, one = shifted(warp), base(warp), top(warp), carry(warp)
        if x is None or y is None or z is None or one is None:
            return [(name, None) for name in (parts.result, *parts.flags)]
        whole = signed(x) if extended else (signed(z) << 32) | x
        moved = whole << count
        total = (moved >> 32 if high else moved) & WORD
        total = total + y + one * 1
        return [(parts.result, total & WORD), *((name, _bool(total >> 32 > 0)) for name in parts.flags)]

    return run


def _funnel(i: SassInstruction) -> Effect:
    result, low, shift, high = i.operands
    kind = next(m for m in i.modifiers if m in ("U32", "S32", "U64", "S64"))
    most = 31 if "W" in i.modifiers else 63

    def compute(a: Value, n: Value, b: Value) -> Value:
        n = n & most if most == 31 else np.minimum(n, most) if isinstance(n, np.ndarray) else min(n, most)
        whole = (signed(b) << 32) | a
        if "L" in i.modifiers:
            moved = _narrow64(whole << n)
        elif kind[0] == "U":
            moved = unsigned64(whole) >> (n.astype(np.uint64) if isinstance(n, np.ndarray) else n)
        else:
            moved = whole >> n
        if isinstance(moved, np.ndarray):
            moved = moved.astype(np.int64)
        return moved >> 32 & WORD if "HI" in i.modifiers else moved & WORD

    value = _known(compute, word(low), word(shift), word(high))
    return lambda warp: [(result, value(warp))]


def _table(bits: int, x: Value, y: Value, z: Value, ones: int) -> Value:
    """Every combination of three bits that `bits` names."""
    if bits == 0xC0:
        return x & y
    if bits == 0xFC:
        return x | y
    if bits == 0x3C:
        return x ^ y
    total: Value = 0
    for row in range(8):
        if bits >> row & 1:
            terms = [v if row >> n & 1 else v ^ ones for n, v in ((2, x), (1, y), (0, z))]
            total = total | (terms[0] & terms[1] & terms[2])
    return total


def _is_all_but_one_bit(operand: str) -> bool:
    return operand.startswith("0x") and (~int(operand, 16) & WORD).bit_count() == 1


def _logic(i: SassInstruction) -> Effect:
    parts = Parts(i)
    *sources, bits = parts.sources
    value = _known(lambda x, y, z: _table(int(bits, 16), x, y, z, WORD), *map(word, sources))
    last = i.operands[-1]
    # So ptxas clears one of the predicates that it keeps in a register, whose other bits are of no interest.
    first, *rest = i.operands
    packs = rest[0] == first and rest[2] == "RZ" and bits == "0xc0" and _is_all_but_one_bit(rest[1])
    or_else = predicate(last) if last.lstrip("!U").startswith("P") else lambda warp: False

    def run(warp: Any) -> list[tuple[str, Value]]:
        result, other = value(warp), or_else(warp)
        result = 0 if result is None and packs else result
        there = None if result is None else _bool(result != 0)
        # A predicate is whether any bit is set, or the last operand, which is !PT where it says nothing.
        unknown = there is None or other is None
        flag = True if other is True else there if other is False else None if unknown else there | other
        return [(parts.result, result), *((name, flag) for name in parts.flags)]

    return run


def _predicate_logic(i: SassInstruction) -> Effect:
    first, second, *sources, one, two = i.operands
    tables = [int(one, 16), int(two, 16)]
    reads = [predicate(each) for each in sources]

    def look_up(bits: int, values: list[Value]) -> Value:
        unknown = [n for n, value in enumerate(values) if value is None]
        if unknown:  # the result may be the same either way
            tries = [look_up(bits, [*values[: unknown[0]], v, *values[unknown[0] + 1 :]]) for v in (False, True)]
            same = all(isinstance(each, bool) for each in tries) and tries[0] == tries[1]
            return tries[0] if same else None
        return _bool(_table(bits, *values, True))

    def run(warp: Any) -> list[tuple[str, Value]]:
        values = [read(warp) for read in reads]
        return [(name, look_up(bits, values)) for name, bits in zip((first, second), tables, strict=True)]

    return run


def _select(i: SassInstruction) -> Effect:
    result, a, b, condition = i.operands
    left, right, which = word(a), word(b), predicate(condition)
    return lambda warp: [(result, choose(which(warp), left(warp), right(warp)))]


def _extremum(i: SassInstruction) -> Effect:
    parts = Parts(i)
    view = (lambda x: x) if "U32" in i.modifiers else signed
    reads = [word(each) for each in parts.sources]
    smallest = predicate(parts.conditions[0])
    added = "VIADDMNMX" in i.opcode

    def run(warp: Any) -> list[tuple[str, Value]]:
        values = [read(warp) for read in reads]
        least = smallest(warp)
        if least is None or any(value is None for value in values):
            return [(parts.result, None)]
        if added:
            values = [values[0] + values[1] & WORD, values[2]]
        x, y = (view(value) for value in values)
        return [(parts.result, choose(_bool((x < y) == least), x, y) & WORD)]

    return run


def _unary(compute: Callable[[Value], Value]) -> Callable[[SassInstruction], Effect]:
    def build(i: SassInstruction) -> Effect:
        value = _known(compute, word(i.operands[1]))
        return lambda warp: [(i.operands[0], value(warp))]

    return build


def _extended(i: SassInstruction) -> Effect:
    result, source, size = i.operands
    bits = int(size, 16)

    def compute(x: Value) -> Value:
        low = x & (1 << bits) - 1
        return low if "U32" in i.modifiers else low - ((low >> bits - 1) << bits) & WORD

    value = _known(compute, word(source))
    return lambda warp: [(result, value(warp))]


def _bytes(i: SassInstruction) -> Effect:
    result, a, pattern, b = i.operands

    def compute(x: Value, selector: Value, y: Value) -> Value:
        whole, total = [*((x >> 8 * n & 255) for n in range(4)), *((y >> 8 * n & 255) for n in range(4))], 0
        if isinstance(selector, np.ndarray):
            return None
        for n in range(4):
            nibble = selector >> 4 * n & 15
            byte = whole[nibble & 7]
            total = total | (((byte >> 7) * 255 if nibble & 8 else byte) << 8 * n)
        return total

    value = _known(compute, word(a), word(pattern), word(b))
    return lambda warp: [(result, value(warp))]


def _pack_predicates(i: SassInstruction) -> Effect:
    """P2R, and UP2UR of the uniform ones; unknown where one of them is."""
    result, kind, base, mask = i.operands
    below, wanted = word(base), int(mask, 16)

    def run(warp: Any) -> list[tuple[str, Value]]:
        total = below(warp)
        if total is None:
            return [(result, None)]
        total = total & ~wanted
        for n in range(7):
            if wanted >> n & 1:
                flag = warp.get(f"{kind[:-1]}{n}")
                if flag is None:
                    return [(result, None)]
                total = total | flag * (1 << n)
        return [(result, total)]

    return run


def _unpack_predicates(i: SassInstruction) -> Effect:
    _, source, mask = i.operands
    read, wanted = word(source), int(mask, 16)

    def run(warp: Any) -> list[tuple[str, Value]]:
        value = read(warp)
        return [(f"P{n}", None if value is None else _bool(value >> n & 1 != 0)) for n in range(7) if wanted >> n & 1]

    return run


def spread(x: Value) -> Value:
    """One element for each lane."""
    return x if isinstance(x, np.ndarray) else np.full(32, x)


def _vote(i: SassInstruction) -> Effect:
    ballot = not PREDICATE.match(i.operands[0])
    result, says = i.operands[0], predicate(i.operands[-1])

    def run(warp: Any) -> list[tuple[str, Value]]:
        yes, here = says(warp), warp.lanes()
        if yes is None:
            passing = warp.block.site.passing
            return [(result, int((1 << LANES)[here][:passing].sum()) if ballot and passing else None)]
        chosen = spread(yes) & here
        if ballot:
            return [(result, int((chosen * (1 << LANES)).sum()))]
        return [(result, bool((spread(yes) | ~here).all() if "ALL" in i.modifiers else chosen.any()))]

    return run


def _shuffle(i: SassInstruction) -> Effect:
    flag, result, source, lane, limit = i.operands
    read, by, clamp = word(source), word(lane), word(limit)

    def compute(warp: Any) -> list[tuple[str, Value]]:
        n, c = by(warp), clamp(warp)
        if n is None or c is None:
            return [(result, None), (flag, None)]
        mode, segment = i.modifiers[0], c >> 8 & 31
        n = n & 31
        last = (LANES & segment) | (c & 31 & ~segment)
        other = {"BFLY": LANES ^ n, "DOWN": LANES + n, "UP": LANES - n, "IDX": (LANES & segment) | (n & ~segment)}[mode]
        valid = other >= last if mode == "UP" else other <= last
        value = read(warp)
        if isinstance(value, np.ndarray):
            value = value[np.where(valid, other, LANES) & 31]
        return [(result, value), (flag, _bool(valid))]

    return compute


def _reduce(i: SassInstruction) -> Effect:
    result, source = i.operands[-2:]
    operation = next((m for m in i.modifiers if m in ("SUM", "MIN", "MAX", "AND", "OR", "XOR")), "AND")
    combine = {"SUM": np.add, "MIN": np.minimum, "MAX": np.maximum, "AND": np.bitwise_and, "OR": np.bitwise_or}
    view = signed if "S32" in i.modifiers else (lambda x: x)
    read = word(source)

    def run(warp: Any) -> list[tuple[str, Value]]:
        value = read(warp)
        if value is None:
            return [(result, None)]
        return [(result, int(combine[operation].reduce(view(spread(value))[warp.lanes()])) & WORD)]

    return run


def _to_uniform(i: SassInstruction) -> Effect:
    result, read = i.operands[0], word(i.operands[-1])

    def run(warp: Any) -> list[tuple[str, Value]]:
        value = read(warp)
        return [(result, int(value[warp.lanes().argmax()]) if isinstance(value, np.ndarray) else value)]

    return run


def _special(i: SassInstruction) -> Effect:
    result, name = i.operands
    if name == "SRZ":
        return lambda warp: [(result, 0)] if "32" in i.modifiers else _pair(result, 0)
    return lambda warp: [(result, warp.special(name))]


def _constant(i: SassInstruction) -> Effect:
    result, place = i.operands
    match = re.match(r"c\[0x0\]\[(U?R\w+)?\+?(?:0x([0-9a-f]+))?\]", place)
    if match is None:
        return _forget(i)
    base = word(match[1]) if match[1] else (lambda warp: 0)
    offset, count = int(match[2] or "0", 16), max(i.width // 4, 1)

    def run(warp: Any) -> list[tuple[str, Value]]:
        start = base(warp)
        known = isinstance(start, int)
        return [
            (name, warp.constant(start + offset + 4 * n) if known else None)
            for n, name in enumerate(registers(result, count))
        ]

    return run


def registers(first: str, count: int) -> list[str]:
    """`count` registers side by side; RZ stands for all of them."""
    match = re.match(r"(U?R)(\d+)$", first)
    return [f"{match[1]}{int(match[2]) + n}" for n in range(count)] if match else []


def _bits(x: Value) -> Value:
    return spread(x).astype(np.uint32).view(np.float32).astype(np.float64)


def _of_float(x: np.ndarray, up: bool = False) -> Value:
    """The bits of the nearest float32, or of the next one above."""
    with np.errstate(over="ignore"):
        single = x.astype(np.float32)
    if up:
        single = np.where(single.astype(np.float64) < x, np.nextafter(single, np.float32(np.inf)), single)
    words = single.astype(np.float32).view(np.uint32).astype(np.int64)
    return int(words[0]) if (words == words[0]).all() else words


def _to_float(i: SassInstruction) -> Effect:
    """I2F, as a division by a number that is not known at compile time begins."""
    result, source = i.operands
    if "F64" in i.modifiers or "F16" in i.modifiers:
        return _forget(i)
    up = "RP" in i.modifiers
    if "U64" in i.modifiers:
        value = _known(lambda x: _of_float(spread(unsigned64(x)).astype(np.float64), up), wide(source))
    else:
        view = (lambda x: x) if "U32" in i.modifiers else signed
        value = _known(lambda x: _of_float(spread(view(x)).astype(np.float64), up), word(source))
    return lambda warp: [(result, value(warp))]


def _to_integer(i: SassInstruction) -> Effect:
    result, source = i.operands
    if "TRUNC" not in i.modifiers or not {"U32", "U64"} & set(i.modifiers):
        return _forget(i)
    most = 2.0**64 - 2048 if "U64" in i.modifiers else 2.0**32 - 1

    def compute(x: Value) -> Value:
        values = [int(min(max(v, 0.0), most)) if v == v else 0 for v in _bits(x)]
        return values[0] if len(set(values)) == 1 else np.array(values, dtype=np.uint64).astype(np.int64)

    value = _known(compute, word(source))
    if "U64" in i.modifiers:
        return lambda warp: _pair(result, value(warp))
    return lambda warp: [(result, value(warp))]


def _reciprocal(i: SassInstruction) -> Effect:
    if i.modifiers != ("RCP",):
        return _forget(i)
    value = _known(lambda x: _of_float(1.0 / np.where(_bits(x) == 0, np.inf, _bits(x))), word(i.operands[1]))
    return lambda warp: [(i.operands[0], value(warp))]


def _half_constant(i: SassInstruction) -> Effect:
    """HFMA2 of zeros and two constants is how ptxas writes some words."""
    result, *sources = i.operands
    if len(sources) != 4 or not all(each.endswith("RZ") for each in sources[:2]):
        return _forget(i)
    high, low = (int(np.float16(float(each)).view(np.uint16)) for each in sources[2:])
    return lambda warp: [(result, high << 16 | low)]


def _leading(x: Value) -> Value:
    """The place of the highest set bit."""
    places = [int(v).bit_length() - 1 & WORD for v in spread(x)]
    return places[0] if len(set(places)) == 1 else np.array(places)


def _count_bits(x: Value) -> Value:
    counts = [int(v).bit_count() for v in spread(x)]
    return counts[0] if len(set(counts)) == 1 else np.array(counts)


def _forget(i: SassInstruction) -> Effect:
    """What its results are is not known."""
    names = [each for each in i.operands[:2] if PREDICATE.match(each)]
    first = next((each for each in i.operands if _REGISTER.match(each)), "RZ")
    kinds = i.modifiers[:1] if i.opcode in ("F2F", "F2I", "I2F") else i.modifiers  # that of the result comes first
    doubles = i.opcode[0] == "D" or {"F64", "64", "U64", "S64"} & set(kinds)
    count = 4 if i.opcode in ("HMMA", "IMMA", "LDSM") or "128" in i.modifiers else 2 if doubles else 1
    names += registers(first, count)
    return lambda warp: [(name, None) for name in names]


def _nothing(i: SassInstruction) -> Effect:
    return lambda warp: []


_VALUES: dict[str, Callable[[SassInstruction], Effect]] = {
    "ISETP": _compare, "IADD3": _sum, "VIADD": _sum, "IADD": _sum, "IMAD": _product, "LEA": _shift_add, "SHF": _funnel,
    "LOP3": _logic, "PLOP3": _predicate_logic, "SEL": _select, "FSEL": _select, "IMNMX": _extremum,
    "VIMNMX": _extremum, "VIADDMNMX": _extremum, "MOV": _unary(lambda x: x), "SGXT": _extended, "PRMT": _bytes,
    "IABS": _unary(lambda x: abs(signed(x))), "POPC": _unary(_count_bits), "FLO": _unary(_leading),
    "P2R": _pack_predicates, "UP2UR": _pack_predicates, "R2P": _unpack_predicates, "VOTE": _vote, "SHFL": _shuffle,
    "REDUX": _reduce,
    "R2UR": _to_uniform, "S2R": _special, "S2UR": _special, "CS2R": _special, "LDC": _constant, "LDCU": _constant,
    "I2F": _to_float, "F2I": _to_integer, "MUFU": _reciprocal, "HFMA2": _half_constant,
}  # fmt: skip
WITHOUT_RESULT = {
    "BAR", "BSSY", "BSYNC", "BREAK", "CCTL", "CGAERRBAR", "DEPBAR", "ENDCOLLECTIVE", "ERRBAR", "FENCE", "LDGDEPBAR",
    "MEMBAR", "NANOSLEEP", "NOP", "STG", "ST", "STS", "STL", "STSM", "STTM", "RED", "WARPSYNC", "WARPGROUP", "YIELD",
    "LDGSTS", "UTCBAR", "UTCHMMA", "SYNCS", "HGMMA", "BPT",
}  # fmt: skip


def effect(instruction: SassInstruction) -> Effect:
    """What an instruction writes into registers, memory aside."""
    opcode = instruction.opcode
    if opcode in WITHOUT_RESULT and opcode != "SYNCS":
        return _nothing(instruction)
    if opcode == "UIADD3" and "64" in instruction.modifiers:
        return _sum64(instruction)
    name = opcode if opcode in _VALUES else opcode[1:] if opcode[0] == "U" and opcode[1:] in _VALUES else None
    return (_VALUES[name] if name else _forget)(instruction)
