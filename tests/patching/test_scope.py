"""scope="memory": an edit acts from the prompt's end on, in the rows whose prompt its entry wins, and nowhere else."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from backbones.zoo import V5
from capture import Capture
from scopes import LAYERS, PROMPTS, scoped
from transformers import CompileConfig, DynamicCache, LogitsProcessorList, StaticCache

import unike_kernels as uk
from unike_kernels.nn.routing import Routed
from unike_kernels.ops.prompt_encoder import spelling

MORE = torch.tensor([[30, 31], [32, 33], [34, 35]])


@pytest.fixture(params=[("opt", ()), ("llama", ()), ("llama", LAYERS)], ids=["opt", "llama", "llama-states"])
def setup(request, make_model, make_edit):
    """A model, its memory and two edits, see `scoped`."""
    model = make_model(request.param[0])
    memory, edits = scoped(model, make_edit, request.param[1])
    return model, memory, edits


@torch.no_grad()
def logits(model, ids, **inputs):
    return model(input_ids=ids, **inputs).logits


@torch.no_grad()
def by_hand(model, edits, memory, row, following=()):
    """Logits [1 + n, V] at the prompt's end and at n following tokens, edited by hand from the prompt's end on."""
    model = copy.deepcopy(model)
    cache = DynamicCache(config=model.config)
    model(input_ids=PROMPTS[row : row + 1, :-1], past_key_values=cache)
    tokens = [PROMPTS[row, -1:], *following]
    with uk.patched(model, edits, memory, scope="all"):
        return torch.cat([model(input_ids=t.view(1, 1), past_key_values=cache).logits[0] for t in tokens])


def test_an_edit_acts_from_its_prompts_end_on(setup):
    model, memory, edits = setup
    base = logits(model, PROMPTS)
    wanted = [by_hand(model, [edit], memory, row) for row, edit in enumerate(edits)]
    assert len(memory) == 0 and memory  # there, though it shifts nothing
    uk.patch(model, [replace(edit, config=replace(edit.config, scope="all")) for edit in edits], memory)
    got = logits(model, PROMPTS)
    assert torch.equal(got[:, :-1], base[:, :-1]) and torch.equal(got[2], base[2])
    for row in (0, 1):
        torch.testing.assert_close(got[row, -1:], wanted[row], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(got[row, -1], base[row, -1], rtol=1e-2, atol=1e-2)
    uk.unpatch(model)
    assert torch.equal(logits(model, PROMPTS), base)
    assert not any(layer._forward_pre_hooks for layer in model.modules())


def as_of_a_device(monkeypatch):
    """What is known of tensors on the CPU alone is not known."""
    monkeypatch.setattr(Routed, "idle", lambda self, among=None: False)
    monkeypatch.setattr(spelling, "_room", lambda places: 26 * (len(places) - 1))


@pytest.mark.skipif(not V5, reason="passes of transformers 4 wait for the device, and do not compile whole")
def test_a_captured_pass_decides_anew(setup, monkeypatch):
    """As in a CUDA graph: nothing waits for the device, and other prompts in the same memory reach other edits."""
    model, memory, edits = setup
    as_of_a_device(monkeypatch)
    uk.patch(model, edits, memory)
    others, ids = PROMPTS[[2, 1, 0]], PROMPTS.clone()
    wanted = [logits(model, given) for given in (PROMPTS, others)]
    captured = Capture(lambda: logits(model, ids))
    assert torch.equal(captured.result, wanted[0])
    ids.copy_(others)
    captured.replay()
    assert torch.equal(captured.result, wanted[1])
    named = [name for name in captured.operators if name.startswith("unike")]
    assert named == ["unike::cosine_topk"] * 2 + ["unike::add_extra_neurons"] * 2
    monkeypatch.undo()
    with pytest.raises(AssertionError, match="waits for the device"):
        Capture(lambda: logits(model, ids))


def generated(model, ids=PROMPTS, **options):
    return model.generate(
        input_ids=ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, return_dict_in_generate=True,
        output_logits=True, **{"attention_mask": torch.ones_like(ids), **options},
    )  # fmt: skip


def test_a_generation_keeps_its_routes(setup):
    model, memory, edits = setup
    base = generated(model)
    uk.patch(model, edits, memory)
    got = generated(model)
    assert all(torch.equal(step[2], plain[2]) for step, plain in zip(got.logits, base.logits, strict=True))
    uk.unpatch(model)
    for row, edit in enumerate(edits):
        following = got.sequences[row, 5:-1].unbind()
        wanted = by_hand(model, [edit], memory, row, following)
        torch.testing.assert_close(torch.stack([step[row] for step in got.logits]), wanted, rtol=1e-4, atol=1e-4)
    for step, plain in zip(got.logits, base.logits, strict=True):
        assert not torch.equal(step[0], plain[0]) and not torch.equal(step[1], plain[1])


def padded(row, side):
    ids, mask = torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 8, dtype=torch.int64)
    where = slice(3, 8) if side == "left" else slice(0, 5)
    ids[:, where], mask[:, where] = PROMPTS[row], 1
    return ids, mask


@pytest.mark.parametrize("row", [0, 2])
def test_padding_counts_for_nothing(setup, row):
    model, memory, edits = setup
    uk.patch(model, edits, memory)
    wanted = logits(model, PROMPTS[row : row + 1])[0]
    for side, where in (("left", slice(3, 8)), ("right", slice(0, 5))):
        ids, mask = padded(row, side)
        got = logits(model, ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
        torch.testing.assert_close(got[0, where], wanted, rtol=1e-4, atol=1e-4)
    ids, mask = padded(row, "left")
    plain, got = generated(model, PROMPTS[row : row + 1]), generated(model, ids, attention_mask=mask)
    assert torch.equal(plain.sequences[0, 5:], got.sequences[0, 8:])


def test_beams_have_the_routes_of_their_prompt(setup):
    model, memory, edits = setup
    plain = generated(model, num_beams=3).logits
    uk.patch(model, edits, memory)
    together = generated(model, num_beams=3).logits
    for row in range(3):
        alone, beams = generated(model, PROMPTS[row : row + 1], num_beams=3).logits, slice(3 * row, 3 * row + 3)
        for step, own, base in zip(together, alone, plain, strict=True):
            torch.testing.assert_close(step[beams], own, rtol=1e-4, atol=1e-4)
            assert torch.equal(step[beams], base[beams]) is (row == 2)


@pytest.mark.parametrize("parts", [(2, 3), (2, 1, 2), (4, 1)])
def test_a_prompt_in_chunks(setup, parts):
    """Of one token, too, where the block says where the prompt ends."""
    model, memory, edits = setup
    uk.patch(model, edits, memory)
    wanted = logits(model, PROMPTS)[:, -1]
    with uk.rows(model, prompt_lengths=[5, 5, 5]):
        cache = DynamicCache(config=model.config)
        for part in PROMPTS.split(parts, 1):
            got = logits(model, part, past_key_values=cache)
    torch.testing.assert_close(got[:, -1], wanted, rtol=1e-4, atol=1e-4)


def test_the_last_chunk_decides(setup):
    model, memory, edits = setup
    uk.patch(model, edits, memory)
    with uk.explain(model) as trace:
        logits(model, PROMPTS)
        cache = DynamicCache(config=model.config)
        for part in PROMPTS.split((2, 3), 1):
            logits(model, part, past_key_values=cache)
    assert [route.edit for route in trace.routes[2]] == [route.edit for route in trace.routes[0]] == ["a", "b", None]
    assert trace.routes[2][0].score > 0.9  # the first chunk's last token was routed, too, and may have been edited


@pytest.mark.parametrize("cached", [False, True])
def test_where_answers_follow_their_prompts(setup, cached):
    """Teacher forcing: prompts of different lengths, one after the other end in one pass or in several."""
    model, memory, edits = setup
    whole = torch.cat([PROMPTS, MORE], 1)
    ids = whole.clone()
    ids[1], mask = torch.cat([torch.zeros(2, dtype=torch.int64), PROMPTS[1]]), torch.ones_like(whole)
    mask[1, :2] = 0
    uk.patch(model, edits, memory)
    wanted = []
    for row, more in ((0, MORE[0]), (1, MORE[1][:0]), (2, MORE[2])):
        cache = DynamicCache(config=model.config)
        steps = [logits(model, PROMPTS[row : row + 1], past_key_values=cache)]
        steps += [logits(model, t.view(1, 1), past_key_values=cache) for t in more]
        wanted.append(torch.cat(steps, 1)[0])
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    with uk.rows(model, prompt_lengths=[5, 5, 5]):
        if cached:
            cache = DynamicCache(config=model.config)
            parts = []
            for a, b in ((0, 3), (3, 6), (6, 7)):
                at = {"attention_mask": mask[:, :b], "position_ids": position[:, a:b]}
                parts.append(logits(model, ids[:, a:b], past_key_values=cache, **at))
            got = torch.cat(parts, 1)
        else:
            got = logits(model, ids, attention_mask=mask, position_ids=position, use_cache=False)
    for row, own in enumerate(wanted):
        torch.testing.assert_close(got[row, 7 - len(own) :], own, rtol=1e-4, atol=1e-4)


def test_a_row_may_use_only_what_it_selects(setup):
    model, memory, edits = setup
    base = logits(model, PROMPTS)
    uk.patch(model, edits, memory)
    free = logits(model, PROMPTS)
    with uk.rows(model, edits=[["b", "a"], [], ["b"]]):
        got = logits(model, PROMPTS)
    assert torch.equal(got[1:], base[1:])
    torch.testing.assert_close(got[0], free[0], rtol=1e-5, atol=1e-5)


def test_a_further_prompt_is_routed_anew(setup):
    """A chat goes on with the cache of before; what is asked next is another prompt."""
    model, memory, edits = setup
    uk.patch(model, edits, memory)
    cache = DynamicCache(config=model.config)
    with uk.explain(model) as trace:
        logits(model, PROMPTS[:1], past_key_values=cache)
        logits(model, MORE[:1, :1], past_key_values=cache)
        logits(model, PROMPTS[2:], past_key_values=cache)
        logits(model, MORE[:1, :1], past_key_values=cache)
    named = [[route.edit for route in routes] for routes in trace.routes]
    assert named[:2] == [["a"], ["a"]] and named[2] == named[3] and trace.routes[2][0].score < 0.999


def test_explain_tells_who_won_and_why(setup):
    model, memory, edits = setup
    uk.patch(model, edits, memory)
    with uk.explain(model) as trace:
        logits(model, PROMPTS)
    a, b, third = trace.routes[0]
    assert (a.edit, b.edit, third.edit) == ("a", "b", None)
    assert third.other == 0 and third.other_score == pytest.approx(1, abs=1e-5) and third.score < third.other_score
    assert a.score == pytest.approx(1, abs=1e-5) and a.margin > a.threshold == 0.01
    assert "'a' acts: cosine with 'a' 1.000" in str(a) and "no edit acts" in str(third)
    assert "fact 0 of the memory ('third') 1.000" in str(third)
    assert trace.passes[0][3].neurons["a"][0, -1].any() and not trace.passes[0][3].neurons["a"][0, :-1].any()
    assert not trace.passes[0][3].neurons["a"][1:].any()


def test_a_change_reaches_running_generations_or_not(setup):
    model, memory, (a, b) = setup
    uk.patch(model, [a], memory)

    def second(prepare):
        """The second token's logits for the first prompt, after a change behind the first one."""
        cache = DynamicCache(config=model.config)
        logits(model, PROMPTS[:1], past_key_values=cache)
        prepare()
        return logits(model, MORE[:1, :1], past_key_values=cache)

    wanted = second(lambda: None)
    assert torch.equal(second(lambda: uk.add_edit(model, b)), wanted)
    assert torch.equal(second(lambda: uk.remove_edit(model, "a")), wanted)
    uk.add_edit(model, a)
    gone = second(lambda: uk.remove_edit(model, "a", running="switch"))
    assert not torch.equal(gone, wanted)
    back = second(lambda: uk.add_edit(model, a, running="switch"))
    assert torch.equal(back, second(lambda: None)) is False  # the first token was not edited, the second one is
    assert not torch.equal(back, gone)


def test_the_newer_of_two_edits_of_a_fact_wins(setup):
    model, memory, (a, b) = setup
    memory = replace(memory, scope=replace(memory.scope, same_fact=0.5))
    newer = replace(b, id="newer", entries=a.entries)
    report = uk.patch(model, [a, newer, b], memory)
    assert report.replaced == {"a": "newer"} and "'newer' takes the place of 'a'" in str(report)

    def winner():
        with uk.explain(model) as trace:
            logits(model, PROMPTS[:1])
        return trace.routes[0][0].edit

    assert winner() == "newer"
    with uk.rows(model, edits=[["a"]]):
        assert winner() == "a"  # of what the row may use
    uk.remove_edit(model, "newer")
    assert winner() == "a"
    uk.add_edit(model, newer)
    assert winner() == "newer"


def test_what_an_edit_is_about_is_no_other_fact(setup):
    """The memory's own entry of the fact does not keep the edit from acting."""
    model, memory, (a, _) = setup
    scope = replace(memory.scope, same_fact=0.5)
    third = replace(a, id="third", entries=scope.entries)
    uk.patch(model, [third, a], replace(memory, scope=scope))
    with uk.explain(model) as trace:
        logits(model, PROMPTS)
    assert [route.edit for route in trace.routes[0]] == ["a", trace.routes[0][1].edit, "third"]
    uk.remove_edit(model, "third")
    with uk.explain(model) as trace:
        logits(model, PROMPTS)
    assert trace.routes[0][2].edit is None and trace.routes[0][2].other == 0


def test_copies_and_files_are_as_good(setup, tmp_path):
    model, memory, edits = setup
    uk.patch(model, edits, memory)
    wanted = logits(model, PROMPTS)
    assert torch.equal(logits(copy.deepcopy(model), PROMPTS), wanted)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), PROMPTS), wanted)
    uk.unpatch(model)
    memory.save(tmp_path / "memory.safetensors")
    read = uk.MemoryBank.load(tmp_path / "memory.safetensors")
    assert read.id == memory.id and read.scope.id == memory.scope.id and read.scope.names == ("third",)
    for edit in edits:
        edit.save(tmp_path / f"{edit.id}.safetensors")
    uk.patch(model, [uk.Edit.load(tmp_path / f"{edit.id}.safetensors") for edit in edits], read)
    assert torch.equal(logits(model, PROMPTS), wanted)


def test_a_memory_of_a_scope_alone_is_no_empty_collection(setup):
    model, memory, _ = setup
    assert memory and len(memory) == 0
    with uk.patched(model, [], memory) as report:  # without a config: the memory's
        assert report.scope == "memory"


def test_many_edits_of_which_few_act(setup, make_edit):
    model, memory, edits = setup
    torch.manual_seed(3)
    uk.patch(model, edits, memory)
    wanted = logits(model, PROMPTS)
    for i in range(40):
        entry = torch.nn.functional.normalize(torch.randn(2, memory.scope.entries.shape[1]), dim=-1)
        uk.add_edit(model, replace(edits[0], id=f"more {i}", entries=entry))
    torch.testing.assert_close(logits(model, PROMPTS), wanted, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused(setup, make_edit, make_memory):
    model, memory, (a, b) = setup
    with pytest.raises(uk.MismatchError, match="scope='memory': expected a memory that has a scope"):
        uk.patch(model, [a], scope="memory")
    with pytest.raises(uk.MismatchError, match="it has no entries, by which the memory decides"):
        uk.patch(model, [replace(a, entries=None, scope_id=None)], memory)
    with pytest.raises(uk.MismatchError, match="entries of another scope"):
        uk.patch(model, [replace(a, scope_id="another")], memory, override=True)
    early = replace(a, layers={1: a.layers[3]})
    if memory.scope.layers:
        with pytest.raises(uk.MismatchError, match=r"their layers \[1\] come before layer 3, which decides"):
            uk.patch(model, [early], memory)
    uk.patch(model, [a], memory)
    with pytest.raises(uk.MismatchError, match="entries"):
        uk.add_edit(model, replace(b, scope_id="another"))
    with pytest.raises(uk.MismatchError, match="expected a memory that has a scope"):
        uk.swap_memory(model, None)
    with pytest.raises(ValueError, match="prompt's end"):
        logits(model, PROMPTS, use_cache=False)
    cache = DynamicCache(config=model.config)
    logits(model, PROMPTS, past_key_values=cache)
    cache.crop(-2)
    with pytest.raises(ValueError, match="of 5 tokens 3 are left"):
        logits(model, PROMPTS[:, 3:], past_key_values=cache)


@pytest.mark.parametrize("changes", [{}, {"alpha": "last"}, {"retrieval": "sequence"}, {"tokens": "answer"}])
def test_the_memory_shifts_where_an_edit_acts(make_model, make_edit, make_memory, changes):
    model = make_model("llama")
    memory, edits = scoped(model, make_edit)
    config = replace(memory.config, values="pre", **changes)
    memory = replace(make_memory(model, replace(config, scope="all")), config=config, scope=memory.scope)
    edits = [replace(edit, config=config, memory_id=memory.id) for edit in edits]
    base = logits(model, PROMPTS)
    uk.patch(model, edits, memory)
    got = logits(model, PROMPTS)
    assert torch.equal(got[:, :-1], base[:, :-1]) and torch.equal(got[2], base[2])
    with uk.explain(model) as trace:
        again = logits(model, PROMPTS)
    alpha = trace.passes[0][2].alpha
    assert torch.equal(again, got) and alpha[:2, -1].all() and not alpha[:, :-1].any() and not alpha[2].any()
    uk.unpatch(model)
    uk.patch(model, edits, replace(memory, layers={5: memory.layers[5]}), override=True)
    assert not torch.allclose(logits(model, PROMPTS)[:2, -1], got[:2, -1], atol=1e-3)
    uk.unpatch(model)
    uk.patch(model, [], memory)
    assert torch.equal(logits(model, PROMPTS), base)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("entries", [0, 20])
def test_a_static_cache_is_compiled_behind_the_prompt(make_model, make_edit, make_memory, entries):
    """In one graph for whatever was decided, as `generate` does by itself on a GPU."""
    model = make_model("llama")
    memory, edits = scoped(model, make_edit)
    if entries:  # which shift the rows in which an edit acts
        config = memory.config
        own = make_memory(model, replace(config, scope="all"), entries=entries)
        memory = replace(own, config=config, scope=memory.scope)
    config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    config._compile_all_devices = True

    def generated(ids, **how):  # the logits of some tokens that are the same ones whatever is edited
        chosen = [lambda ids, scores: F.one_hot(torch.full(scores.shape[:1], 10 + ids.shape[1]), 44) * 9.0]
        how |= {"logits_processor": LogitsProcessorList(chosen), "output_logits": True}
        out = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, **how)
        return torch.stack(out.logits, 1)

    def graphs():
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    base, compiled = generated(PROMPTS), {"cache_implementation": "static", "compile_config": config}
    uk.patch(model, edits[:1], memory, override=True)
    first, second, again = (generated(ids, **compiled) for ids in (PROMPTS, PROMPTS[[2, 1, 0]], PROMPTS))
    assert graphs() == 1
    close(first, generated(PROMPTS))
    close(first, again)
    close(second, first[[2, 1, 0]])
    assert ((first - base).abs().amax((1, 2)) > 1e-3).tolist() == [True, False, False]
    uk.add_edit(model, edits[1], override=True)
    both = generated(PROMPTS, **compiled)
    close(both, generated(PROMPTS))
    assert (both - first)[1].abs().max() > 1e-3
    with uk.rows(model, [["a"], [], []]):
        close(generated(PROMPTS, **compiled), first)


@pytest.mark.skipif(not V5, reason="passes of transformers 4 wait for the device, and do not compile whole")
def test_a_compiled_pass_without_what_a_prompt_decided_is_refused(make_model, make_edit):
    model = make_model("llama")
    memory, edits = scoped(model, make_edit)
    uk.patch(model, edits[:1], memory)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)

    def prompted():
        cache = StaticCache(config=model.config, max_cache_len=16)
        logits(model, PROMPTS, past_key_values=cache)
        return cache

    def refused(ids, cache):
        with pytest.raises(Exception, match="expected a pass over a prompt that is not compiled"):
            logits(compiled, ids, past_key_values=cache)

    logits(compiled, MORE[:, :1], past_key_values=prompted())
    refused(MORE, prompted())  # several tokens: another prompt, perhaps
    refused(PROMPTS, StaticCache(config=model.config, max_cache_len=16))
    refused(MORE[:, :1], DynamicCache(config=model.config))
    cache = prompted()
    uk.add_edit(model, edits[1])
    refused(MORE[:, :1], cache)  # decided among other edits
    wanted, found = prompted(), prompted()
    torch.testing.assert_close(
        logits(compiled, MORE[:, :1], past_key_values=found), logits(model, MORE[:, :1], past_key_values=wanted)
    )


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_code_is_refused(make_model, make_edit, fullgraph):
    """A part of the model too, and not by going on without: it would edit all rows, as it knows no routes."""
    torch._dynamo.reset()
    model = make_model("llama")
    memory, edits = scoped(model, make_edit)
    uk.patch(model, edits, memory)
    layer = model.model.layers[4]
    layer.compile(backend="eager", fullgraph=fullgraph)
    for _ in range(2):
        with pytest.raises(
            Exception, match="scope='memory': expected a pass over a prompt that is not compiled"
        ) as raised:
            logits(model, PROMPTS)
        assert fullgraph or raised.type is ValueError
    uk.unpatch(model)
    uk.patch(model, edits, memory, scope="all")
    got = logits(model, PROMPTS)
    layer._compiled_call_impl = None
    torch.testing.assert_close(got, logits(model, PROMPTS), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("part", ["model", "decoder"])
def test_a_compiled_model_is_refused(make_model, make_edit, fullgraph, part):
    torch._dynamo.reset()
    model = make_model("opt")
    memory, edits = scoped(model, make_edit)
    uk.patch(model, edits, memory)
    module = model if part == "model" else model.model.decoder
    module.forward = torch.compile(module.forward, backend="eager", fullgraph=fullgraph)
    for _ in range(2):
        with pytest.raises(Exception, match="scope='memory': expected a pass over a prompt that is not compiled"):
            logits(model, PROMPTS)
