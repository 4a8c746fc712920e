"""Models whose layers are of several kinds: edited where there is an FFN, remembering where there is an attention."""

from __future__ import annotations

import pytest
import torch
from backbones.hybrids import HYBRIDS
from backbones.zoo import logits, model_of
from configs import every_token
from hooks_reference import Place, hooked

import unike_kernels as uk
from unike_kernels import backbones

IDS = torch.tensor([[7, 8, 9, 10, 11], [12, 13, 14, 15, 16], [17, 18, 19, 20, 21]])
EVERY_TOKEN = torch.ones_like(IDS, dtype=torch.bool)


@pytest.fixture(params=HYBRIDS)
def hybrid(request):
    return HYBRIDS[request.param]


def places(model, hybrid):
    family = hybrid.family
    found = []
    for index, layer in enumerate(model.get_submodule(family.layers)):
        attention = layer.get_submodule(family.attention) if index in hybrid.attention else None
        ffn = layer.get_submodule(family.ffn[0]) if index in hybrid.ffn else None
        found.append(Place(attention, ffn, ffn, family.act))
    return found


@torch.no_grad()
def test_each_layer_is_patched_where_it_has_what_is_needed(hybrid, make_edit, make_memory):
    """As the hooks compute it; a row without edits and memory, and the unpatched model, bit for bit."""
    model = model_of(hybrid.family)
    decoder = backbones.find_decoder(model)
    for part in ("attention", "ffn"):
        assert tuple(layer.index for layer in decoder.layers if layer.has(part)) == getattr(hybrid, part)
    before, unpatched = {name: id(m) for name, m in model.named_modules()}, logits(model, IDS)
    memory = make_memory(model, every_token(k=7, values="pre"), layers=hybrid.attention)
    a, b = (make_edit(model, id, memory, layers=hybrid.ffn, seed=seed) for seed, id in enumerate("ab"))
    with hooked(
        places(model, hybrid), EVERY_TOKEN, edits=[[a], [], [b, a]], memory=memory, config=memory.config,
        remembers=[True, False, True],
    ):  # fmt: skip
        wanted = logits(model, IDS)
    report = uk.patch(model, [a, b], memory)
    assert [row[0] for row in report.layers] == sorted({*hybrid.attention, *hybrid.ffn})
    with uk.rows(model, [["a"], [], ["b", "a"]], memory=[True, False, True]):
        got = logits(model, IDS)
    scale = float(wanted.abs().max())
    torch.testing.assert_close(got, wanted, rtol=0, atol=5e-4 * scale)
    assert float((wanted[[0, 2]] - unpatched[[0, 2]]).abs().max()) > 0.02 * scale
    if hybrid.family.dense:
        assert torch.equal(got[1], unpatched[1])
    uk.unpatch(model)
    assert {name: id(m) for name, m in model.named_modules()} == before
    assert torch.equal(logits(model, IDS), unpatched)


def test_what_is_chosen_and_what_is_refused(hybrid, make_edit, make_memory):
    model = model_of(hybrid.family)
    decoder = backbones.find_decoder(model)
    assert tuple(decoder.select(None)) == hybrid.ffn[-4:]
    assert tuple(decoder.select(None, need=("attention",))) == hybrid.attention
    assert [row[0] for row in uk.patch(model).layers] == list(hybrid.ffn[-4:])
    uk.unpatch(model)
    without = next(i for i in range(4) if i not in hybrid.attention)
    memory = make_memory(model, layers=hybrid.attention)
    moved = uk.MemoryBank({without: memory.layers[hybrid.attention[0]]}, memory.config, memory.base_model)
    with pytest.raises(uk.UnsupportedModelError, match=rf"layer {without} \(.*: looked for one self-attention; found"):
        uk.patch(model, memory=moved)
    for without in set(range(4)) - set(hybrid.ffn):
        edit = make_edit(model, layers=hybrid.ffn)
        moved = uk.Edit("a", {without: edit.layers[hybrid.ffn[0]]}, edit.activation, edit.config, edit.base_model, None)
        with pytest.raises(
            uk.UnsupportedModelError, match=rf"layer {without} \(.*: looked for one FFN called .*; found"
        ):
            uk.patch(model, [moved])
    assert not uk.is_patched(model)


def test_a_memory_is_made_and_an_edit_trained_with_it(processor):
    from unike_kernels.training import EditTraining, EncoderTraining, Sample, Triplet, build_memory, train_edit

    model = model_of(HYBRIDS["lfm2"].family)
    words = ["w1 w2", "w3", "w4 w5", "w6"]
    triplets = [Triplet(prompt, "w7", "w8 w9") for prompt in words]
    memory = build_memory(model, processor, triplets, training=EncoderTraining(steps=2), progress=False).memory
    assert sorted(memory.layers) == [1, 3]
    training = EditTraining(steps=30, neurons=2)
    result = train_edit(model, processor, Sample("w1 w2", "w9"), memory, training=training, progress=False)
    assert sorted(result.edit.layers) == [1, 3]
    assert result.losses[-1] < result.losses[0] / 2


def test_an_activation_with_parameters_of_its_own_is_refused():
    from backbones.zoo import GQA
    from transformers import ApertusConfig, ApertusForCausalLM

    model = ApertusForCausalLM(ApertusConfig(**GQA))
    with pytest.raises(uk.UnsupportedModelError, match=r"layer 0 .*XIELUActivation has parameters of its own"):
        uk.patch(model)
