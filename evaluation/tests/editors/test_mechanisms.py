"""Latent-IKE, LoRA, GRACE, WISE, MEMIT and AlphaEdit, each by what it is said to do, on tiny random models."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from unike_eval import Case, observe
from unike_eval.editors import GRACE, MEMIT, WISE, AlphaEdit, LatentIKE, LoRA
from unike_eval.editors.base import answer_loss
from unike_eval.editors.wise import merged
from unike_eval.suite import Request, Suite

from unike_kernels.backbones import find_decoder
from unike_kernels.config import Config
from unike_kernels.training import Fact, Sample, ScopeTraining
from unike_kernels.training.samples import encode, forward

ASKED = [Sample(f"w{i} w1 w{i + 3} w2", f"w{i + 20} w{i + 5}") for i in range(4, 8)]
KEPT = [Sample(f"w{i} w30", "w31") for i in range(8)]


def suite(asked=ASKED):
    requests = [Request(f"r{i}", "vqa", Case(s), "w3", subject=f"w{i + 7}") for i, s in enumerate(asked)]
    return Suite("words", [], [], requests, KEPT)


@pytest.fixture(params=["opt", "llama"])
def setting(request, make_model, processor):
    return make_model(request.param), processor


def fitted(system, setting, **settings):
    editor = system(*setting, **settings)
    editor.fit(suite())
    return editor


EASY = {
    LoRA: {},
    GRACE: {},
    WISE: {"margin": 3.0, "lr": 0.3},
    MEMIT: {"layers": [3, 4], "lr": 0.5, "weight": 1e-3},
    AlphaEdit: {"layers": [3, 4], "lr": 0.5, "threshold": 0.5, "ridge": 1e-3},
}


@pytest.mark.parametrize("system", EASY, ids=lambda system: system.name)
def test_an_edit_is_said_and_taken_back(system, setting):
    """One word, at the prompt's end: a shift at one place of a random model need not say what follows, too."""
    request, unedited = replace(ASKED[0], answer="w24"), observe(*setting, ASKED)
    editor = system(*setting, **EASY[system])
    editor.fit(suite([]))
    editor.edit(request)
    (seen,) = editor.observe([request])
    assert seen.best[seen.answer, 0].tolist() == seen.wanted.tolist() and seen.said.split()[0] == "w24"
    assert unedited[0].said.split()[0] != "w24"
    editor.reset()
    for was, now in zip(unedited, editor.observe(ASKED), strict=True):
        assert torch.equal(was.best, now.best) and was.said == now.said
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in setting[0].modules())


def test_grace_acts_within_a_radius_and_nowhere_else(setting):
    editor, unedited = fitted(GRACE, setting, radius=0.5), observe(*setting, ASKED)
    editor.edit(ASKED[0])
    batches = [editor.targets([s]) for s in ASKED]
    distances = [float((editor._key(b) - editor.keys[0]).norm()) for b in batches]
    for radius in (0.0, sorted(distances)[1] + 1e-3, max(distances) + 1e-3):
        editor.radii[0] = radius + 1e-3
        for seen, was, distance in zip(editor.observe(ASKED), unedited, distances, strict=True):
            assert torch.equal(seen.best, was.best) == (distance > editor.radii[0])
    assert sorted(distances)[0] == 0 < sorted(distances)[1]


def test_graces_radii_widen_and_split(setting):
    """The paper's Algorithm 1 on keys along a line, of radius 2."""
    editor = GRACE(*setting)
    at = torch.zeros(64)
    at[0] = 10.0

    def entry(where, answer):
        key = at.clone()
        key[1] = where
        editor.radius = 2.0 / float(key.norm())
        return editor._entry(key, answer), [round(r, 3) for r in editor.radii]

    assert entry(0.0, "a") == (0, [2.0])
    assert entry(5.0, "a") == (1, [2.0, 2.0])  # out of reach
    assert entry(-3.0, "a") == (0, [3.0, 2.0])  # reached, with its answer
    assert entry(6.0, "b") == (2, [3.0, 0.5, 0.5])  # reached, with another
    assert editor.keys.shape == (3, 64)


def test_wise_routes_by_the_prompt_alone_and_changes_masked_weights(setting):
    editor = fitted(WISE, setting, **EASY[WISE], density=0.3)
    editor.edit(ASKED[0])
    (mask,) = editor._masks
    assert 0.25 < float(mask.mean()) < 0.35
    assert (editor._side[mask == 0] == 0).all() and (editor._side[mask == 1] != 0).any()
    other = [Sample(s.prompt, "w9 w8 w7") for s in ASKED]
    editor.observe(other)
    of_others = editor._activations
    editor.observe(ASKED)
    first = editor._activations
    assert torch.allclose(first, of_others)
    assert editor.threshold == pytest.approx(float(first[0]), rel=1e-4) and editor.threshold >= 2 * 3.0 * 0.9
    unedited = observe(*setting, ASKED)
    editor.threshold = float(first.sort().values[1]) / editor.slack  # above it are two
    for seen, was, activation in zip(editor.observe(ASKED), unedited, first.tolist(), strict=True):
        assert torch.equal(seen.best, was.best) == (activation <= editor.slack * editor.threshold)


LEARNT = replace(
    suite(),
    train=[Request(f"t{i}", "vqa", Case(Sample(f"w{i} w1 w2", f"w{i + 9}")), "w3") for i in range(12, 16)],
    facts=[
        Fact([Sample(f"w{i} w{j}"), Sample(f"w{j} w{i} w40"), Sample(f"w41 w{i} w{j}")])
        for i in (50, 51, 52)
        for j in (1, 2)
    ],
)


def test_a_requests_own_entries_act_where_it_is_asked_for_alone(setting):
    """One for each token of its answer; the training requests that the memory began with act nowhere."""
    samples = [*ASKED[:1], *(replace(fact.wordings[0], answer="w3") for fact in LEARNT.facts)]
    unedited = observe(*setting, samples)
    config = Config(values="context", norm="none", alpha=1.0)
    editor = LatentIKE(*setting, config=config, layers=3, scope=ScopeTraining(steps=30))
    editor.fit(LEARNT)
    first = len(editor._memory)
    editor.edit(ASKED[0])
    assert sorted(editor._memory.layers) == [3, 4, 5] and len(editor._memory) == first + 2
    own = editor._memory.scope.own.tolist()
    assert [pair for pair in own if pair != [0, 0]] == [[first, first + 2]]
    (asked, *others), (was, *were) = editor.observe(samples), unedited
    assert not torch.equal(asked.best, was.best)
    assert all(
        torch.equal(now.best, then.best) and now.said == then.said for now, then in zip(others, were, strict=True)
    )
    editor.reset()
    assert torch.equal(editor.observe(ASKED[:1])[0].best, was.best)


def test_without_a_scope_any_row_retrieves_the_nearest_entries(setting):
    editor = LatentIKE(*setting, config=Config(k=1, norm="none", alpha=1.0), layers=2)
    editor.fit(LEARNT)
    (before,) = editor.observe(KEPT[:1])
    assert not torch.equal(before.best, observe(*setting, KEPT[:1])[0].best)
    with pytest.raises(ValueError, match=r"config.alpha: expected a number, got 'token'"):
        LatentIKE(*setting, config=Config())


def test_wise_begins_shards_and_merges_them(setting):
    editor = fitted(WISE, setting, steps=3, shard=2)
    for request in ASKED[:3]:
        editor.edit(request)
    assert [float(s.abs().sum() > 0) for s in editor._shards] == [1.0, 1.0]
    assert not torch.equal(*editor._masks)
    assert torch.equal(editor._side, merged(editor._shards))
    changes = [torch.tensor([1.0, 0.0, 2.0, -1.0]), torch.tensor([3.0, 5.0, -1.0, -2.0])]
    assert merged(changes).tolist() == [2.0, 5.0, 2.0, -1.5]


def test_memits_change_is_the_least_squares_solution(setting):
    """Of what must stay (weighted), an earlier key, and the new one, solved as one system in float64."""
    editor = fitted(MEMIT, setting, layers=[3], weight=7.0)
    f, d = editor._linears[0].in_features, 64
    kept, earlier, key = (torch.randn(n, f, dtype=torch.float64) for n in (3 * f, 2, 1))
    residual = torch.randn(d, dtype=torch.float64)
    editor.keep([kept.T @ kept / len(kept)])
    editor._earlier = [earlier.T @ earlier]
    rows = torch.cat([kept * (7.0 / len(kept)) ** 0.5, earlier, key])
    values = torch.cat([torch.zeros(len(rows) - 1, d, dtype=torch.float64), residual.unsqueeze(0)])
    wanted = torch.linalg.lstsq(rows, values).solution.T
    torch.testing.assert_close(editor.solve(0, key[0], residual), wanted)


def test_memit_brings_the_late_state_about(setting):
    editor = fitted(MEMIT, setting, **EASY[MEMIT])
    batch = editor.targets(ASKED[:1])
    at = editor._positions(ASKED[:1], batch, "w7")
    wanted = editor._late_state(batch, at, "w7")
    before = editor._seen(batch, [editor._late])[0][0, at[0]].double()
    editor._prefixes = []  # so that the mean key is this one
    editor.edit(ASKED[0])
    after = editor._seen(batch, [editor._late])[0][0, at[0]].double()
    assert float((after - wanted).norm()) < 0.1 * float((before - wanted).norm())


@pytest.mark.parametrize("system", [MEMIT, AlphaEdit])
def test_what_must_stay_is_measured_once_for_a_model(system, setting, monkeypatch):
    """For all candidates and requests; what is learnt from other texts, or of other layers, is another thing."""

    def edited(editor):
        editor.edit(ASKED[0])
        weights = [p.detach().clone() for p in editor.parameters]
        editor.reset()
        return weights

    before = edited(fitted(system, setting, **EASY[system]))
    measured, own = [], system._moments_over
    monkeypatch.setattr(system, "_moments_over", lambda self, texts: measured.append(texts) or own(self, texts))
    for was, now in zip(before, edited(fitted(system, setting, **EASY[system])), strict=True):
        assert torch.equal(was, now)
    assert not measured
    system(*setting, **EASY[system]).fit(replace(suite(), preserve=KEPT[:5]))
    fitted(system, setting, **{**EASY[system], "layers": [2, 3]})
    assert [len(texts) for texts in measured] == [5, 8]


def test_a_pass_that_looks_at_states_ends_with_them(setting):
    editor = fitted(MEMIT, setting, layers=[2, 3])
    layers, passed = find_decoder(setting[0]).layers, []
    for i, layer in enumerate(layers):
        layer.module.register_forward_pre_hook(lambda *_, i=i: passed.append(i))
    editor._inputs(editor.encode(KEPT[:2]))
    assert passed == [0, 1, 2, 3] and len(layers) > 4


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_the_loss_of_answers_of_several_lengths(make_model, make_processor, padding_side):
    """Against the logits of all positions."""
    model, processor = make_model("llama"), make_processor(padding_side)
    batch = encode(processor, [Sample("w5 w9 w1", "w2"), Sample("w6", "w2 w3 w4"), Sample("w1 w2 w8 w9", "w3 w7")])
    answers = batch.answer_mask()
    logits = forward(model, batch.inputs)[:, :-1][answers[:, 1:]]
    wanted = torch.nn.functional.cross_entropy(logits, batch.inputs["input_ids"][answers])
    torch.testing.assert_close(answer_loss(model, batch), wanted)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_subjects_are_found(make_model, make_processor, padding_side):
    editor = fitted(MEMIT, (make_model("opt"), make_processor(padding_side)), layers=[3])
    samples = [Sample("w5 w9 w1", "w2"), Sample("w6 w6 w5 w9 w5 w9", "w2 w3"), Sample("w1 w2", "w3")]
    batch = editor.targets(samples)
    at = editor._positions(samples, batch, "w5 w9")
    rows = torch.arange(3)
    assert batch.inputs["input_ids"][rows, at].tolist() == [4 + 9, 4 + 9, 4 + 2]
    assert at[1] == batch.ends[1]  # the last of its places


def test_alphaedit_leaves_preserved_keys_and_earlier_edits_as_they_are(setting):
    model, _ = setting
    editor = fitted(AlphaEdit, setting, layers=[3, 4], lr=0.5, threshold=1e-6, ridge=1e-3)
    ranks = [int(p.diagonal().sum().round()) for p in editor._projections]
    assert all(0 < rank < m.in_features for rank, m in zip(ranks, editor._linears, strict=True))
    kept = editor.encode(KEPT)
    keys = editor._inputs(kept)
    values = [m(k) for m, k in zip(editor._linears, keys, strict=True)]
    said = forward(model, kept.inputs).detach()
    editor.edit(ASKED[0])
    for linear, key, value, weight in zip(editor._linears, keys, values, editor._before, strict=True):
        assert float((linear.weight - weight).detach().norm()) > 1e-2
        torch.testing.assert_close(linear(key), value, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(forward(model, kept.inputs), said, rtol=1e-3, atol=1e-3)
    first = editor._earlier[0].clone()
    change = editor.solve(0, torch.randn(len(first), dtype=torch.float64), torch.ones(64, dtype=torch.float64))
    values, vectors = torch.linalg.eigh(editor._projections[0] @ first @ editor._projections[0])
    assert float(values[-1]) > 0.1
    assert float((change @ vectors[:, -1]).norm()) < 0.05 * float(change.norm())


def test_what_is_not_fitted_or_not_there(setting, monkeypatch):
    with pytest.raises(ValueError, match="MEMIT: expected `fit` before an edit"):
        MEMIT(*setting).edit(ASKED[0])
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="LoRA needs PEFT"):
        LoRA(*setting).edit(ASKED[0])


def test_lora_leaves_no_trace(setting):
    model, processor = setting
    asked = [(name, p.requires_grad) for name, p in model.named_parameters()]
    editor = fitted(LoRA, setting)
    before = forward(model, encode(processor, ASKED).inputs).detach()
    editor.edit(ASKED[0])
    editor.edit(ASKED[1])
    assert any("lora_" in name for name, _ in model.named_parameters())
    editor.reset()
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == asked
    assert torch.equal(forward(model, encode(processor, ASKED).inputs), before)
    assert not hasattr(model, "peft_config") and not getattr(model, "_hf_peft_config_loaded", False)
