"""`unike info MODEL`: what is found in a model of which there is only a config."""

import pytest
from backbones.zoo import ZOO

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
