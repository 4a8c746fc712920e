"""Whatever line an interrupt hits: the model computes what it did or what it shall, and can be unpatched and patched.

UNIKE_INTERRUPTS=all tries every line, otherwise a sample of them.
"""

from __future__ import annotations

import os
import random
import sys
import threading
from pathlib import Path

import pytest
import torch

import unike_kernels as uk
from unike_kernels.nn import _drop_in
from unike_kernels.patching import session

ROOT = str(Path(uk.__file__).parent)
IDS = torch.tensor([[5, 6, 7, 8]])


class Interrupt(BaseException):
    """As KeyboardInterrupt, which pytest would take for itself."""


def traced(function, at=0):
    """Run it, interrupted at its line number `at` (0: not at all); the number of its lines that ran."""
    lines = 0

    def tracer(frame, event, _):
        nonlocal lines
        if not frame.f_code.co_filename.startswith(ROOT):
            return None
        if event == "line":
            lines += 1
            if lines == at:
                raise Interrupt
        return tracer

    sys.settrace(tracer)
    try:
        function()
    except Interrupt:
        pass
    finally:
        sys.settrace(None)
    return lines


def chosen(lines):
    """Lines to interrupt: all, or some, half of them among the last, where the model is touched."""
    if os.environ.get("UNIKE_INTERRUPTS") == "all":
        return range(1, lines + 1)
    draw = random.Random(0)
    late = range(max(1, lines - 400), lines + 1)
    return sorted({*draw.sample(range(1, lines + 1), min(4, lines)), *draw.sample(late, min(12, len(late)))})


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


def structure(model):
    held = [(m, {name: list(m.__dict__[name].values()) for name in session._STRUCTURE}) for m in model.modules()]
    return [(id(m), type(m), set(vars(m)), names) for m, names in held]


@pytest.fixture(scope="module")
def parts(make_model, make_memory, make_edit):
    model = make_model("opt")
    memory, other = make_memory(model), make_memory(model, seed=9)
    return model, memory, other, [make_edit(model, name, seed=seed, layers=(3, 5)) for seed, name in enumerate("ab")]


CHANGES = {
    "patch": (None, lambda m, p: uk.patch(m, p[3], p[1], override=True)),
    "replace": (slice(0, 1), lambda m, p: uk.patch(m, p[3], p[2], override=True, replace=True)),
    "unpatch": (slice(0, 2), lambda m, p: uk.unpatch(m)),
    "add_edit": (slice(0, 1), lambda m, p: uk.add_edit(m, p[3][1], override=True)),
    "remove_edit": (slice(0, 2), lambda m, p: uk.remove_edit(m, "b")),
    "set_beta": (slice(0, 2), lambda m, p: uk.set_beta(m, "a", 0.9)),
    "swap_memory": (slice(0, 2), lambda m, p: uk.swap_memory(m, p[2], override=True)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_old_or_the_new_state_is_in_force(parts, name):
    model, memory, _, edits = parts
    first, change = CHANGES[name]
    plain = structure(model), logits(model)

    def begin():
        if uk.is_patched(model):
            uk.unpatch(model)
        if first is not None:
            uk.patch(model, edits[first], memory, override=True)

    begin()
    old = logits(model)
    lines = traced(lambda: change(model, parts))
    new = logits(model)
    assert lines > 10 and not torch.equal(old, new)
    seen = set()
    for at in chosen(lines):
        begin()
        traced(lambda: change(model, parts), at)
        found = logits(model)
        assert torch.equal(found, old) or torch.equal(found, new), at
        seen.add(torch.equal(found, new))
        if uk.is_patched(model):
            state = session.require_state(model)
            thread = threading.Thread(target=lambda state=state: seen.add(("free", state.lock.acquire(timeout=5))))
            thread.start()  # no lock is left held
            thread.join()
            uk.unpatch(model)
        assert structure(model) == plain[0] and torch.equal(logits(model), plain[1]), at
        uk.patch(model, edits[:1], memory, override=True)
        assert uk.is_patched(model)
    assert ("free", False) not in seen and False in seen
    uk.unpatch(model)


def test_a_failure_while_modules_are_adopted(parts, monkeypatch):
    """The fifth module does not get its class."""
    model, memory, _, edits = parts
    plain, set_class, calls = (structure(model), logits(model)), _drop_in.set_class, []

    def failing(module, cls):
        calls.append(module)
        if len(calls) == 5:
            raise MemoryError
        set_class(module, cls)

    monkeypatch.setattr(_drop_in, "set_class", failing)
    with pytest.raises(MemoryError):
        uk.patch(model, edits, memory, override=True)
    assert structure(model) == plain[0]
    plain = plain[1]
    assert torch.equal(logits(model), plain) and not uk.is_patched(model)
    uk.patch(model, edits, memory, override=True)
    assert torch.equal(logits(uk.unpatch(model)), plain)
