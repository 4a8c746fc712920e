"""Hidden states: of which model, extracted once."""

import pytest
import torch
from unike_bench.cases import data, hidden, retrieval
from unike_bench.harness import optional

from unike_kernels.backbones import find_decoder


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(hidden, "TOKENS", 100)
    monkeypatch.setattr(hidden.tempfile, "gettempdir", lambda: str(tmp_path))
    return tmp_path


@pytest.fixture
def digits(monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(optional, "smollm2", lambda: False)


def test_the_shipped_model_stands_in(small, digits):
    assert (hidden.source(), hidden.width()) == ("digits", 64)
    found = hidden.states()
    assert all(t.shape == (100, 64) and t.dtype == torch.float32 for s in found.values() for t in s)
    (file,) = small.iterdir()
    written = file.stat().st_mtime_ns
    again = hidden.states()
    assert file.stat().st_mtime_ns == written
    assert all(torch.equal(a, b) for i in found for a, b in zip(found[i], again[i], strict=True))


def test_a_broken_file_is_made_anew(small, digits):
    found = hidden.states()
    (file,) = small.iterdir()
    file.write_bytes(b"x" * 50)
    again = hidden.states()
    assert all(torch.equal(a, b) for i in found for a, b in zip(found[i], again[i], strict=True))
    assert file.stat().st_size > 50


def test_states_are_the_attentions_input_and_output(small, make_model):
    model = make_model("llama")
    ids = torch.arange(4, 44).reshape(2, 20)
    found = hidden._extract(model, iter([{"input_ids": ids}] * 9))
    assert list(found) == [2, 3, 4, 5]
    layer = find_decoder(model).layers[3].module
    seen = []
    layer.self_attn.register_forward_hook(
        lambda module, args, kwargs, out: seen.append((kwargs["hidden_states"], out[0])), with_kwargs=True
    )
    with torch.no_grad():
        model(input_ids=ids)
    for state, wanted in zip(found[3], seen[0], strict=True):
        assert state.shape == (100, 64)
        torch.testing.assert_close(state[:40], wanted.flatten(0, 1))


def test_keys_and_queries_are_different_states(monkeypatch):
    states = hidden.States(torch.arange(50.0).unsqueeze(1).repeat(1, 4), torch.zeros(50, 4))
    monkeypatch.setattr(hidden, "states", lambda: {1: None, 2: states})
    keys, queries = data.keys_and_queries("hidden", 30, 20, 4)
    assert sorted(torch.cat([keys, queries])[:, 0].tolist()) == list(range(50))
    with pytest.raises(ValueError, match=r"hidden: expected 51 states of width 4, there are \[50, 4\]"):
        data.keys_and_queries("hidden", 31, 20, 4)


def test_without_any_model(small, monkeypatch):
    monkeypatch.setattr(optional, "installed", lambda *_: False)
    assert (hidden.source(), hidden.width()) == (None, None)
    with pytest.raises(ImportError, match="hidden states need a model"):
        hidden.states()
    assert all(case.shape["data"] != "hidden" for case in retrieval.quick() + retrieval.full())
