"""What edits, memories and traces say of themselves: a line that a person can read, and no tensors."""

from __future__ import annotations

from scopes import scoped

import unike_kernels as uk


def test_edits_and_memories(make_model, make_memory, make_edit):
    model = make_model("llama")
    memory = make_memory(model)
    edit = make_edit(model, "a", memory)
    assert repr(edit) == (
        f"Edit('a', neurons in layers 2: 5, 3: 5, 4: 5, 5: 5, {edit.nbytes:,} bytes, memory {memory.id}, "
        "prompt 'w1 w2')"
    )
    assert repr(memory) == f"MemoryBank({memory.id}, 50 entries in layers 2, 3, 4, 5, {memory.nbytes:,} bytes)"
    joined = uk.MemoryBank.joined({"acme": memory, "globex": memory})
    assert repr(joined).endswith(" bytes, tenants 'acme', 'globex')")
    scope, (alone, _) = scoped(model, make_edit, (2, 3))
    assert repr(scope).startswith(f"MemoryBank({scope.id}, 0 entries in layers none, ")
    assert repr(scope).endswith(", a scope of 1 facts)")
    assert "memory " not in repr(uk.Edit(**{**vars(alone), "memory_id": None}))


def test_a_trace(make_model, make_memory, make_inputs):
    model = make_model("llama")
    with uk.patched(model, memory=make_memory(model)), uk.explain(model) as trace:
        model(**make_inputs("llama", ["w1 w2 w3"]), use_cache=False)
    told = trace.counters()
    assert repr(trace).startswith(f"1 passes: {told['shifted']} of {told['tokens']} tokens shifted, by ")
