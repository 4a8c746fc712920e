"""What is measured: a case is one operator on one set of inputs, with the systems that compute it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .roofline import Bound

# "peer": computes the same. "approximate": nearly the same, its recall is reported. "base": does without ours.
Shape = Mapping[str, int | str]
Role = Literal["ours", "peer", "approximate", "base"]


@dataclass(frozen=True)
class Run:
    """A system on the data of a case.

    Attributes:
        call: what is timed.
        check: takes what `call` returned and raises AssertionError if it is wrong. Returns the recall of a retrieval.
        bound: of ours.
    """

    call: Callable[[], Any]
    check: Callable[[Any], float | None]
    bound: Bound | None = None


@dataclass(frozen=True)
class System:
    """One of those that are compared."""

    role: Role
    prepare: Callable[[Any], Run]  # takes the data of the case


@dataclass(frozen=True)
class Case:
    """Systems that are timed together.

    Attributes:
        op: "retrieval", "attention", "ffn", "decode" or "growth".
        title: says in words what is measured; the group of its rows.
        shape: the sizes and kinds that tell it from the other cases of its operator.
        data: makes what the systems work on; freed after the case.
        systems: name -> system; the first is ours.
        device: where they run, "cpu" or "cuda".
        captured: whether on a GPU a CUDA graph of each is timed.
    """

    op: str
    title: str
    shape: Shape
    data: Callable[[], Any]
    systems: Mapping[str, System]
    device: str = "cpu"
    captured: bool = True

    @property
    def name(self) -> str:
        """The operator and the shape in short."""
        parts = (f"{key}{value}" if isinstance(value, int) else value for key, value in self.shape.items())
        return "-".join((self.op, *parts, *([] if self.device == "cpu" else [self.device])))


def check_close(out: Tensor, expected: Tensor) -> None:
    """Raises AssertionError where they differ by more than sums of some thousand terms may, or a few roundings."""
    wide = expected.double()
    share = max(1e-4, 4 * torch.finfo(out.dtype).eps)
    torch.testing.assert_close(out.double(), wide, rtol=0, atol=share * float(wide.abs().max()))
