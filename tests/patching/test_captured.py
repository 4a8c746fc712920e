"""CUDA graphs of a patched model, by a stand-in for them: what replays compute when edits, rows and betas change."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from backbones.zoo import V5
from capture import Capture
from configs import every_token
from transformers import DynamicCache, StaticCache, masking_utils

import unike_kernels as uk
from unike_kernels.nn import context, memory_attention, passes, patched_ffn

pytestmark = pytest.mark.skipif(not V5, reason="passes of transformers 4 wait for the device, and its caches differ")
IDS = torch.tensor([[5, 6, 7], [8, 9, 10]])


@pytest.fixture
def capture(monkeypatch):
    """compute -> its `Capture`, as if all tensors were on a GPU."""
    on = []
    for module in (patched_ffn, memory_attention, context, passes):
        monkeypatch.setattr(module, "on_gpu", lambda t: True)
    for module in (patched_ffn, memory_attention, context):
        monkeypatch.setattr(module, "capturing", lambda device: bool(on))

    def run(compute):
        on.append(True)
        try:
            return Capture(compute)
        finally:
            on.clear()

    return run


@pytest.fixture
def setup(make_model, make_memory, make_edit):
    model = make_model("llama")
    memory = make_memory(model, every_token(k=7, values="pre"), layers=(2, 4))
    edits = [make_edit(model, name, memory, seed=seed, layers=(2, 4)) for seed, name in enumerate("abcd", 2)]
    return model, memory, edits


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


def agrees(graph, wanted):
    graph.replay()
    torch.testing.assert_close(graph.result, wanted, rtol=1e-5, atol=1e-5)


def test_replays_see_rows_betas_and_edits(setup, capture):
    model, memory, (a, b, c, d) = setup
    uk.patch(model, [a, b, c], memory)
    ids = IDS.clone()
    with uk.rows(model, [["a"], ["b"]]):
        logits(model, ids)
        graph = capture(lambda: logits(model, ids))
    seen = []
    for rows, beta in (([["a"], ["b"]], 0.1), ([["b"], []], 0.1), ([["c", "a"], ["b"]], 0.1), ([["a"], ["b"]], 0.9)):
        uk.set_beta(model, "a", beta)
        with uk.rows(model, rows):
            wanted = logits(model, ids)
            agrees(graph, wanted)
        agrees(graph, wanted)  # and behind the block
        seen.append(wanted)
    uk.add_edit(model, d)
    with uk.rows(model, [["d"], ["a"]]):
        agrees(graph, logits(model, ids))
        uk.set_beta(model, "d", 0.7)  # inside of a block, too
        agrees(graph, logits(model, ids))
    uk.remove_edit(model, "c")
    ids.copy_(IDS.flip(0))
    with uk.rows(model, [["d"], ["b"]]):
        agrees(graph, logits(model, ids))
    assert all(not torch.allclose(x, y, atol=1e-3) for i, x in enumerate(seen) for y in seen[:i])


@pytest.mark.parametrize("how", [{"alpha": "last"}, {"retrieval": "sequence"}])
def test_a_pass_that_is_told_where_prompts_end(how, make_model, make_memory, make_edit, capture):
    model = make_model("llama")
    memory = make_memory(model, every_token(**{"k": 7, "values": "pre", "alpha": 0.4, **how}), layers=(2, 4))
    uk.patch(model, [make_edit(model, "a", memory, layers=(2, 4))], memory)
    ids = IDS.clone()
    with uk.rows(model, [["a"], []], prompt_lengths=[2, 3]):
        logits(model, ids)
        graph = capture(lambda: logits(model, ids))
        for now in (IDS, IDS.flip(0), IDS.flip(1)):
            ids.copy_(now)
            agrees(graph, logits(model, now))
    with uk.rows(model, [["a"], []], prompt_lengths=[3, 3]):
        assert not torch.allclose(graph.result, logits(model, ids), atol=1e-3)


def over_caches(model, capture, monkeypatch, prompt, like, replayed):
    """The logits of passes behind a prompt: replayed over a static cache, and computed over one that grows.

    The graph is captured of a pass over `like`, behind another one over it.
    """
    monkeypatch.setattr(masking_utils, "is_tracing", lambda *_: True)  # as it says in a capture
    static, growing = StaticCache(config=model.config, max_cache_len=32), DynamicCache(config=model.config)
    found, wanted, given = [], [], like.clone()

    def step(ids, cache):
        with torch.no_grad():
            return model(input_ids=ids, past_key_values=cache).logits

    for ids in (prompt, like, like):
        wanted.append(step(ids, growing))
    for ids in (prompt, like):
        step(ids, static)
    graph = capture(lambda: step(given, static))
    found.append(graph.result.clone())
    for ids in replayed:
        given.copy_(ids)
        graph.replay()
        found.append(graph.result.clone())
        wanted.append(step(ids, growing))
    return found, wanted[2:]


@pytest.mark.parametrize("how", [{"tokens": "answer"}, {"alpha": "last"}, {"retrieval": "sequence"}])
def test_tokens_behind_a_prompt_over_a_static_cache(how, make_model, make_memory, make_edit, capture, monkeypatch):
    """Nobody asks the device how many tokens are in it."""
    model = make_model("llama")
    memory = make_memory(model, every_token(**{"k": 7, "values": "pre", "alpha": 0.4, **how}), layers=(2, 4))
    uk.patch(model, [make_edit(model, "a", memory, layers=(2, 4))], memory)
    tokens = torch.randint(5, 30, (4, 2, 1))
    with uk.rows(model, [["a"], []], prompt_lengths=[2, 3]):
        found, wanted = over_caches(model, capture, monkeypatch, IDS, tokens[0], tokens[1:])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_prompt_that_ends_in_a_later_replay(make_model, make_memory, capture, monkeypatch):
    """What is an answer is found by how many tokens are in the cache then."""
    model = make_model("llama")
    uk.patch(
        model, memory=make_memory(model, every_token(k=7, values="pre", alpha=0.4, tokens="answer"), layers=(2, 4))
    )
    parts = torch.randint(5, 30, (5, 2, 2))

    def passes(lengths):
        with uk.rows(model, prompt_lengths=lengths):
            found, wanted = over_caches(model, capture, monkeypatch, IDS, parts[0], parts[1:])
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        return found

    ends, later = passes([10, 8]), passes([10, 12])
    assert [torch.equal(a[0], b[0]) for a, b in zip(ends, later, strict=True)] == [True] * 5
    assert [torch.equal(a[1], b[1]) for a, b in zip(ends, later, strict=True)] == [True, False, False, False, False]


def test_a_capture_does_not_guess_where_a_generation_begins(make_model, make_memory, capture, make_edit, monkeypatch):
    monkeypatch.setattr(masking_utils, "is_tracing", lambda *_: True)
    model, ids = make_model("llama"), IDS.clone()
    memory = make_memory(model, every_token(k=7, values="pre", alpha="last"), layers=(2, 4))
    edit = make_edit(model, "a", memory, layers=(2, 4))
    uk.patch(model, [edit], memory)
    cache = StaticCache(config=model.config, max_cache_len=32)
    step = lambda ids: model(input_ids=ids, past_key_values=cache).logits  # noqa: E731
    with torch.no_grad():
        for prompt in (ids, ids[:, :1]):
            cache.reset()
            with uk.rows(model, prompt_lengths=[prompt.shape[1]] * 2):
                step(prompt)
                with pytest.raises(uk.PatchError, match="nothing but its static cache tells whether it begins"):
                    capture(lambda prompt=prompt: step(prompt))
        step(ids[:, :1])
        uk.set_beta(model, "a", 0.7)  # which this generation does not see
        with pytest.raises(uk.PatchError, match="nothing but its static cache tells whether it begins"):
            capture(lambda: step(ids[:, :1]))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("how", [{"alpha": "last"}, {"retrieval": "sequence"}])
def test_a_cache_that_was_reset(how, told, mode, make_model, make_memory, capture, monkeypatch):
    """A long prompt that comes one token at a time is not one behind the prompt before, whose value would be used; of
    what nobody has touched, no device is asked how long it is."""
    model = make_model("llama")
    uk.patch(model, memory=make_memory(model, every_token(**{"k": 7, "values": "pre", **how}), layers=(2, 4)))
    asked, length = [], context._length
    monkeypatch.setattr(context, "_length", lambda cache: asked.append(1) or length(cache))

    def step(ids, cache):
        with uk.rows(model, prompt_lengths=[3, 3]) if told else nullcontext():
            return model(input_ids=ids, past_key_values=cache).logits

    with mode():
        cache, fresh = (StaticCache(config=model.config, max_cache_len=32) for _ in range(2))
        step(IDS, cache)
        asked.clear()
        for _ in range(3):
            step(IDS[:, :1], cache)
        assert not asked
        cache.reset()
        if mode is torch.inference_mode:  # a device that waits for nobody fails
            with pytest.raises(RuntimeError, match="the key-value cache was reset: expected the whole prompt in one"):
                step(IDS[:, :1], cache)
        elif told:
            with pytest.raises(ValueError, match="the whole prompt must come in one forward pass"):
                step(IDS[:, :1], cache)
        else:  # a prompt of one token
            assert torch.equal(step(IDS[:, :1], cache), step(IDS[:, :1], fresh))
        cache.reset()
        fresh.reset()
        assert torch.equal(step(IDS, cache), step(IDS, fresh))
        assert torch.equal(step(IDS[:, 1:2], cache), step(IDS[:, 1:2], fresh))


def test_what_is_written_for_graphs_is_read_by_nobody_else(setup, capture, make_memory):
    model, memory, (a, b, *_) = setup
    uk.patch(model, [a, b], uk.MemoryBank.joined({"one": memory}), override=True)
    # By the definition, which reads tables anew each time, as GPUs do.
    with uk.backend("reference"), uk.rows(model, [["a"], ["b"]], memory=["one", False]), torch.no_grad():
        wanted = logits(model)
        graph = capture(lambda: logits(model))
        running = model(input_ids=IDS).past_key_values
        twin = copy.deepcopy(running)
        following = model(input_ids=IDS[:, :1], past_key_values=twin).logits
        with uk.rows(model, [["b"], []], memory=[False, "one"]):
            agrees(graph, logits(model))
        assert torch.equal(logits(model), wanted)
        uk.set_beta(model, "a", 0.9)  # which a generation that runs does not see
        assert torch.equal(model(input_ids=IDS[:, :1], past_key_values=running).logits, following)


def test_replays_of_all_edits_in_every_row(setup, capture):
    model, memory, (a, b, *_) = setup
    uk.patch(model, [a], memory)
    logits(model)
    graph = capture(lambda: logits(model))
    one = graph.result.clone()
    uk.add_edit(model, b)
    agrees(graph, logits(model))
    uk.remove_edit(model, "a")
    agrees(graph, logits(model))
    uk.remove_edit(model, "b")
    agrees(graph, logits(model))
    assert not torch.allclose(one, graph.result, atol=1e-3)


def test_replays_see_tenants_and_two_graphs_their_own_rows(setup, capture, make_memory):
    model, _, (a, b, *_) = setup
    one, two = (make_memory(model, every_token(k=7, values="pre"), seed=seed, layers=(2, 4)) for seed in (1, 7))
    shared = {
        i: {name: getattr(layer, name) for name in ("encoder", "zeta", "zeta_prime")} for i, layer in one.layers.items()
    }
    two = replace(two, layers={i: replace(layer, **shared[i]) for i, layer in two.layers.items()})
    uk.patch(model, [a, b], uk.MemoryBank.joined({"one": one, "two": two}), override=True)
    with uk.rows(model, [["a"], ["b"]], memory=["one", "two"]):
        logits(model)
        two = capture(lambda: logits(model))
    with uk.rows(model, [["b"]], memory=["two"]):
        logits(model, IDS[:1])
        one = capture(lambda: logits(model, IDS[:1]))
    with uk.rows(model, [["b"], ["a"]], memory=["two", False]):
        agrees(two, logits(model))
    with uk.rows(model, [["a"]], memory=["one"]):
        agrees(one, logits(model, IDS[:1]))
        with uk.rows(model, [["b"], ["b"]], memory=["two", "one"]):
            agrees(two, logits(model))
        agrees(one, logits(model, IDS[:1]))


def test_what_was_never_run_is_not_captured(setup, capture):
    model, memory, (a, b, *_) = setup
    uk.patch(model, [a, b], memory)
    with pytest.raises(uk.PatchError, match="captured of a pass that was never run"):
        capture(lambda: logits(model))
    with uk.rows(model, [["a"], ["b"]]):
        logits(model)
    with uk.rows(model, [["a"]]), pytest.raises(uk.PatchError, match="captured of a pass that was never run"):
        capture(lambda: logits(model))
    with uk.rows(model, [["b"], ["b"]]):
        with pytest.raises(uk.PatchError, match="captured of a pass that was never run"):
            capture(lambda: logits(model))
        logits(model)
        graph = capture(lambda: logits(model))
        agrees(graph, logits(model))


def test_rows_that_a_graph_cannot_see_are_refused(setup, capture):
    model, memory, (a, b, c, d) = setup
    uk.patch(model, [a, b, c, d], memory)
    with uk.rows(model, [["a"], ["b"]]):
        logits(model)
        graph = capture(lambda: logits(model))
    wanted = graph.result.clone()
    for what, rows in (("without memory", {"edits": [["a"], ["b"]]}), ("with edits", {})):
        block = uk.rows(model, **rows, memory=[True, False])
        with pytest.raises(uk.PatchError, match=f"graph of 2 rows was captured in a uk.rows.* {what}="):
            block.__enter__()
    agrees(graph, wanted)
    with uk.rows(model, [["c"], ["a"], ["b"]], memory=[True, False, True]):  # of other rows, that the graph has not
        logits(model, IDS[[0, 1, 1]])
    agrees(graph, wanted)


def test_more_edits_than_a_graph_has_room_for(make_model, make_edit, capture):
    model = make_model("llama")
    edits = [make_edit(model, f"e{i}", seed=i, layers=(2,), neurons=1) for i in range(20)]
    uk.patch(model, edits)
    with uk.rows(model, [["e0"], ["e1"]]):
        logits(model)
        graph = capture(lambda: logits(model))
    wanted, many = graph.result.clone(), [f"e{i}" for i in range(20)]
    with pytest.raises(uk.PatchError, match="room for 16 edits in 2 rows, not for 20: capture it anew"):
        uk.rows(model, [many, []]).__enter__()
    agrees(graph, wanted)
    with uk.rows(model, [many[:16], []]):
        agrees(graph, logits(model))


@pytest.mark.parametrize("change", ["growth", "memory"])
def test_what_a_graph_goes_on_reading_stays_and_is_told(setup, capture, make_edit, make_memory, change):
    model, memory, (a, b, *_) = setup
    uk.patch(model, [a], memory)
    logits(model)
    graph = capture(lambda: logits(model))
    wanted = graph.result.clone()
    made = {id(t) for _, _, _, out in graph._calls for t in (out if isinstance(out, tuple | list) else [out])}
    read = [
        weakref.ref(t)
        for func, args, _, _ in graph._calls
        for t in args
        if func.namespace == "unike" and isinstance(t, torch.Tensor) and id(t) not in made
    ]
    assert len(read) > 20
    changes = {
        "growth": lambda: uk.add_edit(model, make_edit(model, "wide", memory, neurons=200, layers=(2, 4))),
        "memory": lambda: uk.swap_memory(
            model, make_memory(model, memory.config, seed=9, layers=(2, 4)), override=True
        ),
    }
    with pytest.warns(UserWarning, match="CUDA graphs of this model go on with"):
        changes[change]()
    assert not torch.allclose(logits(model), wanted, atol=1e-3)
    agrees(graph, wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        uk.add_edit(model, b, override=True)  # it is told once
    del graph
    gc.collect()
    assert all(ref() is not None for ref in read)
