"""A replayed pass is the whole pass bit for bit, and runs nothing of what is below the edited layers.

One that is put together from rows of several recordings is so up to rounding.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from backbones.zoo import ZOO, logits, model_of
from configs import every_token
from torch import nn

from unike_kernels.backbones import find_decoder
from unike_kernels.training import EditTraining, Sample, activation_cache, train_edits, trainer
from unike_kernels.training.activation_cache import Recording, Replay
from unike_kernels.training.samples import encode, forward

IDS = torch.tensor([[7, 8, 9, 10, 11], [12, 13, 14, 15, 16]])
REQUESTS = [Sample("w1 w2 w3", "w30 w31"), Sample("w4 w5", "w20"), Sample("w6 w3 w5 w1", "w11 w12")]
KEEP = [Sample("w5 w2", "w6"), Sample("w7", "w8 w9"), Sample("w8 w9 w1", "w2")]
TRAINING = EditTraining(
    end=False, neurons=3, lr=1e-2, steps=30, stop_loss=0.5, stop_preserve=10.0, preserve_batch=2, preserve_weight=0.01
)


def replaying(model, first):
    return Replay(model, [layer.module for layer in find_decoder(model).layers], first)


@pytest.mark.parametrize("family", ZOO)
@pytest.mark.parametrize("first", [0, 2])
def test_is_the_whole_pass_of_every_family(family, first):
    """Of a model whose upper layers change between the passes; with its gradients."""
    model = model_of(ZOO[family], torch.float32)
    layers = [layer.module for layer in find_decoder(model).layers]
    upper = [p for layer in layers[first:] for p in layer.parameters() if p.is_floating_point()]
    shared = {id(p) for layer in layers[:first] for p in layer.parameters()}
    model.requires_grad_(False)
    trained = next(p for p in upper if id(p) not in shared and p.dim() > 1).requires_grad_()
    recording, below = Recording(), replaying(model, first)
    for scale in (1.0, 1.2, 0.7):
        with torch.no_grad():
            trained.mul_(scale)
        whole = logits(model, IDS)
        (wanted,) = torch.autograd.grad(whole.square().sum(), trained)
        with below.on(), below.of(recording):
            found = logits(model, IDS)
        (gradient,) = torch.autograd.grad(found.square().sum(), trained)
        assert recording.complete
        assert torch.equal(found, whole)
        assert torch.equal(gradient, wanted)


@pytest.mark.parametrize("family", ZOO)
@pytest.mark.parametrize("first", [0, 2])
def test_rows_of_two_recordings_of_every_family(family, first):
    """The rows of one and behind them those of a copy in the other, which holds other tokens."""
    model = model_of(ZOO[family])
    below, close = replaying(model, first), 1e-9 if ZOO[family].dtype == torch.float64 else 1e-4
    copies = torch.cat([IDS.flip(1), IDS.roll(1, 1), IDS + 3])
    with torch.no_grad(), below.on():
        own, others = (below.record(lambda ids=ids: logits(model, ids)) for ids in (IDS, copies))
        assert own.complete
        assert others.complete
        for number, copy in enumerate(copies.split(2)):
            found = own.with_copy(others, number, 3)
            assert found is not None
            ids = torch.cat([IDS, copy])
            with below.of(found):
                replayed = logits(model, ids)
            torch.testing.assert_close(replayed, logits(model, ids), rtol=close, atol=close)


def test_rows_that_cannot_be_told(make_model):
    """What a module returns for two copies is neither the same nor has twice the rows; or it was another one."""
    model = make_model("llama")
    below, embedding, usual = replaying(model, 2), model.model.embed_tokens, model.model.embed_tokens.forward
    more = {}

    def recorded(ids):
        with below.on(), torch.no_grad():
            return below.record(lambda: logits(model, ids))

    def embed(ids):
        return usual(ids) + more.get("shift", 0.0)

    embedding.forward = embed
    own, others = recorded(IDS), recorded(torch.cat([IDS, IDS]))
    assert own.with_copy(others, 1, 2) is not None
    assert own.with_copy(others, 1, 4) is None
    assert own.with_copy(own, 0, 2).states.shape == own.states.shape  # the same, whoever it is
    more["shift"] = 1.0
    assert own.with_copy(recorded(IDS), 0, 2) is None
    others.beside.reverse()
    assert own.with_copy(others, 1, 2) is None
    others.beside.reverse()
    states = own.states, others.states
    others.states = (others.states,)
    assert own.with_copy(others, 1, 2) is None
    for one, many, told in [(None, None, True), (1, 2, False), (None, states[1], False), (states[0], None, False)]:
        own.states, others.states = one, many
        assert (own.with_copy(others, 1, 2) is not None) == told


def test_a_recorded_pass_ends_at_the_entry(make_model):
    model = make_model("llama")
    below, ran = replaying(model, 3), []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, _: ran.append(module))
    with below.on():
        assert below.record(lambda: logits(model, IDS)).complete
        assert ran == [layer.mlp for layer in model.model.layers[:3]]
        logits(model, IDS)  # as ever
        assert len(ran) == 3 + len(model.model.layers)
        with pytest.raises(ZeroDivisionError):
            below.record(lambda: 1 / 0)
        logits(model, IDS)


@pytest.mark.parametrize("kind", ["opt", "llama", "blip2-opt", "blip2-llama"])
def test_what_is_below_runs_once(make_model, processor, monkeypatch, kind):
    """Told by the matrices that a pass multiplies with."""
    model = make_model(kind)
    image = torch.rand(16, 16) if kind.startswith("blip2") else None
    inputs = encode(processor, [dataclasses.replace(r, image=image) for r in REQUESTS]).inputs
    recording, below, used = Recording(), replaying(model, 4), []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, w, b=None: used.append(w) or linear(x, w, b))
    passes = []
    with below.on(), torch.no_grad():
        for _ in range(3):
            with below.of(recording):
                forward(model, inputs)
            passes.append({id(w) for w in used})
            used.clear()
    of_all = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    upper = [layer.module for layer in find_decoder(model).layers[4:]]
    above = {id(m.weight) for layer in upper for m in layer.modules() if isinstance(m, nn.Linear)}
    head = {id(model.get_output_embeddings().weight)}
    assert passes == [of_all, above | head, above | head]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("kind", "config"), [("opt", {}), ("blip2-llama", {"tokens": "answer"})])
def test_edits_become_the_same(make_model, make_memory, processor, monkeypatch, kind, config, dropout):
    """With a memory, previous edits, samples to preserve and to protect; some edits end before others.

    Bit for bit, but where thinned prompts pass the layers below some steps ahead.
    """
    model, config = make_model(kind), every_token(k=7, values="pre", **config)
    memory = make_memory(model, config, layers=[3, 5])
    image = torch.rand(16, 16) if kind.startswith("blip2") else None
    requests = [dataclasses.replace(r, image=image) for r in REQUESTS]
    training = dataclasses.replace(TRAINING, prompt_dropout=dropout)
    given = {"training": training, "preserve": KEEP, "config": config, "ids": list("abc"), "progress": False}
    (before,) = train_edits(model, processor, [Sample("w2 w2", "w17")], memory, training=TRAINING, progress=False)
    given |= {"previous": [before.edit], "protect": [Sample("w2 w2", "w17")]}
    replayed = []

    class Watched(Replay):
        def _play(self, recording, module, layer):
            replayed.append(module)
            return super()._play(recording, module, layer)

    monkeypatch.setattr("unike_kernels.training.trainer.Replay", Watched)
    found = train_edits(model, processor, requests, memory, **given)
    assert replayed
    assert not any("forward" in module.__dict__ for module in model.modules())
    replayed.clear()
    monkeypatch.setattr(activation_cache, "_BUDGET", 0)
    whole = train_edits(model, processor, requests, memory, **given)
    assert not replayed
    close = {"rtol": 1e-3, "atol": 1e-5} if dropout else {"rtol": 0.0, "atol": 0.0}
    for one, other in zip(found, whole, strict=True):
        assert (one.steps, one.stopped) == (other.steps, other.stopped)
        torch.testing.assert_close(torch.tensor(one.losses), torch.tensor(other.losses), **close)
        assert one.divergence == pytest.approx(other.divergence, rel=close["rtol"], abs=close["atol"])
        for i, layer in one.edit.layers.items():
            for name, t in layer.tensors().items():
                torch.testing.assert_close(t, other.edit.layers[i].tensors()[name], **close)
    assert len({r.steps for r in found}) > 1


@pytest.mark.parametrize("kind", ["opt", "blip2-llama"])
def test_thinned_prompts_pass_the_layers_below_some_steps_ahead(make_model, processor, kind):
    """Whole ones once, for as long as the same edits are trained."""
    model = make_model(kind)
    image = torch.rand(16, 16) if kind.startswith("blip2") else None
    training = dataclasses.replace(TRAINING, prompt_dropout=0.3, steps=9, stop_loss=1e-6)
    rows = []
    attention = find_decoder(model).layers[0].module.self_attn
    attention.q_proj.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    requests = [dataclasses.replace(r, image=image) for r in REQUESTS]
    train_edits(model, processor, requests, layers=[5], preserve=[], training=training, progress=False)
    ahead = 3 * trainer._AHEAD
    assert rows == [3, 3, ahead, ahead, ahead]  # the first where the neurons begin; then steps 0, 4, 8


def test_models_whose_rows_cannot_be_told_are_not_looked_ahead_of(make_model, processor, monkeypatch):
    model = make_model("opt")
    training = dataclasses.replace(TRAINING, prompt_dropout=0.3, steps=9, stop_loss=1e-6)
    given = {"layers": [5], "preserve": [], "training": training, "ids": list("abc"), "progress": False}
    usual = train_edits(model, processor, REQUESTS, **given)
    asked = []
    monkeypatch.setattr(Recording, "with_copy", lambda *_: asked.append(1))
    whole = train_edits(model, processor, REQUESTS, **given)
    assert len(asked) == 1
    for one, other in zip(usual, whole, strict=True):
        torch.testing.assert_close(torch.tensor(one.losses), torch.tensor(other.losses), rtol=1e-3, atol=1e-5)


def test_a_pass_that_fails_below_is_not_taken_for_a_whole_one(make_model):
    model = make_model("llama")
    recording, below = Recording(), replaying(model, 3)
    with torch.no_grad():
        whole = logits(model, IDS)
        with below.on():
            fails = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError), below.of(recording):
                logits(model, IDS)
            fails.remove()
            assert not recording.complete
            for _ in range(2):
                with below.of(recording):
                    assert torch.equal(logits(model, IDS), whole)
            # Outside of `of`, other batches run whole.
            other = logits(model, IDS.flip(0))
        assert torch.equal(other, logits(model, IDS.flip(0)))


def test_another_pass_than_the_recorded_one(make_model):
    model = make_model("llama")
    recording, below = Recording(), replaying(model, 3)
    with below.on(), torch.no_grad():
        with below.of(recording):
            logits(model, IDS)
        recording.beside.reverse()
        expected = "replay: call 0 of Embedding is none of the recorded pass"
        with pytest.raises(RuntimeError, match=expected), below.of(recording):
            logits(model, IDS)
        recording.beside.reverse()
        recording.beside.pop()
        expected = "replay: call 1 of LlamaRotaryEmbedding is none of the recorded pass"
        with pytest.raises(RuntimeError, match=expected), below.of(recording):
            logits(model, IDS)


def test_a_forward_of_an_instance_is_put_back(make_model):
    """As accelerate's hooks have it."""
    model = make_model("opt")
    layer, usual = model.model.decoder.layers[0], type(model.model.decoder.layers[0]).forward
    own = layer.forward = lambda *args, **kwargs: usual(layer, *args, **kwargs)
    with replaying(model, 2).on():
        assert layer.forward is not own
    assert layer.__dict__["forward"] is own


def test_a_layer_that_stands_above_too_runs(make_model):
    """Shared layers: what is trained may be in them."""
    model = make_model("llama")
    model.model.layers[1] = model.model.layers[4]
    below = Replay(model, list(model.model.layers), 3)
    assert below._below == [model.model.layers[0]]
    recording, weight = Recording(), model.model.layers[4].mlp.up_proj.weight
    for scale in (1.0, 1.5):
        with torch.no_grad():
            weight.mul_(scale)
            whole = logits(model, IDS)
            with below.on(), below.of(recording):
                assert torch.equal(logits(model, IDS), whole)


def test_budget(make_model, monkeypatch):
    """Recordings that are gone do not count."""
    model = make_model("llama")
    below, first, second = replaying(model, 3), Recording(), Recording()

    def run(recording):
        with below.of(recording):
            logits(model, IDS)
        return recording.complete

    with below.on(), torch.no_grad():
        assert run(first)
        states = IDS.numel() * 64 * 4
        assert states <= first.size < 4 * states  # of one layer and the embedding; angles are shorter
        monkeypatch.setattr(activation_cache, "_BUDGET", first.size)
        assert not run(second)
        del first
        assert run(second)


def test_layers_that_write_in_place_and_modules_that_call_each_other():
    class Layer(nn.Linear):
        def forward(self, h):
            h += super().forward(h)
            return h

    class Tower(nn.Module):
        def __init__(self, embedding):
            super().__init__()
            self.call = embedding.__call__  # the embedding is no child of it

        def forward(self, ids):
            return self.call(ids) * 2

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(9, 8)
            self.tower = Tower(self.embedding)
            self.layers = nn.ModuleList(Layer(8, 8) for _ in range(3))

        def forward(self, ids):
            h = self.tower(ids) + self.embedding(ids)
            for layer in self.layers:
                h = layer(h)
            return h

    model, ids = Model(), torch.arange(9)
    below, recording = Replay(model, list(model.layers), 1), Recording()
    with below.on(), torch.no_grad():
        whole = model(ids)
        for _ in range(3):
            with below.of(recording):
                assert torch.equal(model(ids), whole)
