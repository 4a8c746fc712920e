"""`unike info`: what is found in a model of which there is only a config, and what is in a file."""

import pytest
import torch
from backbones.zoo import ZOO
from scopes import scoped

import unike_kernels as uk
from unike_kernels.cli import main


@pytest.mark.parametrize(
    ("name", "ffn"), [("opt", "fc1 + activation_fn + fc2"), ("mixtral", "mlp"), ("qwen3_vl", "mlp")]
)
def test_a_folder_with_a_config(name, ffn, tmp_path, capsys):
    config = ZOO[name].make().config
    config.architectures = [type(ZOO[name].make()).__name__]
    config.save_pretrained(tmp_path)
    assert main(["info", str(tmp_path), "--neurons", "5", "--entries", "100"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        f"{config.architectures[0]}: decoder {ZOO[name].layers.rpartition('.')[0]}, 4 layers, d = 64"
    )
    rows = [line for line in lines if line.lstrip("* ")[:1].isdigit() and ffn[:10] in line]
    assert [row.split()[1] for row in rows] == ["0", "1", "2", "3"]
    assert all(row.startswith("*") for row in rows)
    edit = 4 * (5 * 129 + 65) / 1e3
    assert all(f" {edit:.1f} " in row for row in rows)
    assert f"In 4 layers: {4 * (5 * 129 + 65):,} parameters of an edit" in lines[-1]


def test_a_shipped_model(capsys):
    assert main(["info", "digits-llama"]) == 0
    assert "LlamaAttention" in capsys.readouterr().out


def test_models_that_are_not_there_or_not_known(tmp_path, capsys):
    from transformers import MambaConfig

    assert main(["info", str(tmp_path / "none")]) == 1
    assert "neither a folder with a config.json" in capsys.readouterr().err
    MambaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=2, architectures=["MambaForCausalLM"]).save_pretrained(
        tmp_path
    )
    assert main(["info", str(tmp_path)]) == 1
    assert "looked for one FFN called" in capsys.readouterr().err
    assert main(["info", "digits-opt", "--neurons", "-1"]) == 1
    assert "neurons, entries: expected numbers" in capsys.readouterr().err


def test_what_an_edit_and_a_memory_hold(make_model, make_memory, make_edit, tmp_path, capsys):
    model = make_model("llama")
    tables = make_memory(model)
    tables.save(tmp_path / "tables.safetensors")
    make_edit(model, "a", tables).save(tmp_path / "a.safetensors")
    memory, (edit, _) = scoped(model, make_edit, (2, 3))
    memory.save(tmp_path / "scope.safetensors")
    edit.save(tmp_path / "b.safetensors")
    joined = uk.MemoryBank.joined({"acme": tables, "globex": tables})
    joined.save(tmp_path / "joined.safetensors")

    def info(name):
        assert main(["info", str(tmp_path / f"{name}.safetensors")]) == 0
        return capsys.readouterr().out

    said = info("tables")
    assert f"memory {tables.id}: 50 entries in layers 2, 3, 4, 5; {tables.nbytes:,} bytes" in said
    assert "model: llama, 6 layers, d = 64" in said and "Config(k=7" in said and "made: at random" in said
    assert "scope " not in said
    said = info("scope")
    assert f"memory {memory.id}: 0 entries in layers none" in said
    assert f"scope {memory.scope.id}: 1 facts in 1 entries of width 24, told by the text and layers 2, 3" in said
    assert "an edit acts above a margin of 0.010, in 2.0% of the prompts for neighbouring facts" in said
    said = info("a")
    assert "edit 'a': neurons in layers 2: 5, 3: 5, 4: 5, 5: 5" in said and f"memory: {tables.id}" in said
    assert "prompt: w1 w2" in said and "scope " not in said
    assert f"scope {memory.scope.id}: 1 of its own entries decide where it acts" in info("b")
    assert "tenant 'acme': 50 entries" in info("joined")
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    assert main(["info", str(tmp_path / "x.safetensors")]) == 1
    assert "x.safetensors: not a complete safetensors file" in capsys.readouterr().err
    uk.CosineIndex(torch.randn(3, 8)).save(tmp_path / "index.safetensors")
    assert main(["info", str(tmp_path / "index.safetensors")]) == 1
    assert "expected the format unike.memory, got 'unike.index'" in capsys.readouterr().err
