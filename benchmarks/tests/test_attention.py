"""The cases of the memory attention at small shapes."""

import pytest
from unike_bench.cases import attention
from unike_bench.harness.measure import measure
from unike_eval import eager


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch):
    """Compiling takes longer than all else here."""
    monkeypatch.setattr(attention, "compiler", lambda: False)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("make", [attention.latent, attention.with_retrieval])
def test_every_system_is_checked_and_timed(make, tokens):
    rows = measure(make(90, 64, tokens), rounds=3)
    assert [(row.role, row.failure) for row in rows] == [("ours", None), ("peer", None)]
    assert rows[0].bound > 0


def test_the_gate_is_open():
    layer = attention.Layer(90, 64, 5, 40)
    assert (layer.expected(layer.ids) - layer.out).abs().max() > 0.1


@pytest.mark.parametrize(
    ("make", "wrong"), [(attention.latent, "latent_attention"), (attention.with_retrieval, "memory_attention")]
)
def test_a_wrong_kernel_is_caught(monkeypatch, make, wrong):
    right = getattr(attention.ops, wrong)

    def off(*args, **kwargs):
        out, *rest = right(*args, **kwargs)
        return out * 1.001, *rest

    monkeypatch.setattr(attention.ops, wrong, off)
    ours, peer = measure(make(90, 64, 3), rounds=3)
    assert ours.failure.startswith("AssertionError: Tensor-likes are not close!")
    assert (peer.failure, peer.speedup) == (None, None)


def test_wrong_ids_are_caught(monkeypatch):
    right = attention.ops.memory_attention
    monkeypatch.setattr(
        attention.ops,
        "memory_attention",
        lambda *a, **k: (lambda out, alpha, ids: (out, alpha, ids.flip(1)))(*right(*a, **k)),
    )
    assert measure(attention.with_retrieval(90, 64, 3), rounds=3)[0].failure


def test_a_wrong_peer_is_caught(monkeypatch):
    right = eager.attend
    monkeypatch.setattr(eager, "attend", lambda *args: right(*args) + 0.01)
    for make in (attention.latent, attention.with_retrieval):
        ours, peer = measure(make(90, 64, 3), rounds=3)
        assert ours.failure is None
        assert peer.failure
        assert ours.speedup is None


def test_compiled_torch_is_a_peer_where_there_is_a_compiler(monkeypatch):
    assert "torch.compile" not in attention.latent(90, 64, 3).systems
    monkeypatch.setattr(attention, "compiler", lambda: True)
    assert attention.latent(90, 64, 3).systems["torch.compile"].role == "peer"


@pytest.mark.slow
def test_compiled_torch_computes_the_same(monkeypatch):
    monkeypatch.setattr(attention, "compiler", lambda: True)
    assert [row.failure for row in measure(attention.latent(90, 64, 3), rounds=3)] == [None] * 3
