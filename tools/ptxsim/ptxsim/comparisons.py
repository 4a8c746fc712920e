"""Comparisons of integers and of numbers."""

from __future__ import annotations

import numpy as np

from .errors import UnsupportedInstructionError
from .parser import Instruction
from .reals import PACKED, real_reader
from .registers import NUMPY, Mask, Modifiers, Step, pair, reader, writer
from .table import implements

COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
COMPARE |= {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
ORDERED_ONLY = dict(COMPARE, ne=lambda a, b: (a < b) | (a > b))
UNORDERED = {
    "equ": "eq",
    "neu": "ne",
    "ltu": "lt",
    "leu": "le",
    "gtu": "gt",
    "geu": "ge",
}


def _unordered(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.isnan(a) | np.isnan(b)


def comparison(name: str, is_float: bool):
    """The numpy function of a comparison; NaN makes the plain ones false and those in -u true."""
    if name == "nan":
        return _unordered
    if name == "num":
        return lambda a, b: ~_unordered(a, b)
    if name in UNORDERED:
        plain = COMPARE[UNORDERED[name]]
        return lambda a, b: plain(a, b) | _unordered(a, b)
    return (ORDERED_ONLY if is_float else COMPARE)[name]


@implements("setp", "set")
def compare(instruction: Instruction) -> Step:
    """Compare, combine with a predicate, and write predicates (of two packed numbers, one each) or all ones."""
    modifiers = Modifiers(instruction)
    kind = modifiers.type()
    result = modifiers.type() if instruction.opcode == "set" else "pred"
    name = modifiers.one_of(*COMPARE, *UNORDERED, "num", "nan")
    boolean = modifiers.one_of("and", "or", "xor")
    ftz = modifiers.flag("ftz")
    modifiers.done()
    if name is None:
        raise UnsupportedInstructionError(f"comparison of: {instruction.text}")
    is_float, packed = "f" in kind, kind in PACKED
    if packed and (boolean or result != "pred"):
        raise UnsupportedInstructionError(instruction.text)
    test = comparison(name, is_float)
    a, b = ((real_reader(o, kind, ftz) if is_float else reader(o, kind)) for o in instruction.operands[1:3])
    third = reader(instruction.operands[3], "pred") if boolean else None
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor, None: None}[boolean]
    first, second = pair(instruction.operands[0])
    write_first, write_second = writer(first, result), writer(second, result)
    true = np.array([1.0], NUMPY[result]) if "f" in result else np.array([-1]).astype(NUMPY[result])

    def step(group, mask: Mask) -> None:
        holds = test(a(group), b(group))
        if packed:
            write_first(group, mask, np.ascontiguousarray(holds[:, 0]))
            write_second(group, mask, np.ascontiguousarray(holds[:, 1]))
            return
        holds = holds.reshape(-1)
        opposite = ~holds
        if combine is not None:
            holds, opposite = combine(holds, third(group)), combine(opposite, third(group))
        if result != "pred":
            holds = np.where(holds, true, np.zeros(1, true.dtype))
        write_first(group, mask, holds)
        write_second(group, mask, opposite)

    return step
