"""Folded models: plain ones that compute what the patched ones do."""

from __future__ import annotations

import pytest
import torch
from backbones.zoo import ZOO, logits, model_of
from configs import every_token

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
        with pytest.raises(
            uk.UnsupportedModelError,
            match=r"the edits need biases in its FFN.*EditTraining\(bias=False\) and Config\(neurons='gated'\)",
        ):
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
        (make_edit(make_model("llama"), "silu"), uk.MismatchError, "it is for silu FFNs, the model's are relu"),
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


def config_model(name):
    model = model_of(ZOO[name], torch.float32)
    model.generation_config.eos_token_id, model.generation_config.temperature = [2, 5, 9], 0.6
    model.generation_config.do_sample = True
    return model


def test_what_a_model_has_beside_its_weights_is_kept(tmp_path, make_edit):
    from transformers import AutoModelForCausalLM

    model = config_model("llama").train()
    model.model.layers[0].eval()
    model.model.layers[1].requires_grad_(False)
    model.config.name_or_path = "somebody/llama"
    edit = make_edit(model, "a", layers=LAYERS)
    new = uk.fold(model, edit)
    assert new.generation_config.to_dict() == model.generation_config.to_dict()
    assert new.generation_config is not model.generation_config
    assert [m.training for m in new.modules()] == [m.training for m in model.modules()]
    asked = {name: p.requires_grad for name, p in model.named_parameters()}
    for name, p in new.named_parameters():
        assert p.requires_grad == asked.get(name, True)  # biases are new
    assert new.config.name_or_path == "somebody/llama"
    new.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id == [2, 5, 9]


@pytest.mark.parametrize("name", ["opt", "gpt2", "llama, biases", "gemma2", "blip-2, llama"])
@torch.no_grad()
def test_the_folded_model_shares_nothing_with_the_other(name, make_edit):
    """Whatever is written to one of them; tied weights stay tied."""
    model = model_of(ZOO[name], torch.float32)
    new = uk.fold(model, unbiased(make_edit(model, "a", layers=LAYERS, gated=name not in ("opt", "gpt2"))))
    storages = [{t.untyped_storage().data_ptr() for t in [*m.parameters(), *m.buffers()]} for m in (model, new)]
    assert not (storages[0] & storages[1])
    if name != "blip-2, llama":
        assert len(list(new.parameters())) == len(list(model.parameters()))
    before = logits(model, IDS)
    for t in [*new.parameters(), *new.buffers()]:
        t.zero_()
    assert torch.equal(logits(model, IDS), before)


def test_wrappers_are_looked_through_and_adapters_refused(make_model, make_edit):
    model = make_model("llama")
    edit = make_edit(model, "a")
    wanted = uk.fold(model, edit)
    for wrapped in (torch.compile(model), torch.nn.DataParallel(model)):
        new = uk.fold(wrapped, edit)
        assert type(new) is type(model)
        for name, t in new.state_dict().items():
            assert torch.equal(t, wanted.state_dict()[name])
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for each in (adapted, model):
        with pytest.raises(uk.PatchError, match=r"LlamaForCausalLM has adapters in 6 modules: .*merge_and_unload"):
            uk.fold(each, edit)
    assert type(uk.fold(adapted.merge_and_unload(), edit)) is type(model)


def test_override_folds_an_edit_without_its_memory(make_model, make_edit, make_memory):
    model = make_model("opt")
    edit = make_edit(model, "m", make_memory(model))
    new = uk.fold(model, edit, override=True)
    with torch.no_grad(), uk.patched(model, [edit], override=True):
        torch.testing.assert_close(logits(new, IDS), logits(model, IDS), rtol=1e-4, atol=1e-4)
    other = make_model("opt", seed=1)
    with pytest.raises(uk.MismatchError, match=r"made for other weights.*Pass override=True"):
        uk.fold(other, make_edit(model, "o"))
    uk.fold(other, make_edit(model, "o"), override=True)


@pytest.mark.parametrize("name", ["qwen2", "nemotron"])
def test_an_edit_that_is_trained_without_biases_folds_where_there_are_none(name, processor):
    from transformers import NemotronConfig, NemotronForCausalLM

    from unike_kernels.training import EditTraining, Sample, train_edit

    if name == "nemotron":  # plain, relu2
        from backbones.zoo import GQA, Family

        model = model_of(Family(lambda: NemotronForCausalLM(NemotronConfig(**GQA))), torch.float32)
    else:
        model = model_of(ZOO[name], torch.float32)
    config = every_token(neurons="gated" if name == "qwen2" else "plain")
    training = EditTraining(bias=False, steps=30, neurons=3)
    result = train_edit(
        model, processor, Sample("w1 w2", "w9"), preserve=[Sample("w3 w4", "w5")], config=config, training=training,
        progress=False,
    )  # fmt: skip
    assert result.losses[-1] < result.losses[0] / 2
    for layer in result.edit.layers.values():
        assert not layer.key_bias.any()
        assert layer.up_bias is None or not layer.up_bias.any()
    assert_folds(model, [result.edit])
