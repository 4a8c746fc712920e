"""From triplets to a memory: each variant's tables hold what was extracted."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from configs import every_token

import unike_kernels as uk
from unike_kernels.backbones import find_decoder
from unike_kernels.ops.latent_attention import reference
from unike_kernels.training import (
    EditTraining,
    EncoderTraining,
    Sample,
    Triplet,
    build_memory,
    extend_memory,
    extract,
    train_edit,
)
from unike_kernels.training.build_memory import _stored
from unike_kernels.training.samples import encode, forward

TRIPLETS = [Triplet(f"w{i} w{i + 9}", f"w{i + 18}", f"w{i + 1} w{i + 5}") for i in range(12)]
SHORT = EncoderTraining(lr=1e-3, steps=60)


def build(model, processor, triplets=TRIPLETS, **kwargs):
    return build_memory(model, processor, triplets, training=SHORT, progress=False, **kwargs)


@pytest.mark.parametrize("values", ["pre", "out", "projected"])
@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_tables(make_model, processor, kind, values, tmp_path):
    model = make_model(kind)
    result = build(model, processor, config=every_token(k=5, values=values), layers=[1, 4])
    hidden = extract(model, processor, TRIPLETS, layers=[1, 4], progress=False)
    assert list(result.memory.layers) == [1, 4]
    for i, m in result.memory.layers.items():
        h = hidden[i]
        assert torch.equal(m.index, h.sem_pre)
        attention = find_decoder(model).layers[i].module.self_attn
        with torch.no_grad():
            if values == "pre":
                assert m.values is None
                assert torch.equal(m.keys[:, 0], h.pos_pre)
                assert result.memory.config.scale is None
            elif values == "out":
                assert torch.equal(m.keys[:, 0], h.pos_pre)
                assert torch.equal(m.values[:, 0], h.pos_out)
            else:
                keys = attention.k_proj(h.pos_pre).view(12, -1, 16)
                torch.testing.assert_close(m.keys, keys.repeat_interleave(4 // keys.shape[1], 1))
                assert m.values.shape == (12, 4, 64)
                assert result.memory.config.scale == 1 / math.sqrt(16)
        # Whatever the values, zeta' steers the FFN, whose input is of the kind of the attention's input.
        assert F.cosine_similarity(m.zeta_prime, (h.pos_pre - h.neg_pre).mean(0), dim=0) > 0.9
        torch.testing.assert_close(m.zeta_prime, result.spaces[i].w_zeta @ m.zeta)
    result.memory.save(tmp_path / "m")
    assert uk.MemoryBank.load(tmp_path / "m").id == result.memory.id
    uk.patch(model, memory=result.memory)


@pytest.mark.parametrize("values", ["pre", "projected"])
def test_a_memory_is_stored_in_the_dtype_of_its_model(make_model, processor, values, tmp_path):
    """Nothing of the states is lost, so a memory that holds the same numbers in float32 retrieves the same entries."""
    model = make_model("llama", dtype=torch.bfloat16)
    memory = build(model, processor, config=uk.Config(k=5, values=values), layers=[1, 4]).memory
    assert memory.notes["dtype"] == "bfloat16"
    hidden = extract(model, processor, TRIPLETS, layers=[1, 4], progress=False)
    for i, m in memory.layers.items():
        assert torch.equal(m.index.float(), hidden[i].sem_pre)
        kinds = {name: t.dtype for name, t in m.tensors().items()}
        assert {kinds.pop("zeta"), kinds.pop("zeta_prime")} == {torch.float32}
        assert set(kinds.values()) == {torch.bfloat16}
    memory.save(tmp_path / "m")
    loaded = uk.MemoryBank.load(tmp_path / "m")
    assert loaded.id == memory.id
    assert all(t.dtype == memory.layers[4].tensors()[name].dtype for name, t in loaded.layers[4].tensors().items())

    wide = {
        i: uk.MemoryLayer(
            m.index.float(), m.keys.float(), None if m.values is None else m.values.float(),
            type(m.encoder)(*(t.float() for t in m.encoder)), m.zeta, m.zeta_prime,
        )
        for i, m in memory.layers.items()
    }  # fmt: skip
    older = dataclasses.replace(memory, layers=wide)
    batch = encode(processor, [Sample(t.prompt, t.positive) for t in TRIPLETS], torch.device("cpu"))
    traces, logits = [], []
    for bank in (loaded, older):
        with uk.patched(model, memory=bank), uk.explain(model) as trace, torch.no_grad():
            logits.append(model(**batch.inputs).logits.float())
        traces.append(trace.passes[0][1])  # of the first layer: behind it, states differ
    assert torch.equal(traces[0].entries, traces[1].entries) and torch.equal(traces[0].scores, traces[1].scores)
    with torch.no_grad():
        shift = (logits[0] - model(**batch.inputs).logits.float()).abs().max()
    assert (logits[0] - logits[1]).abs().max() < 0.1 * shift


def test_a_table_that_its_models_dtype_does_not_hold_stays_as_it_is():
    exact, more = torch.tensor([[0.5, -3.0]]), torch.tensor([[1 / 3, 1e20]])
    assert _stored(exact, torch.float16).dtype == torch.float16
    assert _stored(more, torch.float16) is more and _stored(more, torch.float32) is more


PHRASES = [Triplet(t.prompt, f"{t.positive} w{i}", t.negative) for i, t in enumerate(TRIPLETS)]


def test_tables_of_values_in_context(make_model, processor, tmp_path):
    """An entry for each token of the answers; keys are the plain states, values those with the knowledge in front."""
    model, config = make_model("llama"), every_token(k=5, values="context", scale="cosine", tokens="answer")
    result = build(model, processor, PHRASES[:9], config=config, layers=[1, 2, 3, 4, 5])
    hidden = extract(model, processor, PHRASES[:9], layers=[1, 4], context=True, progress=False)
    assert len(result.memory) == 18 and result.memory.notes["triplets"] == "9"
    for i, h in hidden.items():
        m = result.memory.layers[i]
        assert torch.equal(m.index, h.sem_pre) and torch.equal(m.keys[:, 0], h.sem_pre)
        assert torch.equal(m.values[:, 0], h.pos_out)
        # The gate compares Enc_sem(value) with the output at the same place.
        anchors = F.normalize(h.sem_out, dim=-1)
        seen = F.normalize(reference.encode(m.encoder, h.pos_out), dim=-1)
        own = (anchors @ seen.T).softmax(-1).diagonal()
        assert own.mean() > 1.2 / 18
    extended = extend_memory(model, processor, result.memory, PHRASES[9:], progress=False)
    assert len(extended) == 24 and extended.config == config
    extended.save(tmp_path / "m")
    assert uk.MemoryBank.load(tmp_path / "m").id == extended.id
    assert extended.texts == tuple(t.text for t in PHRASES for _ in range(2))
    joined = uk.MemoryBank.joined({"acme": result.memory, "globex": extended})
    assert joined.entries("globex") == range(18, 42) and joined.texts == result.memory.texts + extended.texts


def test_pictures_of_its_entries(make_model, processor):
    model, g = make_model("blip2-opt"), torch.Generator().manual_seed(0)
    images = [torch.rand(16, 16, generator=g) for _ in range(3)]
    triplets = [Triplet(t.prompt, t.positive, t.negative, images[i % 3]) for i, t in enumerate(TRIPLETS)]
    made = build(model, processor, triplets, layers=[3]).memory
    assert made.pictures.of.tolist() == [i % 3 for i in range(len(TRIPLETS))] and len(made.pictures.pixels) == 3
    silent = build(model, processor, triplets, layers=[3], keep_texts=False).memory
    assert silent.pictures is None and silent.id == made.id
    more = extend_memory(model, processor, made, triplets[1:2], progress=False).pictures
    assert torch.equal(more[len(TRIPLETS)], made.pictures[1])
    less = extend_memory(model, processor, made, triplets[1:2], keep_texts=False, progress=False).pictures
    assert less[len(TRIPLETS)] is None and torch.equal(less[0], made.pictures[0])


def test_texts_of_its_entries(make_model, processor):
    model = make_model("llama")
    assert TRIPLETS[1].text == "w1 w10 -> w19, not w2 w6"
    asked = [{"role": "user", "content": "What\n is it?"}]
    assert Triplet(messages=asked, positive="a", negative="b").text == "What is it? -> a, not b"
    made = build(model, processor, layers=[3]).memory
    silent = build(model, processor, layers=[3], keep_texts=False).memory
    assert made.texts == tuple(t.text for t in TRIPLETS) and silent.texts is None and silent.id == made.id
    told = extend_memory(model, processor, silent, TRIPLETS[:1], progress=False)
    assert told.texts == (*("",) * 12, TRIPLETS[0].text)
    assert extend_memory(model, processor, made, TRIPLETS[:1], keep_texts=False, progress=False).texts == (
        *made.texts,
        "",
    )
    assert extend_memory(model, processor, silent, TRIPLETS[:1], keep_texts=False, progress=False).texts is None


def test_a_memory_in_more_layers_than_the_edit(make_model, processor, tmp_path):
    """It is active below the neurons while they are trained, as it is afterwards; artifacts fit, and swap."""
    model, config = (
        make_model("llama"),
        every_token(k=5, values="context", scale="cosine", tokens="answer", alpha=0.5, beta=0),
    )
    memory = build(model, processor, PHRASES, config=config, layers=[0, 1, 2, 3, 4, 5]).memory
    brief = EditTraining(end=False, neurons=2, steps=3, lr=0.1, stop_loss=1e-9)
    kept = [Sample("w30 w31", "w32")]
    request = Sample("w1 w2", "w3")
    made = train_edit(
        model, processor, request, memory, layers=[4, 5], training=brief, id="a", preserve=kept, progress=False
    )
    assert sorted(made.edit.layers) == [4, 5] and made.edit.memory_id == memory.id
    made.edit.save(tmp_path / "e")
    edit = uk.Edit.load(tmp_path / "e")

    def loss():
        batch = encode(processor, [request])
        with torch.no_grad(), uk.rows(model, prompt_lengths=batch.prompt_lengths):
            return float(F.cross_entropy(forward(model, batch.inputs)[0, -2], batch.inputs["input_ids"][0, -1]))

    report = uk.patch(model, [edit], memory)
    assert [(i, n, entries) for i, _, _, n, entries in report.layers] == [(i, 2 if i > 3 else 0, 24) for i in range(6)]
    after = loss()
    uk.remove_edit(model, "a")
    assert loss() == pytest.approx(made.losses[0], rel=1e-4)  # fresh neurons do nothing
    assert after < made.losses[0]
    uk.swap_memory(model, memory)
    uk.add_edit(model, edit)
    assert loss() == after


def test_a_scale_that_is_given_is_kept(make_model, processor):
    result = build(make_model("opt"), processor, config=every_token(values="projected", scale=2.0), layers=[5])
    assert result.memory.config.scale == 2.0


def test_of_images_and_text(make_model, processor):
    triplets = [Triplet(t.prompt, t.positive, t.negative, torch.rand(16, 16)) for t in TRIPLETS[:6]] + TRIPLETS[6:]
    result = build(make_model("blip2-llama"), processor, triplets)
    assert len(result.memory) == 12
    assert result.memory.layers[2].index.unique(dim=0).shape[0] == 12


def test_what_it_says(make_model, processor):
    result = build(make_model("opt"), processor, layers=[3])
    lines = str(result).splitlines()
    assert lines[0] == f"memory {result.memory.id}: 12 entries, layers [3]"
    assert lines[1].startswith("  layer 3: held-out truthfulness ")
    assert result.memory.notes["triplets"] == "12"
    assert "steps=60" in result.memory.notes["training"]


def test_the_same_seed_makes_the_same_memory(make_model, processor):
    ids = [build(make_model("opt"), processor, layers=[3]).memory.id for _ in range(2)]
    other = build_memory(
        make_model("opt"), processor, TRIPLETS, layers=[3], training=EncoderTraining(steps=60, seed=1), progress=False
    )
    assert ids[0] == ids[1] != other.memory.id


@pytest.mark.parametrize(
    ("triplets", "layers", "message"),
    [
        ([], None, "triplets: expected at least one, got none"),
        (TRIPLETS[:3], None, "triplets: expected at least 4"),
        (TRIPLETS, [9], "layers: expected indices in 0..5"),
        ([Triplet("w1", "w2", "w3", torch.rand(8, 8))] * 4, None, r"shape \(16, 16\), not \(8, 8\)"),
    ],
)
def test_what_is_refused(make_model, processor, triplets, layers, message):
    with pytest.raises(ValueError, match=message):
        build(make_model("opt"), processor, triplets, layers=layers)


@pytest.mark.parametrize("values", ["pre", "out", "projected"])
def test_a_memory_is_extended(make_model, processor, values, tmp_path):
    """By the entries that a memory of all triplets has, and by nothing else."""
    model, config = make_model("llama"), every_token(k=5, values=values)
    memory = build(model, processor, TRIPLETS[:9], config=config, layers=[1, 4]).memory
    extended = extend_memory(model, processor, memory, TRIPLETS[9:], progress=False)
    assert len(memory) == 9 and len(extended) == 12
    states = build(model, processor, config=config, layers=[1, 4]).memory
    for i, m in extended.layers.items():
        for name in ("index", "keys", *(() if values == "pre" else ("values",))):
            assert torch.equal(getattr(m, name)[:9], getattr(memory.layers[i], name))
            # Batches of other rows round otherwise.
            torch.testing.assert_close(getattr(m, name)[9:], getattr(states.layers[i], name)[9:])
        assert m.encoder is memory.layers[i].encoder and m.zeta_prime is memory.layers[i].zeta_prime
    assert extended.config == memory.config and extended.base_model == memory.base_model
    assert extended.id != memory.id
    extended.save(tmp_path / "m")
    assert uk.MemoryBank.load(tmp_path / "m").id == extended.id
    one = extend_memory(model, processor, extended, TRIPLETS[:1], progress=False)
    assert len(one) == 13
    uk.patch(model, memory=one)
    model(input_ids=torch.arange(5, 9)[None])
    uk.swap_memory(model, memory)
    with pytest.raises(uk.PatchError, match="the model is patched"):
        extend_memory(model, processor, memory, TRIPLETS[:1], progress=False)


def test_a_memory_of_tenants_is_extended_by_entries_of_nobody(make_model, processor):
    model = make_model("llama")
    memory = build(model, processor, layers=[4]).memory
    joined = uk.MemoryBank.joined({"acme": memory})
    extended = extend_memory(model, processor, joined, TRIPLETS[:2], progress=False)
    assert extended.entries("acme") == range(12) and len(extended) == 14 and extended.parts == joined.parts


def test_what_a_memory_is_not_extended_by(make_model, processor):
    model = make_model("llama")
    memory = build(model, processor, layers=[4]).memory
    with pytest.raises(ValueError, match="triplets: expected at least one, got none"):
        extend_memory(model, processor, memory, [], progress=False)
    with pytest.raises(uk.MismatchError, match=f"memory {memory.id}: "):
        extend_memory(make_model("opt"), processor, memory, TRIPLETS, progress=False)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_under_modes_without_gradients(make_model, processor, mode):
    """A memory and an edit are made as ever; what was patched under the mode can be changed and trained after it."""
    model = make_model("llama")
    brief = EditTraining(neurons=2, steps=2)

    def made():
        memory = build(model, processor, layers=[4, 5]).memory
        return memory, train_edit(model, processor, Sample("w1", "w3"), memory, training=brief, id="a", progress=False)

    memory, result = made()
    with mode():
        again = made()
        assert not torch.is_grad_enabled()
        uk.patch(model, [again[1].edit], again[0])
        given = uk.MemoryBank({i: copied(m) for i, m in memory.layers.items()}, memory.config, memory.base_model)
    assert again[0].id == memory.id and again[1].losses == result.losses
    uk.add_edit(model, dataclasses.replace(result.edit, id="b"))
    uk.swap_memory(model, given, override=True)
    x = torch.randn(1, 3, 64, requires_grad=True)
    model(inputs_embeds=x).logits.sum().backward()
    assert x.grad.any()


def copied(layer):
    """Its tensors made anew, in whatever mode this is."""
    encoder = type(layer.encoder)(*(t.clone() for t in layer.encoder))
    return dataclasses.replace(layer, index=layer.index.clone(), keys=layer.keys.clone(), encoder=encoder)
