"""The selections of cases."""

from __future__ import annotations

from .cases import attention, decode, ffn, retrieval, retrieval_gpu
from .harness.case import Case

OPERATORS = {"retrieval": retrieval, "attention": attention, "ffn": ffn, "decode": decode}
SELECTIONS = ("quick", "full")


DEVICES = ("cpu", "cuda")
_ON_CUDA = {"retrieval": retrieval_gpu, "attention": attention, "ffn": ffn, "decode": decode}


def cases(select: str = "quick", *, only: str | None = None, growth: bool = False, device: str = "cpu") -> list[Case]:
    """The cases to measure, those of an operator together.

    Args:
        select: "quick", the rows that matter, some minutes; or "full", all that is reasonable, most of an hour.
        only: one of `OPERATORS`; None: all.
        growth: add retrieval from 15,000 to a million keys; on the CPU.
        device: "cpu" or "cuda".

    Raises:
        ValueError: another selection or operator.
    """
    if select not in SELECTIONS:
        raise ValueError(f"select: expected one of {', '.join(SELECTIONS)}; got {select!r}")
    if only is not None and only not in OPERATORS:
        raise ValueError(f"only: expected one of {', '.join(OPERATORS)}; got {only!r}")
    if device not in DEVICES:
        raise ValueError(f"device: expected one of {', '.join(DEVICES)}; got {device!r}")
    found: list[Case] = []
    if device == "cuda":
        for name, on_cuda in _ON_CUDA.items():
            if only in (None, name):
                found += on_cuda.quick(device) if select == "quick" else on_cuda.full(device)
        return found
    for name, operator in OPERATORS.items():
        if only in (None, name):
            found += operator.quick() if select == "quick" else operator.full()
    return [*found, *retrieval.growth()] if growth else found
