"""`unike eval`: tables of what was measured, from a run that may have been interrupted."""

import csv

import pytest
import torch
from unike_eval.editors import EDITORS
from unike_eval.experiments import table
from unike_eval.metrics import METRICS, PROTOCOLS
from unike_eval.settings import DEFAULTS

from unike_kernels.cli import main
from unike_kernels.training import EditTraining, EncoderTraining


def test_a_table_of_one_system(tmp_path, capsys):
    command = ["eval", "--table", "1", "--systems", "FT", "--split", "validation", "--requests", "1"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    text = (tmp_path / "table-1.md").read_text()
    assert "validation requests, seed 0" in text
    assert text.index("## Protocol generated: greedy answers to their natural end") < text.index("teacher forcing")
    for protocol in PROTOCOLS:
        part = text.split(f"## Protocol {protocol}: {PROTOCOLS[protocol]}\n")[1].split("##")[0]
        assert [line.split(" | ")[0].strip("| ") for line in part.splitlines()[3:11]] == [
            *["digits-opt"] * 4,
            *["digits-llama"] * 4,
        ]
        systems = [
            row["variant"] or row["system"] for row in csv.DictReader((tmp_path / f"table-1-{protocol}.csv").open())
        ]
        assert systems == ["FT", "FT, with prompt dropout"] * 4
    assert "written: table-1.md" in capsys.readouterr().out


def test_what_cannot_be_run(tmp_path, capsys):
    command = ["eval", "--split", "validation", "--requests", "1", "--out", str(tmp_path)]
    assert main([*command, "--systems", "ROME"]) == 1
    told = f"systems: expected some of {', '.join(EDITORS)}; got 'ROME'"
    assert told in capsys.readouterr().err
    assert main([*command, "--systems", "FT", "--requests", "0"]) == 1
    assert "requests: expected a positive number, got 0" in capsys.readouterr().err
    assert main(["eval", "--table", "search", "--out", str(tmp_path)]) == 1
    assert "split: settings are searched for on validation requests alone" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        main(["eval", "--table", "7"])


def test_results_of_another_precision_are_not_mixed(tmp_path, capsys):
    command = ["eval", "--table", "1", "--systems", "FT", "--split", "validation", "--requests", "1"]
    command += ["--out", str(tmp_path)]
    assert main([*command, "--matmul-precision", "medium"]) == 0
    assert "float32 matmul precision medium. Percentages" in (tmp_path / "table-1.md").read_text()
    assert torch.get_float32_matmul_precision() == "highest"
    assert main(command) == 1
    assert "'precision': 'medium'" in capsys.readouterr().err


@pytest.mark.smoke
@pytest.mark.slow
def test_how_long_editing_takes(tmp_path, monkeypatch):
    """The command with brief settings; the figures themselves are for a quiet machine."""
    brief = {**DEFAULTS["UniKE"], "encoders": EncoderTraining(steps=5), "training": EditTraining(steps=3)}
    monkeypatch.setitem(DEFAULTS, "UniKE", brief)
    assert main(["eval", "--table", "speed", "--requests", "3", "--out", str(tmp_path)]) == 0
    lines = (tmp_path / "table-speed.md").read_text().splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| digits-")]
    assert [row[0] for row in rows] == ["| digits-opt", "| digits-llama"]
    for row in rows:
        assert float(row[1].split()[0]) > 0
        assert row[5] == "4"  # three steps, and the look after them
        assert row[6].startswith(("0", "1", "2", "3")) and " of 3" in row[6]


@pytest.mark.slow(minutes=8)
def test_a_smoke_run(tmp_path):
    """Every system through its training and some requests, into tables."""
    options = ["--split", "validation", "--out", str(tmp_path)]
    assert main(["eval", "--table", "3", "--requests", "10", *options]) == 0
    assert main(["eval", "--table", "4", "--requests", "2", *options]) == 0
    for name, runs in (("3", len(table("3"))), ("4", len(table("4")))):
        for protocol in PROTOCOLS:
            rows = list(csv.DictReader((tmp_path / f"table-{name}-{protocol}.csv").open()))
            assert len(rows) == runs
            shares = [float(row[metric]) for row in rows for metric in METRICS]
            assert all(0 <= share <= 1 for share in shares)
    unike = [row for row in rows if row["system"] == "UniKE" and not row["variant"]]
    assert [float(row["reliability"]) for row in unike] == [1.0, 1.0]
