"""Continuous batching with edits for each request, against generation with `patch` and the same edits."""

import dataclasses

import pytest
import torch
from backbones.hybrids import HYBRIDS
from backbones.zoo import model_of, skip_if_not_batched
from configs import every_token
from scopes import PROMPTS, scoped
from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig

import unike_kernels as uk

continuous = pytest.importorskip("unike_kernels.serving.continuous", exc_type=ImportError)

NEW = 8
SETS = [[], ["a"], ["b"], ["a", "b"], ["b", "a"], ["a"], []]


def loud(edit):
    """Values that change what the model says."""
    layers = {i: dataclasses.replace(layer, values=3 * layer.values) for i, layer in edit.layers.items()}
    return dataclasses.replace(edit, layers=layers)


def settings(**more):
    return GenerationConfig(
        **{"max_new_tokens": NEW, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0, **more}
    )


@pytest.fixture
def model(request, make_model):
    kind = getattr(request, "param", "llama")
    skip_if_not_batched(kind)
    return make_model(kind)


# What is kept for a request is the same for both; what they compute with it is not.
of_both_decoders = pytest.mark.parametrize("model", ["opt", "llama"], indirect=True)


@pytest.fixture
def edits(model, make_edit, tmp_path):
    made = [loud(make_edit(model, name, seed=seed)) for seed, name in enumerate("ab")]
    for edit in made:
        edit.save(tmp_path / f"{edit.id}.safetensors")
    return made


@pytest.fixture
def running():
    """Starts managers, and stops them."""
    managers = []

    def start(*args, generation=None, **config):
        usual = {"page_size": 16, "num_blocks": 64, "max_batch_tokens": 64, "allow_block_sharing": True}
        manager = continuous.EditingManager(
            *args,
            generation_config=generation or settings(),
            continuous_batching_config=ContinuousBatchingConfig(**{**usual, **config}),
        )
        managers.append(manager)
        manager.start()
        return manager

    yield start
    for manager in managers:
        manager.stop(block=True, timeout=30)


def prompts(count, length=40):
    """They begin alike, for more than a page of the cache, and end at different places."""
    start = torch.randint(3, 30, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    return [start[: length - i % 3] for i in range(count)]


def expected(model, edits, ids, chosen, memory=None, remembers=True):
    batch = torch.tensor([ids])
    with (
        uk.patched(model, edits, memory),
        uk.rows(model, [chosen], memory=[remembers] if memory else None, prompt_lengths=[len(ids)]),
    ):
        out = model.generate(batch, attention_mask=torch.ones_like(batch), generation_config=settings())
    return out[0, len(ids) :].tolist()


def collect(manager, count):
    """Tokens by request, once that many are finished."""
    found = {}
    while len(found) < count:
        result = manager.get_result(timeout=30)
        assert result is not None, "a request did not end"
        if result.is_finished():
            assert result.error is None, result.error
            found[result.request_id] = list(result.generated_tokens)
    return found


@of_both_decoders
def test_each_request_has_its_own_edits(model, edits, running, tmp_path):
    """Prompts are prefilled in chunks, share prefixes, and come once more with all of these in the cache."""
    ids = prompts(len(SETS))
    wanted = [expected(model, edits, *each) for each in zip(ids, SETS, strict=True)]
    assert len({tuple(w) for w in wanted[:4]}) >= 3
    manager = running(model, tmp_path)
    for _ in range(2):
        names = [manager.add_request(i, unike_edit=s) for i, s in zip(ids, SETS, strict=True)]
        found = collect(manager, len(SETS))
        assert [found[name] for name in names] == wanted


@of_both_decoders
def test_the_memory_decides_where_an_edit_acts(model, make_edit, running, tmp_path):
    memory, edits = scoped(model, make_edit)
    edits = [loud(loud(edit)) for edit in edits]
    for edit in edits:
        edit.save(tmp_path / f"{edit.id}.safetensors")
    asked = [(i, chosen) for i in PROMPTS.tolist() for chosen in (["a", "b"], ["b"], [])]
    wanted = [expected(model, edits, i, chosen, memory) for i, chosen in asked]
    assert wanted[0] != wanted[2] and wanted[3] != wanted[5] and wanted[6] == wanted[8]
    manager = running(model, tmp_path, memory)
    for _ in range(2):
        names = [manager.add_request(i, unike_edit=chosen) for i, chosen in asked]
        found = collect(manager, len(asked))
        assert [found[name] for name in names] == wanted


def test_prefixes_are_shared_by_requests_of_the_same_edits(model, edits, running, tmp_path):
    manager, ids = running(model, tmp_path), prompts(1)[0]
    manager.add_request([5, 6, 7])
    collect(manager, 1)
    cache = manager.batch_processor.cache
    search, matched = cache.search_prefix_match, []
    cache.search_prefix_match = lambda *args: matched.append(search(*args)) or matched[-1]
    for chosen in ([], ["a"], ["a"], [], ["b", "a"], ["a", "b"], ["a", "b"]):
        manager.add_request(ids, unike_edit=chosen)
        collect(manager, 1)
    assert matched == [0, 0, 32, 32, 0, 0, 32]


def test_a_request_keeps_the_version_it_began_with(model, edits, make_edit, running, tmp_path):
    manager, ids = running(model, tmp_path), prompts(1)[0]
    other = loud(make_edit(model, "a", seed=9))
    wanted = [expected(model, [edit], ids, ["a"]) for edit in (edits[0], other)]
    assert wanted[0] != wanted[1]
    first = manager.add_request(ids, unike_edit="a")
    other.save(tmp_path / "a.safetensors")
    second = manager.add_request(ids, unike_edit="a")
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(ValueError, match="there is no edit 'a'"):
        manager.add_request(ids, unike_edit="a")
    found = collect(manager, 2)
    assert [found[first], found[second]] == wanted


@of_both_decoders
@pytest.mark.parametrize("tokens", ["all", "answer"])
def test_a_memory_and_its_tenants(model, make_edit, make_memory, running, tokens, tmp_path):
    config = every_token(k=7, values="out", alpha=0.4, tokens=tokens)
    one = make_memory(model, config)
    flipped = {i: dataclasses.replace(m, index=-m.index, values=-m.values) for i, m in one.layers.items()}
    memory = uk.MemoryBank.joined({"acme": one, "globex": uk.MemoryBank(flipped, config, one.base_model)})
    edits = [loud(make_edit(model, name, memory, seed=seed)) for seed, name in enumerate("ab")]
    for edit in edits:
        edit.save(tmp_path / f"{edit.id}.safetensors")
    uses = ["acme", "globex", False, False, None, "acme", "globex"]
    ids = prompts(len(SETS))
    given = list(zip(ids, SETS, [memory] * len(SETS), [bool(u) if u is None else u for u in uses], strict=True))
    wanted = [expected(model, edits, i, s, m, u) for i, s, m, u in given]
    assert expected(model, edits, ids[0], [], memory, "globex") != wanted[0]
    manager = running(model, tmp_path, memory)
    for _ in range(2):
        names = [manager.add_request(i, unike_edit=s, unike_memory=u) for i, s, u in zip(ids, SETS, uses, strict=True)]
        found = collect(manager, len(SETS))
        assert [found[name] for name in names] == wanted
    with pytest.raises(ValueError, match="unknown tenant 'initech'"):
        manager.add_request(ids[0], unike_memory="initech")
    with pytest.raises(ValueError, match="unike_memory: expected true, false or the name of a tenant, got 7"):
        manager.add_request(ids[0], unike_memory=7)
    with pytest.raises(ValueError, match="this memory has tenants: expected false or the name of one, got True"):
        manager.add_request(ids[0], unike_memory=True)


def test_several_answers_to_one_request(model, edits, running, tmp_path):
    """transformers forks a request for these; what was asked for goes with it."""
    ids = prompts(1)[0]
    manager = running(model, tmp_path, generation=settings(num_return_sequences=3, do_sample=True, top_k=1))
    manager.add_request(ids, unike_edit=["a", "b"])
    found = collect(manager, 3)
    assert list(found.values()) == [expected(model, edits, ids, ["a", "b"])] * 3


def test_a_cache_that_is_too_small(model, make_edit, make_memory, running, tmp_path):
    """Requests are put off and begun again with what they have said; their edits and where answers begin stay."""
    memory = make_memory(model, every_token(k=7, values="out", alpha=0.4, tokens="answer"))
    edits = [loud(make_edit(model, name, memory, seed=seed)) for seed, name in enumerate("ab")]
    for edit in edits:
        edit.save(tmp_path / f"{edit.id}.safetensors")
    ids = prompts(len(SETS), length=30)
    wanted = [expected(model, edits, *each, memory) for each in zip(ids, SETS, strict=True)]
    manager = running(model, tmp_path, memory, num_blocks=8, allow_block_sharing=False)
    names = [manager.add_request(i, unike_edit=s) for i, s in zip(ids, SETS, strict=True)]
    found = collect(manager, len(SETS))
    assert [found[name] for name in names] == wanted


@of_both_decoders
def test_a_stopped_manager_leaves_no_hooks(model, edits, running, tmp_path):
    hooks = lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())  # noqa: E731
    before = hooks()
    manager = running(model, tmp_path)
    manager.add_request(prompts(1)[0], unike_edit="a")
    collect(manager, 1)
    assert hooks() > before
    manager.stop(block=True)
    assert hooks() == before


def test_errors(model, edits, make_model, make_memory, tmp_path):
    with uk.patched(model, edits), pytest.raises(uk.PatchError, match="is patched: unpatch it first"):
        continuous.EditingManager(model, tmp_path)
    for asked in ({"use_cuda_graph": True}, {"use_async_batching": True}, {"varlen_compile_config": CompileConfig()}):
        with pytest.raises(ValueError, match="expected no use_cuda_graph, use_async_batching or compile config"):
            continuous.EditingManager(model, tmp_path, continuous_batching_config=ContinuousBatchingConfig(**asked))
    other = make_model("llama" if model.config.model_type == "opt" else "opt")
    with pytest.raises(uk.MismatchError, match="memory"):
        continuous.EditingManager(other, tmp_path, make_memory(model, every_token(k=7, values="out", alpha=0.4)))

    with pytest.raises(FileNotFoundError, match="edits: there is no folder"):
        continuous.EditingManager(model, tmp_path / "none")
    manager = continuous.EditingManager(model, generation_config=settings())
    with pytest.raises(ValueError, match="made without a folder of edits"):
        manager.add_request([5, 6], unike_edit="a")
    with pytest.raises(ValueError, match="there is no memory for the tenant 'acme'"):
        manager.add_request([5, 6], unike_memory="acme")
    manager = continuous.EditingManager(model, tmp_path, generation_config=settings())
    with pytest.raises(ValueError, match="expected distinct ids"):
        manager.add_request([5, 6], unike_edit=["a", "a"])
    manager = continuous.EditingManager(other, tmp_path, generation_config=settings())
    with pytest.raises(uk.MismatchError, match="edit 'a'"):
        manager.add_request([5, 6], unike_edit="a")
    assert manager.input_queue.empty()


def test_layers_without_an_ffn(make_model, make_edit, running, tmp_path):
    """The others are served; an edit that names such a layer is an error of its request."""
    model = make_model("llama")
    model.model.layers[4].mlp = torch.nn.Identity()
    edit, other = loud(make_edit(model, "a", layers=(2, 3, 5))), make_edit(make_model("llama"), "b", layers=(4,))
    for each in (edit, other):
        each.save(tmp_path / f"{each.id}.safetensors")
    ids = prompts(1)[0]
    wanted = [expected(model, [edit], ids, chosen) for chosen in ([], ["a"])]
    assert wanted[0] != wanted[1]
    manager = running(model, tmp_path)
    names = [manager.add_request(ids, unike_edit=chosen) for chosen in ([], ["a"])]
    found = collect(manager, 2)
    assert [found[name] for name in names] == wanted
    with pytest.raises(uk.MismatchError, match=r"edit 'b': the bank has no layers \[4\]"):
        manager.add_request(ids, unike_edit="b")


def test_a_memory_of_a_layer_without_attention(make_memory):
    model = model_of(HYBRIDS["qwen3_next"].family)
    one = make_memory(model.float(), every_token(k=7, values="out", alpha=0.4), layers=(1, 3))
    memory = dataclasses.replace(one, layers={0: one.layers[1], 1: one.layers[1]})
    with pytest.raises(
        uk.UnsupportedModelError, match=r"layer 0 \(Qwen3NextDecoderLayer\): looked for one self-attention"
    ):
        continuous.EditingManager(model, memory=memory)


@pytest.mark.parametrize("config", [{"alpha": "last"}, {"retrieval": "sequence"}])
def test_memories_that_need_whole_prompts_are_refused_at_start(model, make_memory, config):
    memory = make_memory(model, every_token(**{"k": 7, "values": "out", "alpha": 0.4, **config}))
    with pytest.raises(ValueError, match="an engine of flat tokens serves retrieval='token'"):
        continuous.EditingManager(model, memory=memory)
