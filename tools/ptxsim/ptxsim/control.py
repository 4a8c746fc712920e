"""Control flow: basic blocks in an order in which the lanes of a warp meet again as early as they can.

The blocks are put into a weak topological order (Bourdoncle, 1993): every edge goes forwards except those back to the
head of a loop, and the blocks of a loop are contiguous. A warp whose lanes have parted always runs the lanes that are
furthest back, so all lanes of a branch arrive at its immediate post-dominator, and all lanes of a loop behind the loop,
before any of them goes on. Barriers end a block: a warp can be left and resumed there.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import UnsupportedInstructionError
from .parser import Instruction, Kernel, Symbol

ENDS = {"bra", "ret", "exit", "brx"}
BARRIERS = {"bar", "barrier"}


@dataclass
class BasicBlock:
    """Straight-line code; `targets` are the branch targets, `follows` is the block behind it, both as positions."""

    code: list[Instruction]
    targets: list[int]
    follows: int | None
    spins: bool = False  # a loop around it reads what others may write: its back edges let the others run


def ends_block(instruction: Instruction) -> bool:
    """Whether control may leave here, or a warp may have to wait for the others."""
    if instruction.opcode in BARRIERS:
        return "warp" not in instruction.modifiers
    return instruction.opcode in ENDS


def basic_blocks(kernel: Kernel) -> list[BasicBlock]:
    """The blocks of the kernel in weak topological order; the entry is the first."""
    code = kernel.code
    starts = {0}
    for position, instruction in enumerate(code):
        if ends_block(instruction):
            starts.add(position + 1)
            starts.update(kernel.labels[name] for name in _target_labels(instruction, kernel))
    leaders = sorted(start for start in starts if start < len(code))
    number = {start: i for i, start in enumerate(leaders)}
    blocks = []
    for i, start in enumerate(leaders):
        stop = leaders[i + 1] if i + 1 < len(leaders) else len(code)
        last = code[stop - 1]
        targets = [number[kernel.labels[name]] for name in _target_labels(last, kernel) if ends_block(last)]
        never_falls = last.guard is None and last.opcode in ENDS
        blocks.append(BasicBlock(code[start:stop], targets, None if never_falls or stop == len(code) else i + 1))
    order, loops = _weak_topological_order([_successors(block) for block in blocks])
    for loop in loops:
        if any(_may_wait_for_others(instruction) for i in loop for instruction in blocks[i].code):
            for i in loop:
                blocks[i].spins = True
    place = {block: position for position, block in enumerate(order)}
    for block in blocks:
        block.targets = [place[target] for target in block.targets]
        block.follows = None if block.follows is None else place[block.follows]
    return [blocks[i] for i in order]


def _target_labels(instruction: Instruction, kernel: Kernel) -> list[str]:
    names = [operand.name for operand in instruction.operands if isinstance(operand, Symbol)]
    if instruction.opcode == "bra":
        if names[0] not in kernel.labels:
            raise UnsupportedInstructionError(f"branch to {names[0]}, which is no label")
        return names[:1]
    return kernel.tables[names[-1]] if instruction.opcode == "brx" else []


def _successors(block: BasicBlock) -> list[int]:
    return block.targets + ([] if block.follows is None else [block.follows])


def _may_wait_for_others(instruction: Instruction) -> bool:
    strong_read = instruction.opcode == "ld" and {"volatile", "acquire", "relaxed"} & set(instruction.modifiers)
    return instruction.opcode in {"atom", "nanosleep"} or bool(strong_read)


def _weak_topological_order(successors: list[list[int]]) -> tuple[list[int], list[list[int]]]:
    """Reachable nodes in order, and the nodes of each loop, by strongly connected components, recursively."""
    loops: list[list[int]] = []

    def order(nodes: set[int], entry: int, removed: int | None) -> list[int]:
        # `removed` is the head of the loop that `nodes` form: edges to it are its back edges.
        result: list[int] = []
        for component in _components(nodes, entry, successors, removed):
            head = component[0]
            if len(component) > 1 or (head in successors[head] and head != removed):
                loops.append(component)
                result += order(set(component), head, head)
            else:
                result.append(head)
        return result

    return order(set(range(len(successors))), 0, None), loops


def _components(nodes: set[int], entry: int, successors: list[list[int]], removed: int | None) -> list[list[int]]:
    """Tarjan's algorithm without recursion: components in topological order, each with its first-reached node first."""
    index: dict[int, int] = {entry: 0}
    low = {entry: 0}
    stack, on_stack = [entry], {entry}
    work = [(entry, iter(successors[entry]))]
    found: list[list[int]] = []
    while work:
        node, edges = work[-1]
        for target in edges:
            if target not in nodes or target == removed:
                continue
            if target not in index:
                index[target] = low[target] = len(index)
                stack.append(target)
                on_stack.add(target)
                work.append((target, iter(successors[target])))
                break
            if target in on_stack:
                low[node] = min(low[node], index[target])
        else:
            work.pop()
            if work:
                low[work[-1][0]] = min(low[work[-1][0]], low[node])
            if low[node] == index[node]:
                cut = stack.index(node)
                component, stack = stack[cut:], stack[:cut]
                on_stack -= set(component)
                found.append(component)
    return found[::-1]
