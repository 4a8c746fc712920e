"""Many families, found by structure alone: what is patched, what it computes, and what it leaves as it was."""

from __future__ import annotations

import pytest
import torch
from backbones.zoo import ZOO, logits, model_of, places
from configs import every_token
from hooks_reference import hooked

import unike_kernels as uk
from unike_kernels import backbones
from unike_kernels.artifacts.edit import fresh_layer
from unike_kernels.artifacts.fingerprint import fingerprint
from unike_kernels.ops.patched_ffn.reference import activate

LAYERS = (1, 2, 3)
IDS = torch.tensor([[7, 8, 9, 10, 11], [12, 13, 14, 15, 16], [17, 18, 19, 20, 21]])
EVERY_TOKEN = torch.ones_like(IDS, dtype=torch.bool)
# Norms, routers and rotations that compute in float32 whatever the model's dtype is.
TOLERANCE = 2e-4


@pytest.fixture(params=ZOO)
def family(request):
    return ZOO[request.param]


@pytest.fixture
def setup(family, make_edit, make_memory):
    """The model, two edits and a memory for it, in float64."""
    model = model_of(family)
    memory = make_memory(model, every_token(k=7, values="pre"), layers=LAYERS)
    gated = model.config.get_text_config(decoder=True).model_type not in ("opt", "gpt2", "bloom", "falcon")
    edits = [
        make_edit(model, name, memory, layers=LAYERS, gated=gated and name == "b", seed=seed)
        for seed, name in enumerate("ab", 2)
    ]
    return model, edits, memory


def state(model):
    return {name: id(m) for name, m in model.named_modules()}, list(model.state_dict())


@torch.no_grad()
def test_what_is_found(family):
    model = model_of(family)
    decoder = backbones.find_decoder(model)
    assert f"{decoder.path}.{family.layers.rsplit('.', 1)[-1]}".lstrip(".") == family.layers
    for layer, place in zip(decoder.layers, places(model, family), strict=True):
        assert layer.attention.module is place.attention
        assert [site.module for site in (layer.ffn[0], layer.ffn[-1])] == [place.first, place.last]
        x = torch.linspace(-3, 3, 9)
        torch.testing.assert_close(activate(layer.activation, x), place.act(x))
    assert all(layer.dense is not None for layer in decoder.layers) == family.dense


@torch.no_grad()
def test_computes_what_the_hooks_compute_and_nothing_is_left(family, setup):
    model, (a, b), memory = setup
    before, unpatched = state(model), logits(model, IDS)
    with hooked(
        places(model, family), EVERY_TOKEN, edits=[[a], [], [b, a]], memory=memory, config=memory.config,
        remembers=[True, False, True],
    ):  # fmt: skip
        wanted = logits(model, IDS)
    uk.patch(model, [a, b], memory)
    assert list(model.state_dict()) == before[1]
    with uk.rows(model, [["a"], [], ["b", "a"]], memory=[True, False, True]):
        got = logits(model, IDS)
    scale = float(wanted.abs().max())
    torch.testing.assert_close(got, wanted, rtol=0, atol=TOLERANCE * scale)
    if family.dense:
        assert torch.equal(got[1], unpatched[1])
    else:  # an expert multiplies the tokens of all rows together, and how many those are decides how it rounds
        torch.testing.assert_close(got[1], unpatched[1], rtol=0, atol=1e-5 * scale)
    assert float((wanted[[0, 2]] - unpatched[[0, 2]]).abs().max()) > 50 * TOLERANCE * scale  # it is not blind
    uk.unpatch(model)
    assert state(model) == before
    assert torch.equal(logits(model, IDS), unpatched)


@torch.no_grad()
def test_fresh_edits_change_nothing(family):
    model = model_of(family, torch.float32)
    unpatched = logits(model, IDS)
    uk.patch(model)
    assert torch.equal(logits(model, IDS), unpatched)
    uk.unpatch(model)
    layer = fresh_layer(torch.randn(3, 64), torch.zeros(3), torch.randn(64), gated=False)
    decoder = backbones.find_decoder(model)
    edit = uk.Edit("fresh", {3: layer}, decoder.layers[3].activation, every_token(k=7), fingerprint(model), None, {})
    with uk.patched(model, [edit]):
        assert torch.equal(logits(model, IDS), unpatched)


def test_only_the_edit_is_trained(setup):
    model, (edit, _), memory = setup
    model.requires_grad_(False)
    parts = {name: t.requires_grad_() for name, t in edit.layers[3].tensors().items() if t is not None}
    with uk.patched(model, [edit], memory):
        logits(model, IDS).square().sum().backward()
    assert {name for name, t in parts.items() if t.grad is not None and t.grad.any()} == set(parts)
    assert all(p.grad is None for p in model.parameters())


def test_forty_families():
    assert len(ZOO) >= 40
