"""What a model is wrapped in, edits that are being trained, and what a patched model must not do silently."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import unike_kernels as uk
from unike_kernels.nn import DropIn
from unike_kernels.patching import patched_ffns

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


@pytest.fixture(params=["opt", "llama"])
def setup(request, make_model, make_memory, make_edit):
    model = make_model(request.param)
    memory = make_memory(model)
    return model, [make_edit(model, name, memory, seed=seed) for seed, name in enumerate("ab")], memory


# --- wrappers --------------------------------------------------------------------------------------------------------


def peft_model(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).eval()  # changes nothing yet


WRAPPERS = {
    "compiled": torch.compile,
    "parallel": nn.DataParallel,
    "peft": peft_model,
    "all": lambda m: nn.DataParallel(torch.compile(peft_model(m))),
}


@pytest.mark.filterwarnings("ignore:.*could be compared with the base model")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_every_function_looks_inside(setup, make_memory, name, when):
    """Done to the wrapper, it is done to the model, whatever of both was first."""
    model, (a, b), memory = setup
    plain = copy.deepcopy(model)
    wanted = []
    for edits, rows, more in (([a], None, None), ([a, b], None, None), ([a, b], [["b"], []], memory)):
        uses = None if rows is None else [True, False]
        with uk.patched(plain, edits, more, override=True), uk.rows(plain, rows, memory=uses):
            wanted.append(logits(plain))
    wrapper = WRAPPERS[name](model) if when == "before" else None
    report = uk.patch(model if wrapper is None else wrapper, [a], override=True)
    assert report.model == type(model).__name__
    wrapper = WRAPPERS[name](model) if wrapper is None else wrapper
    assert uk.is_patched(wrapper) and uk.is_patched(model) and set(patched_ffns(wrapper)) == {2, 3, 4, 5}
    with pytest.raises(uk.PatchError, match="patched already"):
        uk.patch(wrapper, [a], override=True)
    assert torch.equal(logits(model), wanted[0])
    uk.add_edit(wrapper, b, override=True)
    assert torch.equal(logits(model), wanted[1])
    uk.swap_memory(wrapper, memory, override=True)
    with uk.rows(wrapper, [["b"], []], memory=[True, False]), uk.explain(wrapper) as trace:
        assert torch.equal(logits(model), wanted[2])
    assert len(trace.passes) == 1
    uk.set_beta(wrapper, "a", 0.5)
    uk.remove_edit(wrapper, "a")
    with pytest.raises(uk.PatchError, match="is patched"):
        uk.fold(wrapper, a, override=True)
    if name == "peft":
        model = wrapper.unload()
    assert uk.unpatch(wrapper if name != "peft" else model) is (wrapper if name != "peft" else model)
    assert torch.equal(logits(model), logits(plain)) and not uk.is_patched(model)


# --- modules that are not where they were ----------------------------------------------------------------------------


def test_a_module_in_two_places_is_refused(setup):
    model, edits, memory = setup
    layers = uk.backbones.find_decoder(model).module.layers
    name = "fc2" if hasattr(layers[3], "fc2") else "mlp"
    before = logits(model)
    setattr(layers[1], name, getattr(layers[3], name))
    with pytest.raises(uk.PatchError, match=rf"layer 3 \(.*\): its {name} \(.*\) stands in 2 places of the model"):
        uk.patch(model, edits, memory, override=True)
    assert not uk.is_patched(model) and not any(isinstance(m, DropIn) for m in model.modules())
    assert not torch.equal(logits(model), before)


def test_a_shared_activation(make_model, make_edit):
    model = make_model("opt")
    for layer in model.model.decoder.layers:
        layer.activation_fn = model.model.decoder.layers[0].activation_fn
    edit = make_edit(model)
    other = make_model("opt")
    with uk.patched(model, [edit]), uk.patched(other, [edit]):
        assert torch.equal(logits(model), logits(other))
    assert torch.equal(logits(model), logits(other))


def test_an_ffn_of_other_parts_is_not_one_launch(make_model, make_edit):
    peft = pytest.importorskip("peft")
    model = make_model("opt")
    uk.patch(model, [make_edit(model)], base="fused")
    layers = model.model.decoder.layers
    logits(model)
    assert all(ffn.dense is not None for ffn in patched_ffns(model).values())
    layers[2].activation_fn = nn.GELU()
    layers[3].fc1 = peft.tuners.lora.Linear(layers[3].fc1, "a", config=peft.LoraConfig(r=2), r=2)
    logits(model)
    assert [ffn.dense is None for ffn in patched_ffns(model).values()] == [True, True, False, False]


def test_what_was_replaced_is_given_back(setup):
    """Unpatch puts nothing back in its place."""
    model, edits, memory = setup
    layers = uk.backbones.find_decoder(model).module.layers
    name = "fc2" if hasattr(layers[3], "fc2") else "mlp"
    old, new = getattr(layers[3], name), copy.deepcopy(getattr(layers[3], name))
    uk.patch(model, edits, memory)
    setattr(layers[3], name, new)
    for call in (lambda: logits(model), lambda: uk.add_edit(model, edits[0]), lambda: uk.set_beta(model, "a", 1.0)):
        with pytest.raises(uk.PatchError, match=f"layer 3: where its {name} .* was patched, there is now"):
            call()
    uk.patch(model, edits, memory, replace=True)  # is a way out
    assert not isinstance(old, DropIn) and isinstance(new, DropIn)
    uk.unpatch(model)
    assert getattr(layers[3], name) is new and not isinstance(new, DropIn)


def test_another_decoder_is_noticed(setup):
    model, edits, memory = setup
    uk.patch(model, edits, memory)
    inner = copy.deepcopy(model.model)
    model.model = inner
    with pytest.raises(uk.PatchError, match=r"its decoder .* is another one than was patched"):
        uk.rows(model, [[], []]).__enter__()
    with pytest.raises(uk.PatchError, match="was copied or pickled alone"):
        logits(model)
    uk.unpatch(model)
    assert not any(isinstance(m, DropIn) for m in model.modules())
    logits(model)


def test_the_config_of_the_attention_is_the_models(setup):
    model, edits, memory = setup
    with uk.patched(model, edits, memory):
        for layer in uk.backbones.find_decoder(model).layers:
            assert layer.attention.module.config is model.config


# --- edits that are being trained ------------------------------------------------------------------------------------


def losses(model, edit, steps=4, checkpointed=False):
    leaves = [t for layer in edit.layers.values() for t in (layer.keys, layer.key_bias, layer.values)]
    optimizer = torch.optim.Adam([t.requires_grad_() for t in leaves], lr=0.05)
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        optimizer.step()
        seen.append(float(loss.detach()))
    return seen


@pytest.mark.parametrize("way", ["patch", "add_edit", "after"])
def test_an_edit_is_trained_by_hand(setup, way):
    """Each step computes with what the last one left, and so does what comes later, of the others nothing changes."""
    model, (a, b), memory = setup
    model.requires_grad_(False)
    if way == "patch":
        for layer in a.layers.values():
            layer.keys.requires_grad_()
    uk.patch(model, [b] if way == "add_edit" else [a, b], memory)
    if way == "add_edit":
        uk.add_edit(model, a)
    logits(model)
    seen = losses(model, a)
    assert seen[-1] < seen[0] - 0.1
    found = logits(model)
    with uk.rows(model, [["b"], []]):
        others = logits(model)
    with pytest.raises(uk.PatchError, match=r"edits \['a'\]: their tensors ask for gradients"):
        copy.deepcopy(model)
    with pytest.raises(uk.PatchError, match="ask for gradients"):
        torch.optim.swa_utils.AveragedModel(model)
    for layer in a.layers.values():
        for t in layer.tensors().values():
            t.requires_grad_(False)
    uk.unpatch(model)
    with uk.patched(model, [b, a] if way == "add_edit" else [a, b], memory):
        torch.testing.assert_close(logits(model), found, rtol=1e-5, atol=1e-5)
        copy.deepcopy(model)
        with uk.rows(model, [["b"], []]):
            torch.testing.assert_close(logits(model), others, rtol=1e-5, atol=1e-5)


def test_a_trained_edit_with_checkpoints(setup):
    model, (a, _), memory = setup
    model.requires_grad_(False)
    again = copy.deepcopy(a)
    with uk.patched(model, [a], memory):
        wanted = losses(model, a)
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with uk.patched(model, [again], memory):
        assert losses(model, again) == pytest.approx(wanted, abs=1e-5)
