"""Kernels without one of their barriers, waits or fences: a test that does not notice proves little."""

from __future__ import annotations

import dataclasses
from typing import Any

from .counters import Launch
from .parser import Instruction
from .session import LoadedKernel, Session


def orders_something(instruction: Instruction) -> bool:
    """Whether it is a barrier, a fence or a wait for copies."""
    waits = instruction.opcode == "cp" and {"wait_group", "wait_all"} & set(instruction.modifiers)
    return instruction.opcode in ("bar", "barrier", "membar", "fence") or bool(waits)


class Mutating(Session):
    """Launches kernels with `opcode`, by default one without effect, for the `victim`-th that orders something.

    A negative victim leaves them as they are; `sites` tells what there is in the kernel launched last.
    """

    def __init__(self, schedule: str, victim: int, opcode: str = "pmevent"):
        super().__init__(schedule)
        self.victim, self.opcode = victim, opcode
        self.sites: list[str] = []

    def launch(self, kernel: LoadedKernel, *arguments: Any, **options: Any) -> Launch:
        """As of a session, but of the mutant."""
        places = [i for i, each in enumerate(kernel.kernel.code) if orders_something(each)]
        self.sites = [f"{kernel.kernel.code[i].text} ({kernel.kernel.code[i].source})" for i in places]
        if self.victim >= 0:
            code = list(kernel.kernel.code)
            code[places[self.victim]] = dataclasses.replace(code[places[self.victim]], opcode=self.opcode, modifiers=())
            mutant = dataclasses.replace(kernel.kernel, code=code)
            kernel = LoadedKernel(kernel.module, mutant, kernel.variables)
        return super().launch(kernel, *arguments, **options)
