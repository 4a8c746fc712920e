"""The plugin in vLLM's own engine, against Hugging Face's generation with the same edits, token for token.

Needs an environment with vLLM, in which these tests are run by tests/test_other_packages.py.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import gc
import itertools
import json
import logging
import math
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import transformers
from configs import every_token
from http_server import free_port, serving

os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind", HF_HUB_OFFLINE="1")
vllm = pytest.importorskip("vllm")

from capture import Capture  # noqa: E402
from PIL import Image  # noqa: E402
from scopes import scoped  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from unike_eval.models import smollm2  # noqa: E402
from unike_eval.toy import digits  # noqa: E402
from unike_eval.toy.digits.model import WEIGHTS  # noqa: E402
from unike_eval.toy.processor import NUM_IMAGE_TOKENS  # noqa: E402
from vllm.compilation.backends import split_graph  # noqa: E402
from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass  # noqa: E402
from vllm.config import CompilationMode, CUDAGraphMode, PassConfig  # noqa: E402
from vllm.config.utils import replace  # noqa: E402
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs  # noqa: E402
from vllm.exceptions import VLLMValidationError  # noqa: E402
from vllm.forward_context import get_forward_context  # noqa: E402
from vllm.platforms.cpu import CpuPlatform  # noqa: E402
from vllm.v1.attention.backend import AttentionCGSupport  # noqa: E402
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder  # noqa: E402
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher  # noqa: E402
from vllm.v1.engine.async_llm import AsyncLLM  # noqa: E402
from vllm.v1.worker.cpu_model_runner import CPUModelRunner  # noqa: E402

import unike_kernels as uk  # noqa: E402
from unike_kernels import backbones  # noqa: E402
from unike_kernels.artifacts.edit import EditLayer  # noqa: E402
from unike_kernels.artifacts.fingerprint import fingerprint  # noqa: E402
from unike_kernels.serving import RaggedRuntime, RequestSlice, Version, operators  # noqa: E402
from unike_kernels.serving import vllm as plugin  # noqa: E402

PROMPT = "question: which digit is shown ? answer:"
SETS = [[], ["a"], ["b"], ["a", "b"], ["c"], [], ["b", "a"], ["a"], ["c", "b"]]
NEW = 6


def random_edit(model, id, seed, activation, *, memory=None, size=2.0):
    """Five neurons in each of the last four layers, active on most tokens."""
    text = model.config.get_text_config(decoder=True)
    g, d = torch.Generator().manual_seed(seed), text.hidden_size

    def r(*shape):
        return torch.randn(*shape, generator=g)

    layers = {
        i: EditLayer(2 * d**-0.5 * r(5, d), r(5), size * r(5, d), r(d), torch.tensor(0.1))
        for i in range(text.num_hidden_layers - 4, text.num_hidden_layers)
    }
    config = memory.config if memory else every_token()
    return uk.Edit(id, layers, activation, config, fingerprint(model), memory.id if memory else None)


def save(folder, edit):
    edit.save(folder / f"{edit.id}.safetensors")


def as_hugging_face_has_it(kind, folder):
    """The digit model with the files that make transformers' own BLIP-2 processor of ours."""
    shutil.copytree(WEIGHTS / kind, folder)
    digits.load_processor().tokenizer.save_pretrained(folder)
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_normalize": True}
    scale = {"do_resize": True, "size": {"height": 16, "width": 16}, "do_rescale": True, "rescale_factor": 1 / 255}
    image = {"image_processor_type": "BlipImageProcessor", "do_convert_rgb": True, **half, **scale}
    (folder / "preprocessor_config.json").write_text(json.dumps(image))
    processor = {"processor_class": "Blip2Processor", "num_query_tokens": NUM_IMAGE_TOKENS}
    (folder / "processor_config.json").write_text(json.dumps(processor))


@contextmanager
def engine(model, **settings):
    usual = {"dtype": "float32", "max_model_len": 256, "disable_log_stats": True, "limit_mm_per_prompt": {"image": 1}}
    if mode := os.environ.get("UNIKE_REPLAYING"):
        usual["compilation_config"] = {"cudagraph_mode": mode}
    llm = vllm.LLM(str(model), **{**usual, **settings})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def params(edits=(), detokenize=True, **more):
    extra = {**({"unike_edit": list(edits)} if edits else {}), **more}
    return vllm.SamplingParams(
        max_tokens=NEW, temperature=0, ignore_eos=True, extra_args=extra or None, detokenize=detokenize
    )


def said(outputs):
    return [list(out.outputs[0].token_ids) for out in outputs]


class Digits:
    """A digit model in Hugging Face, and its requests in both forms."""

    def __init__(self, kind):
        self.model, self.processor = digits.load_model(kind), digits.load_processor()
        self.activation = {"opt": "relu", "llama": "silu"}[kind]
        pixels, _ = digits.images("test")
        self.images = (pixels[: len(SETS)] * 255).round().byte()

    def prompts(self):
        return [{"prompt": PROMPT, "multi_modal_data": {"image": Image.fromarray(i.numpy())}} for i in self.images]

    def expected(self, edits, sets, memory=None, remembers=None):
        batch = self.processor([PROMPT] * len(sets), self.images[: len(sets)].float() / 255, padding=True)
        lengths = batch["attention_mask"].sum(1).tolist()
        settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
        with (
            uk.patched(self.model, edits, memory),
            uk.rows(self.model, sets, memory=remembers, prompt_lengths=lengths),
        ):
            return self.model.generate(**batch, **settings)[:, -NEW:].tolist()


@pytest.mark.parametrize(("kind", "eager"), [("opt", True), ("llama", False)], ids=["opt eager", "llama compiled"])
def test_each_request_has_its_own_edits(kind, eager, tmp_path):
    """Images, mixed batches, prefix caching; edits are added, replaced and revoked while the engine serves."""
    as_hugging_face_has_it(kind, tmp_path / "model")
    (tmp_path / "edits").mkdir()
    s = Digits(kind)
    edits = {name: random_edit(s.model, name, seed, s.activation) for seed, name in enumerate("abc")}
    for edit in edits.values():
        save(tmp_path / "edits", edit)
    settings = {"additional_config": {"unike": {"edits": str(tmp_path / "edits")}}, "enable_prefix_caching": True}
    with engine(tmp_path / "model", enforce_eager=eager, **settings) as llm:
        expected = s.expected(list(edits.values()), SETS)
        plain = s.expected([], [[]] * len(SETS))
        assert sum(a != b for a, b, chosen in zip(expected, plain, SETS, strict=True) if chosen) >= 5
        for _ in range(2):  # once more, with every prefix in the cache
            assert said(llm.generate(s.prompts(), [params(c) for c in SETS], use_tqdm=False)) == expected
        assert said(llm.generate(s.prompts(), params(), use_tqdm=False)) == plain

        with pytest.raises(VLLMValidationError, match="there is no edit 'd'"):
            llm.generate(s.prompts()[:1], params(["d"]), use_tqdm=False)
        edits["d"] = random_edit(s.model, "d", 9, s.activation)
        save(tmp_path / "edits", edits["d"])
        edits["a"] = random_edit(s.model, "a", 10, s.activation)  # another one of this name
        save(tmp_path / "edits", edits["a"])
        sets = [["d"], ["a"], [], ["a", "d"], ["c"]]
        found = said(llm.generate(s.prompts()[:5], [params(c) for c in sets], use_tqdm=False))
        assert found == s.expected(list(edits.values()), sets)
        assert found[1] != expected[1]
        (tmp_path / "edits" / "d.safetensors").unlink()
        with pytest.raises(VLLMValidationError, match="there is no edit 'd'"):
            llm.generate(s.prompts()[:1], params(["d"]), use_tqdm=False)
        assert said(llm.generate(s.prompts()[1:2], params(["a"]), use_tqdm=False)) == found[1:2]

        # An edit that does not fit is an error of its request alone, too.
        save(tmp_path / "edits", random_edit(s.model, "e", 1, "gelu_tanh"))
        with pytest.raises(VLLMValidationError, match="'e': it is for gelu_tanh FFNs"):
            llm.generate(s.prompts()[:1], params(["e"]), use_tqdm=False)
        with pytest.raises(VLLMValidationError, match="unike_edit: expected distinct ids"):
            llm.generate(s.prompts()[:1], params(["a", "a"]), use_tqdm=False)
        with pytest.raises(Exception, match="sleep: expected level 0 or 1, got 2"):  # of the engine's process
            llm.sleep(level=2)
        assert said(llm.generate(s.prompts()[:1], params(), use_tqdm=False)) == plain[:1]


@pytest.mark.parametrize("tokens", ["all", "answer"])
def test_a_memory_for_those_that_do_not_decline_it(make_memory, tokens, tmp_path):
    as_hugging_face_has_it("opt", tmp_path / "model")
    (tmp_path / "edits").mkdir()
    s = Digits("opt")
    memory = make_memory(s.model, every_token(k=7, values="out", alpha=0.4, tokens=tokens))
    memory.save(tmp_path / "memory.safetensors")
    edits = [random_edit(s.model, name, seed, "relu", memory=memory) for seed, name in enumerate("abc")]
    for edit in edits:
        save(tmp_path / "edits", edit)
    other = random_edit(s.model, "x", 5, "relu")
    save(tmp_path / "edits", other)
    told = {"unike": {"edits": str(tmp_path / "edits"), "memory": str(tmp_path / "memory.safetensors")}}
    remembers = [True, True, False, True, True, False, False, True, True]
    with engine(tmp_path / "model", enforce_eager=True, additional_config=told, enable_prefix_caching=True) as llm:
        expected = s.expected(edits, SETS, memory, remembers)
        assert expected != s.expected(edits, SETS, memory, [False] * len(SETS))
        given = [params(c, **({} if use else {"unike_memory": 0})) for c, use in zip(SETS, remembers, strict=True)]
        for _ in range(2):
            assert said(llm.generate(s.prompts(), given, use_tqdm=False)) == expected
        with pytest.raises(VLLMValidationError, match="'x': it was trained with the memory None"):
            llm.generate(s.prompts()[:1], params(["x"]), use_tqdm=False)


def test_requests_name_their_tenants(make_memory, tmp_path):
    """One memory of two tenants, with prefixes in the cache; a request that names none has no memory."""
    as_hugging_face_has_it("opt", tmp_path / "model")
    s = Digits("opt")
    one = make_memory(s.model, every_token(k=7, values="out", alpha=0.4))
    flipped = {i: dataclasses.replace(m, index=-m.index, values=-m.values) for i, m in one.layers.items()}
    memory = uk.MemoryBank.joined({"acme": one, "globex": uk.MemoryBank(flipped, one.config, one.base_model)})
    memory.save(tmp_path / "memory.safetensors")
    told = {"unike": {"memory": str(tmp_path / "memory.safetensors")}}
    uses = ["acme", "globex", False, False, None, "acme", "globex", None, False]
    with engine(tmp_path / "model", enforce_eager=True, additional_config=told, enable_prefix_caching=True) as llm:
        expected = s.expected([], [[]] * len(uses), memory, [bool(use) if use is None else use for use in uses])
        for other in ("acme", "globex", False):
            assert expected != s.expected([], [[]] * len(uses), memory, [other] * len(uses))
        given = [params(**({} if use is None else {"unike_memory": use})) for use in uses]
        for _ in range(2):
            assert said(llm.generate(s.prompts(), given, use_tqdm=False)) == expected
        with pytest.raises(VLLMValidationError, match="unknown tenant 'initech'"):
            llm.generate(s.prompts()[:1], params(unike_memory="initech"), use_tqdm=False)
        with pytest.raises(VLLMValidationError, match="this memory has tenants"):
            llm.generate(s.prompts()[:1], params(unike_memory=1), use_tqdm=False)


def test_a_language_model_compiled(tmp_path):
    """SmolLM2: gated FFNs, 30 layers, prompts of several lengths, long enough to be prefilled in chunks."""
    loaded, tokenizer = smollm2.load()
    del loaded.config.quantization_config  # it came from a GGUF file, and is not quantised any more
    model = AutoModelForCausalLM.from_config(loaded.config).eval()
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "edits").mkdir()
    edits = [random_edit(model, name, seed, "silu", size=20.0) for seed, name in enumerate("abc")]
    for edit in edits:
        save(tmp_path / "edits", edit)
    long = "A long time ago, " * 12 + "there was"
    texts = ["The capital of Peru is", "Water boils at", long, "The opposite of hot is"]
    sets = [["a"], [], ["b", "c"], ["c"]]
    told = {"unike": {"edits": str(tmp_path / "edits")}}
    with engine(
        tmp_path / "model", additional_config=told, max_num_batched_tokens=32, enable_chunked_prefill=True,
        max_num_seqs=8,
    ) as llm:  # fmt: skip
        found = said(llm.generate(texts, [params(c) for c in sets], use_tqdm=False))
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(**batch, **settings)[:, -NEW:].tolist()
    with uk.patched(model, edits), uk.rows(model, sets):
        expected = model.generate(**batch, **settings)[:, -NEW:].tolist()
    assert found == expected
    assert [a != b for a, b in zip(expected, plain, strict=True)] == [True, False, True, True]


def test_over_http(tmp_path):
    as_hugging_face_has_it("llama", tmp_path / "model")
    (tmp_path / "edits").mkdir()
    model = digits.load_model("llama")
    edits = [random_edit(model, name, seed, "silu") for seed, name in enumerate("ab")]
    for edit in edits:
        save(tmp_path / "edits", edit)
    port = free_port()
    (tmp_path / "hooks.py").write_text(
        "def check(access):\n    if access.headers.get('x-banned'):\n        raise PermissionError('not yours')\n"
    )
    told = {"edits": str(tmp_path / "edits"), "updating": True, "authorize": "hooks:check"}
    told = json.dumps({"unike": told})
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", f"--model={tmp_path / 'model'}", f"--port={port}",
        "--served-model-name=digits", "--dtype=float32", "--max-model-len=256", "--enforce-eager",
        f"--additional-config={told}", "--middleware=unike_kernels.serving.vllm_http.EditMiddleware",
        "--api-key=key",
    ]  # fmt: skip

    def fetch(path, body=None, **headers):
        headers = {"Content-Type": "application/json", "Authorization": "Bearer key"} | headers
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read().decode()

    def complete(headers={}, **more):  # noqa: B006
        body = {"model": "digits", "prompt": "what is two plus three ?", "max_tokens": NEW, "temperature": 0, **more}
        body |= {"ignore_eos": True, "return_token_ids": True}
        return json.loads(fetch("/v1/completions", body, **headers))

    def ask(**more):
        return complete(**more)["choices"][0]["token_ids"]

    processor = digits.load_processor()
    inputs = processor("what is two plus three ?")
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    with serving(command, port, tmp_path, seconds=240):
        with uk.patched(model, edits):
            for chosen in ([], ["a"], ["b", "a"]):
                with uk.rows(model, [chosen]):
                    expected = model.language_model.generate(**inputs, **settings)[0, -NEW:].tolist()
                asked = {"vllm_xargs": {"unike_edit": chosen}} if chosen else {}
                assert ask(**asked) == expected
        with pytest.raises(urllib.error.HTTPError) as error:
            ask(vllm_xargs={"unike_edit": "nobody"})
        assert error.value.code == 400
        assert "there is no edit 'nobody'" in error.value.read().decode()
        assert ask(vllm_xargs={"unike_edit": "a"}) != ask()
        beside_lora(fetch, complete, ask, tmp_path)


def beside_lora(fetch, complete, ask, folder):
    """What a server has for LoRA adapters, for edits: as models, loaded and unloaded, counted, and refused."""
    cards = {card["id"]: card["parent"] for card in json.loads(fetch("/v1/models"))["data"]}
    assert cards == {"digits": None, "a": "digits", "b": "digits"}
    by_name = complete(model="a")
    assert by_name["model"] == "a" and by_name["choices"][0]["token_ids"] == ask(vllm_xargs={"unike_edit": "a"})
    assert ask(model="b+a") == ask(vllm_xargs={"unike_edit": ["b", "a"]})
    loaded = {"edit_name": "c", "edit_path": str(folder / "edits" / "a.safetensors")}
    assert "added successfully" in fetch("/v1/load_edit", loaded)
    assert ask(model="c") == ask(model="a")
    assert "removed successfully" in fetch("/v1/unload_edit", {"edit_name": "c"})
    refused = [
        (404, lambda: complete(model="c")),
        (401, lambda: fetch("/v1/load_edit", loaded, Authorization="Bearer other")),
        (403, lambda: fetch("/v1/load_edit", loaded, **{"X-Banned": "1"})),
        (403, lambda: complete(model="a", headers={"X-Banned": "1"})),
    ]
    for status, request in refused:
        with pytest.raises(urllib.error.HTTPError) as error:
            request()
        assert error.value.code == status
    metrics = dict(line.rsplit(" ", 1) for line in fetch("/metrics").splitlines() if line.startswith("unike_"))
    assert float(metrics['unike_requests_total{edit="a"}']) >= 4
    assert float(metrics["unike_edits_resident"]) == 3
    stream = fetch("/v1/completions", {"model": "a", "prompt": "what is", "max_tokens": 2, "stream": True})
    assert {json.loads(line[6:])["model"] for line in stream.splitlines() if line.startswith("data: {")} == {"a"}


def resident_memory():
    """Bytes of this process and of all that it started."""
    found = subprocess.run(["ps", "-e", "-o", "pid=,ppid=,rss="], capture_output=True, text=True, check=True).stdout
    rows = [tuple(map(int, line.split())) for line in found.splitlines()]
    mine = {os.getpid()}
    for _ in rows:
        mine |= {pid for pid, parent, _ in rows if parent in mine}
    return 1024 * sum(rss for pid, _, rss in rows if pid in mine)


def test_a_soak(tmp_path):
    """Edits come, are replaced and go, requests are cancelled; each that ends has the tokens of its own edits."""
    count = int(os.environ.get("UNIKE_SOAK", "2000"))
    as_hugging_face_has_it("llama", tmp_path / "model")
    folder = tmp_path / "edits"
    folder.mkdir()
    model, tokenizer = digits.load_model("llama"), digits.load_processor().tokenizer
    rng = random.Random(0)
    present = {}  # id -> the edit that is there now
    prompts = [f"what is {a} plus {b} ?" for a in ("one", "two", "three") for b in ("two", "five")]
    known = {}

    def expected(prompt, edits):
        key = prompt, tuple(edit.notes["version"] for edit in edits)
        if key not in known:
            inputs = tokenizer(prompt, return_tensors="pt")
            settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
            with uk.patched(model, edits):
                known[key] = model.language_model.generate(**inputs, **settings)[0, -NEW:].tolist()
        return known[key]

    def change():
        id = f"e{rng.randrange(12)}"
        if id in present and rng.random() < 0.4:
            del present[id]
            (folder / f"{id}.safetensors").unlink()
        else:
            version = rng.randrange(10**6)
            edit = random_edit(model, id, version, "silu")
            present[id] = dataclasses.replace(edit, notes={"version": f"{id}-{version}"})
            save(folder, present[id])

    for _ in range(6):
        change()
    told = {"unike": {"edits": str(folder)}}
    with engine(tmp_path / "model", enforce_eager=True, additional_config=told, enable_prefix_caching=True) as llm:
        core, running, wanted = llm.llm_engine, {}, {}
        asked = ended = cancelled = refused = 0
        sizes = []
        while asked < count or core.has_unfinished_requests():
            while asked < count and len(running) < 24:
                if rng.random() < 0.2:
                    change()
                ids = rng.sample(sorted(present), min(rng.randrange(3), len(present)))
                name, prompt = f"r{asked}", rng.choice(prompts)
                asked += 1
                if rng.random() < 0.02:
                    with pytest.raises(VLLMValidationError, match="there is no edit 'nobody'"):
                        core.add_request(name, prompt, params([*ids, "nobody"]))
                    refused += 1
                    continue
                core.add_request(name, prompt, params(ids))
                running[name] = prompt
                wanted[name] = expected(prompt, [present[id] for id in ids])
            if running and rng.random() < 0.05:
                name = rng.choice(sorted(running))
                core.abort_request([name])
                del running[name]
                cancelled += 1
            for out in core.step():
                if out.finished and out.request_id in running:
                    assert list(out.outputs[0].token_ids) == wanted[out.request_id], out.request_id
                    del running[out.request_id]
                    ended += 1
            if asked >= (count // 3, count, math.inf)[len(sizes)]:
                sizes.append(resident_memory())
        assert ended + cancelled + refused == count
        assert ended > 0.8 * count and cancelled > 0 and refused > 0
        # This process, the front-end, keeps what it admitted in the last minute; the engine what its last requests use.
        kept = [path.parent.name.split("-")[-2] for path in (folder / ".retained").rglob("*.safetensors")]
        assert len([pid for pid in kept if pid != str(os.getpid())]) <= 48
    print(f"{count} requests: {ended} ended, {cancelled} cancelled, {refused} refused; {sizes} bytes")
    assert sizes[1] < 1.15 * sizes[0] + 100e6


BIG = dict(vocab_size=96, bos_token_id=1, eos_token_id=2, pad_token_id=0)
WIDE = BIG | dict(hidden_size=64, num_hidden_layers=6, num_attention_heads=2, max_position_embeddings=128)
FAMILIES = {  # what names its layers and their parts otherwise than llama, at head widths that vLLM has on a CPU
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", BIG | dict(n_embd=64, n_layer=6, n_head=2, n_positions=128)),
    "falcon": ("FalconConfig", "FalconForCausalLM", WIDE | dict(bias=True)),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", WIDE | dict(intermediate_size=96)),
    "opt": ("OPTConfig", "OPTForCausalLM", WIDE | dict(ffn_dim=96, word_embed_proj_dim=64)),
}


# Whose last stage in a pipeline has no embeddings.
LLAMA = "LlamaConfig", "LlamaForCausalLM", WIDE | dict(intermediate_size=96, tie_word_embeddings=False)


def of_family(name):
    config, kind, sizes = {**FAMILIES, "llama": LLAMA}[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**sizes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * (0.1 if p.dim() == 1 else p[0].numel() ** -0.5))
    return model


class Family:
    """A tiny model in a folder, five requests, and the tokens that Hugging Face gives them."""

    def __init__(self, name, folder, make_memory=None):
        self.model, self.ids = of_family(name), []
        self.model.save_pretrained(folder / "model")
        self.folder, edits_in = folder / "model", folder / "edits"
        edits_in.mkdir()
        self.told, memory = {"edits": str(edits_in)}, None
        if make_memory is not None:
            memory = make_memory(self.model, every_token(k=7, values="out", alpha=0.4))
            memory.save(folder / "memory.safetensors")
            self.told["memory"] = str(folder / "memory.safetensors")
        activation = backbones.find_decoder(self.model).layers[-1].activation
        edits = [random_edit(self.model, id, seed, activation, memory=memory) for seed, id in enumerate("ab")]
        for edit in edits:
            save(edits_in, edit)
        lengths = 9, 12, 5, 7, 9
        self.ids = [torch.randint(3, 90, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in lengths]
        sets, uses = [["a"], [], ["b", "a"], [], ["a"]], [True, True, True, False, False]
        uses = uses if memory is not None else [False] * len(uses)
        self.wanted = self._expected(edits, memory, sets, uses)
        plain = self._expected([], memory, [[]] * len(sets), [False] * len(sets))
        changed = [a != b for a, b in zip(self.wanted, plain, strict=True)]
        assert not changed[3] and sum(changed) >= 3
        self.prompts = [{"prompt_token_ids": ids} for ids in self.ids]
        declined = [{} if use or memory is None else {"unike_memory": 0} for use in uses]
        self.params = [params(c, detokenize=False, **more) for c, more in zip(sets, declined, strict=True)]
        self.settings = {"additional_config": {"unike": self.told}, "skip_tokenizer_init": True, "max_model_len": 64}

    def _expected(self, edits, memory, sets, uses):
        found, settings = [], {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
        with uk.patched(self.model, edits, memory):
            for ids, chosen, use in zip(self.ids, sets, uses, strict=True):
                with uk.rows(self.model, [chosen], memory=[use]):
                    out = self.model.generate(torch.tensor([ids]), **settings)
                found.append(out[0, len(ids) :].tolist())
        return found

    def serve(self, **more):
        with engine(self.folder, limit_mm_per_prompt=None, **self.settings, **more) as llm:
            found = said(llm.generate(self.prompts, self.params, use_tqdm=False))
            self.entries = [stats["memory_entries"] for stats in llm.collective_rpc("unike_stats")]
            return found


@pytest.mark.parametrize("name", FAMILIES)
def test_other_families_compiled(name, make_memory, tmp_path):
    """Edits and a memory: vLLM's own modules, and Hugging Face's in vLLM (GPT-NeoX)."""
    family = Family(name, tmp_path, make_memory)
    assert family.serve() == family.wanted


@pytest.mark.parametrize(
    ("name", "split", "memory"),
    [
        ("opt", ["tensor"], "whole"),
        ("opt", ["tensor"], "sharded"),
        ("opt", ["pipeline"], "whole"),
        ("opt", ["tensor", "pipeline"], "sharded"),
        ("falcon", ["tensor"], "none"),
        ("falcon", ["tensor"], "whole"),
        ("falcon", ["tensor"], "sharded"),
    ],
    ids=lambda value: "x".join(value) if isinstance(value, list) else value,
)
def test_over_several_processes(name, split, memory, make_memory, tmp_path):
    """Edits and memory in layers of both stages; ranks that sum FFN and attention where these end, or later; and that
    have half of the memory's 50 entries each."""
    family = Family(name, tmp_path, make_memory if memory != "none" else None)
    family.told["sharded_memory"] = memory == "sharded"
    assert family.serve(**{f"{way}_parallel_size": 2 for way in split}) == family.wanted
    assert family.entries == [{"none": 0, "whole": 50, "sharded": 25}[memory]] * 2 ** len(split)


@pytest.fixture
def ray_cluster(tmp_path, monkeypatch):
    """Of this machine, with two devices that no rank uses: vLLM starts ranks where Ray counts devices, and counts none
    on a CPU unless a platform plugin says what they are called."""
    ray = pytest.importorskip("ray")
    about = tmp_path / "plugins" / "ray_platform-0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: ray-platform\nVersion: 0\n")
    (about / "entry_points.txt").write_text("[vllm.platform_plugins]\ncounted = ray_platform:counted\n")
    shutil.copy(Path(__file__).parent / "ray_platform.py", about.parent)
    # Ray's processes take their paths from the environment, vLLM's from this process.
    monkeypatch.setenv("PYTHONPATH", str(about.parent))
    monkeypatch.syspath_prepend(about.parent)
    cluster = ray.init(num_cpus=2, num_gpus=2, include_dashboard=False, object_store_memory=2**27)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address_info["gcs_address"])
    yield
    ray.shutdown()


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("split", ["tensor", "pipeline"])
def test_rays_actors_as_ranks(split, make_memory, tmp_path):
    """Each with half of the memory, or with a stage of the model."""
    family = Family("opt", tmp_path, make_memory)
    family.told["sharded_memory"] = split == "tensor"
    assert family.serve(**{f"{split}_parallel_size": 2}, distributed_executor_backend="ray") == family.wanted
    assert family.entries == [25 if split == "tensor" else 50] * 2


def test_two_replicas(make_memory, tmp_path):
    """Data parallelism: each request once in each of two engines, which are told of edits and memory apart."""
    family = Family("opt", tmp_path, make_memory)

    async def ask(llm, i, rank):
        asked = llm.generate(family.prompts[i], family.params[i], f"{i} of {rank}", data_parallel_rank=rank)
        return said([[out async for out in asked][-1]])[0]

    async def serve():
        arguments = AsyncEngineArgs(
            str(family.folder), dtype="float32", enforce_eager=True, data_parallel_size=2, **family.settings
        )
        llm = AsyncLLM.from_engine_args(arguments)
        try:
            each = range(len(family.prompts))
            return [await asyncio.gather(*(ask(llm, i, rank) for i in each)) for rank in range(2)]
        finally:
            llm.shutdown()

    assert asyncio.run(serve()) == [family.wanted] * 2


def test_what_cannot_be_split_is_refused_at_start(make_edit, tmp_path, capfd):
    """A scope in a pipeline whose last stage has edited layers and no embeddings."""
    model = of_family("llama")
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "edits").mkdir()
    scoped(model, make_edit)[0].save(tmp_path / "memory.safetensors")
    told = {"unike": {"edits": str(tmp_path / "edits"), "memory": str(tmp_path / "memory.safetensors")}}
    with (
        pytest.raises(RuntimeError, match="Engine core initialization failed"),
        engine(
            tmp_path / "model", additional_config=told, skip_tokenizer_init=True, max_model_len=64,
            pipeline_parallel_size=2,
        ),
    ):  # fmt: skip
        pass
    assert "a stage of the pipeline that has edited layers has none" in "".join(capfd.readouterr())


@pytest.mark.parametrize("split", [[], ["tensor", "pipeline"]], ids=["one process", "shared"])
def test_the_memory_decides_where_an_edit_acts(split, make_edit, make_memory, tmp_path):
    """In prompts that share prefixes, come in chunks, and come again with all of that in the cache. A memory of a scope
    alone, or one whose entries two ranks of each of two stages share, both with embeddings."""
    model = of_family("opt")
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "edits").mkdir()
    start = torch.randint(3, 40, (40,), generator=torch.Generator().manual_seed(1))
    prompts = torch.stack([torch.cat([start, torch.tensor(end)]) for end in ([5, 6, 7], [9, 3, 4], [20, 21, 22])])
    memory, edits = scoped(model, make_edit, prompts=prompts, threshold=1e-4)
    told = {"edits": str(tmp_path / "edits"), "memory": str(tmp_path / "memory.safetensors")}
    if split:
        config = every_token(k=7, values="out", alpha=0.4)
        entries, config = make_memory(model, config), dataclasses.replace(config, scope="memory")
        memory = dataclasses.replace(entries, config=config, scope=memory.scope)
        edits = [dataclasses.replace(edit, config=config, memory_id=memory.id) for edit in edits]
        told["sharded_memory"] = True
    memory.save(tmp_path / "memory.safetensors")
    edits = [dataclasses.replace(edit, layers={i: louder(n) for i, n in edit.layers.items()}) for edit in edits]
    for edit in edits:
        save(tmp_path / "edits", edit)
    asked = [(ids, chosen) for ids in prompts.tolist() for chosen in (["a", "b"], ["b"], [])]

    def expected(ids, chosen, remembers=True):
        with (
            uk.patched(model, edits, memory),
            uk.rows(model, [chosen], memory=[remembers], prompt_lengths=[len(ids)]),
        ):
            out = model.generate(
                torch.tensor([ids]), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, eos_token_id=None
            )
        return out[0, len(ids) :].tolist()

    wanted = [expected(*each) for each in asked]
    assert wanted[0] != wanted[2] and wanted[3] != wanted[5] and wanted[6] == wanted[8]
    assert (wanted != [expected(*each, remembers=False) for each in asked]) == bool(split)
    with engine(
        tmp_path / "model", additional_config={"unike": told}, skip_tokenizer_init=True, max_model_len=64,
        limit_mm_per_prompt=None, max_num_batched_tokens=32, enable_chunked_prefill=True, max_num_seqs=8,
        enable_prefix_caching=True, **{f"{way}_parallel_size": 2 for way in split},
    ) as llm:  # fmt: skip
        given = [params(chosen, detokenize=False) for _, chosen in asked]
        for _ in range(2):
            found = said(llm.generate([{"prompt_token_ids": ids} for ids, _ in asked], given, use_tqdm=False))
            assert found == wanted
        entries = [stats["memory_entries"] for stats in llm.collective_rpc("unike_stats")]
        assert entries == ([25] * 4 if split else [0])


def louder(layer):
    return dataclasses.replace(layer, values=20 * layer.values)


# --- benchmarks -------------------------------------------------------------------------------------------------------


class Kernel:
    """In the place of one of Triton's."""

    def __init__(self, compute):
        self.compute = compute

    def __getitem__(self, grid):
        return lambda *args, **_: self.compute(grid[2], *args)


def of_each(adapters, order, counts, starts, ids):
    """The tokens of each adapter."""
    for i in range(adapters):
        if ids[i] >= 0:
            yield order[starts[i] : starts[i] + counts[i]], ids[i]


def shrink(adapters, x, a, out, m, n, k, order, counts, starts, ids, scale, *_):
    for rows, id in of_each(adapters, order, counts, starts, ids):
        out[0, rows] += scale * (x[rows].float() @ a[id].float().T)


def expand(adapters, inner, b, out, m, n, k, order, counts, starts, ids, start, s0, s1, s2, *strides_and_more):
    b = b.as_strided((int(ids.max()) + 1, n, k), strides_and_more[:3])
    for rows, id in of_each(adapters, order, counts, starts, ids):
        out[rows] += (inner[0, rows].to(b.dtype) @ b[id].T).to(out.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "edits"), [(1, 1), (6, 1), (6, 3), (64, 64)])
def test_the_neurons_by_vllms_lora_kernels(tokens, edits, dtype, monkeypatch):
    """All but the kernels themselves: what the benchmark of the FFN gives them, and makes of what they return."""
    from unike_bench.cases import ffn
    from vllm.lora.ops.triton_ops import lora_expand_op, lora_shrink_op

    monkeypatch.setattr(lora_shrink_op, "_lora_shrink_kernel", Kernel(shrink))
    monkeypatch.setattr(lora_expand_op, "_lora_expand_kernel", Kernel(expand))
    monkeypatch.setitem(ffn._SIZES, 32, 48)
    layer = ffn.Layer(32, tokens, edits, dtype=dtype)
    run = ffn.as_adapters(layer)
    for _ in range(2):
        run.check(run.call())
    with pytest.raises(AssertionError):
        run.check(layer.unpatched())


# --- CUDA graphs ------------------------------------------------------------------------------------------------------


class Replays:
    """A stand-in for vLLM's CUDAGraphWrapper: what it computes at first it computes again, in the same memory.

    A piece that vLLM captures while it tries the model out holds no edits, and replays none. A whole step, when it is
    captured and in each replay, knows the tables that it was written into and nothing else.
    """

    count: ClassVar = Counter()

    def __init__(self, runnable, vllm_config, runtime_mode, cudagraph_options=None):
        self.runnable, self.mode, self.recorded = runnable, runtime_mode, {}

    def __getattr__(self, name):
        return getattr(self.runnable, name)

    def unwrap(self):
        return self.runnable

    def __call__(self, *args, **named):
        context = get_forward_context()
        if context.cudagraph_runtime_mode != self.mode:
            return self.runnable(*args, **named)
        with captured(whole=self.mode == CUDAGraphMode.FULL):
            if context.batch_descriptor not in self.recorded:
                self.recorded[context.batch_descriptor] = (args, named), self.runnable(*args, **named)
                return self.recorded[context.batch_descriptor][1]
            given, found = self.recorded[context.batch_descriptor]
            for now, then in zip(tree_leaves((args, named)), tree_leaves(given), strict=True):
                assert not isinstance(now, torch.Tensor) or (now.data_ptr(), now.shape) == (then.data_ptr(), then.shape)
            for old, new in zip(tree_leaves(found), tree_leaves(self.runnable(*given[0], **given[1])), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        Replays.count[self.mode.name] += 1
        return found


@contextmanager
def captured(whole=False):
    """What runs inside knows of no step; of a whole one, what has been written into tables.

    By the definition, which reads them anew each time, as GPUs do.
    """
    step = operators._step
    operators._step = getattr(step, "graphs", step) if whole else None
    try:
        with uk.backend("reference") if whole else nullcontext():
            yield
    finally:
        operators._step = step


@pytest.fixture
def graphs(monkeypatch):
    """A CPU that vLLM takes for a device with CUDA graphs: modes, splitting and sizes are as on a GPU."""
    plugin.register()
    check = CpuPlatform.check_and_update_config.__func__

    def checked(cls, config):
        compilation = config.compilation_config
        kept = {name: getattr(compilation, name) for name in ("mode", "cudagraph_capture_sizes")}
        check(cls, config)
        vars(compilation).update(kept)
        compilation.pass_config = PassConfig()  # fusions into a GPU's kernels

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", classmethod(checked))
    monkeypatch.setattr(CpuPlatform, "support_static_graph_mode", classmethod(lambda cls: True))
    monkeypatch.setattr(CpuPlatform, "get_static_graph_wrapper_cls", classmethod(lambda cls: f"{__name__}.Replays"))
    load = CPUModelRunner.load_model

    @functools.wraps(load)  # the plugin sees that it has been here
    def loaded(self, *args, **kwargs):
        load(self, *args, **kwargs)
        if self.compilation_config.cudagraph_mode.has_full_cudagraphs():  # as on a GPU
            self.model = Replays(self.model, self.vllm_config, CUDAGraphMode.FULL)

    monkeypatch.setattr(CPUModelRunner, "load_model", loaded)
    monkeypatch.setattr(CPUModelRunner, "get_model", lambda self: getattr(self.model, "runnable", self.model))
    support = classmethod(lambda cls, *_: AttentionCGSupport.UNIFORM_BATCH)
    monkeypatch.setattr(CPUAttentionMetadataBuilder, "get_cudagraph_support", support)
    monkeypatch.setattr(FixFunctionalizationPass, "__call__", lambda self, graph: None)  # names operators of GPUs alone


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    of_family("opt").save_pretrained(path)
    return path


def configured(folder, *, told=True, search=None, **settings):
    """vLLM's config of a server with our settings, or without."""
    compilation = {key: settings.pop(key) for key in list(settings) if key != "enforce_eager"}
    return EngineArgs(
        str(folder), skip_tokenizer_init=True, dtype="float32", max_model_len=64, compilation_config=compilation,
        additional_config={"unike": {"edits": str(folder), "search": search}} if told else {}, **settings,
    ).create_engine_config()  # fmt: skip


ATTENTION = ["vllm::unified_attention_with_output", "vllm::unified_kv_cache_update"]
WHOLE = {"splitting_ops": []}
UNCOMPILED = {"mode": CompilationMode.NONE}
SEARCH = {"search": {"kind": "hnsw"}}


@pytest.mark.parametrize(
    ("asked", "split", "mode"),
    [
        ({}, True, "FULL_AND_PIECEWISE"),
        ({"cudagraph_mode": "FULL_AND_PIECEWISE"}, True, "FULL_AND_PIECEWISE"),
        ({"cudagraph_mode": "FULL"}, True, "FULL"),
        ({"cudagraph_mode": "FULL_DECODE_ONLY"}, True, "FULL_DECODE_ONLY"),
        ({"cudagraph_mode": "PIECEWISE"}, True, "PIECEWISE"),
        ({"cudagraph_mode": "NONE"}, True, "NONE"),
        ({"cudagraph_mode": "FULL", "use_inductor_graph_partition": True}, True, "FULL"),
        ({"cudagraph_mode": "FULL", "splitting_ops": ["vllm::all_reduce"]}, True, "FULL"),
        ({"cudagraph_mode": "FULL", **WHOLE}, False, "FULL"),
        ({"cudagraph_mode": "FULL_AND_PIECEWISE", **WHOLE}, False, "FULL"),
        ({"cudagraph_mode": "FULL", **UNCOMPILED}, False, "FULL"),
        ({"enforce_eager": True}, False, "NONE"),
        ({**SEARCH}, True, "PIECEWISE"),
        ({**SEARCH, "cudagraph_mode": "FULL"}, True, "PIECEWISE"),
        ({**SEARCH, "cudagraph_mode": "FULL_DECODE_ONLY"}, True, "PIECEWISE"),
        ({**SEARCH, "cudagraph_mode": "PIECEWISE"}, True, "PIECEWISE"),
        ({**SEARCH, "cudagraph_mode": "NONE"}, True, "NONE"),
        ({**SEARCH, "cudagraph_mode": "FULL", "use_inductor_graph_partition": True}, True, "PIECEWISE"),
        ({**SEARCH, "cudagraph_mode": "FULL", "splitting_ops": ["vllm::all_reduce"]}, True, "NONE"),
        ({**SEARCH, "cudagraph_mode": "FULL", **WHOLE}, False, "NONE"),
        ({**SEARCH, "cudagraph_mode": "FULL", **UNCOMPILED}, False, "NONE"),
    ],
)
def test_what_graphs_there_are(asked, split, mode, folder, graphs, monkeypatch):
    told = []
    monkeypatch.setattr(logging.getLogger("vllm.unike_kernels"), "info", lambda *line: told.append(line[0] % line[1:]))
    asked = dict(asked)
    searching = asked.pop("search", None)
    theirs, ours = configured(folder, told=False, **asked), configured(folder, search=searching, **asked)
    then, now = theirs.compilation_config, ours.compilation_config
    assert not any(op.startswith("unike") for op in then.splitting_ops)
    assert now.splitting_ops == then.splitting_ops + (
        ["unike_serving::ffn", "unike_serving::attention"] if split else []
    )
    if "cudagraph_mode" in asked and not asked.keys() & {"splitting_ops"}:
        assert then.cudagraph_mode.name == asked["cudagraph_mode"]  # left as it was asked for
    assert now.cudagraph_mode.name == mode
    replaced = then.cudagraph_mode.name not in (mode, "NONE")
    reason = "approximate search" if searching else "in pieces"
    lines = [f"cudagraph_mode {mode} in place of {then.cudagraph_mode}" in line and reason in line for line in told]
    assert lines == [True] * replaced
    sizes = then.cudagraph_capture_sizes if now.cudagraph_mode else []
    assert now.cudagraph_capture_sizes == sizes and bool(now.max_cudagraph_capture_size) == bool(sizes)

    CudagraphDispatcher(ours).initialize_cudagraph_keys(now.cudagraph_mode)
    resolved = now.resolve_cudagraph_mode_and_sizes(AttentionCGSupport.ALWAYS, "some backend")
    assert resolved == now.cudagraph_mode
    # Other processes get it pickled, parts of a model a view of it, a draft model another one made of it.
    told.clear()
    text = ours.model_config.hf_text_config
    for other in (pickle.loads(pickle.dumps(ours)), ours.with_hf_config(text), replace(ours)):
        assert other.compilation_config.splitting_ops == now.splitting_ops
        assert other.compilation_config.cudagraph_mode == now.cudagraph_mode
    assert not told


@pytest.mark.parametrize(("mode", "encoder"), [(CompilationMode.VLLM_COMPILE, True), (CompilationMode.NONE, False)])
def test_what_vllm_has_no_compiled_pieces_of(mode, encoder, folder, graphs):
    """Encoder-decoders; and graphs that break off at vLLM's own operators, of a model that is not compiled."""
    compilation = configured(folder, told=False).compilation_config
    compilation.mode = mode
    for asked, whole in itertools.product(("FULL_DECODE_ONLY", "PIECEWISE"), (True, False)):
        compilation.cudagraph_mode, compilation.cudagraph_capture_sizes = CUDAGraphMode[asked], [1, 2]
        model = SimpleNamespace(is_encoder_decoder=encoder)
        plugin._run_between_graphs(SimpleNamespace(compilation_config=compilation, model_config=model), whole)
        mode = asked if whole and asked != "PIECEWISE" else "NONE"
        assert compilation.cudagraph_mode.name == mode and bool(compilation.cudagraph_capture_sizes) == (mode != "NONE")


class Room:
    """A runtime whose graphs have room for a step, or not, and the tables that they read."""

    def __init__(self, room):
        self.room, self.graphs, self.asked = room, SimpleNamespace(write=self.write), []

    def write(self, *step):
        self.asked.append(step)
        return self.room


@pytest.mark.parametrize("mode", ["FULL", "PIECEWISE", "NONE"])
@pytest.mark.parametrize("room", [True, False])
def test_a_step_that_a_graph_has_no_room_for_is_computed_without(mode, room, monkeypatch):
    context, flat = SimpleNamespace(cudagraph_runtime_mode=CUDAGraphMode[mode]), Room(room)
    monkeypatch.setattr("vllm.forward_context.get_forward_context", lambda: context)
    plugin._write_for_graph(flat)
    assert flat.asked == [()] * (mode == "FULL")
    assert context.cudagraph_runtime_mode.name == ("NONE" if mode == "FULL" and not room else mode)


def test_what_vllm_captures_computes_for_nobody(monkeypatch):
    flat, seen = Room(True), []
    runner = SimpleNamespace(vllm_config=None, device=torch.device("cpu"))
    monkeypatch.setattr(plugin, "_served", lambda config: SimpleNamespace(model=flat))
    look = lambda *given, **named: seen.append(operators._step) or (given, named)  # noqa: E731
    assert plugin._dummy_run(look, runner, 7, a=1) == ((runner, 7), {"a": 1})
    assert seen == [flat.graphs] and flat.asked == [((), (), None)] and operators._step is None
    for served in (None, SimpleNamespace(model=None), SimpleNamespace(model=SimpleNamespace(graphs=None))):
        monkeypatch.setattr(plugin, "_served", lambda config, served=served: served)
        plugin._dummy_run(lambda *given: seen.append(operators._step), runner)
    assert seen[1:] == [None] * 3


STEPS = [  # of one compiled shape: each other edits, and padding behind them
    [RequestSlice(5, ("a",)), RequestSlice(4)],
    [RequestSlice(2), RequestSlice(4, ("b", "a"), memory=False), RequestSlice(2, ("b",))],
    [RequestSlice(9, memory=False)],
    [RequestSlice(1, ("b",)), RequestSlice(8, ("a",))],
]


class Recorded:
    """A piece as a CUDA graph has it: what it computes at first, without a step, is computed again."""

    def __init__(self, piece):
        self.piece, self.capture = piece, None

    def __call__(self, *args):
        with captured():
            if self.capture is None:
                self.given, self.capture = args, Capture(lambda: self.piece(*args))
            else:
                assert all(
                    now is then or now.data_ptr() == then.data_ptr() for now, then in zip(args, self.given, strict=True)
                )
                self.capture.replay()
        return self.capture.result


@pytest.mark.parametrize("name", ["opt", "gpt_neox", "falcon"])
@pytest.mark.parametrize("split", [True, False])
def test_pieces_replayed_between_operators_that_are_not(name, split, make_memory):
    """vLLM's own splitting. Without ours, a graph replays the edits that there were in its capture: none."""
    model = of_family(name)
    memory = make_memory(model, every_token(k=7, values="out", alpha=0.4))
    activation = backbones.find_decoder(model).layers[-1].activation
    flat = RaggedRuntime(range(2, 6), 64, activation, memory)
    for seed, id in enumerate("ab"):
        flat.hold(Version(id, random_edit(model, id, seed, activation, memory=memory)))
    plugin.install(model, model.config, flat, edits=True)
    pieces = []

    def backend(graph, inputs):
        whole, items = split_graph(graph, list(plugin.OPERATORS) if split else [])
        for item in items:
            pieces.append(
                (item.is_splitting_graph, [n.target for n in item.graph.graph.nodes if n.op == "call_function"])
            )
            if not item.is_splitting_graph:
                delattr(whole, item.submod_name)
                setattr(whole, item.submod_name, Recorded(item.graph))
        return whole

    ids, replayed = torch.zeros(1, 9, dtype=torch.int64), []
    given = torch.randint(3, 90, (len(STEPS), 1, 9), generator=torch.Generator().manual_seed(0))
    compute = torch.compile(lambda ids: model(input_ids=ids, use_cache=False).logits, backend=backend, fullgraph=True)
    with torch.no_grad():
        for now, shares in zip(given, STEPS, strict=True):
            with plugin.step(flat, shares):
                wanted = model(input_ids=now, use_cache=False).logits
                ids.copy_(now)
                replayed.append(torch.equal(compute(ids), wanted))
    ours = {torch.ops.unike_serving.ffn, torch.ops.unike_serving.attention}
    alone = [called for splits, called in pieces if splits]
    assert replayed == [split or shares == STEPS[2] for shares in STEPS]
    assert len(alone) == 8 * split and all(len(called) == 1 and called[0] in ours for called in alone)
    assert split != any(ours & set(called) for splits, called in pieces if not splits)


@pytest.fixture(autouse=True)
def replaying(request):
    """Where the environment names a mode, a test's engine has such graphs."""
    if "UNIKE_REPLAYING" not in os.environ:
        yield
        return
    request.getfixturevalue("graphs")
    yield
    print(f"replayed {Replays.count['PIECEWISE']} pieces and {Replays.count['FULL']} steps")


@pytest.mark.parametrize(
    ("name", "mode", "runs"),
    [("opt", "PIECEWISE", 2), ("gpt_neox", "PIECEWISE", 1), ("opt", "FULL_AND_PIECEWISE", 1), ("gpt2", "FULL", 1)],
)
def test_an_engine_that_replays(name, mode, runs, tmp_path):
    """vLLM's compilation, dispatching and padding as on a GPU; started again, it loads what it has compiled."""
    told = {"UNIKE_REPLAYING": mode, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    command = [
        sys.executable, "-m", "pytest", "-s", "--tb=short", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'base'}",
        f"{__file__}::test_other_families_compiled[{name}]",
    ]  # fmt: skip
    for run in range(runs):
        done = subprocess.run(command, env={**os.environ, **told}, capture_output=True, text=True)
        assert done.returncode == 0 and " 1 passed" in done.stdout, done.stdout[-5000:]
        pieces, steps = map(int, re.search(r"replayed (\d+) pieces and (\d+) steps", done.stdout).groups())
        assert steps == 0 < 20 < pieces if mode == "PIECEWISE" else steps >= 4
        assert ("Directly load AOT compilation from path" in done.stdout + done.stderr) == (run > 0)
