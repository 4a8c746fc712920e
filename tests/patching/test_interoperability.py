"""What people do to a model, done to a patched one: a gated and an ungated model, edits and a memory in force.

`whole` is one pass over all tokens without a cache, which tests/test_patching.py compares with plain hooks.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import transformers
from backbones.zoo import ZOO, places, skip_if_not_batched
from hooks_reference import hooked
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

import unike_kernels as uk

KINDS = ("opt", "llama")
PROMPTS = [[7, 8, 9, 10, 11, 12], [13, 14, 15, 16, 17, 18]]
IDS = torch.tensor(PROMPTS)
NEW = 6


@pytest.fixture(params=KINDS)
def setup(request, make_model, make_edit, make_memory):
    """kind, model, edits and memory; not patched."""
    model = make_model(request.param)
    memory = make_memory(model)
    edits = [make_edit(model, "a", memory), make_edit(model, "b", memory, gated=request.param == "llama", seed=3)]
    return request.param, model, edits, memory


@pytest.fixture
def patched(setup):
    _, model, edits, memory = setup
    uk.patch(model, edits, memory)
    return model


@torch.no_grad()
def whole(model, ids=IDS, **more):
    return model(input_ids=ids, use_cache=False, **more).logits


def greedy(model, ids=IDS):
    """By whole passes."""
    for _ in range(NEW):
        ids = torch.cat([ids, whole(model, ids)[:, -1:].argmax(-1)], 1)
    return ids


def generate(model, **more):
    usual = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.generate(input_ids=IDS, **usual | more)


# --- generation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 2}],
    ids=["dynamic cache", "static cache", "chunked prefill"],
)
def test_greedy_generation(patched, how):
    assert torch.equal(generate(patched, eos_token_id=None, **how), greedy(patched))


def test_assisted_generation(setup):
    """A draft by the unpatched model, several tokens of which are verified in one pass."""
    _, model, edits, memory = setup
    assistant = copy.deepcopy(model)
    uk.patch(model, edits, memory)
    wanted = greedy(model, IDS[:1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = model.generate(
            input_ids=IDS[:1], assistant_model=assistant, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
            pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
    assert torch.equal(found, wanted)


def test_sampling(patched):
    """The same draws from the same distributions, with a cache and without."""

    def drawn(**how):
        torch.manual_seed(0)
        return generate(patched, do_sample=True, temperature=1.3, top_k=0, eos_token_id=None, **how)

    assert torch.equal(drawn(), drawn(use_cache=False))


def test_continuous_batching(patched):
    skip_if_not_batched(patched.config.model_type)
    settings = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    wanted = [greedy(patched, IDS[:1])[0, len(PROMPTS[0]) :], greedy(patched, IDS[1:])[0, len(PROMPTS[1]) :]]
    # Without a size the cache takes most of the machine's memory, which is then also filled.
    small = transformers.ContinuousBatchingConfig(page_size=16, num_blocks=64, max_batch_tokens=64)
    found = patched.generate_batch(
        inputs=PROMPTS, generation_config=settings, continuous_batching_config=small, progress_bar=False
    )
    assert [list(result.generated_tokens) for result in found.values()] == [t.tolist() for t in wanted]


def test_packed_sequences(patched):
    """Two sequences in one row, told apart by their positions."""
    if patched.config.model_type == "opt":
        pytest.skip("OPT has learned positions and no packing")
    packed = IDS.reshape(1, -1)
    positions = torch.arange(IDS.shape[1]).repeat(1, 2)
    found = whole(patched, packed, position_ids=positions)
    torch.testing.assert_close(found.reshape(2, IDS.shape[1], -1), whole(patched), rtol=1e-4, atol=1e-4)


# --- compilers, training ---------------------------------------------------------------------------------------------


def test_export(patched):
    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = patched

        def forward(self, ids):
            return self.model(input_ids=ids, use_cache=False).logits

    with torch.no_grad():
        program = torch.export.export(Logits(), (IDS,), strict=False)
        torch.testing.assert_close(program.module()(IDS), whole(patched), rtol=1e-5, atol=1e-5)


def test_gradient_checkpointing(setup):
    _, model, edits, memory = setup
    model.requires_grad_(False)

    def gradients():
        parts = {n: t.requires_grad_() for n, t in edits[0].layers[4].tensors().items()}
        with uk.patched(model, edits[:1], memory):
            model.train()
            model(input_ids=IDS, use_cache=False).logits.square().sum().backward()
        found = {n: t.grad for n, t in parts.items()}
        for t in parts.values():
            t.grad = None
        return found

    wanted = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for name, grad in gradients().items():
        torch.testing.assert_close(grad, wanted[name])
        assert grad.any()


# --- other weights ---------------------------------------------------------------------------------------------------


def assert_hooked(model, setup, tolerance):
    """Patched, the model computes what plain hooks make of it."""
    kind, base, edits, memory = setup
    with hooked(
        places(base, ZOO[kind]), torch.ones_like(IDS, dtype=torch.bool), edits=[edits] * 2, memory=memory,
        config=memory.config,
    ):  # fmt: skip
        wanted = whole(model)
    unpatched = whole(model)
    with uk.patched(model, edits, memory, override=True):
        found = whole(model)
    scale = float(wanted.abs().max())
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * scale)
    assert float((found - unpatched).abs().max()) > 20 * tolerance * scale
    assert torch.equal(whole(model), unpatched)


def test_float16(setup):
    """The same bits where nothing is edited; where something is, the exact result up to the model's own rounding."""
    _, model, edits, memory = setup
    with uk.patched(model, edits, memory):
        exact = whole(model)
    plain_exact = whole(model)
    model.half()
    plain = whole(model)
    with pytest.warns(UserWarning, match="cast"):
        uk.patch(model, edits, memory)
    found = whole(model)
    with uk.rows(model, [["a"], []], memory=[True, False]):
        assert torch.equal(whole(model)[1], plain[1])
    rounding = (plain - plain_exact).float().norm() / plain_exact.norm()
    assert found.dtype == torch.float16
    assert (found - exact).float().norm() / exact.norm() < 4 * rounding


def test_peft_adapters(setup, tmp_path):
    peft = pytest.importorskip("peft")
    kind, base, edits, memory = setup
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    adapted.eval()
    adapted.save_pretrained(tmp_path / "unpatched")
    assert_hooked(adapted, (kind, base, edits, memory), 1e-5)
    with uk.patched(adapted, edits, memory, override=True):
        adapted.save_pretrained(tmp_path / "patched")
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("unpatched", "patched"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_torchao_int8_weights(setup):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(setup[1], Int8WeightOnlyConfig())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the fingerprint tells that the weights are others
        assert_hooked(setup[1], setup, 1e-4)


@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes_weights(setup, bits):
    bnb = pytest.importorskip("bitsandbytes")
    model = setup[1]
    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and name != "lm_head":
            bias = module.bias is not None
            if bits == 8:
                new = bnb.nn.Linear8bitLt(module.in_features, module.out_features, bias, has_fp16_weights=False)
            else:
                new = bnb.nn.Linear4bit(module.in_features, module.out_features, bias, quant_type="nf4")
            new.load_state_dict(module.state_dict())
            holder, _, own = name.rpartition(".")
            setattr(model.get_submodule(holder), own, new.to("cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_hooked(model, setup, 1e-3)


def test_disk_offload(setup, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    _, model, edits, memory = setup
    with uk.patched(model, edits, memory):
        wanted = whole(model)
    accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert next(model.parameters()).is_meta
    uk.patch(model, edits, memory, override=True)
    torch.testing.assert_close(whole(model), wanted, rtol=1e-5, atol=1e-5)


# --- files and outputs -----------------------------------------------------------------------------------------------


def test_save_pretrained_saves_the_base_model(setup, patched, tmp_path):
    patched.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(whole(loaded), whole(uk.unpatch(patched)))


def test_hidden_states_and_attentions(patched):
    patched.set_attn_implementation("eager")
    with torch.no_grad():
        out = patched(input_ids=IDS, use_cache=False, output_hidden_states=True, output_attentions=True)
    layers = patched.config.num_hidden_layers
    assert len(out.hidden_states) == layers + 1
    assert [tuple(a.shape) for a in out.attentions] == [(2, 4, 6, 6)] * layers
    torch.testing.assert_close(out.logits, whole(patched))
    torch.testing.assert_close(torch.stack(out.attentions).sum(-1), torch.ones(layers, 2, 4, 6))
