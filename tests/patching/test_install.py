"""Patching, compared with plain forward hooks on the unpatched model, and what it must leave as it was.

The hooks compute in float64, token by token. OPT does too, up to about 1e-12. LLaMA's RMSNorm rounds to float32 inside,
2^-24 of its input, so whatever is added in another order before it may come out one step apart in each of 13 norms.
"""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from configs import every_token
from hooks_reference import Place
from hooks_reference import hooked as hooks_reference

import unike_kernels as uk
from unike_kernels.artifacts.edit import fresh_layer
from unike_kernels.artifacts.fingerprint import fingerprint
from unike_kernels.nn import MemoryAttention, MemoryShift, memory_attention

KINDS = ("opt", "llama", "blip2-opt", "blip2-llama")
PROMPTS = ["w1 w2 w3", "w4 w5 w6 w7 w8 w9", "w10 w11 w12 w13"]
BASE = {"k": 7, "values": "pre"}
PLAIN = every_token(**BASE)
TOLERANCE = {"opt": 1e-9, "llama": 3e-5}
ACT = {"relu": F.relu, "silu": F.silu}


def tolerance(kind):
    return TOLERANCE[kind.removeprefix("blip2-")]


def decoder_layers(model):
    text = getattr(model, "language_model", model)
    inner = text.model if hasattr(text, "model") else text
    return getattr(inner, "decoder", inner).layers


def hooked(model, mask, **what):
    """`hooks_reference.hooked` at the places of OPT's and LLaMA's layers."""
    places = []
    for layer in decoder_layers(model):
        first, last, act = (layer.fc1, layer.fc2, F.relu) if hasattr(layer, "fc1") else (layer.mlp, layer.mlp, F.silu)
        places.append(Place(layer.self_attn, first, last, act))
    return hooks_reference(places, mask, **what)


# --- helpers --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs, use_cache=False).logits


def modules(model):
    """The objects, their classes, and what they keep."""
    return {name: (id(m), type(m), set(vars(m))) for name, m in model.named_modules()}


def hooks(model):
    return {name: (len(m._forward_pre_hooks), len(m._forward_hooks)) for name, m in model.named_modules()}


class Setup:
    """A model with a memory and two edits."""

    def __init__(self, kind, model, memory, edits, inputs):
        self.kind, self.model, self.memory, self.edits, self.inputs = kind, model, memory, edits, inputs


@pytest.fixture
def setup(make_model, make_memory, make_edit, make_inputs):
    def make(kind="opt", config=None, dtype=torch.float32, gated=False, padding_side="left"):
        model = make_model(kind, dtype=dtype)
        memory = make_memory(model, config)
        edits = [
            make_edit(model, "a", memory, seed=2),
            make_edit(model, "b", memory, seed=3, gated=gated, layers=(3, 5), neurons=3),
        ]
        return Setup(kind, model, memory, edits, make_inputs(kind, PROMPTS, padding_side=padding_side, dtype=dtype))

    return make


# --- what it computes -----------------------------------------------------------------------------------------------

CONFIGS = {
    "default": {},
    "out": {"values": "out"},
    "projected": {"values": "projected", "scale": 0.5},
    "scale": {"scale": 1.0},
    "cosine": {"scale": "cosine", "tau": 0.2},
    "projected cosine": {"values": "projected", "scale": "cosine", "tau": 0.2},
    "eq7": {"convention": "eq7"},
    "norm none": {"norm": "none"},
    "fixed alpha": {"alpha": 0.4},
    "last": {"alpha": "last"},
    "sequence": {"retrieval": "sequence"},
    "sequence and last": {"retrieval": "sequence", "alpha": "last"},
    "answer": {"tokens": "answer"},
    "answer and last": {"tokens": "answer", "alpha": "last"},
}


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("kind", "gated"), [("opt", False), ("llama", True)])
def test_computes_what_the_hooks_compute(setup, kind, gated, name, padding_side):
    config = every_token(**{**BASE, **CONFIGS[name]})
    s = setup(kind, config, torch.float64, gated, padding_side)
    mask = s.inputs["attention_mask"].bool()
    lengths = [2, 4, 3]  # the prompt may end before the sequence does
    first = [int(row.nonzero()[0]) for row in mask]
    ends = [start + n - 1 for start, n in zip(first, lengths, strict=True)]
    a, b = s.edits
    with hooked(s.model, mask, edits=[[a], [], [b, a]], memory=s.memory, config=config, remembers=[1, 0, 1], ends=ends):
        wanted = logits(s.model, s.inputs)
    untouched = logits(s.model, s.inputs)
    with (
        uk.patched(s.model, s.edits, s.memory),
        uk.rows(s.model, [["a"], [], ["b", "a"]], memory=[True, False, True], prompt_lengths=lengths),
    ):
        found = logits(s.model, s.inputs)
    torch.testing.assert_close(found[mask], wanted[mask], atol=tolerance(kind), rtol=0)
    assert ((found - untouched)[mask].abs().amax() > 0.05) and torch.equal(found[1], untouched[1])


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "default"])
def test_every_switch_changes_the_output(setup, name):
    outputs = []
    for config in (PLAIN, every_token(**{**BASE, **CONFIGS[name]})):
        s = setup("opt", config, torch.float64)
        with uk.patched(s.model, memory=s.memory), uk.rows(s.model, prompt_lengths=[2, 4, 3]):
            outputs.append(logits(s.model, s.inputs))
    assert (outputs[0] - outputs[1]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_all_rows_use_everything_unless_told_otherwise(setup, kind):
    s = setup(kind, dtype=torch.float64)
    mask = s.inputs["attention_mask"].bool()
    with hooked(s.model, mask, edits=[s.edits] * 3, memory=s.memory, config=s.memory.config):
        wanted = logits(s.model, s.inputs)
    with uk.patched(s.model, s.edits, s.memory):
        found = logits(s.model, s.inputs)
    torch.testing.assert_close(found[mask], wanted[mask], atol=tolerance(kind), rtol=0)


def test_bfloat16(setup):
    """The same bits where nothing is edited; where something is, the exact result up to the model's own rounding."""
    s = setup("opt")
    exact_plain = logits(s.model, s.inputs)
    with uk.patched(s.model, s.edits, s.memory):
        exact = logits(s.model, s.inputs)
    s.model.bfloat16()
    plain = logits(s.model, s.inputs)
    mask = s.inputs["attention_mask"].bool()
    with pytest.warns(UserWarning, match="cast"):
        uk.patch(s.model, s.edits, s.memory)
    found = logits(s.model, s.inputs)
    with uk.rows(s.model, [["a", "b"], [], ["a", "b"]], memory=[True, False, True]):
        mixed = logits(s.model, s.inputs)
    assert found.dtype == torch.bfloat16
    assert torch.equal(mixed[1], plain[1])
    rounding = (plain - exact_plain)[mask].float().norm() / exact_plain[mask].norm()
    assert (found - exact)[mask].float().norm() / exact[mask].norm() < 4 * rounding


def test_a_fresh_edit_is_the_identity(make_model, make_edit, make_inputs):
    for kind, gated in (("opt", False), ("llama", False), ("llama", True)):
        model, inputs = make_model(kind), make_inputs(kind, PROMPTS)
        made = make_edit(model)
        layers = {i: fresh_layer(e.keys, e.key_bias, e.zeta, gated=gated) for i, e in made.layers.items()}
        before = logits(model, inputs)
        with uk.patched(model, [uk.Edit("new", layers, made.activation, made.config, made.base_model, None)]):
            assert torch.equal(logits(model, inputs), before)


@pytest.mark.parametrize("scale", [None, "cosine"])
def test_compiles_in_one_graph(setup, scale):
    s = setup("llama", every_token(**BASE, scale=scale), gated=True)
    with uk.patched(s.model, s.edits, s.memory), uk.rows(s.model, [["a"], [], ["b"]]):
        wanted = logits(s.model, s.inputs)
        torch._dynamo.reset()
        compiled = torch.compile(s.model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(logits(compiled, s.inputs), wanted)


@pytest.mark.parametrize("kind", ["llama", pytest.param("opt", marks=pytest.mark.slow)])
def test_generate_with_a_static_cache_compiles_in_one_graph(make_model, make_memory, make_edit, make_inputs, kind):
    """As it does by itself on a GPU: each token behind the prompt."""
    from transformers import CompileConfig

    model = make_model(kind)
    memory = make_memory(model, uk.Config(k=7, values="pre"))
    inputs, config = make_inputs(kind, PROMPTS), CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    config._compile_all_devices = True

    def generated(**how):
        return model.generate(**inputs, max_new_tokens=8, do_sample=False, **how)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    base = generated()
    with uk.patched(model, [make_edit(model, "a", memory), make_edit(model, "b", memory, seed=3)], memory):
        wanted = generated()
        found = generated(cache_implementation="static", compile_config=config)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch.equal(found, wanted) and not torch.equal(wanted, base)


# --- equality -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_patch_alone_changes_no_bit_and_no_name(setup, kind):
    s = setup(kind)
    before, state = logits(s.model, s.inputs), s.model.state_dict()
    with uk.patched(s.model):
        assert torch.equal(logits(s.model, s.inputs), before)
        found = s.model.state_dict()
        assert list(found) == list(state)
        assert all(found[name].data_ptr() == state[name].data_ptr() for name in state)
    with uk.patched(s.model, s.edits, s.memory):
        assert list(s.model.state_dict()) == list(state)


@pytest.mark.parametrize("kind", KINDS)
def test_unpatch_restores_objects_hooks_and_bits(setup, kind):
    s = setup(kind, every_token(**BASE, tokens="text") if kind.startswith("blip2") else None)
    before = logits(s.model, s.inputs), modules(s.model), hooks(s.model), set(s.model.__dict__)
    uk.patch(s.model, s.edits, s.memory)
    assert uk.is_patched(s.model)
    found = modules(s.model)
    assert found != before[1] and [m[0] for m in found.values()] == [m[0] for m in before[1].values()]
    assert not torch.equal(logits(s.model, s.inputs), before[0])
    assert uk.unpatch(s.model) is s.model
    assert not uk.is_patched(s.model)
    assert torch.equal(logits(s.model, s.inputs), before[0])
    assert (modules(s.model), hooks(s.model), set(s.model.__dict__)) == before[1:]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_independent_bit_for_bit(setup, kind):
    s = setup(kind)
    plain = logits(s.model, s.inputs)
    choices = [([["a"], [], ["b", "a"]], [1, 0, 1]), ([[], ["b"], ["b", "a"]], [0, 1, 1]), ([["a"], [], []], [1, 0, 0])]
    found = []
    with uk.patched(s.model, s.edits, s.memory):
        for edits, memory in choices:
            with uk.rows(s.model, edits, memory=[bool(m) for m in memory]):
                found.append(logits(s.model, s.inputs))
        everything = logits(s.model, s.inputs)
    for (edits, memory), rows in zip(choices, found, strict=True):
        for b in range(3):
            assert torch.equal(rows[b], plain[b]) == (not edits[b] and not memory[b])
    assert torch.equal(found[0][0], found[2][0])  # the others had edits and memory, then had none
    assert torch.equal(found[0][2], found[1][2])
    assert not torch.equal(everything[0], found[0][0])


def test_the_order_of_a_rows_ids_and_of_the_rows_counts(setup):
    """A row's own sum has the order of its list; float64 sums in two orders agree, other edits do not."""
    s = setup("opt", dtype=torch.float64)
    with uk.patched(s.model, s.edits, s.memory):
        found = []
        for edits in ([["a", "b"], ["a"], []], [["b", "a"], [], ["a"]]):
            with uk.rows(s.model, edits):
                found.append(logits(s.model, s.inputs))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-9, rtol=0)
    assert (found[0][1] - found[1][1]).abs().max() > 1e-3


def test_leaving_rows_restores_the_outer_selection(setup):
    s = setup("opt")
    uk.patch(s.model, s.edits, s.memory)
    everything = logits(s.model, s.inputs)
    with uk.rows(s.model, [["a"], [], []], memory=[True, False, False]):
        outer = logits(s.model, s.inputs)
        with uk.rows(s.model, [["b"]], memory=[False]):
            assert not torch.equal(logits(s.model, s.inputs), outer)
        with pytest.raises(KeyError), uk.rows(s.model, [["b"]], memory=[False]):
            raise KeyError
        assert torch.equal(logits(s.model, s.inputs), outer)
    assert torch.equal(logits(s.model, s.inputs), everything)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize(
    "config", [PLAIN, every_token(**BASE, retrieval="sequence", alpha=0.5)], ids=["token", "sequence"]
)
def test_padding_is_never_shifted(setup, monkeypatch, config, padding_side):
    s = setup("opt", config, padding_side=padding_side)
    seen = []
    shift = MemoryShift._shift
    monkeypatch.setattr(
        MemoryShift,
        "_shift",
        lambda self, *args: (seen.append((args[-1], shift(self, *args))), seen[-1])[1][1],
    )
    mask = s.inputs["attention_mask"].bool()
    with uk.patched(s.model, memory=s.memory), uk.rows(s.model, prompt_lengths=[3, 6, 4]):
        logits(s.model, s.inputs)
    assert len(seen) == 4
    for out, shifted in seen:
        assert torch.equal(shifted[~mask], out[~mask])
        assert (shifted != out)[mask].any()


# --- images ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS[2:])
def test_image_tokens_keep_their_bits_with_tokens_text(setup, kind):
    s = setup(kind, every_token(**BASE, tokens="text"), torch.float64)
    text = s.inputs["input_ids"] != 3
    mask = s.inputs["attention_mask"].bool()
    assert (~text).sum() == 12
    with hooked(s.model, mask & text, edits=[[]] * 3, memory=s.memory, config=s.memory.config):
        wanted = logits(s.model, s.inputs)
    with hooked(s.model, mask, edits=[[]] * 3, memory=s.memory, config=s.memory.config):
        other = logits(s.model, s.inputs)
    with uk.patched(s.model, memory=s.memory):
        found = logits(s.model, s.inputs)
    torch.testing.assert_close(found[mask], wanted[mask], atol=tolerance(kind), rtol=0)
    assert (other - wanted)[mask].abs().max() > 1e-3


def test_text_after_an_image_batch_of_the_same_shape_is_shifted(setup):
    """What was noted about one batch must not be applied to the next one."""
    s = setup("blip2-opt", every_token(**BASE, tokens="text"))
    words = s.inputs["input_ids"].clamp(min=4)
    text = {"input_ids": words, "attention_mask": s.inputs["attention_mask"]}
    with uk.patched(s.model, memory=s.memory):
        wanted = logits(s.model.language_model, text)
        logits(s.model, s.inputs)
        assert torch.equal(logits(s.model.language_model, text), wanted)


def test_tokens_text_needs_ids(setup):
    s = setup("blip2-opt", every_token(**BASE, tokens="text"))
    embedded = s.model.get_input_embeddings()(s.inputs["input_ids"]).detach()
    uk.patch(s.model, memory=s.memory)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"inputs_embeds: .*by input_ids"):
            s.model.language_model(inputs_embeds=embedded)
        logits(s.model, s.inputs)  # what is known about this batch says nothing about the next one


def test_tokens_text_needs_a_model_with_images(setup):
    s = setup("opt", every_token(**BASE, tokens="text"))
    before = modules(s.model)
    with pytest.raises(uk.UnsupportedModelError, match="image_token_id"):
        uk.patch(s.model, memory=s.memory)
    assert modules(s.model) == before
    assert not uk.is_patched(s.model)


# --- generation -----------------------------------------------------------------------------------------------------

GENERATION = [
    PLAIN,
    every_token(**BASE, retrieval="sequence", alpha="last"),
    every_token(**BASE, tokens="text"),
    every_token(**BASE, tokens="answer"),
]


def alone(s, row):
    """The prompt of one row, unpadded."""
    keep = s.inputs["attention_mask"][row].bool()
    one = {name: s.inputs[name][row : row + 1, keep] for name in ("input_ids", "attention_mask")}
    return one | {name: t[row : row + 1] for name, t in s.inputs.items() if name == "pixel_values"}


def extended(inputs, tokens):
    ids = torch.cat([inputs["input_ids"], torch.tensor([tokens], dtype=torch.int64)], 1)
    return inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


CASES = [
    pytest.param(kind, config, id=f"{kind}-{config.retrieval}-{config.alpha}-{config.tokens}")
    for kind in KINDS
    for config in GENERATION
    if config.tokens != "text" or kind.startswith("blip2")
]


@pytest.mark.parametrize(("kind", "config"), CASES)
def test_cached_padded_generation_is_uncached_unpadded_forward(setup, kind, config):
    """In float64 (float32 inside LLaMA's norms), where no two of the memory's entries are near a tie at rank k."""
    s = setup(kind, config, torch.float64)
    chosen = [["a"], [], ["b", "a"]]
    lengths = s.inputs["attention_mask"].sum(1).tolist()
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    start = s.inputs["input_ids"].shape[1]
    with uk.patched(s.model, s.edits, s.memory):
        with uk.rows(s.model, chosen, prompt_lengths=lengths):
            out = s.model.generate(**s.inputs, **settings, output_logits=True, return_dict_in_generate=True)
        for row in range(3):
            tokens = out.sequences[row, start:].tolist()
            with uk.rows(s.model, [chosen[row]], prompt_lengths=[lengths[row]]):
                whole = logits(s.model, extended(alone(s, row), tokens))[0]
            steps = torch.stack([step[row] for step in out.logits])
            # generate() hands the logits out in float32
            torch.testing.assert_close(steps, whole[-6:-1].float(), atol=tolerance(kind), rtol=2**-23)
            whole[:, 1] = float("-inf")  # no end before its time
            assert whole[-6:-1].argmax(-1).tolist() == tokens


@pytest.mark.parametrize(
    ("kind", "config"),
    [("opt", GENERATION[1]), ("llama", PLAIN), ("blip2-opt", GENERATION[2]), ("llama", GENERATION[3])],
)
def test_beams_score_what_the_forward_scores(setup, kind, config):
    """Each row's edits follow its beams: the reported score of a beam is its log-probability in one unpadded pass."""
    s = setup(kind, config, torch.float64)
    chosen = [["a"], [], ["b", "a"]]
    lengths = s.inputs["attention_mask"].sum(1).tolist()
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 3, "num_return_sequences": 2, "pad_token_id": 0}
    start = s.inputs["input_ids"].shape[1]
    with uk.patched(s.model, s.edits, s.memory):
        with uk.rows(s.model, chosen, prompt_lengths=lengths):
            out = s.model.generate(
                **s.inputs, **settings, do_sample=False, length_penalty=0.0, output_scores=True,
                return_dict_in_generate=True,
            )  # fmt: skip
        for n, (sequence, score) in enumerate(zip(out.sequences, out.sequences_scores, strict=True)):
            row, tokens = n // 2, sequence[start:].tolist()
            with uk.rows(s.model, [chosen[row]], prompt_lengths=[lengths[row]]):
                whole = logits(s.model, extended(alone(s, row), tokens))[0, -5:-1]
            log_probs = whole.log_softmax(-1)[torch.arange(4), tokens]
            # Beam search keeps its scores in float32.
            torch.testing.assert_close(score.double(), log_probs.sum(), atol=1e-5 + tolerance(kind), rtol=1e-6)


def test_generation_follows_the_rows_own_edits(setup):
    """The reference of the tests above is not blind: other edits, other logits."""
    s = setup("opt", dtype=torch.float64)
    with uk.patched(s.model, s.edits, s.memory):
        found = []
        for chosen in ([["a"]], [[]]):
            with uk.rows(s.model, chosen):
                found.append(logits(s.model, alone(s, 0)))
    assert (found[0] - found[1]).abs().max() > 0.05


def test_right_padding_is_no_padding(setup):
    s = setup("opt", every_token(**BASE, retrieval="sequence", alpha="last"), torch.float64, padding_side="right")
    lengths = s.inputs["attention_mask"].sum(1).tolist()
    with uk.patched(s.model, s.edits, s.memory):
        with uk.rows(s.model, prompt_lengths=lengths):
            padded = logits(s.model, s.inputs)
        for row, n in enumerate(lengths):
            with uk.rows(s.model, prompt_lengths=[n]):
                torch.testing.assert_close(padded[row, :n], logits(s.model, alone(s, row))[0], atol=1e-9, rtol=0)


# --- where the prompt ends ------------------------------------------------------------------------------------------

LAST = [every_token(**BASE, alpha="last"), every_token(**BASE, retrieval="sequence")]


@pytest.mark.parametrize("config", LAST, ids=["alpha", "retrieval"])
def test_prompt_lengths_are_asked_for(setup, config):
    s = setup("opt", config)
    uk.patch(s.model, memory=s.memory)
    with pytest.raises(ValueError, match=r"inside uk.rows\(model, prompt_lengths"):
        logits(s.model, s.inputs)
    with uk.rows(s.model, prompt_lengths=[3, 7, 4]), pytest.raises(ValueError, match=r"prompts of \[3, 7, 4\] tokens"):
        logits(s.model, s.inputs)
    with pytest.raises(ValueError, match="prompt_lengths: expected integers of at least 1"):
        uk.rows(s.model, prompt_lengths=[3, 0, 4]).__enter__()
    assert s.model._unike.context.selections.blocks == []


def test_answers_alone_are_asked_for_where_they_begin(setup):
    s = setup("opt", every_token(**BASE, tokens="answer"))
    uk.patch(s.model, memory=s.memory)
    with pytest.raises(ValueError, match=r"prompt's end \(tokens='answer'\): call the model inside uk.rows"):
        logits(s.model, s.inputs)


def test_a_prompt_in_chunks_where_answers_alone_are_shifted(setup):
    s = setup("opt", every_token(**BASE, tokens="answer"), torch.float64)
    one = {name: t[1:2] for name, t in s.inputs.items()}
    with torch.no_grad(), uk.patched(s.model, memory=s.memory), uk.rows(s.model, prompt_lengths=[4]):
        whole = logits(s.model, one)
        ids, found, cache = one["input_ids"], [], None
        for chunk in (slice(0, 2), slice(2, 5), slice(5, 6)):
            out = s.model(input_ids=ids[:, chunk], past_key_values=cache, use_cache=True)
            found.append(out.logits)
            cache = out.past_key_values
    torch.testing.assert_close(torch.cat(found, 1), whole, atol=1e-9, rtol=0)


def test_prompt_in_two_chunks_is_refused(setup):
    s = setup("opt", LAST[0])
    one = {name: t[1:2] for name, t in s.inputs.items()}
    with torch.no_grad(), uk.patched(s.model, memory=s.memory), uk.rows(s.model, prompt_lengths=[6]):
        with pytest.raises(ValueError, match="whole prompt must come in one forward pass"):
            s.model(input_ids=one["input_ids"][:, :3])
        cache = s.model.model(input_ids=one["input_ids"], use_cache=True).past_key_values
        s.model(input_ids=one["input_ids"][:, :1], past_key_values=cache)
        unknown = copy.deepcopy(cache)
        with uk.rows(s.model, prompt_lengths=[6]), pytest.raises(ValueError, match="start with the prompt"):
            s.model(input_ids=one["input_ids"][:, :1], past_key_values=unknown)


def test_prepared_mask_is_refused_where_it_would_hide_the_prompts_end(setup):
    s = setup("opt", LAST[0])
    s.inputs["attention_mask"] = torch.zeros(3, 1, 6, 6)
    uk.patch(s.model, memory=s.memory)
    with (
        uk.rows(s.model, prompt_lengths=[3, 6, 4]),
        pytest.raises(ValueError, match=r"attention_mask: .*prompt's end"),
    ):
        s.model.model.decoder(**s.inputs, position_ids=torch.arange(6)[None])


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_retrieval_does_not_see_the_target(setup, monkeypatch, padding_side):
    """With the target in the batch, as in training, what is retrieved and the gate depend on the prompt alone."""
    s = setup("opt", every_token(**BASE, retrieval="sequence", alpha="last"), padding_side=padding_side)
    lengths = [2, 4, 3]
    retrieved = []
    retrieve = memory_attention.MemoryTables.retrieve

    def spy(tables, *args):
        retrieved.append(retrieve(tables, *args))
        return retrieved[-1]

    monkeypatch.setattr(memory_attention.MemoryTables, "retrieve", spy)
    mask = s.inputs["attention_mask"].bool()
    target = mask & (mask.cumsum(1) > torch.tensor(lengths)[:, None])
    other = dict(s.inputs, input_ids=s.inputs["input_ids"].masked_fill(target, 40))
    with uk.patched(s.model, memory=s.memory), uk.rows(s.model, prompt_lengths=lengths):
        first, second = logits(s.model, s.inputs), logits(s.model, other)
    prompt = mask & ~target
    assert torch.equal(first[prompt], second[prompt])
    assert not torch.equal(first[target], second[target])
    assert len(retrieved) == 8
    for one, two in zip(retrieved[:4], retrieved[4:], strict=True):
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])
    assert retrieved[0][1].unique().numel() > 7  # the rows do not all retrieve the same


# --- copies ---------------------------------------------------------------------------------------------------------


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch])
@pytest.mark.parametrize("kind", ["opt", "blip2-llama"])
def test_a_copy_is_patched_and_independent(setup, kind, copied):
    config = every_token(k=7, values="projected", tokens="text" if kind != "opt" else "all")
    s = setup(kind, config)
    plain = logits(s.model, s.inputs)
    uk.patch(s.model, s.edits, s.memory)
    wanted = logits(s.model, s.inputs)
    twin = copied(s.model)
    assert torch.equal(logits(twin, s.inputs), wanted)
    with uk.rows(twin, [[], [], []], memory=[False] * 3):
        assert torch.equal(logits(twin, s.inputs), plain)
        assert torch.equal(logits(s.model, s.inputs), wanted)
    uk.unpatch(twin)
    assert torch.equal(logits(twin, s.inputs), plain)
    assert torch.equal(logits(s.model, s.inputs), wanted)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert torch.equal(logits(s.model, s.inputs), wanted)


def test_mode_dtype_and_loaded_weights_reach_the_originals(setup, make_model):
    s = setup("opt")
    untouched = [id(m) for m in s.model.modules()]
    uk.patch(s.model)
    s.model.train().double()
    other = make_model("opt", seed=5, dtype=torch.float64)
    s.model.load_state_dict(other.state_dict())
    with torch.no_grad():
        for p in (*s.model.parameters(), *other.parameters()):
            p.mul_(1.5)
    uk.unpatch(s.model)
    assert [id(m) for m in s.model.modules()] == untouched
    assert all(m.training for m in s.model.modules())
    assert torch.equal(logits(s.model, s.inputs), logits(other.train(), s.inputs))


def test_an_offloaded_model_is_edited_where_it_computes(setup):
    accelerate = pytest.importorskip("accelerate")
    s = setup("opt", every_token(**BASE, alpha="last"))
    with uk.patched(s.model, s.edits, s.memory), uk.rows(s.model, prompt_lengths=[3, 6, 4]):
        wanted = logits(s.model, s.inputs)
    accelerate.cpu_offload(s.model, execution_device=torch.device("cpu"))
    assert next(s.model.parameters()).is_meta
    with pytest.warns(UserWarning, match="no weight could be compared"):
        uk.patch(s.model, s.edits, s.memory)
    with uk.rows(s.model, prompt_lengths=[3, 6, 4]):
        assert torch.equal(logits(s.model, s.inputs), wanted)
    uk.unpatch(s.model)


# --- misuse ---------------------------------------------------------------------------------------------------------


def test_patching_twice(setup):
    s = setup("opt")
    before = modules(s.model)
    uk.patch(s.model, s.edits[:1], s.memory)
    first = logits(s.model, s.inputs)
    with pytest.raises(uk.PatchError, match=r"patched already.*replace=True"):
        uk.patch(s.model, s.edits, s.memory)
    assert torch.equal(logits(s.model, s.inputs), first)
    uk.patch(s.model, s.edits, s.memory, replace=True)
    found = logits(s.model, s.inputs)
    uk.unpatch(s.model)
    assert modules(s.model) == before
    with uk.patched(s.model, s.edits, s.memory):
        assert torch.equal(logits(s.model, s.inputs), found)
    assert not torch.equal(found, first)


def test_part_of_a_patched_model(setup):
    s = setup("blip2-opt")
    uk.patch(s.model)
    for replace in (False, True):
        with pytest.raises(uk.PatchError, match="part of OPTForCausalLM was patched"):
            uk.patch(s.model.language_model, replace=replace)
    uk.unpatch(s.model)
    with uk.patched(s.model.language_model):
        assert not uk.is_patched(s.model)


def other_config(s):
    return {"edits": s.edits, "memory": s.memory, "config": every_token(k=8, values="pre")}


def changed(edit, **values):
    return uk.Edit(**{**vars(edit), **values})


def narrow(edit, width):
    """The edit with its tensors cut to another hidden size."""
    layers = {
        i: uk.EditLayer(e.keys[:, :width], e.key_bias, e.values[:, :width], e.zeta[:width], e.beta)
        for i, e in edit.layers.items()
    }
    return changed(edit, layers=layers)


WRONG = {
    "not an edit": (lambda s: {"edits": ["a"]}, TypeError, "edits: expected a sequence of Edit, got str"),
    "not a memory": (lambda s: {"memory": "m"}, TypeError, "memory: expected a MemoryBank, got str"),
    "one id twice": (
        lambda s: {"edits": [s.edits[0], s.edits[0]], "memory": s.memory},
        uk.PatchError,
        r"distinct ids, got \['a', 'a'\]",
    ),
    "unknown layer": (lambda s: {"layers": [1, 6]}, ValueError, r"layers: expected indices in 0..5, got \[1, 6\]"),
    "negative layer": (lambda s: {"layers": [-1]}, ValueError, r"layers: expected indices in 0..5, got \[-1\]"),
    "no layer": (lambda s: {"layers": []}, ValueError, r"layers: expected indices in 0..5, got \[\]"),
    "memory left out": (
        lambda s: {"edits": s.edits},
        uk.MismatchError,
        "edit 'a': it was trained with the memory .*, this one is None.*override=True",
    ),
    "other config": (other_config, uk.MismatchError, r"edit 'a': its Config differs \(k: 8 != 7\)"),
    "layer beyond the model": (
        lambda s: {"edits": [changed(s.edits[0], layers={6: s.edits[0].layers[2]}, memory_id=None)]},
        uk.MismatchError,
        r"edit 'a': it names the layers \[6\], the model has 6",
    ),
    "other hidden size": (
        lambda s: {"edits": [narrow(s.edits[0], 32)], "memory": s.memory},
        uk.MismatchError,
        "edit 'a': its hidden size is 32, the model's 64",
    ),
    "other activation": (
        lambda s: {"edits": [changed(s.edits[0], activation="gelu")], "memory": s.memory},
        uk.MismatchError,
        "edit 'a': it is for gelu FFNs, the model's are relu",
    ),
    "other model": (
        lambda s: {"edits": [changed(s.edits[0], base_model=s.other, memory_id=None)]},
        uk.MismatchError,
        "edit 'a': it was made for other weights",
    ),
}


@pytest.mark.parametrize("patched_before", [False, True], ids=["patch", "replace"])
@pytest.mark.parametrize("name", WRONG)
def test_a_refused_patch_leaves_the_model_as_it_was(setup, make_model, name, patched_before):
    arguments, error, message = WRONG[name]
    s = setup("opt")
    s.other = fingerprint(make_model("opt", seed=9))
    if patched_before:
        uk.patch(s.model, s.edits, s.memory)
    before = modules(s.model), hooks(s.model), logits(s.model, s.inputs)
    with pytest.raises(error, match=message):
        uk.patch(s.model, replace=True, **arguments(s))
    assert (modules(s.model), hooks(s.model)) == before[:2]
    assert torch.equal(logits(s.model, s.inputs), before[2])
    assert uk.is_patched(s.model) == patched_before


@pytest.mark.parametrize("patched_before", [False, True], ids=["patch", "replace"])
def test_a_patch_that_fails_midway_leaves_the_model_as_it_was(setup, monkeypatch, patched_before):
    s = setup("opt")
    if patched_before:
        uk.patch(s.model, s.edits, s.memory)
    before = modules(s.model), hooks(s.model), logits(s.model, s.inputs)
    make = MemoryAttention.from_module

    def failing(*args, layer, **kwargs):
        if layer == 4:
            raise MemoryError
        return make(*args, layer=layer, **kwargs)

    monkeypatch.setattr(MemoryAttention, "from_module", failing)
    with pytest.raises(MemoryError):
        uk.patch(s.model, s.edits, s.memory, replace=True)
    assert (modules(s.model), hooks(s.model)) == before[:2]
    assert torch.equal(logits(s.model, s.inputs), before[2])
    assert uk.is_patched(s.model) == patched_before


@pytest.mark.parametrize("name", ["memory left out", "other config", "other model"])
def test_override_accepts_what_does_not_belong(setup, make_model, name):
    s = setup("opt")
    s.other = fingerprint(make_model("opt", seed=9))
    before = logits(s.model, s.inputs)
    with uk.patched(s.model, override=True, **WRONG[name][0](s)):
        assert not torch.equal(logits(s.model, s.inputs), before)


def test_memory_of_another_model(setup, make_model):
    s = setup("opt")
    with pytest.raises(uk.MismatchError, match=f"memory {s.memory.id}: it was made for other weights"):
        uk.patch(make_model("opt", seed=9), memory=s.memory)
    with pytest.raises(uk.MismatchError, match="made for model_type 'opt', this model has 'llama'"):
        uk.patch(make_model("llama"), memory=s.memory)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"edits": [["a"], ["c"], []]},
            uk.PatchError,
            r"edits\[1\]: unknown edit ids \['c'\]; the model has \['a', 'b'\]",
        ),
        ({"edits": ["a", "b", "a"]}, TypeError, r"edits\[0\]: expected a list of edit ids, got the string 'a'"),
        ({"edits": [["a", "a"], [], []]}, ValueError, r"edits\[0\]: expected distinct ids"),
        ({"edits": []}, ValueError, "one entry per row in each argument, got {'edits': 0}"),
        ({"edits": [[]], "memory": [True, False]}, ValueError, "got {'edits': 1, 'memory': 2}"),
        ({"edits": [[], []]}, ValueError, "rows: 2 edit sets were given, the batch has 3 rows"),
    ],
)
def test_wrong_rows(setup, arguments, error, message):
    s = setup("opt")
    uk.patch(s.model, s.edits, s.memory)
    wanted = logits(s.model, s.inputs)
    with pytest.raises(error, match=message), uk.rows(s.model, **arguments):
        logits(s.model, s.inputs)
    assert torch.equal(logits(s.model, s.inputs), wanted)


def test_what_needs_a_patched_model(make_model):
    model = make_model("opt")
    with pytest.raises(uk.PatchError, match="OPTForCausalLM is not patched"):
        uk.unpatch(model)
    with pytest.raises(uk.PatchError, match="is not patched"), uk.rows(model, [[]]):
        pass


def test_patched_unpatches_when_the_block_raises(setup):
    s = setup("opt")
    with pytest.raises(KeyError), uk.patched(s.model, s.edits, s.memory):
        raise KeyError
    assert not uk.is_patched(s.model)


def test_report_prints_as_a_table(setup):
    s = setup("opt")
    report = uk.patch(s.model, s.edits, s.memory, layers=[0])
    numbers = {2: (5, 50), 3: (8, 50), 4: (5, 50), 5: (8, 50), 0: (0, 0)}
    assert report.layers == tuple((i, "fc1 + activation_fn + fc2", "self_attn", *numbers[i]) for i in (0, 2, 3, 4, 5))
    lines = str(report).splitlines()
    assert lines[0] == "OPTForCausalLM: patched 5 layers of model.decoder"
    assert lines[1] == f"  edits: a, b; memory: {s.memory.id}; {report.nbytes:,} bytes"
    assert lines[2].split() == ["layer", "FFN", "attention", "neurons", "entries"]
    assert lines[4].split() == ["2", "fc1", "+", "activation_fn", "+", "fc2", "self_attn", "5", "50"]
    # index, keys, projected keys, Enc_sem, and the codes of the index with four numbers each and a direction, of four
    # layers, and the bounds of all entries; 26 neurons, each of two vectors and a bias, zeta' and beta of six edits.
    floats = 4 * (50 * (2 * 64 + 16 + 4) + 2 * 16 * 64 + 16 + 2 * 64) + 26 * (2 * 64 + 1) + 6 * 65
    assert report.nbytes == 4 * floats + 4 * 50 * 64 + 4 * 2 * 8
    assert "edits: none; memory: none; 0 bytes" in str(uk.patch(s.model, replace=True))


def test_prompt_lengths_of_other_libraries(make_model, make_memory):
    """A tensor, or integers that are not Python's."""
    import numpy as np

    model = make_model("llama")
    memory, ids = make_memory(model, every_token(k=7, tokens="answer")), torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    found = []
    with torch.no_grad(), uk.patched(model, memory=memory):
        for lengths in ([2, 3], torch.tensor([2, 3]), np.array([2, 3])):
            with uk.rows(model, prompt_lengths=lengths):
                found.append(model(input_ids=ids, use_cache=False).logits)
        for wrong in (torch.tensor([2.0, 3.0]), torch.tensor([True, True]), [0, 1], ["a", 2]):
            with pytest.raises(ValueError, match="prompt_lengths: expected integers of at least 1, got"):
                uk.rows(model, prompt_lengths=wrong).__enter__()
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_an_unknown_base(make_model):
    with pytest.raises(ValueError, match="base: expected 'vendor' or 'fused', got 'mine'"):
        uk.patch(make_model("llama"), base="mine")
