"""Hooks on the FFNs and attentions of many families against the same models patched; hybrids; what engines return."""

from types import SimpleNamespace

import pytest
import torch
from backbones.hybrids import HYBRIDS
from backbones.zoo import ZOO, model_of
from configs import every_token
from torch import nn

import unike_kernels as uk
from unike_kernels import backbones
from unike_kernels.serving import RaggedRuntime, RequestSlice, Version, operators
from unike_kernels.serving.hooks import hook_attention, hook_ffn

IDS = torch.arange(5, 14)[None]
FAMILIES = [
    "opt", "gpt2", "gptj", "gpt_neox", "falcon", "bloom", "qwen2", "gemma2", "olmo2", "cohere", "phi", "starcoder2",
    "mixtral", "llama4_text",
]  # fmt: skip


def installed(model, memory, edits, layers):
    """The model with vLLM's hooks in these layers, and what they call."""
    text = model.config.get_text_config(decoder=True)
    activation = backbones.find_decoder(model).layers[layers[-1]].activation
    flat = RaggedRuntime(layers, text.hidden_size, activation, memory)
    for edit in edits:
        flat.hold(Version(edit.id, edit))
    operators.install(model, text, flat, edits=True)
    return flat


@pytest.mark.parametrize("name", FAMILIES)
def test_vllms_hooks_find_what_patch_finds(name, make_edit, make_memory):
    """The same bits, in modules that are called as Hugging Face calls them."""
    model = model_of(ZOO[name], torch.float32)
    memory = make_memory(model, every_token(k=7, values="out", alpha=0.4), layers=(2, 3))
    edit = make_edit(model, "a", memory, layers=(2, 3))
    with torch.no_grad():
        plain = model(input_ids=IDS, use_cache=False).logits
        with uk.patched(model, [edit], memory):
            wanted = model(input_ids=IDS, use_cache=False).logits
        flat = installed(model, memory, [edit], [2, 3])
        assert torch.equal(model(input_ids=IDS, use_cache=False).logits, plain)
        with operators.step(flat, [RequestSlice(9, ("a",))]):
            found = model(input_ids=IDS, use_cache=False).logits
        flat.begin([RequestSlice(9, ("a",))])  # of which the operators are not told
        assert torch.equal(model(input_ids=IDS, use_cache=False).logits, plain)
    assert torch.equal(found, wanted)
    assert not torch.allclose(found, plain, atol=1e-2)


def test_a_layer_that_lacks_a_part_is_refused_at_start(make_memory):
    """Only where the part is needed."""
    hybrid = next(h for h in HYBRIDS.values() if len(h.ffn) < 4 and h.attention)
    model = model_of(hybrid.family)
    lacking = next(i for i in range(4) if i not in hybrid.ffn)
    text = model.config.get_text_config(decoder=True)
    flat = RaggedRuntime(range(4), text.hidden_size, "silu")
    with pytest.raises(uk.UnsupportedModelError, match=rf"layer {lacking} .*: looked for one FFN"):
        operators.install(model, text, flat, edits=True)
    operators.install(model, text, flat, edits=False)
    operators.install(model, text, RaggedRuntime(hybrid.ffn, text.hidden_size, "silu"), edits=True)


def test_modules_that_keep_no_config():
    """As vLLM's StableLM: then the text config is theirs."""
    model = model_of(ZOO["llama"])
    text, layers = model.config, model.model.layers
    for module in model.modules():
        module.__dict__.pop("config", None)
    found = backbones.find_decoder(model, text)
    assert found.path == "model" and [layer.module for layer in found.layers] == list(layers)
    with pytest.raises(uk.UnsupportedModelError, match="expected a Hugging Face PreTrainedModel"):
        backbones.find_decoder(model)


class PPMissingLayer(nn.Identity):
    """What vLLM puts in the place of another stage's layer."""


def test_a_stage_of_a_pipeline_installs_its_own_layers():
    model = model_of(ZOO["llama"])
    for i in (0, 3):
        model.model.layers[i] = PPMissingLayer()
    assert operators.stage_of(model, model.config) == [1, 2]
    flat = RaggedRuntime([1, 2, 3], 64, "silu", own=[1, 2])
    operators.install(model, model.config, flat, edits=True)
    hooked = [bool(layer.mlp._forward_hooks) for layer in model.model.layers[1:3]]
    assert hooked == [True, True]
    with pytest.raises(uk.UnsupportedModelError, match=r"layer 3 .*: looked for one FFN"):
        operators.install(model, model.config, RaggedRuntime([1, 2, 3], 64, "silu"), edits=True)


def test_what_a_layer_sums_itself(make_memory, monkeypatch):
    """Edits are added by one rank. What the memory shifts is computed by each, of one more sum, and added by shares."""
    hooks = []
    for rank in (0, 1):
        model = model_of(ZOO["llama"])
        model.model.layers[3].mlp.down_proj.reduce_results = False
        operators.install(model, model.config, RaggedRuntime([2, 3], 64, "silu"), edits=True, ranks=2, rank=rank)
        hooks.append([bool(layer.mlp._forward_hooks) for layer in model.model.layers])
    assert hooks == [[False, False, True, True], [False, False, True, False]]
    memory = make_memory(model, every_token(k=7, values="out"), layers=(2, 3))
    asked, shares, hook = [], [], operators.hook_attention
    monkeypatch.setattr(operators, "hook_attention", lambda *a, **how: shares.append(how["share"]) or hook(*a, **how))

    def summed(part):
        asked.append(part)
        return part.clone()

    for rank, sums in ((0, [3]), (1, [3]), (0, [])):
        model = model_of(ZOO["llama"])
        if sums:
            model.model.layers[3].self_attn.o_proj.reduce_results = False
        flat, shifted = RaggedRuntime([2, 3], 64, "silu", memory), []
        operators.install(model, model.config, flat, edits=False, ranks=2, rank=rank, summed=summed)
        flat.attention = lambda layer, hidden, out, shifted=shifted: shifted.append(layer)
        with operators.step(flat, []), torch.no_grad():
            model(input_ids=IDS)
        assert shifted == [2, 3] and len(asked) == len(sums) and shares == [1.0, 0.5 if sums else 1.0]
        asked.clear()
        shares.clear()


class Leaves(nn.Module):
    """An attention as vLLM's Falcon has it: positions first, the bias left for the layer to add."""

    def __init__(self, bias):
        super().__init__()
        self.bias = bias

    def forward(self, positions, hidden_states):
        return 2 * hidden_states, self.bias


@pytest.mark.parametrize("bias", [None, torch.randn(6)])
@pytest.mark.parametrize("named", [True, False])
def test_an_output_whose_bias_is_left_to_the_layer(bias, named):
    attention, x, seen = Leaves(bias), torch.randn(3, 6), []

    def change(hidden, out):
        seen.append((hidden, out.clone()))
        out[1:] *= 3

    layer = SimpleNamespace(attention=SimpleNamespace(module=attention), where="layer 0")
    hook_attention(layer, change)
    out, _ = attention(torch.arange(3), hidden_states=x) if named else attention(torch.arange(3), x)
    whole = 2 * x if bias is None else 2 * x + bias
    ((hidden, given),) = seen
    assert torch.equal(hidden, x) and torch.equal(given, whole)
    assert torch.equal(out[0], 2 * x[0])  # to the bit: it was not changed
    torch.testing.assert_close(out[1:] + (0 if bias is None else bias), 3 * whole[1:])


@pytest.mark.parametrize("bias", [None, torch.randn(6)])
def test_an_output_of_which_each_rank_has_a_part(bias):
    """All of it is changed, by each of them in its share: their sum is what it would be on one rank."""
    x, other = torch.randn(3, 6), torch.randn(3, 6)

    def change(hidden, out):
        out[1:] *= 3

    parts = []
    for mine, rest, share in ((2 * x, other, 0.25), (other, 2 * x, 0.75)):
        attention = Leaves(bias)
        attention.forward = lambda positions, hidden_states, mine=mine: (mine.clone(), bias)
        layer = SimpleNamespace(attention=SimpleNamespace(module=attention), where="layer 0")
        hook_attention(layer, change, summed=lambda part, rest=rest: part + rest, share=share)
        parts.append(attention(torch.arange(3), x)[0])
    whole = 2 * x + other + (0 if bias is None else bias)
    assert torch.equal(parts[1][0], other[0]) and torch.equal(parts[0][0], 2 * x[0])
    torch.testing.assert_close((parts[0] + parts[1] + (0 if bias is None else bias))[1:], 3 * whole[1:])


def test_a_part_with_a_residual_is_refused(monkeypatch):
    monkeypatch.setattr("unike_kernels.serving.hooks.residual_position", lambda module: 1)
    layer = SimpleNamespace(attention=SimpleNamespace(module=Leaves(None)), where="layer 0")
    with pytest.raises(uk.UnsupportedModelError, match="layer 0: its attention is not summed over the ranks, and has"):
        hook_attention(layer, lambda hidden, out: None, summed=torch.clone)


def test_an_output_that_is_no_tensor_is_refused():
    class Returns(nn.Module):
        def forward(self, x):
            return SimpleNamespace(routed=x)

    ffn = Returns()
    hook_ffn(SimpleNamespace(ffn=[SimpleNamespace(module=ffn)], where="layer 7 (Block)"), lambda x, out: None)
    with pytest.raises(uk.UnsupportedModelError, match=r"layer 7 \(Block\): expected its Returns to return a tensor"):
        ffn(torch.zeros(2, 3))
