"""The cases of the patched FFN at small shapes."""

import sys
from dataclasses import replace

import pytest
from unike_bench.cases import ffn
from unike_bench.harness.measure import measure

D = 32


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(ffn._SIZES, D, 48)


@pytest.mark.parametrize(("tokens", "edits"), [(1, 1), (6, 1), (6, 3), (4, 4)])
def test_every_system_is_checked_and_timed(tokens, edits):
    rows = measure(ffn.case(D, tokens, edits), rounds=3)
    assert [row.failure for row in rows] == [None] * (4 if edits == 1 else 2)
    assert [row.role for row in rows[:2]] == ["ours", "base"]
    assert rows[0].added is not None
    assert rows[0].over is not None
    peers = ("concatenated per call", "concatenated once")
    assert rows[0].against in (peers if edits == 1 else (None,))


def test_neurons_can_be_seen():
    layer = ffn.Layer(D, 6, 1)
    assert (layer.expected - layer.expected_unpatched).abs().max() > 0.01 * layer.expected.abs().max()


@pytest.mark.parametrize("edits", [1, 6])
def test_a_kernel_that_leaves_the_neurons_out_is_caught(monkeypatch, edits):
    monkeypatch.setattr(ffn.ops, "patched_ffn", lambda x, base, pool, activation: base)
    rows = measure(ffn.case(D, 6, edits), rounds=3)
    assert [bool(row.failure) for row in rows] == [True] + [False] * (len(rows) - 1)
    assert all(row.speedup is None for row in rows)


def test_a_row_with_the_edit_of_another_is_caught(monkeypatch):
    right = ffn.ops.patched_ffn

    def rolled(x, base, pool, activation):
        return right(x, base, pool._replace(row_edits=pool.row_edits.roll(1)), activation=activation)

    monkeypatch.setattr(ffn.ops, "patched_ffn", rolled)
    assert measure(ffn.case(D, 6, 3), rounds=3)[0].failure


@pytest.mark.parametrize("there", [True, False])
def test_vllms_kernels_are_measured_where_they_are(there, monkeypatch):
    """With the kernels themselves in tests/serving/test_vllm.py. What is wrong with them costs the others nothing."""
    monkeypatch.setattr(ffn, "installed", lambda *names: there)
    peers = [name for name, s in ffn.case(D, 4, 4, "cuda").systems.items() if s.prepare is ffn.as_adapters]
    assert peers == ["vLLM's LoRA kernels"] * there
    if there:
        monkeypatch.setitem(sys.modules, "vllm", None)
        case = ffn.case(D, 4, 4)
        broken = {peers[0]: ffn.System("peer", ffn.as_adapters)}
        *others, row = measure(replace(case, systems={**case.systems, **broken}), rounds=3)
        assert "ModuleNotFoundError" in row.failure and [other.failure for other in others] == [None, None]
