"""Every editing system: an edit changes what the model says, a reset takes it back to the bit."""

import dataclasses

import pytest
import torch
from configs import every_token
from unike_eval import observe
from unike_eval.builtin_suite import world_suite
from unike_eval.editors import (
    EDITORS,
    GRACE,
    IKE,
    MEMIT,
    MEND,
    SERAC,
    WISE,
    AlphaEdit,
    FineTune,
    IntrinsicIKE,
    KnowledgeEditor,
    LoRA,
    TPatcher,
    UniKE,
    serac,
)  # fmt: skip
from unike_eval.editors.base import answer_loss
from unike_eval.toy import digits

from unike_kernels.training import EditTraining, EncoderTraining, Sample
from unike_kernels.training.samples import encode, forward

QUICK = {
    KnowledgeEditor: {"steps": 20},
    MEND: {"steps": 20},
    SERAC: {"steps": 100, "counterfactual_steps": 5},
    # Two late layers, and weights for states of this size.
    MEMIT: {"layers": [3, 4], "lr": 0.5, "weight": 1.0},
    AlphaEdit: {"layers": [3, 4], "lr": 0.5, "threshold": 0.3, "ridge": 0.1},
    GRACE: {"steps": 20},
    WISE: {"margin": 3.0},
    LoRA: {"steps": 20},
    UniKE: {"encoders": EncoderTraining(steps=60), "training": EditTraining(steps=60)},
}
QUICK[IntrinsicIKE] = {**QUICK[UniKE], "k": 2}


@pytest.fixture(scope="module", params=["opt", pytest.param("llama", marks=pytest.mark.slow)])
def setting(request):
    """A model, its processor and the first requests of its suite."""
    model, processor = digits.load_model(request.param), digits.load_processor()
    suite = world_suite("digits", "vqa", model, processor)
    return model, processor, dataclasses.replace(suite, train=suite.train[:80], test=suite.test[:4])


def logits(model, processor, samples):
    with torch.no_grad():
        return forward(model, encode(processor, samples).inputs)


def kept(model):
    return [(name, p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()]


@pytest.mark.parametrize("system", EDITORS.values(), ids=EDITORS)
def test_edits_and_takes_them_back(system, setting):
    model, processor, suite = setting
    samples = [suite.test[0].case.request, *suite.test[0].case.images]
    before, weights, modules = logits(model, processor, samples), kept(model), list(model.modules())
    unedited = observe(model, processor, samples)
    editor = system(model, processor, **QUICK.get(system, {}))
    editor.fit(suite)
    assert torch.equal(logits(model, processor, samples), before)  # no trace of learning
    for request in suite.test[1::-1]:
        editor.edit(request.case.request)
    edited = editor.observe(samples)
    assert [len(o.best) for o in edited] == [len(o.best) for o in unedited]
    assert any(not torch.equal(a.best, b.best) for a, b in zip(edited, unedited, strict=True))
    editor.reset()
    assert torch.equal(logits(model, processor, samples), before)
    assert list(model.modules()) == modules
    for (name, was, asked), (also, now) in zip(weights, model.named_parameters(), strict=True):
        assert name == also
        assert torch.equal(was, now)
        assert now.requires_grad == asked
        assert now.grad is None


@pytest.mark.slow
@pytest.mark.parametrize("system", [FineTune, TPatcher, UniKE, LoRA, GRACE, WISE, MEMIT, AlphaEdit])
def test_what_is_trained_for_each_edit_reaches_it(system, setting):
    model, processor, suite = setting
    editor = system(model, processor, **QUICK.get(system, {}))
    editor.fit(suite)
    for request in suite.test[:2]:
        editor.edit(request.case.request)
        (seen,) = editor.observe([request.case.request])
        assert torch.equal(seen.best[seen.answer, 0], seen.wanted)
        editor.reset()


def test_the_factors_of_the_gradient(setting):
    model, processor, suite = setting
    editor = MEND(model, processor, layers=2)
    editor.ended = False
    request = suite.test[0].case.request
    weights = {name: m.weight for name, m in editor.linears.items()}
    wanted = torch.autograd.grad(answer_loss(model, encode(processor, [request])), list(weights.values()))
    assert len(weights) == (4 if "opt" in str(type(model.language_model)).lower() else 6)
    for (name, (u, delta)), gradient in zip(editor.gradients(request).items(), wanted, strict=True):
        torch.testing.assert_close(delta.T @ u, gradient, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("system", [MEND, KnowledgeEditor])
def test_hypernetworks_learn_to_lower_their_objective(system, setting):
    """On the first requests of training: before the network has learnt, and after."""
    model, processor, suite = setting
    losses = []
    for steps in (0, 150):
        editor = system(model, processor, steps=steps)
        editor.fit(suite)
        pairs = list(zip(suite.train[:20], suite.preserve[:20], strict=True))
        found = [editor.objective(r.case.request, r.case.request, kept) for r, kept in pairs]
        losses.append(float(sum(found).detach()))
    assert losses[1] < 0.8 * losses[0]


def test_patches_start_active_at_the_edit_and_learn_silence_elsewhere(setting):
    model, processor, suite = setting
    editor = TPatcher(model, processor, steps=1)
    editor.fit(suite)
    editor.edit(suite.test[0].case.request)
    (layer,) = editor._edits[0].layers.values()
    # One step of Adam moves each number by the learning rate at most.
    norms = layer.keys.norm(dim=-1)
    start = layer.keys / norms.square().unsqueeze(-1)  # q, for a key q / |q|^2
    activation = (start * layer.keys).sum(-1)
    torch.testing.assert_close(activation, torch.ones_like(activation))
    assert len(layer.keys) == len(encode(processor, [suite.test[0].case.request]).answer_mask().nonzero())
    loud = editor._kept @ layer.keys.T + layer.key_bias
    editor.reset()
    longer = TPatcher(model, processor, steps=60, stop_loss=0.0)
    longer.fit(suite)
    longer.edit(suite.test[0].case.request)
    (layer,) = longer._edits[0].layers.values()
    assert (longer._kept @ layer.keys.T + layer.key_bias).mean() < loud.mean() - 0.5


def test_demonstrations_come_before_the_edits_and_those_before_the_question(setting):
    model, processor, suite = setting
    editor = IKE(model, processor, k=2)
    editor.fit(suite)
    asked = suite.train[5].case.request
    editor.edit(Sample("question: one ? answer:", "two"))
    *demonstrations, edit, prompt = editor._with_demonstrations(asked).prompt.split("\n")
    assert edit == "question: one ? answer: two"
    assert prompt == asked.prompt
    lines = [f"{r.case.request.prompt} {r.case.request.answer}" for r in suite.train]
    assert len(demonstrations) == 2
    assert all(line in lines and line.startswith(asked.prompt) for line in demonstrations)


def test_neurons_and_demonstrations_work_together(setting):
    """What the edited model says to the prompt with the demonstrations and the edit."""
    model, processor, suite = setting
    both, neurons, prompts = (
        system(model, processor, **settings)
        for system, settings in (
            (IntrinsicIKE, QUICK[IntrinsicIKE]), (UniKE, {**QUICK[UniKE], "latent": False}), (IKE, {"k": 2})
        )
    )  # fmt: skip
    request = suite.test[0].case.request
    for editor in (both, neurons, prompts):
        editor.fit(suite)
        editor.edit(request)
    found, after = both.observe([request]), neurons.observe([prompts._with_demonstrations(request)])
    assert torch.equal(found[0].best[found[0].answer], after[0].best[after[0].answer])
    assert not torch.equal(found[0].best, prompts.observe([request])[0].best)


def test_variants_share_a_memory(setting):
    model, processor, suite = setting
    one, two = (UniKE(model, processor, **QUICK[UniKE], config=every_token(k=k)) for k in (40, 5))
    for editor in (one, two):
        editor.fit(suite)
    assert one._memory.layers[5].keys is two._memory.layers[5].keys
    assert (one._memory.config.k, two._memory.config.k) == (40, 5)
    other = UniKE(model, processor, **QUICK[UniKE], seed=3)
    other.fit(suite)
    assert not torch.equal(other._memory.layers[5].encoder.w1, one._memory.layers[5].encoder.w1)


def test_only_what_an_edit_concerns_is_answered_by_the_counterfactual_model(setting):
    model, processor, suite = setting
    editor = SERAC(model, processor, steps=400, counterfactual_steps=0)
    editor.fit(suite)
    requests = [r.case.request for r in suite.train[:2]]
    for request in requests:
        editor.edit(request)
    outside = list(suite.train[0].case.text_locality)
    one, *unconcerned, other = editor.observe([requests[0], *outside, requests[1]])
    for seen, request in zip((one, other), requests, strict=True):
        line = f"{request.prompt} {request.answer}\n"
        (expected,) = observe(model, processor, [dataclasses.replace(request, prompt=line + request.prompt)])
        assert torch.equal(seen.best[seen.answer], expected.best[expected.answer])
    for a, b in zip(unconcerned, observe(model, processor, outside), strict=True):
        assert torch.equal(a.best, b.best)


def test_the_classifier_reads_states_and_no_logits(setting, monkeypatch):
    """Those of all positions take longer than many layers, where the vocabulary is large."""
    model, processor, suite = setting
    samples, places = [r.case.request for r in suite.test], []
    monkeypatch.setattr(serac, "forward", lambda *given: places.append(forward(*given).shape[1]))
    states = SERAC(model, processor)._states(samples)
    assert states.shape[0] == len(samples) and places == [1]


def test_directions_that_steer(setting):
    """As long as zeta', other ones, and used in the edit."""
    model, processor, suite = setting
    found = {}
    for steer in ("truth", "random", "semantic"):
        editor = UniKE(model, processor, **QUICK[UniKE], latent=False, steer=steer)
        editor.fit(suite)
        found[steer] = editor._zeta
        editor.edit(suite.test[0].case.request)
        layer = max(found[steer])
        start = found[steer][layer] / found[steer][layer].norm()
        trained = editor._edits[0].layers[layer].zeta
        assert float(trained @ start / trained.norm()) > 0.5  # what training starts from
    for layer, right in found["truth"].items():
        for other in ("random", "semantic"):
            assert float(found[other][layer].norm()) == pytest.approx(float(right.norm()), rel=1e-4)
            assert float(torch.cosine_similarity(found[other][layer], right, dim=0)) < 0.95
    with pytest.raises(ValueError, match="steer: expected one of truth, random, semantic; got 'north'"):
        UniKE(model, processor, steer="north")


@pytest.mark.parametrize("system", [FineTune, TPatcher])
def test_prompt_dropout(system, setting, monkeypatch):
    """Each step sees the request as it is, and once more without some of its prompt's words, others in each step."""
    model, processor, suite = setting
    request = suite.test[0].case.request
    (whole,) = encode(processor, [request]).inputs["input_ids"].tolist()
    steps = []

    def watched(model, batch):
        rows = zip(batch.inputs["input_ids"], batch.inputs["attention_mask"].bool(), strict=True)
        steps.append([ids[mask].tolist() for ids, mask in rows])
        return answer_loss(model, batch)

    monkeypatch.setattr(f"{system.__module__}.answer_loss", watched)
    drawn = {}
    for share, seed in ((0.0, 0), (0.4, 0), (0.4, 1)):
        editor = system(model, processor, steps=5, stop_loss=1e-9, prompt_dropout=share, seed=seed)
        editor.fit(suite)
        steps.clear()
        editor.edit(request)
        editor.reset()
        assert [rows[0] for rows in steps] == [whole] * 5
        drawn[share, seed] = [rows[1:] for rows in steps]
    assert drawn[0.0, 0] == [[]] * 5
    for copies in (drawn[0.4, 0], drawn[0.4, 1]):
        assert len({tuple(copy) for (copy,) in copies}) > 1
        for (copy,) in copies:
            left = iter(whole)
            assert all(token in left for token in copy)  # in their order
            assert copy[-2:] == whole[-2:]
    assert drawn[0.4, 0] != drawn[0.4, 1]
    assert min(len(copy) for (copy,) in drawn[0.4, 0]) < len(whole)
