"""Commands of other packages: found by entry point, and named with their package where it is missing."""

import types
from importlib import metadata

import pytest

from unike_kernels import cli


def without(monkeypatch, *packages):
    """As if these distributions were not installed."""
    entries = metadata.entry_points(group="unike.commands")
    kept = [entry for entry in entries if entry.value.split(".")[0] not in packages]
    monkeypatch.setattr(cli.metadata, "entry_points", lambda group: kept)


@pytest.mark.parametrize(
    ("command", "package"),
    [("bench", "unike-bench"), ("tune", "unike-bench"), ("eval", "unike-eval"), ("demo", "unike-eval")],
)
def test_a_missing_package_is_named(monkeypatch, capsys, command, package):
    without(monkeypatch, "unike_bench", "unike_eval")
    assert cli.main([command, "--out", "somewhere"]) == 1
    assert capsys.readouterr().err.endswith(f"this command is part of the package {package}: pip install {package}\n")


def test_all_commands_are_there():
    assert set(cli._commands()) >= {"edit", "info", "memory", "serve", "bench", "tune", "eval", "demo"}


def test_a_command_of_another_package(monkeypatch, capsys):
    module = types.SimpleNamespace(
        HELP="says it",
        add_arguments=lambda parser: parser.add_argument("what"),
        run=lambda args: print("said", args.what) or 7,
    )
    entry = types.SimpleNamespace(name="say", load=lambda: module)
    monkeypatch.setattr(cli.metadata, "entry_points", lambda group: [entry])
    assert cli.main(["say", "hello"]) == 7
    assert capsys.readouterr().out == "said hello\n"
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "says it" in capsys.readouterr().out
