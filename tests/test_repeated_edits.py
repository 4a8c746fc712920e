"""A row that names an edit more than once is refused on every way in: kernels have room for each edit once."""

from __future__ import annotations

import time

import pytest
import torch

import unike_kernels as uk
from unike_kernels.nn import extra_neurons
from unike_kernels.ops import EditPool
from unike_kernels.ops.patched_ffn import cpu
from unike_kernels.ops.patched_ffn.reference import FFNWeights, check_distinct
from unike_kernels.serving.ragged import RaggedRuntime, RequestSlice


def pool_of(rows: list[list[int]], edits: int = 2, d: int = 16) -> EditPool:
    starts = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    listed = torch.tensor([e for row in rows for e in row], dtype=torch.int64)
    keys, zeta = torch.randn(edits, d), torch.randn(edits, d)
    return EditPool(
        keys, torch.randn(edits), None, None, torch.randn(edits, d), zeta, torch.randn(edits),
        torch.arange(edits + 1), starts, listed,
    )  # fmt: skip


@pytest.mark.parametrize("rows", [[[0], [1, 1]], [[0], [1, 0, 1]], [[], [0] * 20_000], [[0, 1], [0, 1] * 50]])
@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("fused", [False, True])
def test_the_operator(rows, backend, fused):
    x = torch.randn(4, 16, requires_grad=True)
    base = FFNWeights(torch.randn(8, 16), None, None, None, torch.randn(16, 8), None) if fused else torch.randn(4, 16)
    with uk.backend(backend if not fused else "reference"):
        with pytest.raises(ValueError, match=r"pool\.row_edits: row 1 names an edit more than once; expected distinct"):
            uk.ops.patched_ffn(x, base, pool_of(rows), activation="relu")
        uk.ops.patched_ffn(x, base, pool_of([[0, 1], [1, 0]]), activation="relu").sum().backward()


@pytest.mark.parametrize("rows", [[[0], [1, 1]], [[], [0] * 20_000], [[1, 0, 1], []]])
def test_the_core_itself(rows):
    """Without the checks of Python: an error, and not a byte beyond a buffer."""
    x, pool = torch.randn(4, 16), cpu.Pool(pool_of(rows), "relu")
    for run in (pool.add, pool.gradients):
        with pytest.raises(ValueError, match=r"row_(edits|indptr): expected .*distinct edits"):
            run(x, x)


@pytest.mark.parametrize("op", ["add_extra_neurons", "add_extra_neurons_backward"])
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_the_registered_operators(op, backend):
    x = torch.randn(4, 16)
    with uk.backend(backend), pytest.raises(ValueError, match="distinct"):
        getattr(torch.ops.unike, op)(x, x, *pool_of([[1, 1], []]), "relu")


def test_rows_that_are_named_by_tokens():
    """One row that no token uses is refused like the others."""
    pool = pool_of([[0], [1, 1]])._replace(token_rows=torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="row 1 names an edit more than once"):
        uk.ops.patched_ffn(torch.randn(4, 16), torch.randn(4, 16), pool, activation="relu")


def test_a_bank(make_model, make_edit):
    bank = uk.EditBank([1, 2, 3, 4, 5], 64, "silu")
    x = torch.randn(4, 64)
    bank.add(make_edit(make_model("llama"), "kea"))
    for use in (
        lambda rows: bank.apply(2, x, x, rows),
        lambda rows: bank.pool(2, rows),
        lambda rows: bank.apply(1, x, x, rows),  # where no edit has neurons
    ):
        with pytest.raises(ValueError, match=r"rows\[1\]: expected distinct edit ids, got \['kea', 'kea'\]"):
            use([["kea"], ["kea", "kea"]])
    assert bank.apply(2, x, x, [["kea"], []]).shape == x.shape


def test_a_patched_model(make_model, make_edit):
    model = make_model("llama")
    ids = torch.tensor([[5, 6], [7, 8]])
    with uk.patched(model, [make_edit(model, name, seed=seed) for seed, name in enumerate("ab")]):
        with pytest.raises(ValueError, match=r"edits\[1\]: expected distinct ids, got \['a', 'a'\]"):
            uk.rows(model, [["a"], ["a", "a"]]).__enter__()
        ffn = extra_neurons(model.model.layers[3].mlp)
        with pytest.raises(ValueError, match=r"rows\[0\]: expected distinct edit ids"):
            ffn.edits.csr([["b", "a", "b"], []])
        with pytest.raises(ValueError, match=r"rows\[0\]: expected distinct edit ids"):
            ffn.edits.pool((("b", "b"), ()))
        with pytest.raises(ValueError, match=r"rows\[0\]: expected distinct edit ids"), torch.no_grad():
            ffn.edits.view("silu", (("b", "b"), ()))
        with uk.rows(model, [["a", "b"], ["b"]]), torch.no_grad():
            model(input_ids=ids)


def test_a_server(make_model, make_edit):
    model = RaggedRuntime([2, 3, 4, 5], 64, "silu")
    model.bank.add(make_edit(make_model("llama"), "a"))
    with pytest.raises(ValueError, match=r"shares\[1\]\.edits: expected distinct keys, got \['a', 'a'\]"):
        model.begin([RequestSlice(1, ("a",)), RequestSlice(1, ("a", "a"))])


def test_it_costs_a_decode_call_next_to_nothing(make_model, make_edit):
    """Rows are looked at when they are laid out; the kernel's own look is a few hundred nanoseconds."""
    pool = pool_of([[i % 8, (i + 1) % 8] for i in range(64)], edits=8)
    start = time.process_time()
    for _ in range(100):
        check_distinct(pool)
    assert (time.process_time() - start) / 100 < 2e-3
    edits = uk.nn.LayerEdits()
    edits.set({"a": make_edit(make_model("llama"), "a").layers[2]})
    assert edits.view("silu", (("a",),)) is edits.view("silu", (("a",),))
