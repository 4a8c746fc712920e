"""What servers tell and are told of edits over HTTP: vLLM's, with fakes of the few classes that are met there."""

from __future__ import annotations

import asyncio
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from configs import every_token

from unike_kernels.serving import RaggedRuntime, RequestSlice, Version
from unike_kernels.serving.vllm import _served

fastapi = pytest.importorskip("fastapi")
prometheus_client = pytest.importorskip("prometheus_client")


def nobody_but_acme(access):
    """A hook of an operator's own: what is called 'secret' is acme's."""
    if "secret" in access.edits and access.headers.get("x-tenant") != "acme":
        raise PermissionError("not yours")


class BaseServing:
    """As vLLM's, as far as a model's name goes."""

    def __init__(self, models):
        self.models = models

    @staticmethod
    def create_error_response(message):
        return {"error": message}

    async def _check_model(self, request):
        return None if self.models.is_base_model(request.model) else {"error": f"no {request.model}"}


class Card(SimpleNamespace):
    def model_copy(self, update):
        return Card(**{**vars(self), **update})


class OpenAIServingModels:
    """As vLLM's."""

    def __init__(self, engine_client):
        self.engine_client = engine_client
        self.base_model_paths, self.lora_requests = [SimpleNamespace(name="base")], {"adapter": None}

    def is_base_model(self, name):
        return name == "base"

    def model_name(self, lora_request=None):
        return "base"

    async def show_available_models(self):
        return SimpleNamespace(data=[Card(id="base", root="here", parent=None, max_model_len=9)])


class Engine:
    """Its worker has routed one prompt more each time that it is asked."""

    def __init__(self, config):
        self.vllm_config, self.count = config, 0

    async def collective_rpc(self, method, timeout):
        assert method == "unike_stats"
        self.count += 1
        if self.count > 2:
            raise TimeoutError
        return [
            {"edits_resident": 3, "prompts_routed": 0, "prompts_not_routed": 0, "memory_seconds": 0.0},  # a first stage
            {"edits_resident": 3, "prompts_routed": self.count, "prompts_not_routed": 0, "memory_seconds": 0.5},
            {},
        ]


@pytest.fixture
def server(monkeypatch, make_model, make_edit, tmp_path):
    """(settings) -> a function that asks the server: (method, path, body, headers) -> status, reply."""
    model = make_model("llama")
    edits = tmp_path / "edits"
    for id in ("kea", "other", "secret"):
        make_edit(model, id).save(edits / f"{id}.safetensors")
    make_edit(model, "elsewhere").save(tmp_path / "elsewhere.safetensors")
    for name, made in (
        ("vllm.entrypoints.openai.models.serving", OpenAIServingModels),
        ("vllm.entrypoints.serve.engine.serving", BaseServing),
    ):
        module = ModuleType(name)
        kind = type(made.__name__, (made,), dict(vars(made)))  # wrapped anew in each test
        setattr(module, made.__name__, kind)
        for part in range(1, name.count(".") + 1):
            parent = ".".join(name.split(".")[:part])
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        monkeypatch.setitem(sys.modules, name, module)

    def make(**settings):
        from unike_kernels.serving.vllm_http import EditMiddleware

        config = SimpleNamespace(
            additional_config={"unike": {"edits": edits, **settings}}, use_v2_model_runner=False,
            model_config=SimpleNamespace(hf_config=model.config, hf_text_config=model.config, model="none"),
        )  # fmt: skip
        app = fastapi.FastAPI()
        app.add_middleware(EditMiddleware)
        app.state.vllm_config, app.state.engine_client = config, Engine(config)

        def models():
            return sys.modules["vllm.entrypoints.openai.models.serving"].OpenAIServingModels(app.state.engine_client)

        @app.get("/v1/models")
        async def list_models():
            return [vars(card) for card in (await models().show_available_models()).data]

        @app.post("/v1/completions")
        async def complete(body: dict):
            request = SimpleNamespace(model=body["model"], vllm_xargs=body.get("vllm_xargs"))
            own = models()
            error = await sys.modules["vllm.entrypoints.serve.engine.serving"].BaseServing(own)._check_model(request)
            if error is not None:
                return error
            engine_request = SimpleNamespace(
                sampling_params=SimpleNamespace(extra_args=request.vllm_xargs), cache_salt=None
            )
            _served(config).admit(engine_request)
            keys = engine_request.sampling_params.extra_args["unike"]["edits"]
            return {"model": own.model_name(), "edits": [key.split("@")[0] for key in keys]}

        @app.get("/metrics")
        def metrics():
            text = prometheus_client.generate_latest().decode()
            return {
                line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
                for line in text.splitlines()
                if "# " not in line
            }

        def ask(method, path, body=None, **headers):
            return asyncio.run(exchange(app, method, path, body, headers))

        asyncio.run(start(app))
        return ask

    return make


async def start(app):
    """The start and end of a server, as it tells the application."""
    events = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])

    async def receive():
        return next(events)

    async def send(message):
        assert "failed" not in message["type"], message

    await app({"type": "lifespan", "state": {}}, receive, send)


async def exchange(app, method, path, body, headers):
    """One request."""
    told, sent = [], False
    names = {"content-type": "application/json", **{name.replace("_", "-"): text for name, text in headers.items()}}
    scope = {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"",
        "headers": [(name.encode(), text.encode()) for name, text in names.items()], "http_version": "1.1",
        "scheme": "http", "server": ("here", 80), "client": ("there", 1), "root_path": "",
    }  # fmt: skip

    async def receive():
        nonlocal sent
        if sent:
            return {"type": "http.disconnect"}
        sent = True
        return {"type": "http.request", "body": b"" if body is None else json.dumps(body).encode()}

    async def send(message):
        told.append(message)

    await app(scope, receive, send)
    text = b"".join(message.get("body", b"") for message in told).decode()
    return told[0]["status"], json.loads(text) if text[:1] in "[{" else text


def test_edits_are_models(server):
    ask = server(authorize=f"{__name__}:nobody_but_acme")
    _, listed = ask("GET", "/v1/models")
    assert [(card["id"], card["parent"]) for card in listed] == [("base", None), ("kea", "base"), ("other", "base")]
    assert len(ask("GET", "/v1/models", x_tenant="acme")[1]) == 4
    complete = lambda **body: ask("POST", "/v1/completions", body)[1]  # noqa: E731
    assert complete(model="base") == {"model": "base", "edits": []}
    assert complete(model="kea") == {"model": "kea", "edits": ["kea"]}
    assert complete(model="kea+other") == {"model": "kea+other", "edits": ["kea", "other"]}
    assert complete(model="base") == {"model": "base", "edits": []}  # nothing is left of the last request
    assert complete(model="base", vllm_xargs={"unike_edit": "kea"}) == {"model": "base", "edits": ["kea"]}
    for unknown in ("nobody", "kea+nobody", "../kea", "adapter"):
        assert complete(model=unknown) == {"error": f"no {unknown}"}
    assert "expected the base model" in complete(model="kea", vllm_xargs={"unike_edit": "other"})["error"]
    with pytest.raises(PermissionError, match="not yours"):  # which the plugin answers with the status 403
        complete(model="secret")


def test_edits_are_loaded_and_unloaded(server, tmp_path):
    ask = server(updating=True, authorize=f"{__name__}:nobody_but_acme")
    file = str(tmp_path / "elsewhere.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no")

    def load(**more):
        status, told = ask("POST", "/v1/load_edit", {"edit_name": "new", "edit_path": file, **more})
        return status, told if isinstance(told, str) else told["error"]["message"]

    assert load() == (200, "Success: edit 'new' added successfully.")
    assert ask("POST", "/v1/completions", {"model": "new"})[1] == {"model": "new", "edits": ["new"]}
    assert load() == (400, "edit: there is an edit 'new' already; replacing it has to be asked for")
    assert load(load_inplace=True)[0] == 200
    assert load(edit_name="secret", load_inplace=True) == (403, "not yours")
    assert load(edit_name="../x")[0] == 400
    assert load(edit_path=str(tmp_path / "none"))[0] == 404
    assert load(edit_name="b", edit_path=str(tmp_path / "broken.safetensors"))[0] == 400
    assert ask("GET", "/v1/edits")[1]["data"] == [{"id": "kea"}, {"id": "new"}, {"id": "other"}]
    assert ask("POST", "/v1/unload_edit", {"edit_name": "new"}) == (200, "Success: edit 'new' removed successfully.")
    assert ask("POST", "/v1/unload_edit", {"edit_name": "new"})[0] == 404
    assert ask("POST", "/v1/unload_edit", {"edit_name": "secret"})[0] == 403
    assert ask("POST", "/v1/completions", {"model": "new"})[1] == {"error": "no new"}


def test_an_edit_of_another_model_is_not_loaded(server, make_model, make_edit, tmp_path):
    ask = server(updating=True)
    make_edit(make_model("opt"), "x").save(tmp_path / "x.safetensors")
    status, told = ask("POST", "/v1/load_edit", {"edit_name": "x", "edit_path": str(tmp_path / "x.safetensors")})
    assert status == 400 and "edit 'x'" in told["error"]["message"]
    assert {"id": "x"} not in ask("GET", "/v1/edits")[1]["data"]


def test_nothing_is_loaded_unless_that_is_allowed(server):
    ask = server()
    assert ask("POST", "/v1/load_edit", {"edit_name": "x", "edit_path": "y"})[0] == 404
    assert ask("POST", "/v1/unload_edit", {"edit_name": "kea"})[0] == 404
    assert {"id": "kea"} in ask("GET", "/v1/edits")[1]["data"]


def test_metrics(server):
    ask = server()
    for _ in range(2):
        ask("POST", "/v1/completions", {"model": "kea"})
    ask("POST", "/v1/completions", {"model": "base"})
    _, first = ask("GET", "/metrics")
    assert first['unike_requests_total{edit="kea"}'] == 2 and first['unike_requests_total{edit=""}'] == 1
    assert (first["unike_edits_resident"], first["unike_prompts_routed"], first["unike_memory_seconds"]) == (3, 1, 0.5)
    ask("POST", "/v1/completions", {"model": "kea"})
    _, second = ask("GET", "/metrics")
    assert second['unike_requests_total{edit="kea"}'] == 3 and second["unike_prompts_routed"] == 2
    status, third = ask("GET", "/metrics")  # the engine does not answer
    assert status == 200 and third["unike_prompts_routed"] == 2


def test_what_a_runtime_tells_a_monitor(make_model, make_memory, make_edit):
    model = make_model("llama")
    memory = make_memory(model, every_token(k=7, values="out"))
    runtime = RaggedRuntime([2, 3, 4, 5], 64, "silu", memory)
    assert {name for name, value in runtime.stats.items() if value} == {"memory_entries"}
    runtime.hold(Version("a@1", make_edit(model, "a", memory)))
    runtime.begin([RequestSlice(3, ("a@1",))])
    runtime.attention(2, torch.randn(3, 64), torch.randn(3, 64))
    assert (runtime.stats["edits_resident"], runtime.stats["memory_entries"]) == (1, 50)
    assert 0 < runtime.stats["memory_seconds"] < 10
