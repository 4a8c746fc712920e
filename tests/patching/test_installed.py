"""What is in force in a patched model, as `installed` tells it, and what `save_pretrained` leaves out."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch

import unike_kernels as uk

IDS = torch.tensor([[7, 8, 9, 10, 11]])


@pytest.fixture
def setup(make_model, make_memory, make_edit):
    model = make_model("llama")
    memory = make_memory(model)
    return model, memory, [make_edit(model, name, memory, seed=seed) for seed, name in enumerate("abc")]


def test_it_follows_every_change(setup, make_memory):
    model, memory, (a, b, c) = setup
    uk.patch(model, [a, b], memory)
    found = uk.installed(model)
    assert (found.model, [e.id for e in found.edits], found.memory) == ("LlamaForCausalLM", ["a", "b"], memory.id)
    assert found.layers == (2, 3, 4, 5) and found.entries == len(memory) and found.config == memory.config
    for told, edit in zip(found.edits, (a, b), strict=True):
        assert told.layers == {i: len(layer.keys) for i, layer in edit.layers.items()}
        assert told.betas == {i: float(layer.beta) for i, layer in edit.layers.items()}
    uk.add_edit(model, c)
    uk.remove_edit(model, "a")
    uk.set_beta(model, "c", 0.75)
    now = uk.installed(model)
    assert [e.id for e in now.edits] == ["b", "c"] and set(now.edits[1].betas.values()) == {0.75}
    assert [e.id for e in found.edits] == ["a", "b"]  # a report stays what it was
    other = make_memory(model, seed=3)
    uk.swap_memory(model, uk.MemoryBank.joined({"acme": other, "globex": other}), override=True)
    now = uk.installed(model)
    assert now.memory != memory.id and now.entries == 2 * len(other) and now.tenants == ("acme", "globex")
    uk.patch(model, [a], replace=True, override=True)
    now = uk.installed(model)
    assert ([e.id for e in now.edits], now.memory, now.scope_id) == (["a"], None, None)
    uk.unpatch(model)
    with pytest.raises(uk.PatchError, match="is not patched"):
        uk.installed(model)


def test_its_form_for_people(setup):
    model, memory, (a, *_) = setup
    uk.patch(model, [a], memory)
    uk.set_beta(model, "a", 0.25)
    lines = repr(uk.installed(model)).splitlines()
    layers = ", ".join(f"{i}: {len(layer.keys)}" for i, layer in a.layers.items())
    assert lines[0] == "LlamaForCausalLM: layers 2, 3, 4, 5 are patched"
    assert lines[1] == f"  edit 'a': neurons of layers {layers}; beta 0.25"
    assert lines[2] == f"  memory: {memory.id}, {len(memory)} entries" and lines[3] == "  scope: 'all'"
    uk.patch(model, replace=True)
    assert "  no edits\n  memory: none\n" in str(uk.installed(model))


def saved(model, folder) -> list[str]:
    """The warnings of saving the model; what it writes is the base model."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.save_pretrained(folder)
    loaded = type(model).from_pretrained(folder)
    base = uk.unpatch(copy.deepcopy(model)) if uk.is_patched(model) else model
    assert torch.equal(loaded(IDS).logits, base(IDS).logits)
    return [str(w.message) for w in caught if "base model" in str(w.message)]


def test_saving_says_what_it_leaves_out(setup, tmp_path):
    model, memory, (a, b, _) = setup
    before = dict(vars(model))
    assert saved(model, tmp_path / "plain") == []
    uk.patch(model)
    assert saved(model, tmp_path / "nothing") == []  # is left out
    uk.patch(model, [a, b], memory, replace=True)
    (told,) = saved(model, tmp_path / "patched")
    assert f"without the edit 'a', the edit 'b', the memory {memory.id}: keep them" in told
    assert "Edit.save_pretrained(folder, memory=...)" in told and "unike_kernels.fold(model, edits)" in told
    uk.remove_edit(model, "b")
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.nn.DataParallel(model).module):
        (told,) = saved(copied, tmp_path / "copy")
        assert f"without the edit 'a', the memory {memory.id}: keep" in told
    other = copy.deepcopy(model)
    uk.remove_edit(other, "a")
    uk.swap_memory(other, None)
    assert saved(other, tmp_path / "other") == [] and len(saved(model, tmp_path / "one")) == 1
    uk.unpatch(model)
    assert saved(model, tmp_path / "unpatched") == []
    assert vars(model).keys() == before.keys() and "save_pretrained" not in vars(model)


def test_a_save_of_the_objects_own_is_called_and_given_back(setup, tmp_path):
    model, _, (a, *_) = setup
    calls = []
    own = model.save_pretrained = lambda *args, **kwargs: calls.append((args, kwargs)) or "saved"
    with pytest.raises(uk.MismatchError):
        uk.patch(model, [a])
    assert model.save_pretrained is own
    with uk.patched(model, [a], override=True), pytest.warns(UserWarning, match="without the edit 'a': keep them"):
        assert model.save_pretrained("folder", max_shard_size=3) == "saved"
    assert calls == [(("folder",), {"max_shard_size": 3})] and model.save_pretrained is own
