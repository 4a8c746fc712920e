"""Folded models: plain ones that compute what the patched ones do."""

from __future__ import annotations

import pytest
import torch
from backbones.zoo import ZOO, logits, model_of

import unike_kernels as uk

IDS = torch.tensor([[7, 8, 9, 10, 11], [12, 13, 14, 15, 16]])
LAYERS = (1, 3)


def unbiased(edit):
    """The edit without biases, as gated neurons of a gated FFN."""
    from dataclasses import replace

    layers = {
        i: replace(
            e, key_bias=torch.zeros_like(e.key_bias), up_bias=None if e.up is None else torch.zeros_like(e.up_bias)
        )
        for i, e in edit.layers.items()
    }
    return replace(edit, layers=layers)


@torch.no_grad()
def assert_folds(model, edits):
    unpatched = logits(model, IDS)
    with uk.patched(model, edits):
        wanted = logits(model, IDS)
    new = uk.fold(model, edits)
    assert type(new) is type(model)
    got = logits(new, IDS)
    # The sums are those of one wider product: as exact as rounding lets them be.
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-6 * float(wanted.abs().max()))
    assert float((got - unpatched).abs().max()) > 1e-2
    assert torch.equal(logits(model, IDS), unpatched)
    return new


@pytest.mark.parametrize("name", ["opt", "gpt2", "gptj", "gpt_neox", "llama", "llama, biases", "phi", "starcoder2"])
def test_a_folded_model_computes_what_the_patched_one_does(name, make_edit):
    model = model_of(ZOO[name], torch.float32)
    gated = name.startswith("llama")
    edits = [make_edit(model, "a", layers=LAYERS), make_edit(model, "b", layers=(3,), gated=gated, seed=5, neurons=3)]
    assert_folds(model, edits)


@pytest.mark.parametrize("name", ["qwen2", "phi3", "gemma2", "mistral", "blip-2, llama", "qwen3_vl"])
def test_gated_neurons_without_biases_fold_into_any_gated_ffn(name, make_edit):
    model = model_of(ZOO[name], torch.float32)
    edit = make_edit(model, "a", layers=LAYERS, gated=True)
    if name in ("qwen2", "phi3"):
        with pytest.raises(uk.UnsupportedModelError, match="the edits need biases in its FFN"):
            uk.fold(model, edit)
    assert_folds(model, [unbiased(edit)])


def test_a_checkpoint_of_it_is_a_plain_one(tmp_path, make_edit):
    from transformers import AutoModelForCausalLM

    model = model_of(ZOO["llama"], torch.float32)
    new = assert_folds(model, [make_edit(model, "a", layers=LAYERS)])
    new.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.intermediate_size == 96 + 5
    with torch.no_grad():
        assert torch.equal(logits(loaded.eval(), IDS), logits(new, IDS))


def test_what_cannot_be_folded(make_model, make_edit, make_memory):
    model = make_model("opt")
    plain, memory = make_edit(model, "a"), make_memory(model)
    before = dict(model.named_modules())
    for edit, error, message in [
        (make_edit(model, "m", memory), uk.MismatchError, "'m': it was trained with the memory .* cannot be folded"),
        (make_edit(model, "far", layers=(7,)), uk.MismatchError, r"names the layers \[7\], the model has 6"),
        (make_edit(make_model("llama"), "silu"), uk.MismatchError, "it is for silu FFNs, layer 2's is relu"),
        (make_edit(model, "gated", gated=True), uk.UnsupportedModelError, "gated neurons cannot be folded"),
    ]:
        with pytest.raises(error, match=message):
            uk.fold(model, edit)
    experts = model_of(ZOO["mixtral"])
    with pytest.raises(uk.UnsupportedModelError, match="looked for an FFN of two or three plain matrices"):
        uk.fold(experts, make_edit(experts, "e", layers=LAYERS))
    bloom = model_of(ZOO["bloom"], torch.float32)
    with pytest.raises(uk.UnsupportedModelError, match="looked for the FFN's width 256 in its config"):
        uk.fold(bloom, make_edit(bloom, "b", layers=LAYERS))
    t5 = model_of(ZOO["t5"], torch.float32)
    with pytest.raises(uk.UnsupportedModelError, match="its encoder's FFNs have the same width"):
        uk.fold(t5, make_edit(t5, "t", layers=LAYERS))
    uk.patch(model, [plain])
    with pytest.raises(uk.PatchError, match="OPTForCausalLM is patched"):
        uk.fold(model, plain)
    assert dict(uk.unpatch(model).named_modules()) == before
