"""What the layers tell about themselves: against the reference operators, and without a change of the output."""

import dataclasses
import importlib
import logging

import pytest
import torch
from configs import every_token
from pages import Page

import unike_kernels as uk
from unike_kernels.artifacts.pictures import Pictures
from unike_kernels.backbones import find_decoder

reference = importlib.import_module("unike_kernels.ops.latent_attention.reference")
IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])
CONFIGS = {
    "token": {},
    "fixed": {"alpha": 0.4},
    "last, sequence": {"alpha": "last", "retrieval": "sequence"},
    "answer": {"tokens": "answer"},
    "projected": {"values": "projected", "scale": 0.5},
    "cosine": {"values": "out", "scale": "cosine", "tau": 0.3, "retrieval": "sequence"},
}


@torch.no_grad()
def run(model):
    with uk.rows(model, [["a"], ["b", "a"]], memory=[True, True], prompt_lengths=[3, 5]):
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_entries_scores_gates_and_neurons(make_model, make_memory, make_edit, kind, name):
    config = every_token(**{"k": 7, "values": "pre", **CONFIGS[name]})
    model = make_model(kind, dtype=torch.float64)
    memory = make_memory(model, config)
    edits = [make_edit(model, id, memory, seed=seed, gated=kind == "llama") for seed, id in enumerate("ab")]
    seen = {}
    with uk.patched(model, edits, memory):
        plain = run(model)
        attention = {i: find_decoder(model).layers[i].attention.module for i in memory.layers}
        hooks = [
            m.register_forward_pre_hook(lambda _, a, k, i=i: seen.__setitem__(i, k["hidden_states"]), with_kwargs=True)
            for i, m in attention.items()
        ]
        with uk.explain(model) as explanation:
            assert torch.equal(run(model), plain)
        for hook in hooks:
            hook.remove()
        assert torch.equal(run(model), plain)
    (told,) = explanation.passes  # and nothing after the block
    assert sorted(told) == [2, 3, 4, 5]
    ends = torch.tensor([2, 4])
    for i, at in told.items():
        index = torch.nn.functional.normalize(memory.layers[i].index.double(), dim=-1)
        asks = torch.nn.functional.normalize(seen[i].double(), dim=-1)
        own = asks
        if config.retrieval == "sequence":
            asks = asks[torch.arange(2), ends].unsqueeze(1).expand_as(asks)
        best = (asks @ index.T).argsort(-1, descending=True)[..., :7]
        shifted = torch.ones(2, 5, dtype=torch.bool)
        if config.tokens == "answer":
            shifted = torch.arange(5) >= ends.unsqueeze(1)
        assert torch.equal(at.entries[shifted], best[shifted])
        assert (at.entries[~shifted] == -1).all() and (at.alpha[~shifted] == 0).all()
        scores = torch.einsum("btd,btkd->btk", own, index[best])
        torch.testing.assert_close(at.scores[shifted].double(), scores[shifted], atol=1e-5, rtol=1e-5)
        if config.alpha == 0.4:
            assert torch.equal(at.alpha, torch.full((2, 5), 0.4))
        assert ((at.alpha >= 0) & (at.alpha <= 1)).all()
        assert set(at.neurons) == {"a", "b"}
        assert at.neurons["a"].shape == (2, 5, 5)
        assert (at.neurons["a"] != 0).any((1, 2)).all()
        assert (at.neurons["b"][0] == 0).all() and (at.neurons["b"][1] != 0).any()
        assert at.memory_seconds > 0 and at.neuron_seconds > 0
    counters = explanation.counters()
    gates = torch.cat([t.alpha.flatten() for t in told.values()])
    assert (counters["passes"], counters["tokens"]) == (1, 40)
    assert counters["shifted"] == int((gates > 0).sum()) > 0
    assert counters["alpha_mean"] == pytest.approx(float(gates[gates > 0].mean()))
    assert counters["alpha_max"] == pytest.approx(float(gates.max()))
    assert 0 < counters["memory_seconds"] < 10


def test_the_gates_are_those_that_were_used(make_model, make_memory, make_inputs):
    """From the output: (out - base) = alpha (|base| know / |know| - base), with what the layer retrieved."""
    model = make_model("opt", dtype=torch.float64)
    memory = make_memory(model, every_token(k=7, values="pre"), layers=[5])
    seen = {}
    base = find_decoder(model).layers[5].attention.module

    def note(_, args, kwargs, out):
        seen["h"], seen["q"] = out[0].detach(), kwargs["hidden_states"].detach()

    hook = base.register_forward_hook(note, with_kwargs=True)
    with torch.no_grad():
        model(input_ids=IDS)
        hook.remove()
        with uk.patched(model, memory=memory), uk.explain(model) as explanation:
            model(input_ids=IDS)
    (told,) = explanation.passes
    m, at = memory.layers[5], told[5]
    encoder = reference.SemanticEncoder(*(t.double() for t in m.encoder))
    keys = m.keys.double()
    _, alpha = reference.latent_attention(
        seen["q"].reshape(10, 1, -1), seen["h"].reshape(10, -1), keys, keys, at.entries.view(10, -1), encoder,
        None, None, reference.Blend(64**-0.5, "inclusion", "match"),
    )  # fmt: skip
    torch.testing.assert_close(at.alpha.view(-1).double(), alpha, atol=1e-5, rtol=1e-4)
    assert (alpha > 0).any()


@pytest.mark.parametrize(
    ("switches", "spread"),
    [
        ({"scale": 1e-9}, (6.99, 7.0)),  # a uniform softmax
        ({"scale": 1e4}, (1.0, 1.01)),
        ({"k": 80, "scale": 1e-9}, (49.9, 50.0)),  # of 50 entries
        ({"scale": "cosine", "tau": 1e-4}, (1.0, 1.3)),
        ({"scale": "cosine", "tau": 1e4, "values": "out"}, (6.99, 7.0)),
        ({"scale": 1e-9, "values": "projected"}, (6.99, 7.0)),
        ({"scale": 1e-9, "retrieval": "sequence"}, (6.99, 7.0)),
    ],
)
def test_how_far_the_attention_spreads(make_model, make_memory, switches, spread):
    model = make_model("opt")
    memory = make_memory(model, every_token(**{"k": 7, "values": "pre", "alpha": 0.5, "tokens": "answer", **switches}))
    ids = torch.arange(4, 34)[None].repeat(20, 1)  # more tokens than are looked at together
    with uk.patched(model, memory=memory), uk.explain(model) as explanation, uk.rows(model, prompt_lengths=[11] * 20):
        model(input_ids=ids)
    (told,) = explanation.passes
    for at in told.values():
        assert at.effective.shape == at.shift.shape == (20, 30)
        assert (at.effective[:, :10] == 0).all() and (at.shift[:, :10] == 0).all()
        mean = float(at.effective[:, 10:].mean())
        assert spread[0] <= mean <= spread[1] + 1e-3
        assert (at.shift[:, 10:] > 0).all()
    assert spread[0] <= explanation.counters()["effective_mean"] <= spread[1] + 1e-3


def test_entries_that_a_row_may_not_use_have_no_part_in_the_spread(make_model, make_memory):
    model = make_model("opt")
    memory = make_memory(model, every_token(k=7, values="pre", scale=1e-9))
    memory = dataclasses.replace(memory, tenants={"acme": range(3, 6)}, parts={"acme": "another"})
    with uk.patched(model, memory=memory), uk.explain(model) as explanation, uk.rows(model, memory=["acme", False]):
        model(input_ids=IDS)
    for at in explanation.passes[0].values():
        torch.testing.assert_close(at.effective, torch.tensor([3.0, 0.0]).view(2, 1).expand(2, 5), atol=1e-3, rtol=0)


def test_the_spread_and_the_shift_by_hand(make_model, make_memory):
    model = make_model("opt", dtype=torch.float64)
    memory = make_memory(model, every_token(k=7, values="out", scale=0.3), layers=[5])
    seen = {}
    module = find_decoder(model).layers[5].attention.module

    def note(name):
        return lambda _, args, kwargs, out: seen.__setitem__(name, (kwargs["hidden_states"].detach(), out[0].detach()))

    with torch.no_grad():
        hook = module.register_forward_hook(note("plain"), with_kwargs=True)
        model(input_ids=IDS)
        hook.remove()
        with uk.patched(model, memory=memory), uk.explain(model) as explanation:
            hook = module.register_forward_hook(note("shifted"), with_kwargs=True)
            model(input_ids=IDS)
            hook.remove()
    at, m = explanation.passes[0][5], memory.layers[5]
    moved = (seen["shifted"][1] - seen["plain"][1]).norm(dim=-1)
    torch.testing.assert_close(at.shift.double(), moved, atol=1e-6, rtol=1e-5)
    logits = 0.3 * torch.einsum("btd,btkd->btk", seen["plain"][0], m.keys[at.entries].squeeze(-2))
    p = logits.softmax(-1)
    torch.testing.assert_close(at.effective.double(), (-(p * p.log()).sum(-1)).exp(), atol=1e-5, rtol=1e-5)
    assert 1.5 < float(at.effective.mean()) < 6.5


def test_every_pass_tells_for_itself(make_model, make_memory):
    model = make_model("llama")
    memory = make_memory(model)
    with uk.patched(model, memory=memory), uk.explain(model) as explanation:
        model.generate(input_ids=IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert [told[5].alpha.shape for told in explanation.passes] == [(2, 5), (2, 1), (2, 1)]
    with pytest.raises(uk.PatchError), uk.explain(model):
        pass


def test_nobody_asks_nothing_is_kept(make_model):
    model, seen = make_model("opt"), []
    with uk.patched(model):
        context = model._unike.context
        handle = model.model.decoder.layers[4].register_forward_pre_hook(lambda *_: seen.append(context.now().trace))
        model(input_ids=IDS)
        handle.remove()
    assert seen == [None]


def test_changes_are_logged_for_those_who_listen(make_model, make_memory, make_edit, caplog, capfd):
    model = make_model("llama")
    memory, edit = make_memory(model), make_edit(model, "a")

    def change():
        with uk.patched(model, [edit], layers=[2, 3, 4, 5]):
            uk.add_edit(model, make_edit(model, "b"))
            uk.set_beta(model, "b", 0.5)
            uk.remove_edit(model, "a")
            uk.remove_edit(model, "b")
            uk.swap_memory(model, memory, override=True)

    change()
    assert capfd.readouterr() == ("", "")
    with caplog.at_level(logging.INFO, "unike_kernels"):
        change()
    told = [record.unike for record in caplog.records]
    assert [(t["event"], t["edits"]) for t in told] == [
        ("patch", 1), ("add_edit", 2), ("set_beta", 2), ("remove_edit", 1), ("remove_edit", 0), ("swap_memory", 0),
        ("unpatch", 0),
    ]  # fmt: skip
    assert told[1]["edit"] == "b" and told[1]["layers"] == [2, 3, 4, 5] and told[2]["beta"] == 0.5
    assert told[-2]["memory"] == memory.id
    assert "event=set_beta" in caplog.text


@pytest.mark.parametrize("kind", ["llama", "blip2-opt"])
def test_what_entries_and_tokens_say(make_model, make_memory, make_inputs, processor, kind):
    """Tokens of what the model was given, where its decoder was given embeddings, too."""
    model, texts = make_model(kind), tuple(f"fact {i}" for i in range(50))
    pictures = Pictures(torch.zeros(1, 48, 48, 3, dtype=torch.uint8), torch.zeros(50, dtype=torch.int64))
    memory = make_memory(model, every_token(k=7, tokens="answer"))
    memory = dataclasses.replace(memory, texts=texts, pictures=pictures)
    inputs = make_inputs(kind, ["w1 w2 w3", "w4 w5"])
    with uk.patched(model, memory=memory), uk.explain(model, processor) as trace:
        model(**inputs)
        uk.swap_memory(model, dataclasses.replace(memory, texts=None))
        model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    first, second, *_ = [layers[5].texts for layers in trace.passes]
    assert first == texts and second is None
    tokenizer = getattr(processor, "tokenizer", processor)
    ids = inputs["input_ids"]
    assert torch.equal(trace.ids[0], ids) and trace.said(0, 1, [0, -1]) == tokenizer.decode(ids[1, [0, -1]])
    assert trace.ids[2].shape == (2, 1)
    page = Page(trace.to_html())
    assert f"{float(trace.passes[0][5].scores.max()):.3f} fact " in page.text and page.images
