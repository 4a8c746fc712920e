"""The cases of decoding, with a tiny model in the place of SmolLM2."""

from types import SimpleNamespace

import pytest
import torch
from unike_bench.cases import decode, hidden
from unike_bench.harness.measure import measure

from unike_kernels.ops.memory_attention import cpu

SYSTEMS = ["unike patched", "unpatched", "eager, concatenated per call", "eager, concatenated once"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch, make_model):
    model = make_model("llama")

    def tokenizer(text, return_tensors):
        return SimpleNamespace(input_ids=torch.arange(4, 44).unsqueeze(0))

    def states():
        return {i: hidden.States(torch.randn(60, 64), torch.randn(60, 64)) for i in range(2, 6)}

    monkeypatch.setattr(decode.smollm2, "load", lambda: (model, tokenizer))
    monkeypatch.setattr(hidden, "states", states)
    monkeypatch.setattr(decode, "PROMPT", 12)
    return model


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_every_system_is_checked_and_timed(phase):
    rows = measure(decode.case(50, phase), rounds=3)
    assert [(row.system, row.failure) for row in rows] == [(name, None) for name in SYSTEMS]
    assert rows[0].bound > 0
    assert rows[0].added is not None
    assert rows[0].shape == {"phase": phase, "N": 50, "T": 1 if phase == "decode" else 12, "layers": 4}


def test_the_systems_share_the_models_weights(tiny):
    subject = decode.Subject(50, "decode")
    shared = {id(p) for p in tiny.parameters()}
    for model in (subject.patched(), subject.eager(cached=False)):
        assert model is not tiny
        assert {id(p) for p in model.parameters()} <= shared
    assert not any(module._forward_hooks for module in tiny.modules())


def test_a_patch_that_does_nothing_is_caught(monkeypatch):
    monkeypatch.setattr(decode, "patch", lambda *_: None)
    rows = measure(decode.case(50, "decode"), rounds=3)
    assert [bool(row.failure) for row in rows[1:]] == [False] * 3
    # Without a memory to take the bound from, and with the unpatched model's logits.
    assert rows[0].failure


@torch.no_grad()
def test_an_edit_that_cannot_be_seen_is_no_check():
    subject = decode.Subject(50, "decode")
    subject.expected = subject.unpatched_logits
    with pytest.raises(AssertionError, match="the edit changes the logits by 0, too little"):
        subject.check(subject.unpatched_logits)


@torch.no_grad()
def test_wrong_kernels_are_caught(monkeypatch):
    subject = decode.Subject(50, "decode")
    model = subject.patched()
    subject.check(subject.step(model)())
    subject.check_definition(model)
    native = cpu.attend
    monkeypatch.setattr(cpu, "attend", lambda *a, **k: (native(*a, **k)[0] * 1.05, None, None))
    with pytest.raises(AssertionError):
        subject.check(subject.step(model)())
    with pytest.raises(AssertionError):
        subject.check_definition(model)


def test_without_smollm2_there_is_nothing_to_decode(monkeypatch):
    monkeypatch.setattr(decode.optional, "smollm2", lambda: False)
    assert decode.quick() == decode.full() == []
