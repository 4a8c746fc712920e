"""What the plugin makes of SGLang's requests, batches and servers, without SGLang."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from configs import every_token

import unike_kernels as uk
from unike_kernels.serving import RaggedRuntime, RequestSlice, Version, operators, sglang
from unike_kernels.serving.access import headers
from unike_kernels.serving.served import Served

fastapi = pytest.importorskip("fastapi")


@pytest.fixture
def make_served(make_model, make_edit, make_memory, tmp_path):
    """Makes what a server has: edits "a" and "b", and with a config a memory."""
    model = make_model("llama")

    def make(config=None, **more):
        memory = None if config is None else make_memory(model, config)
        settings = {"edits": tmp_path / "edits", **more}
        settings["edits"].mkdir(exist_ok=True)
        for seed, id in enumerate("ab"):
            edit = make_edit(model, id, memory, config=config or every_token(), seed=seed)
            edit.save(settings["edits"] / f"{id}.safetensors")
        if memory is not None:
            settings["memory"] = tmp_path / "memory"
            memory.save(settings["memory"])
        return Served("settings", settings, model.config, model.config, "none", sglang._KNOWN)

    return make


def tokenized(served, asked, salt=None, prompt=(5, 6, 7), **more):
    """The request, as the front-end sends it to the scheduler."""
    params = SimpleNamespace(custom_params=asked, beam_width=more.pop("beam_width", None))
    usual = {"session_params": None, "input_embeds": None}
    made = SimpleNamespace(sampling_params=params, cache_salt=salt, input_ids=prompt, **{**usual, **more})
    manager = SimpleNamespace(unike=served)
    assert sglang._create_tokenized_object(lambda *given: made, manager, "request", 1) is made
    return made


def test_what_a_request_asks_for_is_told_and_keeps_its_prefixes_apart(make_served):
    served = make_served()
    plain, one = tokenized(served, None), tokenized(served, {"unike_edit": "a", "mine": 1})
    assert plain.cache_salt is None and json.loads(plain.sampling_params.custom_params["unike"])["edits"] == []
    told = json.loads(one.sampling_params.custom_params["unike"])
    assert told == {"edits": [served.folder.get("a").key], "memory": False}
    assert one.sampling_params.custom_params["mine"] == 1
    forged = tokenized(served, {"unike": json.dumps(told)})  # which the front-end alone may say
    assert json.loads(forged.sampling_params.custom_params["unike"])["edits"] == []
    other, salted = tokenized(served, {"unike_edit": ["a", "b"]}), tokenized(served, None, salt=one.cache_salt)
    assert len({None, one.cache_salt, other.cache_salt, salted.cache_salt}) == 4
    assert tokenized(served, {"unike_edit": "a"}, prompt=(8, 9)).cache_salt == one.cache_salt


@pytest.mark.parametrize("tokens", ["all", "answer"])
def test_where_prompts_end_matters_only_equal_ones_share_their_prefix(tokens, make_served):
    served = make_served(every_token(values="out", tokens=tokens))
    for asked in ({}, {"unike_edit": "a"}):
        salts = [tokenized(served, asked, prompt=prompt).cache_salt for prompt in ([5, 6], [5, 6], [5, 6, 7])]
        assert salts[0] == salts[1] and (salts[0] == salts[2]) == (tokens == "all")
    declined = [tokenized(served, {"unike_memory": 0}, prompt=prompt).cache_salt for prompt in ([5, 6], [5, 6, 7])]
    assert declined[0] == declined[1] not in (None, salts[0])


def nobody(access):
    raise PermissionError("not yours")


def test_what_cannot_be_served_is_an_error_of_the_request(make_served):
    served = make_served()
    for message, asked, more in (
        ("there is no edit 'z'", {"unike_edit": "z"}, {}),
        ("expected a mapping", ["unike_edit"], {}),
        ("computes no beams", {}, {"beam_width": 2}),
        ("no sessions", {}, {"session_params": {}}),
        ("no prompts of embeddings", {}, {"input_embeds": [[0.5]]}),
    ):
        with pytest.raises(ValueError, match=message):
            tokenized(served, asked, **more)
    tokenized(None, None), tokenized(None, {"mine": 1})
    with pytest.raises(ValueError, match="started without json_model_override_args"):
        tokenized(None, {"unike_memory": 1})
    embedding = SimpleNamespace(sampling_params=SimpleNamespace(custom_params={"unike_edit": "a"}))
    with pytest.raises(ValueError, match="embeddings are computed without edits"):
        sglang._create_tokenized_object(lambda *given: embedding, SimpleNamespace(unike=served), "request")
    with pytest.raises(fastapi.HTTPException) as caught:
        tokenized(make_served(authorize=f"{__name__}:nobody"), {"unike_edit": "a"})
    assert (caught.value.status_code, caught.value.detail) == (403, "not yours")


def test_a_model_may_be_the_name_of_edits(make_served):
    served = make_served()
    manager = SimpleNamespace(unike=served, served_model_name="b")

    def named(model, params=None, **more):
        request = SimpleNamespace(model=model, custom_params=params, **more)
        serving = SimpleNamespace(tokenizer_manager=manager)
        assert sglang._handle_request(lambda *given: given, serving, request, "raw") == (serving, request, "raw")
        return request.custom_params

    assert named("a") == {"unike_edit": ["a"]} and named("b+a", {"mine": 1}) == {"mine": 1, "unike_edit": ["b", "a"]}
    assert named("other") is named("a+other") is named("b") is None  # "b" is the base model's name here


def test_a_client_is_known_by_its_headers():
    raw = SimpleNamespace(headers={"x-tenant": "acme"})
    assert sglang._generate_request(lambda *given: given, "manager", "request", raw) == ("manager", "request", raw)
    assert headers.get() == {"x-tenant": "acme"}
    sglang._generate_request(lambda *given: given, "manager", "request")  # of no HTTP
    assert headers.get() == {}


def scheduled(served, told):
    """A request, as the scheduler takes it up, and why it ends, if it does."""
    scheduler = SimpleNamespace(tp_worker=SimpleNamespace(model_runner=SimpleNamespace(unike=served)))
    asked = SimpleNamespace(sampling_params=SimpleNamespace(custom_params=told))
    ended = []
    request = SimpleNamespace(set_finish_with_abort=ended.append)
    assert sglang._create_generation_req(lambda *given: request, scheduler, asked, 1) is request
    return request, ended


def test_the_scheduler_holds_the_versions_of_a_request(make_served):
    served = make_served()
    key = served.folder.get("a").key
    request, ended = scheduled(served, {"unike": json.dumps({"edits": [key], "memory": True})})
    assert ended == [] and [each.key for each in request.unike.versions] == [key] and request.unike.memory is True
    _, ended = scheduled(served, {"unike": json.dumps({"edits": ["a@1-2-3"], "memory": True})})
    assert len(ended) == 1 and "was replaced or revoked" in ended[0]
    _, ended = scheduled(served, None)
    assert len(ended) == 1 and "a front-end that does not know" in ended[0]
    request, ended = scheduled(None, None)
    assert ended == [] and not hasattr(request, "unike")


def request_of(prompt, versions=(), memory=True):
    ids = list(range(prompt))
    return SimpleNamespace(origin_input_ids=ids, origin_input_ids_unpadded=ids, unike=sglang._Asked(versions, memory))


class Flat:
    """Of which the first edit of each request acts."""

    def __init__(self):
        self.held, self.decided = [], 0

    def decide(self, ids, versions, embed):
        self.decided += 1
        return tuple(versions[:1])

    def hold(self, version, needed):
        self.held.append((version.key, tuple(needed)))


def test_the_rows_of_a_batch():
    a, b = Version("a@1", None), Version("b@1", None)
    requests = [request_of(9, [a, b]), request_of(4, memory="acme"), request_of(7, [b], memory=False)]
    requests.append(SimpleNamespace(origin_input_ids=[1, 2, 3]))  # a trial of SGLang's own
    flat = Flat()
    model = SimpleNamespace(get_input_embeddings=lambda: None)
    runner = SimpleNamespace(unike=SimpleNamespace(flat=lambda: flat), model=model)
    extended = SimpleNamespace(extend_seq_lens_cpu=[4, 2, 1, 3], extend_prefix_lens_cpu=[2, 2, 7, 0])
    assert sglang._shares(requests, extended, runner) == [
        RequestSlice(4, ("a@1",), True, 6), RequestSlice(2, (), "acme", 1), RequestSlice(1, ("b@1",), False, 0),
        RequestSlice(3, (), False, 2),
    ]  # fmt: skip
    assert flat.held == [("a@1", ("a@1", "b@1")), ("b@1", ("a@1", "b@1"))]
    decoding = SimpleNamespace(extend_seq_lens_cpu=None, extend_prefix_lens_cpu=None, batch_size=4)
    found = sglang._shares(requests, decoding, runner)
    assert [(each.tokens, each.edits, each.prompt) for each in found] == [
        (1, ("a@1",), 0), (1, (), 0), (1, ("b@1",), 0), (1, (), 0)
    ]  # fmt: skip
    assert flat.decided == 3  # once each
    with pytest.raises(ValueError, match="zip"):  # rows that nobody asked for
        sglang._shares(requests, SimpleNamespace(**{**vars(decoding), "batch_size": 5}), runner)


def test_a_batch_that_is_edited_is_computed_without_graphs():
    flat, seen = RaggedRuntime([2], 64, "silu"), []
    runner = SimpleNamespace(
        unike=SimpleNamespace(flat=lambda: flat), decode_cuda_graph_runner="decode", prefill_cuda_graph_runner="prefill"
    )

    def forward(runner, batch, last):
        seen.append((runner.decode_cuda_graph_runner, runner.prefill_cuda_graph_runner, operators._step))
        return last

    for shares in ([RequestSlice(1, ("a@1",)), RequestSlice(1)], [RequestSlice(1)], [], None):
        batch = SimpleNamespace() if shares is None else SimpleNamespace(unike=shares)
        assert sglang._forward_raw(forward, runner, batch, "last") == "last"
    graphs = "decode", "prefill"
    assert seen == [(None, None, flat), (*graphs, flat), (*graphs, None), (*graphs, None)]
    with pytest.raises(ZeroDivisionError):
        sglang._forward_raw(lambda *given: 1 / 0, runner, SimpleNamespace(unike=[RequestSlice(1, ("a@1",))]))
    assert (runner.decode_cuda_graph_runner, runner.prefill_cuda_graph_runner) == graphs and operators._step is None


def registry(places):
    """SGLang's, that has found these."""
    module = ModuleType("sglang.srt.plugins.hook_registry")
    module.HookRegistry = SimpleNamespace(_patched={f"sglang.srt.{place}" for place in places}, register=None)
    module.HookType = SimpleNamespace(AROUND="around")
    return dict.fromkeys(("sglang", "sglang.srt", "sglang.srt.plugins", module.__name__), module)


def runner_of(model, settings, **arguments):
    config = SimpleNamespace(
        model_override_args={} if settings is None else {"unike": settings}, hf_config=model.config,
        hf_text_config=model.config, model_path="none",
    )  # fmt: skip
    return SimpleNamespace(
        model_config=config, model=model, server_args=SimpleNamespace(**{**sglang._NEEDED, **arguments})
    )


def test_a_server_is_refused_where_layers_get_other_tokens(make_model, tmp_path, monkeypatch):
    for name, module in registry(sglang._AROUND).items():
        monkeypatch.setitem(sys.modules, name, module)
    model, told = make_model("llama"), {"edits": str(tmp_path)}
    for name in sglang._NEEDED:
        runner = runner_of(model, told, **{name: 7})
        with pytest.raises(ValueError, match=f"expected {name}=.*, got 7"):
            sglang._load_model(lambda runner: None, runner)
        runner = runner_of(model, None, **{name: 7})
        sglang._load_model(lambda runner: None, runner)
        assert runner.unike is None
    assert not any(module._forward_hooks for module in model.modules())
    runner = runner_of(model, told)
    sglang._load_model(lambda runner: None, runner)
    assert runner.unike.flat().layers == [2, 3, 4, 5] and any(module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError, match=r"json_model_override_args\.unike: expected .*, got \['sharded_memory'\]"):
        sglang._load_model(lambda runner: None, runner_of(model, {**told, "sharded_memory": True}))


def test_a_server_is_refused_where_a_place_is_missing(make_model, tmp_path, monkeypatch):
    """SGLang would log that, and answer without edits."""
    model, manager = make_model("llama"), SimpleNamespace()
    manager.model_config = runner_of(model, {"edits": str(tmp_path)}).model_config
    for gone in sglang._AROUND:
        for name, module in registry(set(sglang._AROUND) - {gone}).items():
            monkeypatch.setitem(sys.modules, name, module)
        with pytest.raises(RuntimeError, match=f"does not have sglang.srt.{gone};"):
            sglang._init_model_config(lambda manager: None, manager)


def test_edits_are_computed_in_the_layers_that_they_are_for(make_model, make_edit):
    """What `install` puts into a model, driven as SGLang's runner does."""
    model = make_model("llama")
    edit = make_edit(model, "a", config=every_token())
    flat = RaggedRuntime([2, 3, 4, 5], 64, "silu")
    flat.hold(Version("a@1", edit))
    ids = torch.arange(4, 12)[None]
    with uk.patched(model, [edit]), uk.rows(model, [["a"]]):
        expected = model(ids).logits
    plain = model(ids).logits
    operators.install(model, model.config, flat, edits=True)
    runner = SimpleNamespace(
        unike=SimpleNamespace(flat=lambda: flat), decode_cuda_graph_runner=None, prefill_cuda_graph_runner=None
    )
    with torch.no_grad():
        for shares, logits in (([RequestSlice(8, ("a@1",))], expected), ([RequestSlice(8)], plain)):
            found = sglang._forward_raw(lambda *given: model(ids).logits, runner, SimpleNamespace(unike=shares))
            torch.testing.assert_close(found, logits)
