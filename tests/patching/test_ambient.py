"""Whose selection a pass has: that of its task, thread or generator, and in a recomputation that of its first time."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from configs import every_token
from torch.utils.checkpoint import checkpoint

import unike_kernels as uk

IDS = torch.tensor([[5, 6, 7, 8]])
NO_BLOCK = r"no uk.rows\(...\) block of its own.*copy_context\(\).run.*default='none'"


def joined(memory):
    """The entries of a memory, shared out among the tenants acme and globex."""

    def part(m, rows):
        values = None if m.values is None else m.values[rows]
        return replace(m, index=m.index[rows], keys=m.keys[rows], values=values)

    parts = {"acme": slice(0, 30), "globex": slice(30, 50)}
    return uk.MemoryBank.joined(
        {
            name: uk.MemoryBank({i: part(m, rows) for i, m in memory.layers.items()}, memory.config, memory.base_model)
            for name, rows in parts.items()
        }
    )


CHOICES = {
    "everything": {},
    "a": {"edits": [["a"]]},
    "b": {"edits": [["b"]]},
    "acme": {"edits": [[]], "memory": ["acme"]},
    "globex": {"edits": [[]], "memory": ["globex"]},
    "nothing": {"edits": [[]], "memory": [False]},
}


class Asked:
    """A patched model with the edits a and b and a memory of two tenants, that tells which of them a pass used."""

    def __init__(self, make_model, make_memory, make_edit, **how) -> None:
        self.model = make_model("llama")
        self.memory = joined(make_memory(self.model))
        edits = [make_edit(self.model, name, self.memory, seed=seed) for seed, name in enumerate("ab", 5)]
        uk.patch(self.model, edits, self.memory, **how)
        self.wanted = {}
        for name in CHOICES:
            with self.rows(name):
                self.wanted[name] = self.logits()

    @torch.no_grad()
    def logits(self, model=None):
        return (self.model if model is None else model)(input_ids=IDS, use_cache=False).logits

    def rows(self, name):
        return uk.rows(self.model, **CHOICES[name])

    def used(self, model=None):
        found = self.logits(model)
        return next((name for name, wanted in self.wanted.items() if torch.equal(found, wanted)), "something else")

    def assert_nothing_is_selected(self):
        context = self.model._unike.context
        assert context.selections.blocks == [] and context.traced is None and context.selection() is None
        assert self.used() == {"all": "everything", "none": "nothing"}[context.default]


@pytest.fixture
def asked(make_model, make_memory, make_edit):
    found = Asked(make_model, make_memory, make_edit)
    assert len({float(t.sum()) for t in found.wanted.values()}) == len(CHOICES)
    yield found
    found.assert_nothing_is_selected()


@pytest.fixture
def asked_none(make_model, make_memory, make_edit):
    found = Asked(make_model, make_memory, make_edit, default="none")
    yield found
    found.assert_nothing_is_selected()


# --- tasks, threads, generators --------------------------------------------------------------------------------------


def test_interleaved_tasks(asked):
    """Each leaves its block in another order than it came."""

    async def task(name, before, after):
        with asked.rows(name):
            await asyncio.sleep(before)
            found = asked.used()
            await asyncio.sleep(after)
            return found, asked.used()

    async def main():
        waits = [("a", 0.02, 0.03), ("acme", 0.01, 0.01), ("b", 0.03, 0.0), ("globex", 0.0, 0.05), ("everything", 0, 0)]
        return await asyncio.gather(*(task(*each) for each in waits))

    assert asyncio.run(main()) == [(name, name) for name in ("a", "acme", "b", "globex", "everything")]


def test_a_task_without_a_block_beside_one_with(asked):
    async def other(inside):
        with asked.rows("a"):
            inside.set()
            await asyncio.sleep(0.05)

    async def main():
        inside = asyncio.Event()
        task = asyncio.create_task(other(inside))
        await inside.wait()
        with pytest.raises(uk.PatchError, match=NO_BLOCK):
            asked.logits()
        with asked.rows("everything"):
            assert asked.used() == "everything"
        await task

    asyncio.run(main())


def test_what_a_task_starts_has_its_selection_as_long_as_the_block_is_open(asked):
    async def main():
        with asked.rows("b"):
            assert await asyncio.to_thread(asked.used) == "b"
            assert await asyncio.create_task(asyncio.to_thread(asked.used)) == "b"
            late = asyncio.create_task(asyncio.sleep(0.02, result=asked.used))
        return (await late)()

    assert asyncio.run(main()) == "everything"


def test_threads(asked):
    """A thread starts in an empty context; in a copy of the context it has the selection."""
    with ThreadPoolExecutor(1) as pool, asked.rows("acme"):
        with pytest.raises(uk.PatchError, match=NO_BLOCK):
            pool.submit(asked.used).result()
        assert pool.submit(contextvars.copy_context().run, asked.used).result() == "acme"

        def own():
            with asked.rows("b"):
                return asked.used()

        assert pool.submit(own).result() == "b"
        assert asked.used() == "acme"


def test_a_block_that_narrows_nothing_refuses_nobody(asked):
    with ThreadPoolExecutor(1) as pool, uk.rows(asked.model, prompt_lengths=[2]):
        assert pool.submit(asked.used).result() == "everything"


def test_a_streaming_thread(asked):
    """As of transformers' TextIteratorStreamer."""
    found = []

    def generate():
        try:
            found.append(asked.model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0))
        except uk.PatchError as error:
            found.append(error)

    with asked.rows("a"):
        generate()
        for target, *args in ((generate,), (contextvars.copy_context().run, generate)):
            thread = threading.Thread(target=target, args=args)
            thread.start()
            thread.join()
    assert isinstance(found[1], uk.PatchError)
    assert torch.equal(found[0], found[2])


def test_by_default_nothing(asked_none):
    asked = asked_none
    assert asked.used() == "nothing"
    with ThreadPoolExecutor(1) as pool, asked.rows("a"):
        assert asked.used() == "a"
        assert pool.submit(asked.used).result() == "nothing"
        assert pool.submit(contextvars.copy_context().run, asked.used).result() == "a"
    with asked.rows("everything"):
        assert asked.used() == "everything"


def test_by_default_nothing_needs_no_prompt_lengths(make_model, make_memory):
    model = make_model("llama")
    plain = model(input_ids=IDS).logits
    with uk.patched(model, memory=make_memory(model, every_token(alpha="last", tokens="answer")), default="none"):
        assert torch.equal(model(input_ids=IDS).logits, plain)


def test_an_unknown_default(make_model):
    with pytest.raises(ValueError, match="default: expected 'all' or 'none', got 'some'"):
        uk.patch(make_model("llama"), default="some")


def test_generators(asked):
    """Consumed in turns, each has its own; the consumer has neither."""

    def stream(name):
        with asked.rows(name):
            yield asked.used()
            with uk.rows(asked.model, memory=[False]):
                yield asked.used()
            yield asked.used()

    one, two = stream("a"), stream("acme")
    found = []
    for _ in range(3):
        found.append((next(one), next(two)))
        with pytest.raises(uk.PatchError, match=NO_BLOCK):
            asked.logits()
    with asked.rows("b"):
        assert asked.used() == "b"
        assert next(one, "the end") == "the end"
        two.close()
        assert asked.used() == "b"
    without = "something else"  # the edit a and no memory
    assert found == [("a", "acme"), (without, "nothing"), ("a", "acme")]


def test_a_generator_that_is_dropped_leaves_nothing(asked):
    def stream():
        with asked.rows("a"):
            while True:
                yield asked.used()

    assert [found for found, _ in zip(stream(), range(2), strict=False)] == ["a", "a"]
    asked.assert_nothing_is_selected()


def test_a_generator_that_is_consumed_in_other_threads(asked):
    """As web frameworks do with a plain generator: each step in whichever thread is free, in a context of its own."""

    def stream(name):
        with asked.rows(name):
            for _ in range(3):
                yield asked.used()

    streams, found = [stream("a"), stream("globex")], []
    for _ in range(4):
        for each in streams:
            with ThreadPoolExecutor(1) as pool:
                found.append(pool.submit(next, each, None).result())
    assert found == ["a", "globex"] * 3 + [None, None]


def test_asynchronous_generators(asked):
    async def step():
        await asyncio.sleep(0)
        return asked.used()

    async def stream(name):
        with asked.rows(name):
            for _ in range(2):
                yield await step()

    async def main():
        one, two = stream("b"), stream("globex")
        found = [await anext(each) for _ in range(2) for each in (one, two)]
        with pytest.raises(uk.PatchError, match=NO_BLOCK):
            asked.logits()
        await one.aclose()
        await two.aclose()
        return found

    assert asyncio.run(main()) == ["b", "globex"] * 2


def test_what_a_generator_starts(asked):
    """A thread that it waits for has its selection, tasks of an event loop within it their own."""

    def stream():
        with asked.rows("a"), ThreadPoolExecutor(1) as pool:
            yield pool.submit(contextvars.copy_context().run, asked.used).result()

            async def task(name, seconds):
                with asked.rows(name):
                    await asyncio.sleep(seconds)
                    return asked.used()

            async def main():
                return await asyncio.gather(task("b", 0.02), task("acme", 0.01), task("globex", 0.03))

            yield asyncio.run(main())

    assert list(stream()) == ["a", ["b", "acme", "globex"]]


def test_context_managers_select_for_their_body(asked):
    @contextlib.contextmanager
    def own(name):
        with asked.rows(name):
            yield

    @contextlib.asynccontextmanager
    async def async_own(name):
        with asked.rows(name):
            yield

    async def main():
        async with async_own("b"):
            return asked.used()

    with own("a"), contextlib.ExitStack() as stack:
        assert asked.used() == "a"
        stack.enter_context(asked.rows("globex"))
        assert asked.used() == "globex"
    assert asyncio.run(main()) == "b"


def test_blocks_in_any_order_and_exceptions(asked):
    outer, inner = asked.rows("a"), asked.rows("b")
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert asked.used() == "b"
    inner.__exit__(None, None, None)
    asked.assert_nothing_is_selected()
    with contextlib.suppress(KeyboardInterrupt), asked.rows("a"), asked.rows("b"):
        raise KeyboardInterrupt


def test_explain_belongs_to_its_call(asked):
    async def task(wait):
        with uk.explain(asked.model) as trace:
            await asyncio.sleep(wait)
            asked.logits()
            await asyncio.sleep(0.03 - wait)
            return trace

    async def main():
        return await asyncio.gather(task(0.02), task(0.01))

    def stream():
        with uk.explain(asked.model) as trace:
            yield trace
            asked.logits()
            yield trace

    traces = asyncio.run(main())
    generator = stream()
    traces.append(next(generator))
    asked.logits()
    next(generator)
    generator.close()
    asked.logits()
    assert [len(trace.passes) for trace in traces] == [1, 1, 1]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_within_a_block_selects_nothing(asked, copied):
    with asked.rows("a"):
        twin = copied(asked.model)
        assert asked.used(twin) == "everything"
        with uk.rows(twin, [["b"]]):
            assert (asked.used(twin), asked.used()) == ("b", "a")


def test_a_pass_within_a_pass(asked):
    """A hook that calls the model in another block, in the middle of a pass."""
    inner = []

    def ask(*_):
        handle.remove()
        with asked.rows("acme"):
            inner.append(asked.used())

    handle = asked.model.model.layers[4].register_forward_pre_hook(ask)
    with asked.rows("b"):
        assert asked.used() == "b"
    assert inner == ["acme"]


def test_a_pass_that_fails_is_over(asked):
    def fail(*_):
        raise MemoryError

    handle = asked.model.model.layers[4].register_forward_hook(fail)
    with pytest.raises(MemoryError), asked.rows("a"):
        asked.logits()
    handle.remove()
    assert asked.model._unike.context.local.running is None


# --- compiled --------------------------------------------------------------------------------------------------------

REFUSED = "compiled code knows one"


def compiled(asked):
    torch._dynamo.reset()
    return torch.compile(asked.model, fullgraph=True, backend="eager")


def used_compiled(asked, model):
    found = asked.logits(model)
    return min(asked.wanted, key=lambda name: float((asked.wanted[name] - found).abs().max()))


def test_a_compiled_model_follows_blocks_one_after_the_other(asked):
    model = compiled(asked)
    with asked.rows("a"):
        with asked.rows("acme"):
            assert used_compiled(asked, model) == "acme"
        assert used_compiled(asked, model) == "a"
    assert used_compiled(asked, model) == "everything"


def test_a_compiled_model_refuses_whoever_selects_otherwise(asked):
    """Threads, with and without a block, and the consumer of a generator."""
    model = compiled(asked)

    def own(name):
        with asked.rows(name):
            return used_compiled(asked, model)

    def stream():
        with asked.rows("acme"):
            yield used_compiled(asked, model)
            yield used_compiled(asked, model)

    with ThreadPoolExecutor(1) as pool, asked.rows("a"):
        assert used_compiled(asked, model) == "a"
        with pytest.raises(RuntimeError, match=REFUSED):
            pool.submit(used_compiled, asked, model).result()
        assert pool.submit(own, "b").result() == "b"
        inside, leave = threading.Event(), threading.Event()

        def hold():
            with asked.rows("b"):
                inside.set()
                leave.wait()

        held = pool.submit(hold)
        inside.wait()
        with pytest.raises(RuntimeError, match=REFUSED):
            asked.logits(model)
        leave.set()
        held.result()
        assert used_compiled(asked, model) == "a"
    generator = stream()
    assert next(generator) == "acme"
    with pytest.raises(RuntimeError, match=REFUSED):
        asked.logits(model)
    assert next(generator) == "acme"
    generator.close()


def test_a_compiled_model_that_selects_nothing_by_default(asked_none):
    model = compiled(asked_none)
    assert used_compiled(asked_none, model) == "nothing"
    with asked_none.rows("a"):
        assert used_compiled(asked_none, model) == "a"


# --- recomputation ---------------------------------------------------------------------------------------------------

CONFIGS = {
    "token": every_token(k=7, values="pre"),
    "answer, last": every_token(k=7, values="pre", tokens="answer", alpha="last"),
    "sequence": every_token(k=7, values="pre", retrieval="sequence"),
}
KINDS = {"reentrant": {"use_reentrant": True}, "not reentrant": {"use_reentrant": False}}


def _in_a_thread(loss):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(loss.backward).result()


def gradient(model, backward):
    """Of the embedded inputs, of two passes with other rows, masks, prompts and lengths, and of a third in between."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, 6, 64, requires_grad=True), torch.randn(2, 5, 64, requires_grad=True)]
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])

    def loss(x, mask):
        return model(inputs_embeds=x, attention_mask=mask, use_cache=False).logits.square().mean()

    with uk.rows(model, [["a"], ["a"]], memory=[True, False], prompt_lengths=[2, 4]):
        one = loss(inputs[0], mask)
    with uk.rows(model, [["b"], []], memory=["acme", True], prompt_lengths=[3, 1]):
        two = loss(inputs[1], None)
        with torch.no_grad():
            loss(inputs[0], mask.flip(0))
    uk.add_edit(model, model.another)
    backward(one - two)
    uk.remove_edit(model, "c")
    return [x.grad for x in inputs]


@pytest.mark.parametrize("backward", [torch.Tensor.backward, _in_a_thread], ids=["here", "in a thread"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", CONFIGS)
def test_what_is_computed_again_has_what_the_first_pass_had(make_model, make_memory, make_edit, config, kind, backward):
    model = make_model("llama").train()
    memory = joined(make_memory(model, CONFIGS[config]))
    edits = [make_edit(model, name, memory, seed=seed) for seed, name in enumerate("abc")]
    model.__dict__["another"] = edits.pop()
    uk.patch(model, edits, memory)
    wanted = gradient(model, torch.Tensor.backward)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=KINDS[kind])
    for found, exact in zip(gradient(model, backward), wanted, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-8)
    uk.unpatch(model)
    functions = [layer._gradient_checkpointing_func for layer in model.model.layers]
    uk.patch(model, edits, memory)  # where checkpointing was switched on before
    for found, exact in zip(gradient(model, backward), wanted, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-8)
    uk.unpatch(model)
    assert all(layer._gradient_checkpointing_func is functions[0] for layer in model.model.layers)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_that_does_not_know_the_pass_is_refused(make_model, make_memory, make_edit, kind):
    model = make_model("llama")
    memory = make_memory(model)
    uk.patch(model, [make_edit(model, "a", memory)], memory)
    x = torch.randn(1, 4, 64, requires_grad=True)
    layer = model.model.layers[3]
    inner = layer.forward
    layer.forward = lambda x, **kwargs: checkpoint(lambda x: inner(x, **kwargs), x, **KINDS[kind])
    loss = model(inputs_embeds=x, use_cache=False).logits.sum()
    with pytest.raises(uk.PatchError, match=r"use model.gradient_checkpointing_enable\(\)"):
        loss.backward()
