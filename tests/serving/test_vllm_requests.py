"""What vLLM's front-end makes of requests, without vLLM: cache salts that nobody can choose, errors of one request."""

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
from configs import every_token

import unike_kernels as uk
from unike_kernels.nn import Ranks
from unike_kernels.serving import vllm
from unike_kernels.serving.access import headers, load_hook


@pytest.fixture
def served(make_model, make_edit, make_memory, tmp_path):
    """Makes a server's settings: with no memory, one for all, or one of tenants."""
    model = make_model("llama")
    config = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=model.config, hf_text_config=model.config, model=str(tmp_path / "none"))
    )
    one = make_memory(model, every_token(k=7, values="out"))
    flipped = {i: dataclasses.replace(m, index=-m.index, values=-m.values) for i, m in one.layers.items()}
    joined = uk.MemoryBank.joined({"acme": one, "globex": uk.MemoryBank(flipped, one.config, one.base_model)})

    def make(kind="tenants", folder=None, **more):
        memory = {"none": None, "one": one, "tenants": joined}[kind]
        folder = tmp_path / (folder or kind)
        folder.mkdir()
        for seed, id in enumerate("abc"):
            make_edit(model, id, memory, seed=seed).save(folder / f"{id}.safetensors")
        settings = {"edits": folder, **more}
        if memory is not None:
            memory.save(tmp_path / f"{kind}.memory")
            settings["memory"] = tmp_path / f"{kind}.memory"
        return vllm._Served(config, settings)

    made = make
    made.replace = lambda served, id, seed: make_edit(model, id, served.memory, seed=seed).save(
        served.folder.path / f"{id}.safetensors"
    )
    return made


def asked(served, extra=None, salt=None):
    """The request after it was admitted."""
    request = SimpleNamespace(sampling_params=SimpleNamespace(extra_args=extra), cache_salt=salt)
    served.admit(request)
    return request


@pytest.mark.parametrize(
    ("kind", "uses"),
    [("none", [None, 0, 1, True]), ("one", [None, 0, 1, False]), ("tenants", [None, 0, False, "acme", "globex"])],
)
def test_equal_salts_are_equal_computations(served, kind, uses):
    """Whatever salts clients send: those that came out before, too."""
    server = served(kind)
    edits, seen, salts = [None, [], "a", ["a"], ["b"], ["a", "b"], ["b", "a"]], {}, [None, "", "s", "t"]
    old = '|unike|memory "acme"', "|unike|memory 'acme'", "unike|memory False", f"|unike|{server.folder.get('a').key}"
    salts += old

    def ask_for_all():
        for salt, chosen, use in itertools.product(list(salts), edits, uses):
            extra = {} if chosen is None else {"unike_edit": chosen}
            extra |= {} if use is None else {"unike_memory": use}
            request = asked(server, extra, salt)
            told = request.sampling_params.extra_args["unike"]
            computed = salt, tuple(told["edits"]), told["memory"]
            assert seen.setdefault(request.cache_salt, computed) == computed
            plain = not chosen and told["memory"] == (kind == "one")
            assert (request.cache_salt is None) == (plain and salt is None)
            assert request.cache_salt is None or request.cache_salt.startswith("unike|")
            assert request.cache_salt is None or request.cache_salt != salt

    ask_for_all()
    before = len(seen)
    salts[:] = [None, *(salt for salt in seen if salt is not None)][:40]  # what a client may have found out
    ask_for_all()
    assert len(seen) > 2 * before
    salts[:], before = [None], len(seen)
    served.replace(server, "a", 9)
    ask_for_all()
    new = {computed[1:] for computed in seen.values()}
    assert len(seen) > before and len({keys for keys, _ in new}) == 8  # with other versions, other salts


def test_nobody_takes_a_tenants_prefix(served):
    server = served()
    victim = asked(server, {"unike_memory": "acme"}).cache_salt
    for salt in (victim, "|unike|memory 'acme'", victim.removeprefix("unike|"), "acme"):
        assert asked(server, {"unike_memory": 0}, salt).cache_salt != victim
        assert asked(server, {"unike_memory": "globex"}, salt).cache_salt != victim
        assert asked(server, {"unike_memory": "acme"}, salt).cache_salt != victim


@pytest.mark.parametrize("use", [1, True, 1.0])
def test_all_tenants_at_once_cannot_be_asked_for(served, use):
    with pytest.raises(ValueError, match="unike_memory: this memory has tenants: expected false or the name of one"):
        asked(served(), {"unike_memory": use})


def nobody_but_acme(access):
    """A hook of an operator's own."""
    if access.headers.get("x-tenant") != "acme" or access.tenant not in (None, "acme"):
        raise PermissionError("not yours")


def test_a_hook_decides_who_may_have_what(served):
    """It is asked before anything is looked up; a request that came by no HTTP has no headers."""
    server = served(authorize=f"{__name__}:nobody_but_acme")
    with pytest.raises(PermissionError, match="not yours"):
        asked(server, {"unike_edit": "a"})
    token = headers.set({"x-tenant": "acme"})
    try:
        asked(server, {"unike_edit": ["a", "b"], "unike_memory": "acme"})
        with pytest.raises(PermissionError, match="not yours"):
            asked(server, {"unike_memory": "globex"})
    finally:
        headers.reset(token)
    assert server.asked == {"a": 1, "b": 1}
    for name in ("json", "json:nothing", "no_such_module:f", "json:__doc__"):
        with pytest.raises(ValueError, match=r"^authorize: "):
            load_hook(name)


def test_an_unknown_tenant_is_the_only_one_that_is_named(served):
    with pytest.raises(ValueError, match=r"^unike_memory: unknown tenant 'initech'$"):
        asked(served(), {"unike_memory": "initech"})


@pytest.mark.parametrize(
    "extra",
    [
        {"unike_edit": 3},
        {"unike_edit": None},
        {"unike_edit": {"a": 1}},
        {"unike_edit": [["a"]]},
        {"unike_edit": [{"a": 1}]},
        {"unike_edit": ["a", "a"]},
        {"unike_edit": "a" * 300},
        {"unike_edit": "a\0"},
        {"unike_edit": "../a"},
        {"unike_edit": "loop"},
        {"unike_edit": "broken"},
        {"unike_edit": ["a", "b", "c"]},
        {"unike_memory": [1]},
        {"unike_memory": {"acme": 1}},
        {"unike_memory": 7},
        {"unike_memory": "x" * 10_000},
    ],
)
def test_what_is_wrong_is_an_error_of_its_request(served, tmp_path, extra):
    """A ValueError, which the servers answer with the status 400; it tells no path, and is not long."""
    server = served(max_edits=2)
    (server.folder.path / "loop.safetensors").symlink_to("loop.safetensors")
    (server.folder.path / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"^(unike_edit|edit|unike_memory): ") as error:
        asked(server, extra)
    assert str(tmp_path) not in str(error.value) and len(str(error.value)) < 250
    assert len(asked(server, {"unike_edit": ["a", "b"]}).sampling_params.extra_args["unike"]["edits"]) == 2


def test_a_limit_that_is_none_is_refused_at_start(served):
    with pytest.raises(ValueError, match="max_edits: expected an integer of at least 1, got 0"):
        served(max_edits=0)


# --- what refuses a server at its start ---


def config_of(*, settings=None, v2=False):
    """As much of vLLM's own as is asked."""
    return SimpleNamespace(
        additional_config={} if settings is None else {"unike": settings},
        use_v2_model_runner=v2,
    )


class Embeds:
    """A stage's model; without embeddings it gives back what it is given."""

    def __init__(self, has=True):
        self.embed_input_ids = torch.nn.Embedding(3, 2) if has else torch.nn.Identity()


def graphs(whole):
    """What a runner knows of them."""
    mode = SimpleNamespace(has_full_cudagraphs=lambda: whole)
    return {
        "compilation_config": SimpleNamespace(cudagraph_mode=mode, max_cudagraph_capture_size=512),
        "scheduler_config": SimpleNamespace(max_num_seqs=7),
    }


def loaded(monkeypatch, *, ubatching=False, context=1, rank=0, routes=False, layers=(4,), model=None, sharded=False):
    """What is installed where vLLM has loaded a model."""
    installed, model = [], model or Embeds()
    flat = SimpleNamespace(routes=routes, layers=list(layers))
    server = SimpleNamespace(
        flat=lambda device, *given: installed.append(given) or flat, folder=None, model=1, sharded=sharded,
        first_edit=lambda: None,
    )  # fmt: skip
    monkeypatch.setattr(vllm, "_served", lambda config: server)
    monkeypatch.setattr(vllm, "_ranks", lambda: "its ranks")
    monkeypatch.setattr(vllm, "stage_of", lambda model, text: [4, 5])
    monkeypatch.setattr(vllm, "install", lambda *given, **more: installed.append((*given, more)))
    parallel = SimpleNamespace(
        tensor_parallel_size=2, rank=rank, use_ubatching=ubatching, prefill_context_parallel_size=context
    )
    config = SimpleNamespace(model_config=SimpleNamespace(hf_text_config="its config"), parallel_config=parallel)
    runner = SimpleNamespace(
        vllm_config=config,
        parallel_config=parallel,
        device=torch.device("cpu"),
        get_model=lambda: model,
        **graphs(False),
    )
    assert vllm._load_model(lambda self: "loaded", runner) == "loaded"
    assert installed == [
        ([4, 5], "its ranks" if sharded else None),
        (model, "its config", flat, {"edits": False, "ranks": 2, "rank": rank % 2, "summed": vllm._sum_over_ranks}),
    ]


def test_a_model_is_not_served_where_it_cannot_be(monkeypatch):
    """The checks come before anything is installed."""
    for rank in (0, 1, 3):  # the last one of the second stage
        loaded(monkeypatch, rank=rank)
    loaded(monkeypatch, sharded=True)
    for more, message in (
        ({"ubatching": True}, r"^additional_config\.unike: microbatches"),
        ({"context": 2}, r"^additional_config\.unike: prefill context parallelism is not supported"),
    ):
        with pytest.raises(ValueError, match=message):
            loaded(monkeypatch, **more)
    with pytest.raises(uk.UnsupportedModelError, match="a stage of the pipeline that has edited layers has none"):
        loaded(monkeypatch, routes=True, model=Embeds(False))
    loaded(monkeypatch, routes=True)
    loaded(monkeypatch, routes=True, layers=(), model=Embeds(False))  # nothing is decided there
    loaded(monkeypatch, model=Embeds(False))


@pytest.mark.parametrize("first", ["fits", "does not", "is not there", "no folder"])
def test_what_a_gpu_will_launch_is_compiled_before_requests_come(first, served, monkeypatch):
    """With one edit of the folder, if it can be served; and what graphs of whole steps read is laid out before."""
    server, held, warmed, laid = served("none"), [], [], []
    if first == "does not":
        (server.folder.path / "a.safetensors").write_bytes(b"nothing of the kind")
    for file in server.folder.path.glob("*.safetensors") if first == "is not there" else []:
        file.unlink()
    server.folder = None if first == "no folder" else server.folder
    flat = SimpleNamespace(
        routes=False, layers=[4], hold=held.append, warm_up=warmed.append,
        for_graphs=lambda *sizes, like: laid.append((sizes, None if like is None else like.id)),
    )  # fmt: skip
    monkeypatch.setattr(server, "flat", lambda device, own, ranks: flat)
    monkeypatch.setattr(vllm, "_served", lambda config: server)
    monkeypatch.setattr(vllm, "stage_of", lambda model, text: [4, 5])
    monkeypatch.setattr(vllm, "install", lambda *given, **more: None)
    one = SimpleNamespace(tensor_parallel_size=1, rank=0, use_ubatching=False, prefill_context_parallel_size=1)
    told = SimpleNamespace(model_config=SimpleNamespace(hf_text_config=None, dtype=torch.bfloat16))
    runner = SimpleNamespace(
        vllm_config=told, parallel_config=one, device=torch.device("cuda"), get_model=lambda: "model", **graphs(True)
    )
    vllm._load_model(lambda self: None, runner)
    assert laid == [((512, 7, 0 if first == "no folder" else 7), "a" if first == "fits" else None)]
    assert [version.edit.id for version in held] == (["a"] if first == "fits" else [])
    assert warmed == [torch.bfloat16]


def test_the_second_model_runner(monkeypatch):
    """A server with edits makes vLLM choose the first one; where it was forced, the start is refused."""
    usual = lambda self: ["something else"]  # noqa: E731
    assert vllm._v2_unsupported(usual, config_of()) == ["something else"]
    assert vllm._v2_unsupported(usual, config_of(settings={})) == ["something else", "the edits of unike_kernels"]
    with pytest.raises(ValueError, match="first model runner; unset VLLM_USE_V2_MODEL_RUNNER"):
        vllm._served(config_of(settings={}, v2=True))
    assert vllm._served(config_of(v2=True)) is None
    assert vllm._served(SimpleNamespace(additional_config=None)) is None
    made = []
    monkeypatch.setattr(vllm, "_Served", lambda config, settings: made.append(settings) or object())
    config = config_of(settings={"edits": "here"})
    assert vllm._served(config) is vllm._served(config) is not vllm._served(config_of(settings={"edits": "here"}))
    assert made == [{"edits": "here"}] * 2


def test_a_sleep_that_loses_the_tables():
    """Level 2 is refused where there are edits; the others, and engines without edits, sleep as they are asked to."""
    asleep = lambda self, level, mode="abort": (level, mode)  # noqa: E731
    plain, told = (SimpleNamespace(vllm_config=config_of(settings=settings)) for settings in (None, {}))
    assert vllm._sleep(asleep, plain, 2, "wait") == (2, "wait")
    assert vllm._sleep(asleep, told) == (1, "abort") and vllm._sleep(asleep, told, 0, mode="keep") == (0, "keep")
    with pytest.raises(ValueError, match=r"sleep: expected level 0 or 1, got 2: it discards the tables"):
        vllm._sleep(asleep, told, level=2)


def test_what_a_compiled_model_is_kept_by(make_model, make_memory, tmp_path):
    """The layers of a memory, whose file may be another at the next start."""
    model, path = make_model("llama"), tmp_path / "memory.safetensors"
    config = config_of(settings={"memory": str(path)})
    theirs = lambda self: "0123456789"  # noqa: E731
    found = []
    for layers in ((4, 5), (4, 5), (3, 5)):
        make_memory(model, every_token(k=7, values="out"), layers=layers).save(path)
        found.append(vllm._compute_hash(theirs, config))
    assert found[0] == found[1] != found[2] and "0123456789" not in found and {len(each) for each in found} == {10}
    assert vllm._compute_hash(theirs, config_of()) == vllm._compute_hash(theirs, config_of(settings={})) == theirs(None)


def test_settings_of_a_server(served, make_model, make_memory):
    with pytest.raises(
        ValueError, match=r"expected authorize, edits, layers, max_edits, .*, got \['edit', 'memories'\]"
    ):
        served("one", edit="x", memories="y")
    assert served("none").layers == [2, 3, 4, 5]  # the last ones
    server = served("tenants", layers=[5, 4, 3, 2])
    assert server.layers == [2, 3, 4, 5] and server.memory is not None
    with pytest.raises(ValueError, match=r"layers: expected indices in 0\.\.5, got \[5, 6\]"):
        served("none", folder="another", layers=[6, 5])


def test_a_memory_for_another_model_is_refused_at_start(make_model, make_memory, tmp_path):
    other = make_model("opt")
    make_memory(other).save(tmp_path / "memory")
    text = make_model("llama").config
    config = SimpleNamespace(model_config=SimpleNamespace(hf_config=text, hf_text_config=text, model="nowhere"))
    with pytest.raises(uk.MismatchError, match="llama"):
        vllm._Served(config, {"memory": tmp_path / "memory"})


def test_what_wraps_a_place_in_vllm_does_so_once():
    class Place:
        def f(self, x):
            return x

    class Below(Place):
        pass

    around = lambda original, self, x: original(self, x) + 1  # noqa: E731
    for owner in (Place, Place, Below):  # once, and not what it inherits
        vllm._wrap(owner, "f", around)
    assert Place().f(1) == Below().f(1) == 2 and "f" not in vars(Below)


@pytest.mark.parametrize(
    ("config", "allowed"),
    [({"tokens": "answer"}, True), ({"alpha": "last"}, False), ({"retrieval": "sequence"}, False)],
)
def test_memories_that_need_prompts_work_or_are_refused_at_start(make_model, make_memory, tmp_path, config, allowed):
    model = make_model("llama")
    memory = make_memory(model, every_token(**{"k": 7, "values": "out", "alpha": 0.4, **config}))
    memory.save(tmp_path / "memory")
    told = SimpleNamespace(hf_config=model.config, hf_text_config=model.config, model=str(tmp_path / "none"))
    start = lambda: vllm._Served(SimpleNamespace(model_config=told), {"memory": tmp_path / "memory"})  # noqa: E731
    if allowed:
        assert start().flat().memory.id == memory.id
    else:
        with pytest.raises(ValueError, match="memory: an engine of flat tokens serves retrieval='token'"):
            start()


def test_a_memory_that_is_searched_approximately(served):
    pytest.importorskip("faiss")
    server = served("one", search={"kind": "hnsw", "breadth": 64})
    assert server.memory.search == uk.ANNConfig("hnsw", breadth=64)
    assert all(isinstance(t.retriever, uk.ApproximateIndex) for t in server.flat()._tables.values())
    with pytest.raises(ValueError, match="expected 'ivf' or 'hnsw', got 'lsh'"):
        served("none", memory=server.folder.path.parent / "one.memory", search={"kind": "lsh"})


@pytest.mark.parametrize("kind", ["one", "tenants"])
def test_a_memory_that_the_ranks_share(kind, served):
    """Where it is asked for; the tables of a rank are a part of it, and all else is as with the whole one."""
    ranks = Ranks(1, 3, torch.clone, torch.clone)
    whole, sharded = served(kind), served(kind, folder="sharded", sharded_memory=True)
    assert whole.memory.id == sharded.memory.id and len(whole.memory) == len(sharded.memory)
    entries = len(whole.memory)
    for server, ranks_of, count in ((whole, None, entries), (sharded, None, entries), (sharded, ranks, entries // 3)):
        server.model = None
        runtime = server.flat(ranks=ranks_of)
        assert runtime.stats["memory_entries"] == pytest.approx(count, abs=1)
        assert all(len(tables.keys) == runtime.stats["memory_entries"] for tables in runtime._tables.values())
    with pytest.raises(ValueError, match="expected a memory where sharded_memory is asked for"):
        served("none", sharded_memory=True)
