"""`unike eval`: tables of what was measured, from a run that may have been interrupted."""

import pytest

from unike_kernels.cli import main


def test_a_table_of_one_system(tmp_path, capsys):
    command = ["eval", "--table", "1", "--systems", "FT", "--split", "validation", "--requests", "2"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    text = (tmp_path / "table-1.md").read_text()
    assert "validation requests, seed 0" in text
    for protocol in ("mmedit", "unike"):
        part = text.split(f"## Protocol {protocol}\n")[1].split("##")[0]
        assert [line.split(" | ")[0].strip("| ") for line in part.splitlines()[3:7]] == [
            *["digits-opt"] * 2,
            *["digits-llama"] * 2,
        ]
        assert (tmp_path / f"table-1-{protocol}.csv").read_text().count("\n") == 5
    assert "written: table-1.md" in capsys.readouterr().out


def test_what_cannot_be_run(tmp_path, capsys):
    command = ["eval", "--split", "validation", "--requests", "1", "--out", str(tmp_path)]
    assert main([*command, "--systems", "ROME"]) == 1
    told = "systems: expected some of FT, KE, T-Patcher, MEND, IKE, SERAC, UniKE, Intrin + IKE; got 'ROME'"
    assert told in capsys.readouterr().err
    assert main([*command, "--systems", "FT", "--requests", "0"]) == 1
    assert "requests: expected a positive number, got 0" in capsys.readouterr().err
    assert main(["eval", "--table", "search", "--out", str(tmp_path)]) == 1
    assert "split: settings are searched for on validation requests alone" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        main(["eval", "--table", "7"])
