"""A binary -> its instructions, with what ptxas wrote beside each for the hardware: how long it stalls, what it awaits.

Since Volta the hardware checks no registers. Bits 105 to 125 of an instruction say how many cycles the warp waits
behind it, which of six counters it holds until its result is there, or its operands are read, and which counters have
to be free before it starts (Jia et al., "Dissecting the NVIDIA Volta GPU architecture via microbenchmarking", 2018). So
the binary itself says which load waits for which.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton

NONE = 7  # no counter
_LINE = re.compile(r'//## File "([^"]*)", line (\d+)')
_CODE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?)(\w+)\s+)?([A-Z]\w*)([\w.]*)\s*(.*?)\s*;\s*/\* 0x[0-9a-f]{16} \*/")
_REST = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")


@dataclass(frozen=True)
class SassInstruction:
    """`@guard opcode.modifier... operands` at a place of the kernel; branches name the place of their target."""

    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]
    guard: str | None
    negated: bool
    target: int | None
    stall: int
    result: int  # the counter that is held until the result is there
    operands_read: int  # the one that is held until the operands are read
    waits: tuple[int, ...]
    source: str

    @property
    def width(self) -> int:
        """Bytes of a lane's access to memory."""
        sizes = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
        return next((sizes[name] for name in self.modifiers if name in sizes), 4)

    @property
    def name(self) -> str:
        """The opcode with its modifiers."""
        return ".".join((self.opcode, *self.modifiers))


@dataclass
class Code:
    """The instructions of one kernel, and what a block of it takes."""

    kernel: str
    arch: int
    code: list[SassInstruction]
    registers: int
    shared: int  # bytes, of static variables

    def loops(self) -> list[tuple[int, int]]:
        """Head and last instruction of each loop, by its branch back."""
        back = ((i.target, at) for at, i in enumerate(self.code) if i.opcode == "BRA" and "DIV" not in i.modifiers)
        return sorted({(target, at) for target, at in back if target is not None and target <= at})


def read(cubin: bytes, kernel: str) -> Code:
    """Disassemble `kernel`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = tool(triton.knobs.nvidia.nvdisasm.path, "-c", "-g", "-hex", path)
        usage = tool(triton.knobs.nvidia.cuobjdump.path, "-res-usage", path)
    arch = int(re.search(r"(?:EF_CUDA_SM|\.target\s+sm_)(\d+)", text)[1])
    body = text.split(f".text.{kernel}:\n", 1)[1].split("\n\t.section", 1)[0]
    taken = re.search(rf"Function {re.escape(kernel)}:\s+REG:(\d+) STACK:\d+ SHARED:(\d+)", usage)
    return Code(kernel, arch, _instructions(body), int(taken[1]), int(taken[2]))


def tool(*command: object) -> str:
    """What a program prints."""
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def _instructions(text: str) -> list[SassInstruction]:
    labels: dict[str, int] = {}
    found: list[tuple[re.Match, str, int]] = []
    source, pending = "", None
    for line in text.splitlines():
        if pending:
            found.append((*pending, int(_REST.match(line)[1], 16)))
            pending = None
        elif match := _CODE.search(line):
            pending = match, source
        elif match := _LINE.search(line):
            if "inlined at" not in line or not source:
                source = f"{match[1].rsplit('/', 1)[-1]}:{match[2]}"
        elif match := re.match(r"(\S+):$", line):
            labels[match[1]] = len(found)
    return [_instruction(match, source, high >> 41, labels) for match, source, high in found]


def _instruction(match: re.Match, source: str, control: int, labels: dict[str, int]) -> SassInstruction:
    _, negated, guard, opcode, modifiers, rest = match.groups()
    label = re.search(r"`\((.*?)\)", rest)
    operands = re.split(r",\s*", re.sub(r"\.reuse|`\(.*?\)", "", rest)) if rest else []
    return SassInstruction(
        opcode, tuple(modifiers.split(".")[1:]), tuple(each.strip() for each in operands if each.strip()),
        guard, negated == "!", labels.get(label[1]) if label else None,
        control & 15, control >> 5 & 7, control >> 8 & 7, tuple(b for b in range(6) if control >> 11 + b & 1), source,
    )  # fmt: skip
