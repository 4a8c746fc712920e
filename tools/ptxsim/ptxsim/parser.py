"""PTX text -> kernels as lists of instructions. Nothing here knows what an instruction means."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from .errors import UnsupportedInstructionError

WIDTHS = {"pred": 0, "b8": 1, "b16": 2, "b32": 4, "b64": 8}  # bytes of a register of each bit type
WIDTHS |= {f"{kind}{8 * size}": size for kind in "us" for size in (1, 2, 4, 8)}
WIDTHS |= {"f16": 2, "bf16": 2, "f16x2": 4, "bf16x2": 4, "f32": 4, "f64": 8}


class Register(NamedTuple):
    """A register of the kernel; `negated` is the `!` before a predicate."""

    index: int
    width: int
    negated: bool = False


class Immediate(NamedTuple):
    """A number in the text. `bits` is set for the exact forms 0f... and 0d..."""

    value: int | float
    bits: int | None = None


class Symbol(NamedTuple):
    """A special register, variable, parameter or label."""

    name: str


class Address(NamedTuple):
    """`[base + offset]`."""

    base: Operand
    offset: int


class Vector(NamedTuple):
    """`{a, b}`."""

    items: tuple[Operand, ...]


class Pair(NamedTuple):
    """`d|p`: two destinations."""

    first: Operand
    second: Operand


Operand = Register | Immediate | Symbol | Address | Vector | Pair


@dataclass(frozen=True)
class Instruction:
    """One statement: `@guard opcode.modifier... operands;`, and where it came from."""

    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | None
    text: str
    source: str  # "file:line" of the program that was compiled, where the PTX tells


@dataclass
class Variable:
    """A variable in memory; `size` is 0 for `extern` shared memory, which the launch sizes."""

    name: str
    space: str
    align: int
    size: int
    initial: bytes = b""
    entry: str = ""  # the kernel that it belongs to, if one


@dataclass
class Kernel:
    """An entry: parameters, register widths, and instructions with the labels that stand before them."""

    name: str
    parameters: list[Variable] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)  # .branchtargets
    required_threads: int | None = None


@dataclass
class Module:
    """All kernels and variables of one PTX file."""

    kernels: dict[str, Kernel]
    variables: list[Variable]
    target: str


def parse(text: str) -> Module:
    """Read a PTX file.

    Raises:
        UnsupportedInstructionError: a statement outside the grammar that is read here.
    """
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    text = re.sub(r"//[^\n]*", "", text)
    files = dict(re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text))
    text = re.sub(r"^\s*\.loc\s+(\d+)\s+(\d+)[^\n]*", r".loc \1 \2;", text, flags=re.MULTILINE)
    target = re.search(r"\.target\s+(\w+)", text)
    module = Module({}, [], target[1] if target else "")
    outside, last = [], 0
    # `.func` bodies are stepped over: a kernel that calls one is refused at the call.
    for header in re.finditer(r"(\.entry\s+([\w$]+)\s*\(([^)]*)\)|\.func\b)([^{};]*)\{", text):
        if header.start() < last:
            continue
        end = _closing_brace(text, header.end())
        if header[2]:
            kernel = _kernel(header, text[header.end() : end], files, module)
            module.kernels[kernel.name] = kernel
        outside.append(text[last : header.start()])
        last = end + 1
    outside.append(text[last:].split(".section")[0])
    for statement in "\n".join(outside).split(";"):
        variable = _variable(statement)
        if variable:
            module.variables.append(variable)
    return module


def _kernel(header: re.Match, body: str, files: dict[str, str], module: Module) -> Kernel:
    kernel = Kernel(header[2])
    threads = re.search(r"\.reqntid\s+([\d, ]+)", header[4])
    if threads:
        kernel.required_threads = _product(threads[1])
    for declaration in header[3].split(","):
        if declaration.strip():
            kernel.parameters.append(_parameter(declaration))
    scopes: list[dict[str, Register]] = [{}]
    source, position = "", 0
    while True:
        # A brace where a statement could start opens a scope: inline assembly declares registers of its own in one.
        token = re.compile(r"\s*(?:([{}])|([\w$%.]+):(?!:)|([^;]*);)").match(body, position)
        if token is None:
            break
        position = token.end()
        brace, label, statement = token.groups()
        if brace:
            scopes = [*scopes, {}] if brace == "{" else scopes[:-1]
        elif label:
            table = re.compile(r"\s*\.branchtargets([^;]*);").match(body, position)
            if table:
                kernel.tables[label] = [name.strip() for name in table[1].split(",")]
                position = table.end()
            kernel.labels[label] = len(kernel.code)
        elif statement.startswith(".loc "):
            file, line = statement.split()[1:3]
            source = f"{files.get(file, '?').rsplit('/', 1)[-1]}:{line}"
        elif statement.startswith(".reg"):
            _declare(statement, scopes[-1], kernel.widths)
        elif statement.startswith("."):
            variable = _variable(statement)
            if variable is None:
                if not statement.startswith(".pragma"):
                    raise UnsupportedInstructionError(f"directive {statement.split()[0]}")
                continue
            variable.entry = kernel.name
            module.variables.append(variable)
        elif statement.strip():
            kernel.code.append(_instruction(" ".join(statement.split()), scopes, source))
    return kernel


def _closing_brace(text: str, start: int) -> int:
    depth = 1
    for brace in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.start()
    raise UnsupportedInstructionError("a function without an end")


def _product(numbers: str) -> int:
    total = 1
    for number in numbers.split(","):
        total *= int(number)
    return total


def _parameter(declaration: str) -> Variable:
    array = re.search(r"\.align\s+(\d+)\s+\.b8\s+([\w$]+)\s*\[(\d+)\]", declaration)
    if array:
        return Variable(array[2], "param", int(array[1]), int(array[3]))
    scalar = re.search(r"\.param\s+\.(\w+)\b.*?([\w$]+)\s*$", declaration, re.DOTALL)
    if scalar is None or scalar[1] not in WIDTHS:
        raise UnsupportedInstructionError(f"parameter {declaration.strip()}")
    return Variable(scalar[2], "param", WIDTHS[scalar[1]], WIDTHS[scalar[1]])


def _variable(statement: str) -> Variable | None:
    declared = re.search(
        r"\.(shared|global|const|local)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)\s*((?:\[\d*\])*)\s*(?:=\s*(.*))?$",
        statement.strip(),
        re.DOTALL,
    )
    if declared is None:
        return None
    space, align, kind, name, dimensions, values = declared.groups()
    size = WIDTHS[kind]
    for length in re.findall(r"\[(\d*)\]", dimensions):
        size *= int(length or 0)
    initial = b""
    for value in re.findall(r"[^{},\s]+", values or ""):
        number = immediate(value)
        if number is None:
            raise UnsupportedInstructionError(f"initial value {value} of {name}")
        bits = int(number.value) if number.bits is None else number.bits
        initial += (bits % 256 ** WIDTHS[kind]).to_bytes(WIDTHS[kind], "little")
    return Variable(name, space, int(align or WIDTHS[kind]), size, initial)


def _declare(statement: str, scope: dict[str, Register], widths: list[int]) -> None:
    kind, names = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", statement.strip(), re.DOTALL).groups()
    if kind not in WIDTHS:
        raise UnsupportedInstructionError(f"registers of type .{kind}")
    for name in names.split(","):
        stem, count = re.fullmatch(r"([\w%$.]+)(?:<(\d+)>)?", name.strip()).groups()
        for each in [stem] if count is None else [f"{stem}{i}" for i in range(int(count))]:
            scope[each] = Register(len(widths), WIDTHS[kind])
            widths.append(WIDTHS[kind])


def _instruction(statement: str, scopes: list[dict[str, Register]], source: str) -> Instruction:
    match = re.fullmatch(r"(?:@(!?)([\w%$]+)\s+)?([\w.:]+)\s*(.*)", statement, re.DOTALL)
    if match is None:
        raise UnsupportedInstructionError(statement)
    negated, guard, name, rest = match.groups()
    opcode, *modifiers = name.split(".")
    operands = tuple(_operand(item, scopes) for item in _split(rest))
    condition = None
    if guard:
        condition = _operand(negated + guard, scopes)
        if not isinstance(condition, Register):
            raise UnsupportedInstructionError(statement)
    return Instruction(opcode, tuple(modifiers), operands, condition, statement, source)


def _split(text: str) -> list[str]:
    """At the commas outside of brackets."""
    items, depth, current = [], 0, ""
    for character in text:
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            items.append(current)
            current = ""
        else:
            current += character
    return [item.strip() for item in [*items, current] if item.strip()]


def _operand(text: str, scopes: list[dict[str, Register]]) -> Operand:
    if text[0] == "{":
        return Vector(tuple(_operand(item, scopes) for item in _split(text[1:-1])))
    if text[0] == "[":
        base, offset = re.fullmatch(r"\[\s*([^\s+]+)\s*(?:\+\s*(-?\w+)\s*)?\]", text).groups()
        return Address(_operand(base, scopes), int(offset or "0", 0))
    if "|" in text:
        first, second = text.split("|")
        return Pair(_operand(first.strip(), scopes), _operand(second.strip(), scopes))
    if text[0] == "!":
        return _operand(text[1:], scopes)._replace(negated=True)
    for scope in reversed(scopes):
        if text in scope:
            return scope[text]
    return immediate(text) or Symbol(text)


def immediate(text: str) -> Immediate | None:
    """The number that `text` spells, or None."""
    exact = re.fullmatch(r"0[fFdD]([0-9a-fA-F]+)", text)
    if exact and len(exact[1]) in (8, 16):
        return Immediate(0.0, int(exact[1], 16))
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?", text):
        digits = text.rstrip("U")
        octal = re.fullmatch(r"(-?)0([0-7]+)", digits)
        return Immediate(int(f"{octal[1]}0o{octal[2]}", 0) if octal else int(digits, 0))
    if re.fullmatch(r"-?\d+\.\d*([eE][-+]?\d+)?", text):
        return Immediate(float(text))
    return None
