"""The latency table: every system in every phase, and none of it before the systems agree."""

import importlib

import pytest
import torch
from unike_eval import LatencyRow, LatencyTable, measure_latency

import unike_kernels as uk

EAGER = importlib.import_module("unike_eval.eager")
SYSTEMS = ["unpatched", "eager, weights concatenated per call", "eager, concatenation cached", "patched"]


@pytest.fixture(params=["opt", "blip2-llama"])
def setup(request, make_model, make_memory, make_edit, make_inputs):
    model = make_model(request.param)
    memory = make_memory(model)
    return model, make_inputs(request.param, ["w1 w2 w3"]), [make_edit(model, "a", memory)], memory


def test_all_systems_are_timed(setup):
    model, inputs, *_ = setup
    with torch.no_grad():
        before = model(**inputs).logits
    table = measure_latency(*setup, rounds=3, calls=1)
    assert [(r.phase, r.system) for r in table.rows] == [(p, s) for p in ("prefill", "decode") for s in SYSTEMS]
    for row in table.rows:
        assert row.median > 0
        assert row.spread >= 0
        assert row.ratio == 1.0 if row.system == "unpatched" else row.ratio > 0
    assert (table.tokens, table.threads) == (inputs["input_ids"].shape[1], torch.get_num_threads())
    assert 0 <= table.agreement < 1e-4
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)
    assert not uk.is_patched(model)


@pytest.mark.parametrize("name", ["shift", "activate"])
def test_systems_that_disagree_are_not_timed(setup, monkeypatch, name):
    """The baseline's memory, or its neurons, a little off."""
    right = getattr(EAGER, name)
    monkeypatch.setattr(EAGER, name, lambda *args: right(*args) * 1.05)
    monkeypatch.setattr("unike_eval.latency._time", lambda *_: pytest.fail("timed all the same"))
    with pytest.raises(RuntimeError, match=r"do not compute the same logits \(limit .*'eager, concatenation cached'"):
        measure_latency(*setup, rounds=3, calls=1)
    assert not uk.is_patched(setup[0])


def test_logits_that_are_no_numbers_are_not_agreement(setup, monkeypatch):
    monkeypatch.setattr(EAGER, "shift", lambda hidden, out, *_: out * float("nan"))
    with pytest.raises(RuntimeError, match="nan"):
        measure_latency(*setup, rounds=3, calls=1)


@pytest.mark.parametrize(("rounds", "calls"), [(2, 1), (3, 0)])
def test_too_few_rounds_or_calls(setup, rounds, calls):
    with pytest.raises(ValueError, match=f"expected at least 3 and 1, got {rounds} and {calls}"):
        measure_latency(*setup, rounds=rounds, calls=calls)


def test_prints_as_a_table():
    rows = (LatencyRow("prefill", "unpatched", 1.5, 0.25, 1.0), LatencyRow("decode", "patched", 2.0, 0.5, 1.125))
    lines = str(LatencyTable(rows, 12, 4, 3e-7)).splitlines()
    assert lines[0].endswith("prompt of 12 tokens, 4 threads, edited systems agree to 3e-07")
    assert lines[1].split() == ["phase", "system", "median", "spread", "x", "unpatched"]
    assert lines[2].split() == ["prefill", "unpatched", "1.50", "0.25", "1.00"]
    assert lines[3].split() == ["decode", "patched", "2.00", "0.50", "1.12"]
