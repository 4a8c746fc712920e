"""The table of instructions: opcode -> what turns an instruction into a step."""

from __future__ import annotations

from collections.abc import Callable

from .errors import UnsupportedInstructionError
from .parser import Instruction
from .registers import Step

Decode = Callable[[Instruction], Step]
TABLE: dict[str, Decode] = {}


def implements(*opcodes: str) -> Callable[[Decode], Decode]:
    """Enter a decoder into the table."""

    def enter(decode: Decode) -> Decode:
        TABLE.update(dict.fromkeys(opcodes, decode))
        return decode

    return enter


def decode(instruction: Instruction) -> Step:
    """The step of an unguarded instruction.

    Raises:
        UnsupportedInstructionError: the opcode or a modifier is not implemented.
    """
    if instruction.opcode not in TABLE:
        raise UnsupportedInstructionError(f"opcode {instruction.opcode} of: {instruction.text}")
    try:
        return TABLE[instruction.opcode](instruction)
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # a form that the decoder did not expect
        raise UnsupportedInstructionError(f"form of: {instruction.text}") from error
