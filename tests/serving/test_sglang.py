"""The plugin in SGLang's own engine, against Hugging Face's generation with the same edits, token for token.

Needs an environment with SGLang, in which these tests are run by tests/test_other_packages.py.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest
import torch
from configs import every_token
from http_server import free_port, serving
from scopes import PROMPTS, scoped

os.environ.update(SGLANG_USE_CPU_ENGINE="1", HF_HUB_OFFLINE="1")
sglang = pytest.importorskip("sglang", reason="SGLang is not installed")

import unike_kernels as uk  # noqa: E402

NEW = 6
SETTINGS = {
    "device": "cpu", "dtype": "float32", "attention_backend": "torch_native", "sampling_backend": "pytorch",
    "grammar_backend": "none", "max_total_tokens": 4096, "log_level": "warning",
}  # fmt: skip


@contextmanager
def engine(folder, told, **more):
    """SGLang with the model of a folder; prompts are given as ids."""
    overrides = json.dumps({"unike": {name: str(value) for name, value in told.items()}})
    made = sglang.Engine(
        model_path=str(folder), skip_tokenizer_init=True, json_model_override_args=overrides, **{**SETTINGS, **more}
    )
    try:
        yield made
    finally:
        made.shutdown()


def ask(llm, prompts, asked, **more):
    """Ids of the answers to prompts, and how many of their tokens came from the cache."""
    params = [
        {"temperature": 0, "max_new_tokens": NEW, "ignore_eos": True, "custom_params": each or None, **more}
        for each in asked
    ]
    found = llm.generate(input_ids=[list(prompt) for prompt in prompts], sampling_params=params)
    return [each["output_ids"] for each in found], [each["meta_info"]["cached_tokens"] for each in found]


class Alone:
    """Each request alone, in Hugging Face."""

    def __init__(self, model, edits, memory=None):
        self.model, self.edits, self.memory = model, edits, memory

    def __call__(self, prompt, chosen=(), memory=None):
        settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
        ids = torch.tensor([list(prompt)])
        edits = [edit for edit in self.edits if edit.id in chosen]
        with (
            uk.patched(self.model, edits, self.memory),
            uk.rows(
                self.model, [list(chosen)], memory=None if memory is None else [memory], prompt_lengths=[len(prompt)]
            ),
        ):
            return self.model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, -NEW:].tolist()


@pytest.fixture
def place(tmp_path):
    """Puts a model and its edits into a folder, and returns what a server is told."""

    def make(model, edits, memory=None):
        model.save_pretrained(tmp_path / "model")
        (tmp_path / "edits").mkdir()
        for edit in edits:
            edit.save(tmp_path / "edits" / f"{edit.id}.safetensors")
        if memory is None:
            return tmp_path, {"edits": tmp_path / "edits"}
        memory.save(tmp_path / "memory.safetensors")
        return tmp_path, {"edits": tmp_path / "edits", "memory": tmp_path / "memory.safetensors"}

    return make


def prompt(seed, length):
    return torch.randint(4, 44, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_each_request_has_its_own_edits(make_model, make_edit, place):
    """Chunks, prefixes in the cache, several samples; edits are added, replaced and revoked while the engine serves."""
    model = make_model("llama")
    edits = {id: make_edit(model, id, config=every_token(), seed=seed) for seed, id in enumerate("abc")}
    folder, told = place(model, edits.values())
    sets = [[], ["a"], ["b"], ["a", "b"], ["c"], [], ["b", "a"], ["a"], ["c", "b"]]
    one, long = prompt(0, 5), prompt(1, 40)
    prompts = [one, one, one, one, long, long, long, one + long, prompt(2, 1)]
    with engine(folder / "model", told, chunked_prefill_size=16) as llm:
        asked, alone = [{"unike_edit": chosen} if chosen else {} for chosen in sets], Alone(model, edits.values())
        expected = [alone(*each) for each in zip(prompts, sets, strict=True)]
        plain = [alone(each) for each in prompts]
        assert sum(a != b for a, b, chosen in zip(expected, plain, sets, strict=True) if chosen) >= 5
        assert ask(llm, prompts, asked)[0] == expected
        found, cached = ask(llm, prompts, asked)  # once more, with every prefix in the cache
        assert found == expected and cached == [len(each) - 1 for each in prompts]
        assert ask(llm, prompts, [{}] * len(prompts))[0] == plain
        assert ask(llm, [one, one], [{"unike_edit": "a"}, {}], n=2)[0] == [expected[1]] * 2 + [expected[0]] * 2

        def refused(message, asked, **more):
            with pytest.raises(ValueError, match=message):
                ask(llm, [one], [asked], **more)

        refused("there is no edit 'd'", {"unike_edit": "d"})
        edits["d"] = make_edit(model, "d", config=every_token(), seed=9)
        edits["a"] = make_edit(model, "a", config=every_token(), seed=10)  # another one of this name
        for id in "ad":
            edits[id].save(folder / "edits" / f"{id}.safetensors")
        sets, alone = [["d"], ["a"], [], ["a", "d"]], Alone(model, edits.values())
        found, cached = ask(llm, [one] * 4, [{"unike_edit": chosen} for chosen in sets])
        assert found == [alone(one, chosen) for chosen in sets]
        assert found[1] != expected[1] and cached == [0, 0, len(one) - 1, 0]
        (folder / "edits" / "d.safetensors").unlink()
        refused("there is no edit 'd'", {"unike_edit": "d"})
        refused("unike_edit: expected distinct ids", {"unike_edit": ["a", "a"]})
        refused("there is no memory for the tenant 'acme'", {"unike_memory": "acme"})
        refused("computes no beams", {}, beam_width=2)
        forged = {"unike": json.dumps({"edits": ["a@1-2-3"], "memory": False})}  # what the front-end alone may say
        assert ask(llm, [one], [forged])[0] == [plain[0]]


@pytest.mark.parametrize("tokens", ["all", "answer"])
def test_a_memory_for_those_that_do_not_decline_it(tokens, make_model, make_edit, make_memory, place):
    """With prompts and answers in one batch, and conversations whose first turn is in the cache."""
    model = make_model("llama")
    memory = make_memory(model, every_token(k=7, values="out", alpha=0.4, tokens=tokens))
    edits = [make_edit(model, id, memory, config=memory.config, seed=seed) for seed, id in enumerate("ab")]
    folder, told = place(model, edits, memory)
    alone = Alone(model, edits, memory)
    sets, uses = [["a"], [], [], ["b", "a"], ["b"]], [None, None, 0, 0, 1]
    prompts = [prompt(0, 9), prompt(0, 9), prompt(0, 9), prompt(1, 30), prompt(2, 12)]
    asked = [
        {"unike_edit": chosen, **({} if use is None else {"unike_memory": use})}
        for chosen, use in zip(sets, uses, strict=True)
    ]
    with engine(folder / "model", told, chunked_prefill_size=8, enable_mixed_chunk=True) as llm:
        for turn in range(3):
            expected = [alone(p, chosen, use in (None, 1)) for p, chosen, use in zip(prompts, sets, uses, strict=True)]
            assert turn or expected != [alone(p, chosen, False) for p, chosen in zip(prompts, sets, strict=True)]
            for _ in range(2):
                found, cached = ask(llm, prompts, asked)
                assert found == expected
            assert cached == [len(p) - 1 for p in prompts]
            prompts = [[*p, *answer, 7] for p, answer in zip(prompts, found, strict=True)]


def test_requests_name_their_tenants(make_model, make_memory, place):
    model = make_model("llama")
    one = make_memory(model, every_token(k=7, values="out", alpha=0.4))
    flipped = {i: dataclasses.replace(m, index=-m.index, values=-m.values) for i, m in one.layers.items()}
    memory = uk.MemoryBank.joined({"acme": one, "globex": uk.MemoryBank(flipped, one.config, one.base_model)})
    folder, told = place(model, [], memory)
    uses = ["acme", "globex", False, None, "acme", None]
    with engine(folder / "model", told) as llm:
        alone = Alone(model, [], memory)
        expected = [alone(prompt(0, 8), (), use or False) for use in uses]
        assert len({tuple(each) for each in expected}) == 3
        asked = [{} if use is None else {"unike_memory": use} for use in uses]
        for _ in range(2):
            assert ask(llm, [prompt(0, 8)] * len(uses), asked)[0] == expected
        with pytest.raises(ValueError, match="unknown tenant 'initech'"):
            ask(llm, [prompt(0, 8)], [{"unike_memory": "initech"}])


def louder(edit):
    layers = {i: dataclasses.replace(layer, values=20 * layer.values) for i, layer in edit.layers.items()}
    return dataclasses.replace(edit, layers=layers)


def test_a_scope_decides_which_edit_acts(make_model, make_edit, place):
    model = make_model("llama")
    memory, edits = scoped(model, make_edit)
    edits = [louder(edit) for edit in edits]
    folder, told = place(model, edits, memory)
    with engine(folder / "model", told) as llm:
        alone, sets = Alone(model, edits, memory), [["a", "b"], ["b"], ["a", "b"], ["a"]]
        prompts = [PROMPTS[0].tolist(), PROMPTS[0].tolist(), PROMPTS[1].tolist(), PROMPTS[2].tolist()]
        expected = [alone(*each) for each in zip(prompts, sets, strict=True)]
        plain = [alone(each) for each in prompts]
        assert [a != b for a, b in zip(expected, plain, strict=True)] == [True, False, True, False]
        for _ in range(2):
            assert ask(llm, prompts, [{"unike_edit": chosen} for chosen in sets])[0] == expected


def test_over_http(make_model, make_edit, make_processor, place):
    model, tokenizer = make_model("llama"), make_processor().tokenizer
    edits = [make_edit(model, id, config=every_token(), seed=seed) for seed, id in enumerate("ab")]
    folder, told = place(model, edits)
    tokenizer.save_pretrained(folder / "model")
    (folder / "hooks.py").write_text(
        "def check(access):\n    if access.headers.get('x-banned'):\n        raise PermissionError('not yours')\n"
    )
    port = free_port()
    overrides = json.dumps({"unike": {"edits": str(told["edits"]), "authorize": "hooks:check"}})
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    command = [
        sys.executable, "-m", "sglang.launch_server", f"--model-path={folder / 'model'}", f"--port={port}",
        "--served-model-name=words", f"--json-model-override-args={overrides}", *flags,
    ]  # fmt: skip

    def fetch(path, body, **headers):
        headers = {"Content-Type": "application/json"} | headers
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    def complete(**more):
        body = {"model": "words", "prompt": "w1 w2 w3", "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
        headers = more.pop("headers", {})
        found = fetch("/v1/completions", body | more, **headers)
        return found["model"], found["choices"][0]["text"].split()

    with serving(command, port, folder, seconds=300):
        ids, alone = tokenizer("w1 w2 w3")["input_ids"], Alone(model, edits)
        for chosen in ([], ["a"], ["b", "a"]):
            expected = tokenizer.decode(alone(ids, chosen)).split()
            assert complete(custom_params={"unike_edit": chosen} if chosen else None) == ("words", expected)
            name = "+".join(chosen) or "words"
            assert complete(model=name) == (name, expected)
        sampling = {"temperature": 0, "max_new_tokens": NEW, "ignore_eos": True, "custom_params": {"unike_edit": "a"}}
        native = {"input_ids": ids, "sampling_params": sampling}
        assert fetch("/generate", native)["output_ids"] == alone(ids, ["a"])

        def refused(status, message, **more):
            with pytest.raises(urllib.error.HTTPError) as caught:
                more.pop("post", complete)(**more)
            assert caught.value.code == status and message in caught.value.read().decode()

        refused(400, "there is no edit 'd'", custom_params={"unike_edit": "d"})
        refused(400, "expected the base model", model="a", custom_params={"unike_edit": "b"})
        refused(403, "not yours", model="a", headers={"x-banned": "1"})
        refused(403, "not yours", post=lambda: fetch("/generate", native, **{"x-banned": "1"}))
        assert complete(model="a")[1] == tokenizer.decode(alone(ids, ["a"])).split()
