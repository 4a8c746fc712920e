"""`warm_up` on a CPU, where there is nothing to compile. What it compiles for a GPU: tests/ops/gpu/test_warm_up.py."""

from __future__ import annotations

import pytest
import torch

import unike_kernels as uk

IDS = torch.tensor([[7, 8, 9, 10, 11]])


@pytest.fixture
def model(make_model, make_edit, make_memory):
    model = make_model("llama")
    memory = make_memory(model)
    uk.patch(model, [make_edit(model, "a", memory)], memory)
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def test_the_tables_are_laid_out(model):
    state = model._unike
    stores = [record.edits for record in state.ffns.values()]
    memories = [record.memory for record in state.attentions.values()]
    assert all(each._plan is None for each in (*stores, *memories))
    assert uk.warm_up(model) > 0
    plans = [each._plan for each in (*stores, *memories)]
    views = [store._views[None, None] for store in stores]
    assert len(plans) == 8 and all(plan is not None for plan in plans)
    logits(model)
    assert all(each._plan is plan for each, plan in zip((*stores, *memories), plans, strict=True))
    assert all(store._views[None, None] is view for store, view in zip(stores, views, strict=True))


def test_nothing_changes(make_model, make_edit, make_memory, model):
    version, states = model._unike.context.current, {name: t.clone() for name, t in model.state_dict().items()}
    wanted, seen = logits(model), []
    for module in model.modules():
        module.register_forward_hook(lambda *_: seen.append(1))
    with uk.explain(model) as trace, uk.rows(model, edits=[[]]):
        uk.warm_up(model, range(1, 4))
    assert not seen and not trace.passes
    assert model._unike.context.current is version and not [*model._unike.context._running]
    assert all(torch.equal(t, states[name]) for name, t in model.state_dict().items())
    assert torch.equal(logits(model), wanted)
    assert all(t.grad is None for t in model.parameters())


def test_models_with_less_in_them(make_model, make_edit, make_memory):
    """No edits, no memory, a retriever of one's own, and wrappers."""
    model = make_model("opt")
    uk.patch(model, layers=[2])
    uk.warm_up(model)
    uk.patch(model, [make_edit(model, "a")], replace=True)
    uk.warm_up(torch.compile(model, backend="eager"), [1])
    memory = make_memory(model)
    uk.patch(model, memory=memory, retriever=uk.CosineIndex, replace=True)
    uk.warm_up(model, [1, 2])


@pytest.mark.parametrize("tokens", [[0], [1, -2], [2.0], [True], ["8"]])
def test_what_is_no_number_of_tokens(model, tokens):
    with pytest.raises(ValueError, match="tokens: expected integers of at least 1"):
        uk.warm_up(model, tokens)


def test_a_model_that_is_not_patched(make_model):
    with pytest.raises(uk.PatchError, match="not patched"):
        uk.warm_up(make_model("llama"))
