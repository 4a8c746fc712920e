"""Figures: images of what was measured, and spaces in which right and wrong answers lie apart or do not."""

import pytest
import torch
from unike_eval import command, figures
from unike_eval.experiments import Run
from unike_eval.measure import Measured
from unike_eval.metrics import METRICS, PROTOCOLS

from unike_kernels.cli import main

PNG = b"\x89PNG\r\n"


def test_a_sweep():
    def rows(share):
        return [Measured(str(i), {"unike": dict.fromkeys(METRICS[:4], share)}, 0.1) for i in range(3)]

    variants = {"K 1": 0.5, "K 5": 0.9}
    results = [(Run("digits-llama", "vqa", "UniKE", variant=name), rows(share)) for name, share in variants.items()]
    assert figures.sweep(results, "unike").startswith(PNG)


@pytest.mark.slow
def test_the_spaces_of_a_memory():
    found, told = figures.spaces("digits-opt", limit=60)
    assert told.startswith("digits-opt, layer 5, 60 requests; held out: truthfulness ")
    assert list(found) == ["semantic space", "truthfulness space"]

    def apart(right, wrong):
        """How far the means are apart, in units of the spread around them."""
        spread = torch.cat([right - right.mean(0), wrong - wrong.mean(0)]).norm(dim=1).mean()
        return float((right.mean(0) - wrong.mean(0)).norm() / spread)

    assert all(len(states) == 60 for pair in found.values() for states in pair)
    assert apart(*found["truthfulness space"]) > 2 * apart(*found["semantic space"])
    assert figures.visualized(found, told).startswith(PNG)


def test_the_command(tmp_path, capsys, monkeypatch):
    scores = {p: dict.fromkeys(METRICS, 0.5) for p in PROTOCOLS}
    monkeypatch.setattr(command, "perform", lambda *args, **kwargs: [Measured("r", scores, 1.0)])
    asked = ["eval", "--table", "4a", "--out", str(tmp_path)]
    assert main([*asked, "--systems", "FT"]) == 1
    assert "systems: table 4a has no run of FT" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert main(asked) == 0
    assert (tmp_path / "figure-4a.png").read_bytes().startswith(PNG)
    assert (tmp_path / "table-4a.md").read_text().count("| digits-llama |") == len(PROTOCOLS) * 9
