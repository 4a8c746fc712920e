"""Changes to a patched model: what they give, who sees them and when, and what they leave as it was."""

from __future__ import annotations

import copy
import pickle
import threading
from dataclasses import replace

import pytest
import torch

import unike_kernels as uk

KINDS = ("opt", "llama")
IDS = torch.tensor([[7, 8, 9, 10, 11], [12, 13, 14, 15, 16]])


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def setup(make_model, make_edit, make_memory, kind):
    """A model, a memory and four edits made for both, the last two of other sizes and forms."""
    model = make_model(kind)
    memory = make_memory(model)
    sizes = [("a", 5, False), ("b", 3, False), ("c", 40, False), ("d", 2, True)]
    edits = [
        make_edit(model, name, memory, seed=seed, neurons=neurons, gated=gated)
        for seed, (name, neurons, gated) in enumerate(sizes)
    ]
    return model, memory, edits


@torch.no_grad()
def logits(model, **inputs):
    return model(input_ids=IDS, **inputs).logits


def fresh(model, edits, memory):
    """Of the model that is patched anew with these."""
    model = uk.unpatch(copy.deepcopy(model))
    uk.patch(model, edits, memory, layers=[2, 3, 4, 5])
    return logits(model)


def test_changes_give_what_a_patch_gives(setup):
    model, memory, (a, b, c, d) = setup
    uk.patch(model, [a], memory)
    installed = [a]
    for edit in (b, c, d):  # room for b, more neurons than there is room for, and gated ones among plain ones
        uk.add_edit(model, edit)
        installed.append(edit)
        torch.testing.assert_close(logits(model), fresh(model, installed, memory), rtol=1e-5, atol=1e-5)
    for edit in (b, a, d):
        uk.remove_edit(model, edit.id)
        installed.remove(edit)
        torch.testing.assert_close(logits(model), fresh(model, installed, memory), rtol=1e-5, atol=1e-5)
    with uk.rows(model, [["c"], []]):
        mixed = logits(model)
    uk.remove_edit(model, "c")
    assert torch.equal(mixed[1], logits(model)[1])
    assert torch.equal(logits(model), fresh(model, [], memory))


def test_the_same_bits_in_whatever_order(setup):
    """An edited row's sum follows its list, not the pool."""
    model, memory, (a, b, c, _) = setup
    uk.patch(model, [a, b, c], memory)
    with uk.rows(model, [["b"], ["c", "b"]]):
        wanted = logits(model)
    uk.remove_edit(model, "a")
    uk.remove_edit(model, "b")
    uk.add_edit(model, b)
    with uk.rows(model, [["b"], ["c", "b"]]):
        assert torch.equal(logits(model), wanted)


def test_beta(setup):
    model, memory, (a, b, *_) = setup
    uk.patch(model, [a, b], memory)
    uk.set_beta(model, "b", 0.7)
    layers = {i: replace(layer, beta=torch.tensor(0.7)) for i, layer in b.layers.items()}
    stronger = replace(b, layers=layers)
    assert not torch.equal(logits(model), fresh(model, [a, b], memory))
    torch.testing.assert_close(logits(model), fresh(model, [a, stronger], memory), rtol=1e-5, atol=1e-5)


def test_memories(setup, make_memory):
    model, memory, (a, *_) = setup
    other = make_memory(model, seed=9, entries=20)
    uk.patch(model, [], memory)
    before = logits(model)
    uk.swap_memory(model, other)
    assert torch.equal(logits(model), fresh(model, [], other))
    uk.swap_memory(model, None)
    assert torch.equal(logits(model), fresh(model, [], None))
    with pytest.raises(uk.MismatchError, match="trained with the memory"):
        uk.add_edit(model, a)
    uk.swap_memory(model, memory)
    assert torch.equal(logits(model), before)
    uk.add_edit(model, a)
    with pytest.raises(uk.MismatchError, match="trained with the memory"):
        uk.swap_memory(model, other)


def test_refused_changes_leave_the_model_as_it_was(setup, make_model, make_edit):
    model, memory, (a, b, *_) = setup
    uk.patch(model, [a], memory, layers=[2, 3, 4, 5])
    before = logits(model)
    elsewhere = make_edit(make_model("opt" if model.config.model_type == "llama" else "llama"), "x")
    outside = make_edit(model, "y", memory, layers=(0, 1))
    for change, error, message in [
        (lambda: uk.add_edit(model, a), uk.PatchError, "'a' is installed already"),
        (lambda: uk.add_edit(model, elsewhere), uk.MismatchError, "edit 'x'"),
        (lambda: uk.add_edit(model, outside), uk.PatchError, r"its layers \[0, 1\] are not patched"),
        (lambda: uk.add_edit(model, "b"), TypeError, "edit: expected an Edit, got str"),
        (lambda: uk.add_edit(model, b, running="stop"), ValueError, "running: expected 'keep' or 'switch', got 'stop'"),
        (lambda: uk.remove_edit(model, "z"), uk.PatchError, r"id: 'z' is no edit of the model; it has \['a'\]"),
        (lambda: uk.set_beta(model, "z", 0.1), uk.PatchError, "'z' is no edit"),
        (lambda: uk.set_beta(model, "a", float("nan")), ValueError, "beta: expected a finite number, got nan"),
        (lambda: uk.swap_memory(model, a), TypeError, "memory: expected a MemoryBank or None, got Edit"),
    ]:
        with pytest.raises(error, match=message):
            change()
        assert torch.equal(logits(model), before)
    with pytest.raises(uk.PatchError, match="is not patched"):
        uk.add_edit(uk.unpatch(model), b)


@torch.no_grad()
def test_a_generation_keeps_the_version_that_it_began_with(setup):
    from transformers import DynamicCache

    model, memory, (a, b, *_) = setup
    uk.patch(model, [a], memory)
    whole = {"with a": logits(model)}
    running, switched = (DynamicCache(config=model.config) for _ in range(2))
    for cache in (running, switched):
        model(input_ids=IDS[:, :3], past_key_values=cache)
    uk.add_edit(model, b)
    whole["with b"] = logits(model)
    last = model(input_ids=IDS[:, 3:], past_key_values=running).logits
    torch.testing.assert_close(last, whole["with a"][:, 3:], rtol=1e-4, atol=1e-4)
    uk.set_beta(model, "a", 0.3, running="switch")
    uk.set_beta(model, "a", 0.1)
    mixed = model(input_ids=IDS[:, 3:], past_key_values=switched).logits
    assert float((mixed - whole["with a"][:, 3:]).abs().max()) > 1e-2
    anew = model(input_ids=IDS, past_key_values=DynamicCache(config=model.config)).logits
    torch.testing.assert_close(anew, whole["with b"], rtol=1e-4, atol=1e-4)


def test_a_pass_sees_one_version_under_load(setup):
    """Each answer of four threads is that of one version, while a fifth adds and removes."""
    model, memory, (a, b, *_) = setup
    uk.patch(model, [a], memory)
    torch.set_num_threads(1)
    without = logits(model)
    uk.add_edit(model, b)
    with_b = logits(model)
    uk.remove_edit(model, "b")
    wrong, seen, stop = [], set(), threading.Event()

    def ask():
        while not stop.is_set():
            found = logits(model)
            which = [torch.equal(found, version) for version in (without, with_b)]
            seen.add(tuple(which))
            if not any(which):
                wrong.append(found)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(25):
        uk.add_edit(model, b)
        uk.remove_edit(model, "b")
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert seen <= {(True, False), (False, True)}


def test_threads_have_rows_of_their_own(setup):
    model, memory, (a, b, *_) = setup
    uk.patch(model, [a, b], memory)
    torch.set_num_threads(1)
    choices = [[["a"], []], [[], ["b"]], [["b"], ["a", "b"]], None]

    def alone(choice):
        with uk.rows(model, choice):
            return logits(model)

    wanted, wrong = [alone(choice) for choice in choices], []
    barrier = threading.Barrier(len(choices))

    def ask(n):
        barrier.wait()
        for _ in range(15):
            if not torch.equal(alone(choices[n]), wanted[n]):
                wrong.append(n)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(len(choices))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_blocks_of_two_threads_that_end_in_another_order_leave_nothing(setup):
    model, memory, (a, b, *_) = setup
    uk.patch(model, [a, b], memory)
    before = logits(model)
    entered, leave = threading.Event(), threading.Event()

    def other():
        with uk.rows(model, [["a"], ["b"]], memory=[False, True]):
            entered.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with uk.rows(model, [["b"], []]):
        thread.start()
        entered.wait()
    leave.set()
    thread.join()
    assert torch.equal(logits(model), before)
    context = model._unike.context
    assert context.selections.blocks == [] and context.traced is None and context.local.running is None


def test_compiled_code_sees_changes_without_being_compiled_again(setup, make_memory):
    from torch._dynamo.testing import CompileCounter

    model, memory, (a, b, *_) = setup
    uk.patch(model, [a], memory)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    first = logits(compiled, use_cache=False)
    graphs = counter.frame_count
    uk.add_edit(model, b)
    with_b = logits(compiled, use_cache=False)
    torch.testing.assert_close(with_b, logits(model), rtol=1e-5, atol=1e-5)
    uk.set_beta(model, "b", 0.5)
    stronger = logits(compiled, use_cache=False)
    uk.remove_edit(model, "b")
    torch.testing.assert_close(logits(compiled, use_cache=False), first)
    uk.swap_memory(model, make_memory(model, seed=9), override=True)
    swapped = logits(compiled, use_cache=False)
    assert counter.frame_count == graphs
    assert len({float(t.sum()) for t in (first, with_b, stronger, swapped)}) == 4


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_a_copy_changes_alone(setup, copied):
    model, memory, (a, b, *_) = setup
    uk.patch(model, [a], memory)
    before, twin = logits(model), copied(model)
    uk.add_edit(twin, b)
    assert torch.equal(logits(model), before)
    torch.testing.assert_close(logits(twin), fresh(model, [a, b], memory), rtol=1e-5, atol=1e-5)


def test_a_model_that_is_moved_takes_its_edits_along(setup):
    model, memory, (a, b, *_) = setup
    uk.patch(model, [a], memory)
    uk.add_edit(model, b)
    before = logits(model)
    assert torch.equal(logits(model.to("cpu")), before)
    uk.remove_edit(model.to("cpu"), "b")
    torch.testing.assert_close(logits(model), fresh(model, [a], memory), rtol=1e-5, atol=1e-5)


def test_switching_leaves_the_rows_their_selection(make_model, make_edit):
    """Running generations are forgotten, not what the threads have chosen."""
    model = make_model("llama")
    ids = torch.tensor([[5, 6, 7], [7, 6, 5]])
    with torch.no_grad(), uk.patched(model, [make_edit(model, "a")]):
        with uk.rows(model, [["a"], []]):
            before = model(input_ids=ids).logits
            uk.add_edit(model, make_edit(model, "b", seed=3), running="switch")
            assert torch.equal(model(input_ids=ids).logits, before)
        assert not torch.equal(model(input_ids=ids).logits, before)
