"""The training script, for a few steps."""

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_models.py"


@pytest.mark.slow(minutes=3)
@pytest.mark.parametrize(
    ("world", "decoder", "kinds"),
    [pytest.param("digits", "opt", 12, marks=pytest.mark.smoke), ("digits", "llama", 12), ("easyvqa", "opt", 4)],
)
def test_trains_and_reports(world, decoder, kinds, tmp_path):
    spec = importlib.util.spec_from_file_location("train_models", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main(["--world", world, "--decoder", decoder], output=tmp_path, steps=3)
    assert (tmp_path / decoder / "model.safetensors").stat().st_size < 3_000_000
    report = json.loads((tmp_path / decoder / "training.json").read_text(encoding="utf-8"))
    assert report["steps"] == 3
    assert len(report["exact-match accuracy"]["by kind"]) == kinds
