"""`with` blocks that belong to the logical call that enters them: an asyncio task, a thread, or a generator.

Tasks, and threads that run in a copy of a context, have a block by a contextvar. A generator has no context of its own:
what it enters between two yields would stay with whoever consumes it. So a block that a generator enters is in force
where that generator is on the stack, and only there.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from inspect import CO_ASYNC_GENERATOR, CO_COROUTINE, CO_GENERATOR
from types import FrameType
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Block(Generic[T]):
    """An open `with` block."""

    def __init__(self, ambient: Ambient[T], value: T, generator: int | None) -> None:
        self.ambient, self.value, self.generator = ambient, value, generator
        self.thread = threading.get_ident()


_entered: ContextVar[tuple[Block[Any], ...]] = ContextVar("unike_entered", default=())


class Ambient(Generic[T]):
    """The open blocks of one kind and one model; the innermost one of a logical call gives the value in force."""

    def __init__(self) -> None:
        self._open: list[Block[T]] = []
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Ambient[T]], tuple[()]]:  # a copy of a model has no open blocks
        return Ambient, ()

    @property
    def blocks(self) -> list[Block[T]]:
        """All open ones, of whatever call, in the order in which they were entered."""
        return self._open

    def innermost(self) -> Block[T] | None:
        """The block in force for whoever calls, or None."""
        if not self._open:
            return None
        owners = {block.generator for block in self._open} - {None}
        for generator in _generators(sys._getframe()) if owners else ():
            if generator in owners:
                return [block for block in self._open if block.generator == generator][-1]
        mine = [block for block in _entered.get() if block.ambient is self and block in self._open]
        return next((block for block in reversed(mine) if block.generator is None or _waits(block)), None)

    @contextlib.contextmanager
    def entered(self, value: T) -> Iterator[Block[T]]:
        """Within the block `value` is in force for the logical call that enters it, and for nobody afterwards."""
        block = Block(self, value, next(_generators(sys._getframe()), None))
        try:
            with self._lock:
                self._open = [*self._open, block]
            _entered.set((*_entered.get(), block))
            yield block
        finally:
            with self._lock:
                self._open = [other for other in self._open if other is not block]
            # Other contexts may still list it; it counts only while it is open.
            _entered.set(tuple(other for other in _entered.get() if other in other.ambient.blocks))


# Generators that a `with` statement drives: what they enter is for its body.
_WITH = {
    contextlib._GeneratorContextManager.__enter__.__code__,
    contextlib._AsyncGeneratorContextManager.__aenter__.__code__,
}


def _generators(frame: FrameType | None) -> Iterator[int]:
    """Ids of the frames of the generators that run now, innermost first.

    A coroutine belongs to a task, which has a context: whatever plain generator runs the event loop does not count.
    """
    in_task = False
    while frame is not None:
        flags, caller = frame.f_code.co_flags, frame.f_back
        in_task |= bool(flags & CO_COROUTINE)
        generator = flags & CO_ASYNC_GENERATOR or (flags & CO_GENERATOR and not in_task)
        if generator and (caller is None or caller.f_code not in _WITH):
            yield id(frame)
        frame = caller


def _waits(block: Block[Any]) -> bool:
    """Whether the generator that entered the block runs, in another thread, and waits for this one."""
    if block.thread == threading.get_ident():
        return False
    return block.generator in list(_generators(sys._current_frames().get(block.thread)))
