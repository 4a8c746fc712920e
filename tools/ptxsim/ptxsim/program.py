"""A parsed kernel -> a program: every instruction decoded once, guards and the ends of basic blocks included."""

from __future__ import annotations

import numpy as np

from . import comparisons, integers, mma, reals, transfers, warps  # noqa: F401  (they fill the table)
from .control import BARRIERS, BasicBlock, basic_blocks, ends_block
from .errors import SimulationError, UnsupportedInstructionError
from .machine import DecodedBlock, Program
from .parser import Immediate, Instruction, Kernel, Module, Symbol
from .registers import Mask, Modifiers, Step, reader
from .table import TABLE, decode, implements


def build(module: Module, kernel: Kernel, addresses: dict[str, int]) -> Program:
    """Lay out the kernel's variables and decode its code; `addresses` are those of the module's global variables.

    Raises:
        UnsupportedInstructionError: an instruction that is not implemented, whether it would be executed or not.
    """
    text = {symbol.name for i in kernel.code for symbol in _symbols(i)}
    symbols, sizes = dict(addresses), {"shared": 0, "local": 0}
    # `extern` shared memory has size 0 and begins where the static variables end.
    for variable in sorted(module.variables, key=lambda v: v.size == 0):
        if variable.space in sizes and variable.name in text and variable.entry in ("", kernel.name):
            start = -(-sizes[variable.space] // variable.align) * variable.align
            symbols[variable.name] = start
            sizes[variable.space] = start + variable.size
    blocks = basic_blocks(kernel)
    decoded = [_decode_block(block, place, kernel) for place, block in enumerate(blocks)]
    return Program(kernel, decoded, symbols, sizes["shared"], sizes["local"])


def _symbols(instruction: Instruction) -> list[Symbol]:
    operands = [getattr(operand, "base", operand) for operand in instruction.operands]
    return [operand for operand in operands if isinstance(operand, Symbol)]


def _decode_block(block: BasicBlock, place: int, kernel: Kernel) -> DecodedBlock:
    code = block.code
    if ends_block(code[-1]):
        last: Instruction | None = code[-1]
        code = code[:-1]
        end = _decode_end(last, block, place)
    else:
        last, follows = None, block.follows
        if follows is None:
            raise UnsupportedInstructionError(f"{kernel.name} runs past its end")
        end = lambda group, mask: group.go(mask, follows)  # noqa: E731
    return DecodedBlock([(instruction, _guarded(instruction)) for instruction in code], (last, end), block)


def _guarded(instruction: Instruction) -> Step:
    step = decode(instruction)
    if instruction.guard is None:
        return step
    condition = reader(instruction.guard, "pred")

    def guarded(group, mask: Mask) -> None:
        here = condition(group) if mask is None else mask & condition(group)
        if here.all():
            step(group, None)
        elif here.any():
            step(group, here)

    return guarded


def _decode_end(instruction: Instruction, block: BasicBlock, place: int) -> Step:
    modifiers = Modifiers(instruction)
    if instruction.opcode in BARRIERS:
        taken = _barrier(instruction, modifiers, block.follows)
    elif instruction.opcode == "bra":
        modifiers.flag("uni")
        target = block.targets[0]
        taken = _jump(target, back=target <= place and block.spins)
    elif instruction.opcode == "brx":
        modifiers.ignore("idx", "uni")
        index, table = reader(instruction.operands[0], "u32"), np.array(block.targets)
        taken = lambda group, mask: group.go(mask, table[np.where(_full(group, mask), index(group), 0)])  # noqa: E731
    else:
        modifiers.flag("uni")
        taken = lambda group, mask: group.block.leave(group, mask)  # noqa: E731
    modifiers.done()
    if instruction.guard is None:
        return taken
    condition, follows = reader(instruction.guard, "pred"), block.follows

    def guarded(group, mask: Mask) -> None:
        here = _full(group, mask)
        chosen = here & condition(group)
        group.go(here & ~chosen, follows)
        if chosen.any():
            taken(group, None if chosen.all() else chosen)

    return guarded


def _full(group, mask: Mask) -> np.ndarray:
    return np.ones(group.size, bool) if mask is None else mask


def _jump(target: int, back: bool) -> Step:
    def jump(group, mask: Mask) -> None:
        group.go(mask, target)
        if back:
            group.let_others_run(group.selected(mask))

    return jump


def _barrier(instruction: Instruction, modifiers: Modifiers, follows: int | None) -> Step:
    modifiers.ignore("cta", "aligned")
    if not modifiers.flag("sync"):
        raise UnsupportedInstructionError(f"only the .sync form: {instruction.text}")
    if not all(isinstance(operand, Immediate) for operand in instruction.operands):
        raise UnsupportedInstructionError(f"computed barrier: {instruction.text}")
    number, *threads = (int(operand.value) for operand in instruction.operands)

    def wait(group, mask: Mask) -> None:
        group.go(mask, follows)
        group.block.arrive(group, mask, number, threads[0] if threads else None, instruction)

    return wait


@implements("bar", "barrier")
def _warp_barrier(instruction: Instruction) -> Step:
    return warps.warp_barrier(instruction)


@implements("trap", "brkpt")
def _trap(instruction: Instruction) -> Step:
    def trap(group, mask: Mask) -> None:
        raise SimulationError(group.where(int(group.selected(mask)[0]), "trap"))

    return trap


def opcodes() -> list[str]:
    """All that is implemented."""
    return sorted({*TABLE, "bra", "brx", "ret", "exit"})
