"""Finding decoder, attention and FFN; what is said about a model of another structure."""

import numpy as np
import pytest
import torch
from torch import nn

import unike_kernels as uk
from unike_kernels import backbones
from unike_kernels.ops.patched_ffn.reference import ACTIVATIONS, activate, base_ffn


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("opt", "model.decoder"),
        ("llama", "model"),
        ("blip2-opt", "language_model.model.decoder"),
        ("blip2-llama", "language_model.model"),
    ],
)
def test_finds_the_decoder(make_model, kind, path):
    model = make_model(kind)
    decoder = backbones.find_decoder(model)
    assert (decoder.path, decoder.hidden_size, len(decoder.layers)) == (path, 64, 6)
    assert decoder.module is model.get_submodule(path)
    gated = kind.endswith("llama")
    for index, layer in enumerate(decoder.layers):
        assert (layer.index, layer.attention, layer.gated) == (index, (layer.module, "self_attn"), gated)
        assert layer.module is decoder.module.layers[index]
        assert [site.name for site in layer.ffn] == (["mlp"] if gated else ["fc1", "activation_fn", "fc2"])
        assert all(site.parent is layer.module for site in layer.ffn)
        assert layer.activation == ("silu" if gated else "relu")


@pytest.mark.parametrize("kind", ["opt", "llama"])
@pytest.mark.parametrize("patched", [False, True])
def test_weights_are_those_of_the_ffn(make_model, kind, patched):
    model = make_model(kind)
    if patched:
        uk.patch(model)
    layer = backbones.find_decoder(model).layers[3]
    x = torch.randn(4, 64)
    parts = layer.module.mlp if layer.gated else nn.Sequential(layer.module.fc1, nn.ReLU(), layer.module.fc2)
    torch.testing.assert_close(base_ffn(x, layer.weights(), layer.activation), parts(x))


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_a_patched_ffn_is_probed_without_its_neurons(make_model, make_edit, kind):
    model = make_model(kind)
    wanted = [layer.weights() for layer in backbones.find_decoder(model).layers]
    with uk.patched(model, [make_edit(model)]):
        found = [layer.weights() for layer in backbones.find_decoder(model).layers]
    assert all(torch.equal(one.w_in, other.w_in) for one, other in zip(found, wanted, strict=True))


def test_select(make_model):
    decoder = backbones.find_decoder(make_model("opt"))
    assert decoder.select(None) == [2, 3, 4, 5]
    assert decoder.select(None, count=9) == [0, 1, 2, 3, 4, 5]
    assert decoder.select([4, 1, 4]) == [1, 4]
    assert decoder.select([np.int64(4), torch.tensor(1)]) == [1, 4]
    for wrong in ([6], [-1], [], [True], [1.0], ["1"]):
        with pytest.raises(ValueError, match=r"layers: expected indices in 0..5"):
            decoder.select(wrong)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_is_known_by_what_it_computes(name):
    assert backbones.match_activation(lambda x: activate(name, x), "here") == name


def test_an_unknown_activation():
    with pytest.raises(uk.UnsupportedModelError, match="layer 3: its activation Tanh computes none of relu, gelu"):
        backbones.match_activation(nn.Tanh(), "layer 3")


def activations(model):
    return [layer.activation for layer in backbones.find_decoder(model).layers]


def mamba():
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=2, state_size=4))


def vit():
    from transformers import ResNetConfig, ResNetModel

    return ResNetModel(ResNetConfig(embedding_size=4, hidden_sizes=[4, 4], depths=[1, 1], layer_type="basic"))


def of_another_activation(make_model):
    model = make_model("llama")
    model.model.layers[4].mlp.act_fn = nn.Softsign()
    return model


def with_two_decoders(make_model):
    model = make_model("opt")
    model.second = make_model("opt").model
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda _: mamba(),
            r"layer 0 \(MambaBlock\): looked for one FFN called mlp, .*; found \{.*'mixer': \['conv1d'",
        ),
        (lambda _: vit(), "ResNetModel: looked for one submodule with model_type 'resnet'.*found none"),
        (lambda _: nn.Linear(2, 2), "model: expected a Hugging Face PreTrainedModel, got Linear"),
        (lambda _: "model", "model: expected a Hugging Face PreTrainedModel, got str"),
        (of_another_activation, r"layer 4 \(LlamaDecoderLayer\): its activation Softsign computes none of relu"),
        (with_two_decoders, r"found \['model.decoder', 'second.decoder'\]"),
    ],
)
def test_an_unsupported_model_is_described_and_left_alone(make_model, make_edit, make_memory, make, message):
    model = make(make_model)
    before = dict(model.named_modules()) if isinstance(model, nn.Module) else None
    with pytest.raises(uk.UnsupportedModelError, match=message):
        activations(model)
    if before is not None:
        with pytest.raises(uk.UnsupportedModelError, match=message):
            uk.patch(model)
        assert dict(model.named_modules()) == before


def test_placeholders(make_model):
    model = make_model("blip2-opt")
    assert backbones.placeholder_ids(model) == backbones.required_placeholder_ids(model) == {3}
    model.config.video_token_id, model.config.audio_token_index, model.config.image_start_token_id = 5, 6, 7
    model.config.speech_token_id = None
    assert backbones.placeholder_ids(model) == {3, 5, 6}
    assert backbones.placeholder_ids(make_model("opt")) == frozenset()
    with pytest.raises(
        uk.UnsupportedModelError, match=r"OPTForCausalLM: Config\(tokens='text'\) needs an image_token_id"
    ):
        backbones.required_placeholder_ids(make_model("opt"))


def test_a_layer_that_stands_twice(make_model):
    model = make_model("llama")
    model.model.layers[4] = model.model.layers[2]
    with pytest.raises(
        uk.UnsupportedModelError, match=r"layer 4 \(LlamaDecoderLayer\): expected a module of its own.*layer 2"
    ):
        backbones.find_decoder(model)


def test_unwrap(make_model):
    model = make_model("llama")
    for wrapped in (model, torch.compile(model), nn.DataParallel(model), torch.compile(nn.DataParallel(model))):
        assert backbones.unwrap(wrapped) is model
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert backbones.unwrap(torch.compile(adapted)) is model


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_projections_are_the_attention_modules_own(make_model, kind):
    """A single entry, attended to by anything, comes out as the module's own output for it (Eq. 8); keys agree with
    the scores that the module computes without positions."""
    attention = backbones.find_decoder(make_model(kind)).layers[2].module.self_attn
    hidden, other = torch.randn(5, 64), torch.randn(3, 64)
    with torch.no_grad():
        keys, values = backbones.project_memory(attention, hidden)
        queries = backbones.project_queries(attention, other)
        output = attention.out_proj if kind == "opt" else attention.o_proj
        grouped = attention.v_proj(hidden).view(5, -1, 16)
        wide = grouped.repeat_interleave(4 // grouped.shape[1], 1).flatten(1)
        torch.testing.assert_close(values.sum(1), output(wide))
        for head in range(4):
            own = attention.k_proj(hidden).view(5, -1, 16)[:, head * grouped.shape[1] // 4]
            torch.testing.assert_close(
                queries[:, head] @ keys[:, head].T, attention.q_proj(other).view(3, 4, 16)[:, head] @ own.T
            )
    assert keys.shape == (5, 4, 16)
    assert values.shape == (5, 4, 64)
    assert backbones.score_scale(attention) == 0.25


def test_projections_of_another_attention():
    with pytest.raises(uk.UnsupportedModelError, match=r"Linear: Config\(values='projected'\) looked for q_proj"):
        backbones.project_queries(nn.Linear(2, 2), torch.zeros(1, 2))


def test_device_of(make_model):
    model = make_model("opt")
    assert backbones.device_of(model) == torch.device("cpu")
    assert backbones.device_of(model.to("meta")) == torch.device("meta")
    accelerate = pytest.importorskip("accelerate")
    offloaded = accelerate.cpu_offload(make_model("opt"), execution_device=torch.device("cpu"))
    assert next(offloaded.parameters()).is_meta
    assert backbones.device_of(offloaded) == torch.device("cpu")
