"""Steps of an engine as CUDA graphs compute them: recorded once, and computed again with what is written meanwhile."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from capture import Capture
from configs import every_token

import unike_kernels as uk
from unike_kernels.serving import RaggedRuntime, RequestSlice, Version
from unike_kernels.serving.step_tables import StepTables

D, LAYERS, TOKENS = 64, (2, 4), 12


@pytest.fixture
def served(make_model, make_memory, make_edit):
    """() -> a runtime with a memory of two tenants and edits "a" to "d", of which it holds two; and all of them."""
    model = make_model("llama")

    def make(gated=True, **how):
        one = make_memory(model, every_token(**{"k": 7, "values": "out", "alpha": 0.4, **how}), layers=LAYERS)
        turned = {i: replace(m, index=-m.index, values=-m.values) for i, m in one.layers.items()}
        memory = uk.MemoryBank.joined({"acme": one, "globex": replace(one, layers=turned)})
        edits = {
            name: make_edit(model, name, memory, seed=seed, layers=LAYERS, neurons=seed + 2, gated=gated and seed != 1)
            for seed, name in enumerate("abcd")
        }
        runtime = RaggedRuntime(LAYERS, D, "silu", memory)
        for name in "ab":
            runtime.hold(Version(name, edits[name]))
        return runtime, edits

    return make


STEPS = [
    [RequestSlice(3, ("a",), "acme"), RequestSlice(2, (), "globex")],
    [RequestSlice(1, ("b", "a"), False), RequestSlice(4, ("b",), "acme"), RequestSlice(2, (), False)],
    [RequestSlice(12, ("a",), "globex")],
    [RequestSlice(5, ("b",), False)],
    [RequestSlice(2), RequestSlice(6, memory=False)],
    [],
]


def wanted(runtime, shares, x, base):
    """What the runtime itself makes of a step: of its FFN and of its attention."""
    runtime.begin(shares)
    made = {layer: (base.clone(), base.clone()) for layer in LAYERS}
    for layer, (ffn, attention) in made.items():
        runtime.ffn(layer, x, ffn)
        runtime.attention(layer, x, attention)
    return [t for pair in made.values() for t in pair]


@pytest.fixture
def graph():
    """(runtime, tables, tokens) -> shares -> whether the step has room, and then that its replay is right."""

    def record(runtime, tables, tokens=TOKENS):
        x, base = torch.randn(tokens, D), torch.randn(tokens, D)
        outs = [torch.empty(tokens, D) for _ in range(2 * len(LAYERS))]

        def compute():
            for i, (layer, run) in enumerate(itertools.product(LAYERS, (tables.ffn, tables.attention))):
                run(layer, x, outs[i].copy_(base))

        with uk.backend("reference"):  # which reads tables anew each time, as GPUs do
            captured = Capture(compute)

        def replay(shares):
            x.normal_()
            base.normal_()
            with uk.backend("reference"):
                runtime.begin(shares)
                if not runtime.write():
                    return False
                expected = wanted(runtime, shares, x, base)
                runtime.end()
                captured.replay()
            for out, right in zip(outs, expected, strict=True):
                torch.testing.assert_close(out, right, rtol=1e-5, atol=1e-5)
                untouched = (right == base).all(1)
                assert torch.equal(out[untouched], base[untouched])
            return True

        return replay

    return record


@pytest.mark.parametrize("how", [{}, {"tokens": "answer"}])
def test_replays_of_other_steps(how, served, graph):
    runtime, edits = served(**how)
    replay = graph(runtime, runtime.for_graphs(TOKENS, 4, edits=4, like=edits["a"]))
    for shares in (*STEPS, *reversed(STEPS)):
        assert replay(shares)
        assert replay([replace(share, prompt=1) for share in shares])


def test_graphs_of_several_sizes(served, graph):
    runtime, edits = served()
    tables = runtime.for_graphs(TOKENS, 4, edits=4, like=edits["a"])
    small, large = graph(runtime, tables, 7), graph(runtime, tables)
    for _ in range(2):
        assert small(STEPS[1]) and large(STEPS[2]) and large(STEPS[0]) and small(STEPS[0])


def test_edits_that_come_and_go(served, graph):
    """In whatever tensors the bank then has them."""
    runtime, edits = served()
    replay = graph(runtime, runtime.for_graphs(TOKENS, 4, edits=4, like=edits["d"]))
    assert replay([RequestSlice(4, ("a",), "acme"), RequestSlice(4, ("b",))])
    runtime.hold(Version("c", edits["c"]))
    assert replay([RequestSlice(4, ("c",), "acme"), RequestSlice(4, ("a", "c"))])
    runtime.bank.replace(replace(edits["d"], id="c"))
    assert replay([RequestSlice(4, ("c",), "acme"), RequestSlice(4, ("b", "c"))])
    for name in "ab":
        runtime.bank.remove(name)
    assert replay([RequestSlice(2, ("c",)), RequestSlice(2)])
    runtime.bank.remove("c")
    assert replay([RequestSlice(2), RequestSlice(3, memory="acme")])
    runtime.hold(Version("b", edits["b"]))
    assert replay([RequestSlice(2, ("b",)), RequestSlice(3, memory="acme")])


def test_what_there_is_no_room_for(served, graph):
    runtime, edits = served()
    replay = graph(runtime, runtime.for_graphs(TOKENS, 2, edits=2, like=edits["a"]))  # five edits of two neurons
    assert replay(STEPS[0])
    assert not replay([RequestSlice(TOKENS + 1)])
    assert not replay([RequestSlice(1)] * 5)
    runtime.bank.add(replace(edits["d"], id="large"))
    runtime.bank.add(replace(edits["d"], id="larger"))
    assert not replay(STEPS[0])
    for name in ("large", "larger"):
        runtime.bank.remove(name)
    runtime.bank.remove("b")
    assert replay([RequestSlice(2, ("a",), "acme")])


def test_more_edits_of_a_request_than_there_is_room_for(served, graph):
    runtime, edits = served()
    replay, names = (
        graph(runtime, runtime.for_graphs(TOKENS, 1, edits=20, like=edits["a"])),
        [f"e{i}" for i in range(17)],
    )
    for name in names:
        runtime.hold(Version(name, edits["a"]))
    assert replay([RequestSlice(2, tuple(names[1:]))])
    assert not replay([RequestSlice(2, tuple(names))])


def test_neurons_are_copied_when_the_bank_has_changed(served, graph, monkeypatch):
    runtime, edits = served()
    replay = graph(runtime, runtime.for_graphs(TOKENS, 4, edits=4, like=edits["a"]))
    assert replay(STEPS[0])
    copied, copy = [], StepTables._copy
    monkeypatch.setattr(StepTables, "_copy", lambda self, *given: copied.append(given) or copy(self, *given))
    assert replay(STEPS[1]) and not copied
    runtime.hold(Version("c", edits["c"]))
    assert replay(STEPS[1]) and len(copied) == len(LAYERS)


@pytest.mark.parametrize("like", ["b", None])
def test_edits_of_another_form(like, served, graph):
    """Gated ones where there is room for plain ones, and another dtype."""
    runtime, edits = served()
    replay = graph(runtime, runtime.for_graphs(TOKENS, 4, edits=4, like=edits[like] if like else None))
    assert not replay(STEPS[0])
    plain, edits = served(gated=False)
    tables = plain.for_graphs(TOKENS, 4, edits=4, like=edits[like] if like else None)
    replay = graph(plain, tables)
    assert replay(STEPS[0]) and tables.nbytes > 0
    halves = {i: replace(layer, **{n: getattr(layer, n).half() for n in ("keys", "key_bias", "values", "zeta", "beta")})
              for i, layer in edits["a"].layers.items()}  # fmt: skip
    for name in "ab":
        plain.bank.remove(name)
    plain.bank.add(replace(edits["a"], id="half", layers=halves))
    assert not replay([RequestSlice(3, ("half",))])


def test_as_many_edits_stay_as_there_is_room_for(served):
    runtime, edits = served()
    runtime.for_graphs(TOKENS, 2, edits=2)
    for i in range(9):
        runtime.hold(Version(f"a{i}", edits["a"]))
        assert len(runtime.bank) <= 2


def test_a_search_that_no_graph_holds(make_model, make_memory):
    memory = make_memory(make_model("llama"), every_token(k=7, values="out"), layers=LAYERS)
    runtime = RaggedRuntime(LAYERS, D, "silu", memory, retriever=uk.CosineIndex)
    with pytest.raises(ValueError, match="memory: expected one that is searched exactly"):
        runtime.for_graphs(TOKENS, 2)
