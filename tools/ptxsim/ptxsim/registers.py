"""Operands -> closures that read and write whole registers, one element per lane.

A register is an unsigned array of its width (bool for predicates) that is replaced, never changed in place, so that
two registers may share one array. `mask` is None where all lanes of the group are active.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .errors import UnsupportedInstructionError
from .parser import WIDTHS, Immediate, Instruction, Operand, Pair, Register, Symbol, Vector

if TYPE_CHECKING:
    from .machine import Group

UNSIGNED = {0: np.dtype(bool), 1: np.dtype("u1"), 2: np.dtype("u2"), 4: np.dtype("u4"), 8: np.dtype("u8")}
NUMPY = {"pred": UNSIGNED[0]}
for _kind, _width in WIDTHS.items():
    NUMPY.setdefault(_kind, np.dtype(f"i{_width}") if _kind[0] == "s" else UNSIGNED[_width])
NUMPY |= {"f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8")}

Mask = np.ndarray | None
Read = Callable[["Group"], np.ndarray]
Write = Callable[["Group", Mask, np.ndarray], None]
Step = Callable[["Group", Mask], None]


class Modifiers:
    """The modifiers of an instruction, taken one by one: what nobody takes is an error that names it."""

    def __init__(self, instruction: Instruction):
        self.left = list(instruction.modifiers)
        self.text = instruction.text

    def flag(self, name: str) -> bool:
        """Whether `name` is there."""
        return self.one_of(name) is not None

    def one_of(self, *names: str) -> str | None:
        """The first of `names` that is there."""
        for name in names:
            if name in self.left:
                self.left.remove(name)
                return name
        return None

    def ignore(self, *names: str) -> None:
        """Modifiers that change nothing that is modelled."""
        self.left = [name for name in self.left if name not in names]

    def type(self) -> str:
        """The last type among the modifiers."""
        for position in reversed(range(len(self.left))):
            if self.left[position] in WIDTHS:
                return self.left.pop(position)
        raise UnsupportedInstructionError(f"no type that is known in: {self.text}")

    def done(self) -> None:
        """Nothing may be left."""
        if self.left:
            raise UnsupportedInstructionError(f"modifier {', '.join('.' + name for name in self.left)} of: {self.text}")


def constant(value: Immediate, dtype: np.dtype) -> np.ndarray:
    """The number as an array of one element."""
    if value.bits is not None:
        exact = np.array([value.bits], np.uint64)
        if dtype.kind == "f":
            wide = exact.view(np.float64) if value.bits >> 32 else exact.astype(np.uint32).view(np.float32)
            return wide.astype(dtype) if dtype.itemsize < 4 else exact.astype(UNSIGNED[dtype.itemsize]).view(dtype)
        return exact.astype(dtype)
    if dtype.kind == "f":
        return np.array([value.value], dtype)
    if dtype.kind == "b":
        return np.array([bool(value.value)])
    return np.array([int(value.value) % 256**dtype.itemsize], UNSIGNED[dtype.itemsize]).view(dtype)


def reader(operand: Operand, kind: str) -> Read:
    """Read `operand` as PTX type `kind`."""
    dtype = NUMPY[kind]
    if isinstance(operand, Immediate):
        value = constant(operand, dtype)
        return lambda group: value
    if isinstance(operand, Symbol):
        name = operand.name
        return lambda group: group.symbol(name).astype(dtype, copy=False)
    if not isinstance(operand, Register):
        raise UnsupportedInstructionError(f"operand {operand} as a source")
    index, width, negated = operand
    if width == 0:
        if negated:
            return lambda group: ~group.registers[index]
        return lambda group: group.registers[index]
    if width == dtype.itemsize:
        if dtype == UNSIGNED[width]:
            return lambda group: group.registers[index]
        return lambda group: group.registers[index].view(dtype)
    if width < dtype.itemsize:
        raise UnsupportedInstructionError(f"register of {width} bytes read as .{kind}")
    narrow = UNSIGNED[dtype.itemsize]
    return lambda group: group.registers[index].astype(narrow).view(dtype)


def writer(operand: Operand, kind: str) -> Write:
    """Write values of PTX type `kind`; a wider register is extended by the sign of `kind`."""
    if operand == Symbol("_"):
        return lambda group, mask, value: None
    if not isinstance(operand, Register):
        raise UnsupportedInstructionError(f"operand {operand} as a destination")
    index, width, _ = operand
    register = UNSIGNED[width]
    source = NUMPY[kind]
    if width < source.itemsize and width:
        raise UnsupportedInstructionError(f"register of {width} bytes written as .{kind}")
    extends = width > source.itemsize and width > 0
    extended = np.dtype(f"i{width}") if source.kind == "i" else register

    def write(group: Group, mask: Mask, value: np.ndarray) -> None:
        if extends:
            value = value.view(source).astype(extended)
        value = value.view(register)
        if len(value) != group.size:
            value = np.broadcast_to(value, group.size).copy()
        group.registers[index] = value if mask is None else np.where(mask, value, group.registers[index])

    return write


def sources(instruction: Instruction, kind: str, count: int) -> list[Read]:
    """The last `count` operands as `kind`; there is one more in front, the destination."""
    if len(instruction.operands) != count + 1:
        raise UnsupportedInstructionError(f"{len(instruction.operands)} operands: {instruction.text}")
    return [reader(operand, kind) for operand in instruction.operands[1:]]


def per_lane(group: Group, value: np.ndarray) -> np.ndarray:
    """One element for each lane, where `value` may be a constant of one element."""
    return value if len(value) == group.size else np.broadcast_to(value, group.size)


def items(operand: Operand) -> tuple[Operand, ...]:
    """The members of a vector, or the operand itself."""
    return operand.items if isinstance(operand, Vector) else (operand,)


def pair(operand: Operand) -> tuple[Operand, Operand]:
    """Both destinations; the sink where there is only one."""
    return (operand.first, operand.second) if isinstance(operand, Pair) else (operand, Symbol("_"))
