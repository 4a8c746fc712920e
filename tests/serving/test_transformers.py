"""transformers' own server with a real client: edited models by their names."""

import dataclasses
import gc
import json
import socket
import time
import urllib.error
import urllib.request
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from configs import every_token

import unike_kernels as uk
from unike_kernels.serving import EditRepository, transformers
from unike_kernels.serving.transformers import EditedModels, RequestError, _resolving, serve, sharing_weights

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")
from transformers.cli.serving.completion import CompletionHandler  # noqa: E402
from transformers.cli.serving.systemone import SystemOneHandler  # noqa: E402

PROMPT = "w1 w2 w3 w4"
NEW = 6


def loud(edit):
    """Values that change what the model says."""
    layers = {i: dataclasses.replace(layer, values=20 * layer.values) for i, layer in edit.layers.items()}
    return dataclasses.replace(edit, layers=layers)


def test_a_model_that_shares_its_weights(make_model, make_edit):
    model, ids = make_model("llama"), torch.tensor([[5, 6, 7]])
    other = sharing_weights(model)
    for one, two in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert one.data_ptr() == two.data_ptr()
    before = model(input_ids=ids).logits
    uk.patch(other, [make_edit(model, "a")])
    assert torch.equal(model(input_ids=ids).logits, before)
    assert not torch.equal(other(input_ids=ids).logits, before)


def test_names(make_model, make_edit, tmp_path):
    model = make_model("llama")
    make_edit(model, "a").save(tmp_path / "a.safetensors")
    models = EditedModels(EditRepository(tmp_path))
    base, versions = models.split("folder/name+a")
    assert (base, [v.edit.id for v in versions]) == ("folder/name", ["a"])
    edited = models.edited(model, versions)
    assert models.edited(model, versions) is edited is not model
    assert models.edited(model, []) is model
    make_edit(model, "a", seed=7).save(tmp_path / "a.safetensors")
    assert models.edited(model, models.split("x+a")[1]) is not edited
    with pytest.raises(ValueError, match="there is no edit 'b'"):
        models.split("x+a+b")


def test_edited_models_go_with_their_model(make_model, make_edit, tmp_path):
    model = make_model("llama")
    make_edit(model, "a").save(tmp_path / "a.safetensors")
    models = EditedModels(EditRepository(tmp_path))
    edited = weakref.ref(models.edited(model, models.split("x+a")[1]))
    weight = weakref.ref(model.get_input_embeddings().weight)
    gc.collect()
    assert edited() is not None
    del model
    gc.collect()
    assert edited() is None and weight() is None


@pytest.mark.parametrize("config", [{"tokens": "answer"}, {"alpha": "last"}, {"retrieval": "sequence"}])
def test_edited_models_know_where_prompts_end(make_model, make_edit, make_memory, tmp_path, config):
    """A memory whose config needs it, as with `rows(prompt_lengths=...)`."""
    model = make_model("llama")
    memory = make_memory(model, every_token(**{"k": 7, "values": "out", "alpha": 0.4, **config}))
    edit = loud(make_edit(model, "a", memory))
    edit.save(tmp_path / "a.safetensors")
    models = EditedModels(EditRepository(tmp_path), memory)
    edited = models.edited(model, models.split("x+a")[1])
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    settings = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with uk.patched(model, [edit], memory), uk.rows(model, prompt_lengths=[5]):
        wanted = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    found = edited.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    assert all(torch.equal(a, b) for a, b in zip(found.logits, wanted.logits, strict=True))


def test_memories_that_cannot_be_served_are_refused_at_start(make_model, make_memory, tmp_path):
    one = make_memory(make_model("llama"), every_token(k=7, values="out", tokens="answer"))
    one.save(tmp_path / "one")
    uk.MemoryBank.joined({"acme": one}).save(tmp_path / "joined")
    for continuous in (False, True):
        with pytest.raises(ValueError, match="memory: expected one without tenants"):
            serve(tmp_path, tmp_path / "joined", continuous_batching=continuous)
    with pytest.raises(ValueError, match="with compile=True transformers' masks do not tell where prompts end"):
        serve(tmp_path, tmp_path / "one", compile=True)
    with pytest.raises(ValueError, match="max_edits: expected an integer"):
        serve(tmp_path, max_edits=0)
    for config in ({"alpha": "last"}, {"retrieval": "sequence"}):
        memory = make_memory(make_model("llama"), every_token(k=7, values="out", **config))
        with pytest.raises(ValueError, match="memory: an engine of flat tokens serves retrieval='token'"):
            serve(tmp_path, memory, continuous_batching=True)


@pytest.mark.parametrize("config", [{"tokens": "answer"}, {"alpha": "last"}, {"retrieval": "sequence"}, {}])
def test_decisions_and_speech_have_no_end_of_a_prompt(make_model, make_edit, make_memory, tmp_path, config):
    """/v1/systemone computes single passes; what generates from sounds has no prompt of text."""
    model = make_model("llama")
    memory = make_memory(model, every_token(**{"k": 7, "values": "out", "alpha": 0.4, **config}))
    loud(make_edit(model, "a", memory)).save(tmp_path / "a.safetensors")
    models = EditedModels(EditRepository(tmp_path), memory)
    state = SimpleNamespace(use_continuous_batching=lambda *args: False)
    kinds = SimpleNamespace(get_model_modality=lambda *args, **kwargs: None, force_model=None)
    resolve = _resolving(lambda self, body: (body["model"], model, None), models)
    for handler in (SystemOneHandler(kinds, state), CompletionHandler(kinds, state)):
        if config and isinstance(handler, SystemOneHandler):
            with pytest.raises(RequestError, match="the memory here needs to know where a prompt ends") as error:
                resolve(handler, {"model": "x+a"})
            assert error.value.status == 400
        else:
            assert resolve(handler, {"model": "x+a"})[1] is models.edited(model, models.split("x+a")[1])
    if config:
        with pytest.raises(RequestError, match="where a prompt of text ends"):
            models.edited(model, models.split("x+a")[1]).generate(input_features=torch.zeros(1, 2))


@pytest.fixture
def server(make_model, make_edit, processor, tmp_path, request):
    """(client, name of the model, the model, the edits' folder) of a server that runs."""
    model = make_model("llama")
    model.save_pretrained(tmp_path / "model")
    processor.tokenizer.save_pretrained(tmp_path / "model")
    folder = tmp_path / "edits"
    folder.mkdir()
    for seed, name in enumerate("ab"):
        loud(make_edit(model, name, seed=seed)).save(folder / f"{name}.safetensors")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"non_blocking": True, "dtype": "float32", "device": "cpu", **getattr(request, "param", {})}
    running = serve(folder, host="127.0.0.1", port=port, **settings)
    try:
        while not running.server.started:
            time.sleep(0.05)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        yield client, str(tmp_path / "model"), model, folder
    finally:
        running.kill_server()


def refused(client, model):
    """Status and error of a request for this model, and the whole reply."""
    body = json.dumps({"model": model, "prompt": PROMPT, "max_tokens": 1}).encode()
    request = urllib.request.Request(f"{client.base_url}completions", body, {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=60)
    text = error.value.read().decode()
    return error.value.code, json.loads(text)["error"], text


def check_hostile_names(client, name, folder):
    """Errors of their requests, in OpenAI's form, that tell no more than what was asked for."""
    (folder / "broken.safetensors").write_bytes(b"no")
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    for model, status, message in [
        (f"{name}+none", 404, "there is no edit 'none'"),
        (f"{name}+broken", 400, "the file of 'broken' is not valid"),
        (f"{name}+loop", 400, "the file of 'loop' cannot be read"),
        (f"{name}+a+a", 400, "expected distinct ids, got ['a', 'a']"),
        (f"{name}{'+a' * 10_000}", 400, "expected at most 16 edits, got 10000"),
        (f"{name}+{'a' * 300}", 400, "expected an id of letters"),
        (f"{name}+..", 400, "expected an id of letters"),
        (f"{name}+../a", 400, "expected an id of letters"),
        (f"{name}+a\0", 400, "expected an id of letters"),
        (f"{name}+", 400, "expected an id of letters"),
        ("no-such-model-of-ours/anywhere/at-all+a", 404, "'no-such-model-of-ours/anywhere/at-all' cannot be loaded"),
        (None, 400, "expected the name of a model, got None"),
        (["x+a"], 400, "expected the name of a model, got ['x+a']"),
        ({"x": 1}, 400, "expected the name of a model"),
        (7, 400, "expected the name of a model, got 7"),
    ]:
        code, error, text = refused(client, model)
        assert (code, error["type"], error["param"]) == (status, "invalid_request_error", "model")
        assert message in error["message"]
        assert error["code"] == ("model_not_found" if status == 404 else None)
        assert str(folder) not in text and len(text) < 400


def test_each_name_has_its_edits(server, make_model, make_edit, processor):
    client, name, model, folder = server
    tokenizer = processor.tokenizer
    inputs = tokenizer(PROMPT, return_tensors="pt")

    def expected(edits):
        with uk.patched(model, edits):
            out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def asked(*edits, **more):
        model_name = "+".join([name, *edits])
        return client.completions.create(model=model_name, prompt=PROMPT, max_tokens=NEW, temperature=0, **more)

    edits = {id: uk.Edit.load(folder / f"{id}.safetensors") for id in "ab"}
    texts = [expected([edits[id] for id in chosen]) for chosen in ("", "a", "b", "ab")]
    assert len(set(texts)) == 4
    for _ in range(2):
        for chosen, text in zip(("", "a", "b", "ab"), texts, strict=True):
            assert asked(*chosen).choices[0].text == text
    streamed = "".join(part.choices[0].text for part in asked("a", stream=True))
    assert streamed == texts[1]

    with pytest.raises(openai.NotFoundError) as error:
        asked("c")
    assert "there is no edit 'c'" in error.value.response.text
    loud(make_edit(model, "c", seed=5)).save(folder / "c.safetensors")
    loud(make_edit(model, "a", seed=6)).save(folder / "a.safetensors")  # another one of this name
    assert asked("c").choices[0].text == expected([uk.Edit.load(folder / "c.safetensors")])
    assert asked("a").choices[0].text == expected([uk.Edit.load(folder / "a.safetensors")]) != texts[1]
    (folder / "c.safetensors").unlink()
    with pytest.raises(openai.NotFoundError):
        asked("c")
    assert asked().choices[0].text == texts[0]
    cards = {card.id: getattr(card, "parent", None) for card in client.models.list()}
    assert cards[name] is None and cards[f"{name}+a"] == cards[f"{name}+b"] == name and f"{name}+c" not in cards
    with urllib.request.urlopen(f"{client.base_url}edits", timeout=60) as answer:
        assert json.load(answer)["data"] == [{"id": "a"}, {"id": "b"}]
    check_hostile_names(client, name, folder)
    make_edit(make_model("opt"), "other").save(folder / "other.safetensors")
    assert refused(client, f"{name}+other")[0] == 400
    assert asked("b").model == f"{name}+b"
    assert {part.model for part in asked("a", "b", stream=True)} == {f"{name}+a+b"}
    with urllib.request.urlopen(str(client.base_url).replace("/v1/", "/metrics"), timeout=60) as answer:
        told = answer.read().decode().splitlines()
    assert told[1:] == [  # of those that were answered
        "# TYPE unike_requests_total counter", 'unike_requests_total{edit=""} 3', 'unike_requests_total{edit="a"} 7',
        'unike_requests_total{edit="b"} 6', 'unike_requests_total{edit="c"} 1',
    ]  # fmt: skip


# Without a size the cache takes most of the machine's memory.
@pytest.mark.parametrize(
    "server", [{"continuous_batching": True, "cb_num_blocks": 64, "cb_max_batch_tokens": 64}], indirect=True
)
def test_requests_with_different_edits_in_one_batch(server, make_edit, processor):
    """Continuous batching: all at once, plain and streamed; an unknown edit is an error of its request alone."""
    client, name, model, folder = server
    tokenizer = processor.tokenizer
    inputs = tokenizer(PROMPT, return_tensors="pt")
    edits = {id: uk.Edit.load(folder / f"{id}.safetensors") for id in "ab"}

    def expected(chosen):
        with uk.patched(model, [edits[id] for id in chosen]):
            out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def asked(chosen, **more):
        model_name = "+".join([name, *chosen])
        return client.completions.create(model=model_name, prompt=PROMPT, max_tokens=NEW, temperature=0, **more)

    def streamed(chosen):
        return "".join(part.choices[0].text for part in asked(chosen, stream=True))

    sets = ["", "a", "b", "ab", "a", ""]
    texts = {chosen: expected(chosen) for chosen in sets}
    assert len(set(texts.values())) == 4
    assert asked("").choices[0].text == texts[""]  # the server begins with a request without edits
    with ThreadPoolExecutor(8) as clients:
        for _ in range(3):
            whole = [clients.submit(asked, chosen) for chosen in sets]
            parts = [clients.submit(streamed, chosen) for chosen in sets]
            nobody = clients.submit(asked, "ac")
            assert [each.result().choices[0].text for each in whole] == [texts[chosen] for chosen in sets]
            assert [each.result() for each in parts] == [texts[chosen] for chosen in sets]
            with pytest.raises(openai.NotFoundError) as error:
                nobody.result()
            assert "there is no edit 'c'" in error.value.response.text
    (folder / "a.safetensors").unlink()
    with pytest.raises(openai.NotFoundError):
        asked("a")
    assert asked("b").choices[0].text == texts["b"]
    assert asked("b").model == f"{name}+b"
    assert {part.model for part in asked("b", stream=True)} == {f"{name}+b"}
    make_edit(model, "a").save(folder / "a.safetensors")
    check_hostile_names(client, name, folder)
    assert asked("").choices[0].text == texts[""]


def test_workers_are_bounded():
    """transformers keeps one for each name that was ever asked for."""
    from transformers.cli.serving.utils import GenerationState

    get, state = (
        transformers._managing(getattr(GenerationState.get_manager, "original", GenerationState.get_manager)),
        GenerationState(),
    )
    plain = get(state, "m@main")
    made = set()
    for i in range(3 * transformers._KEPT):
        token = transformers._asked.set(transformers._Asked(("a",), "m@main"))
        worker = get(state, f"m+{i}")
        assert get(state, f"m+{i}") is worker
        transformers._asked.reset(token)
        made.add(worker)
    assert len(made) == transformers._KEPT and plain not in made
    assert get(state, "m@main") is plain
    assert len(state._generate_managers) == transformers._KEPT + 1
