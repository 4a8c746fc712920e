"""How far a long run is: a bar on a terminal and in a notebook, a line now and then in a log."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import Any

from tqdm.auto import tqdm

_SECONDS = 30.0  # between two lines of a log


def progress_bar(name: str, total: int, shown: bool) -> Any:
    """A context manager with `update(n)` and `set_postfix(...)`.

    Args:
        name: of what is done.
        total: how much there is to do.
        shown: False: nothing is shown; nor is it where the environment says UNIKE_PROGRESS=0.
    """
    shown = shown and os.environ.get("UNIKE_PROGRESS") != "0"
    if shown and not sys.stderr.isatty() and "ipykernel" not in sys.modules:
        return _Log(name, total)
    return tqdm(total=total, desc=name, disable=not shown, leave=False)


class _Log:
    """What takes less than `_SECONDS` says nothing."""

    def __init__(self, name: str, total: int) -> None:
        self._name, self._total, self._done, self._more = name, total, 0, ""
        self._begun = self._told = time.monotonic()

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Nothing is left to be done."""

    def update(self, n: int = 1) -> None:
        self._done += n
        now = time.monotonic()
        if now - self._told >= _SECONDS:
            self._told = now
            line = f"{self._name}: {self._done} of {self._total}{self._more}, {now - self._begun:.0f} s"
            print(line, file=sys.stderr, flush=True)

    def set_postfix(self, **values: object) -> None:
        self._more = "".join(f", {name} {value}" for name, value in values.items())
