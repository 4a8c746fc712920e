"""The eager baseline computes the same as the patched model and leaves no trace."""

import dataclasses

import pytest
import torch
from configs import every_token
from scopes import scoped
from unike_eval.eager import eager

import unike_kernels as uk

PRE = {"k": 7, "values": "pre"}
CONFIGS = [PRE, {"k": 7, "values": "out"}, {**PRE, "convention": "eq7", "norm": "none", "alpha": 0.3, "scale": 0.5}]
CONFIGS += [
    {**PRE, "scale": "cosine"},
    {**PRE, "tokens": "answer", "scale": "cosine"},
    {"k": 7, "values": "context", "scale": "cosine", "tau": 0.3},
]


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("config", CONFIGS, ids=["pre", "out", "switches", "cosine", "defaults", "context"])
@pytest.mark.parametrize("kind", ["opt", "llama", "blip2-llama"])
def test_equals_the_patched_model(make_model, make_memory, make_edit, make_inputs, kind, config, cached):
    model = make_model(kind)
    memory = make_memory(model, every_token(**config))
    edits = [make_edit(model, "a", memory), make_edit(model, "b", memory, seed=5, layers=(1, 4))]
    inputs = make_inputs(kind, ["w1 w2 w3 w4", "w5 w6 w7 w8"])  # without padding: the baseline would shift that too
    plain, before = logits(model, inputs), [(id(m), len(m._forward_hooks)) for m in model.modules()]
    for used, recalled in ((edits, memory), ([], memory), (edits, None)):
        alone = [dataclasses.replace(e, memory_id=recalled.id if recalled else None) for e in used]
        with uk.patched(model, alone, recalled):
            wanted = logits(model, inputs)
        with eager(model, alone, recalled, cached=cached):
            found = logits(model, inputs)
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
        assert (wanted - plain).abs().max() > 0.05
        assert [(id(m), len(m._forward_hooks)) for m in model.modules()] == before
    assert torch.equal(logits(model, inputs), plain)


def test_restores_after_an_error(make_model, make_memory, make_edit, make_inputs):
    model = make_model("opt")
    memory = make_memory(model)
    before = [(id(m), len(m._forward_hooks)) for m in model.modules()]
    with pytest.raises(KeyError), eager(model, [make_edit(model, "a", memory)], memory, cached=True):
        raise KeyError
    assert [(id(m), len(m._forward_hooks)) for m in model.modules()] == before


def test_live_weights_count_only_where_nothing_is_cached(make_model, make_edit, make_inputs):
    model, inputs = make_model("opt"), make_inputs("opt", ["w1 w2"])
    found = {}
    for cached in (False, True):
        edit = make_edit(model)
        with eager(model, [edit], None, cached=cached):
            before = logits(model, inputs)
            edit.layers[3].values.mul_(2)
            found[cached] = torch.equal(logits(model, inputs), before)
    assert found == {False: False, True: True}


@pytest.mark.parametrize(
    "config",
    [{"alpha": "last"}, {"retrieval": "sequence"}, {"values": "projected"}, {"tokens": "text"}],
)
def test_what_it_does_not_know(make_model, make_memory, config):
    model = make_model("blip2-opt")
    memory = make_memory(model, every_token(**{**PRE, **config}))
    with pytest.raises(NotImplementedError, match="eager baseline"), eager(model, [], memory, cached=False):
        pass


def test_a_scope_is_not_known(make_model, make_edit):
    model = make_model("llama")
    memory, edits = scoped(model, make_edit)
    with pytest.raises(NotImplementedError, match="eager baseline"), eager(model, edits, memory, cached=False):
        pass


def test_gated_neurons_are_not_known(make_model, make_edit):
    model = make_model("llama")
    edit = make_edit(model, gated=True)
    with pytest.raises(NotImplementedError, match="plain neurons"), eager(model, [edit], None, cached=False):
        pass
