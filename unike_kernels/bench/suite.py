"""The selections of cases."""

from __future__ import annotations

from . import attention, decode, ffn, retrieval
from .cases import Case

OPERATORS = {"retrieval": retrieval, "attention": attention, "ffn": ffn, "decode": decode}
SELECTIONS = ("quick", "full")


def cases(select: str = "quick", *, only: str | None = None, growth: bool = False) -> list[Case]:
    """The cases to measure, those of an operator together.

    Args:
        select: "quick", the rows that matter, some minutes; or "full", all that is reasonable, most of an hour.
        only: one of `OPERATORS`; None: all.
        growth: add retrieval from 15,000 to a million keys.

    Raises:
        ValueError: another selection or operator.
    """
    if select not in SELECTIONS:
        raise ValueError(f"select: expected one of {', '.join(SELECTIONS)}; got {select!r}")
    if only is not None and only not in OPERATORS:
        raise ValueError(f"only: expected one of {', '.join(OPERATORS)}; got {only!r}")
    found: list[Case] = []
    for name, operator in OPERATORS.items():
        if only in (None, name):
            found += operator.quick() if select == "quick" else operator.full()
    return [*found, *retrieval.growth()] if growth else found
