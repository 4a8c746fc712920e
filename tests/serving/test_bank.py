"""The bank against edits applied one by one, whatever was added, removed and replaced before; and isolation of rows."""

from __future__ import annotations

import pytest
import torch
from configs import every_token
from hypothesis import given, settings
from hypothesis import strategies as st

import unike_kernels as uk
from unike_kernels.ops.patched_ffn.reference import activate

D, LAYERS = 12, (2, 5)
BACKENDS = ["reference", "native"]


def neurons(n, gated, seed):
    def rand(*shape):
        return torch.randn(*shape, generator=generator)

    generator = torch.Generator().manual_seed(seed)
    up = (rand(n, D), rand(n)) if gated else (None, None)
    return uk.EditLayer(rand(n, D), rand(n), rand(n, D), rand(D), rand(()), *up)


def edit(id, sizes=(3, 2), gated=False, seed=0, activation="silu", layers=LAYERS):
    made = {layer: neurons(n, gated, 100 * seed + layer) for layer, n in zip(layers, sizes, strict=True)}
    return uk.Edit(id, made, activation, every_token(), {}, None)


def alone(x, base, edits, layer):
    """A row's output, edit after edit, in float64."""
    total = base.double()
    for e in (e.layers[layer] for e in edits if layer in e.layers):
        o = activate("silu", x.double() @ e.keys.double().T + e.key_bias)
        if e.up is not None:
            o = o * (x.double() @ e.up.double().T + e.up_bias)
        total = total + o @ (e.values + e.beta * e.zeta).double()
    return total


def bank_of(*edits):
    bank = uk.EditBank(LAYERS, D, "silu")
    for each in edits:
        bank.add(each)
    return bank


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["add", "remove", "replace"]), st.integers(0, 6), st.integers(1, 9), st.booleans()),
    max_size=25,
)


@given(ACTIONS, st.data())
@settings(max_examples=60)
def test_whatever_was_done_before(actions, data):
    bank, held = bank_of(), {}
    for seed, (action, name, n, gated) in enumerate(actions):
        made = edit(f"e{name}", (n, 1 + n % 3), gated, seed)
        if action == "remove" and made.id in held:
            bank.remove(made.id)
            del held[made.id]
        elif action == "replace" and made.id in held:
            bank.replace(made)
            held[made.id] = made
        elif action == "add" and made.id not in held:
            bank.add(made)
            held[made.id] = made
    assert (len(bank), set(bank)) == (len(held), set(held))
    row = st.lists(st.sampled_from(sorted(held)), max_size=3, unique=True) if held else st.just([])
    rows = data.draw(st.lists(row, min_size=1, max_size=4))
    x, base = torch.randn(2 * len(rows), D), torch.randn(2 * len(rows), D)
    for layer in LAYERS:
        out = bank.apply(layer, x, base, rows)
        for r, row in enumerate(rows):
            at = slice(2 * r, 2 * r + 2)
            wanted = alone(x[at], base[at], [held[id] for id in row], layer)
            torch.testing.assert_close(out[at].double(), wanted, rtol=1e-4, atol=1e-4)
            assert row or torch.equal(out[at], base[at])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_does_not_see_the_edits_of_the_others(backend):
    """Bit for bit, whether theirs are there, removed, or replaced."""
    bank = bank_of(edit("mine", seed=1), edit("theirs", (5, 4), seed=2), edit("more", (1, 1), True, seed=3))
    x, base = torch.randn(3, D), torch.randn(3, D)
    with uk.backend(backend):
        before = bank.apply(2, x, base, [["mine"], ["theirs"], ["more", "theirs"]])
        bank.replace(edit("theirs", (8, 8), seed=9))
        replaced = bank.apply(2, x, base, [["mine"], ["theirs"], ["more", "theirs"]])
        bank.remove("theirs")
        removed = bank.apply(2, x, base, [["mine"], [], ["more"]])
    assert torch.equal(before[0], replaced[0])
    assert torch.equal(before[0], removed[0])
    assert torch.equal(removed[1], base[1])
    assert not torch.equal(before[1:], replaced[1:])


def test_a_pool_stays_what_it_was():
    bank = bank_of(edit("a"), edit("b", seed=1))
    x, base = torch.randn(2, D), torch.randn(2, D)
    pool = bank.pool(2, [["a"], ["b"]])
    before = uk.ops.patched_ffn(x, base, pool, activation="silu")
    bank.remove("a")
    for n in range(40):
        bank.add(edit(f"n{n}", seed=n))
    assert torch.equal(uk.ops.patched_ffn(x, base, pool, activation="silu"), before)


def test_tensors_are_kept_and_space_is_bounded():
    """Three thousand requests come and go: what is left is right, and the bank does not grow."""
    bank = bank_of(*(edit(f"r{n}", (4, 4), seed=n) for n in range(20)))
    kept = bank.pool(2, [["r0"]]).keys.data_ptr()
    bank.replace(edit("r19", (4, 4), seed=99))
    assert bank.pool(2, [["r0"]]).keys.data_ptr() == kept
    largest = 0
    for n in range(20, 3020):
        bank.remove(f"r{n - 20}")
        bank.add(edit(f"r{n}", (4, 4), seed=n % 7))
        largest = max(largest, bank.nbytes)
    assert len(bank) == 20
    x, base = torch.randn(2, D), torch.randn(2, D)
    found = bank.apply(2, x, base, [["r3019"], ["r3000"]])
    for r, n in enumerate((3019, 3000)):
        wanted = alone(x[r : r + 1], base[r : r + 1], [edit("x", (4, 4), seed=n % 7)], 2)
        torch.testing.assert_close(found[r : r + 1].double(), wanted, rtol=1e-4, atol=1e-4)
    one = edit("x", (4, 4)).nbytes
    assert largest < 8 * 20 * one


def test_refusals_change_nothing():
    bank = bank_of(edit("a"))
    before = bank.nbytes
    for call, error, message in [
        (lambda: bank.add(edit("a")), uk.PatchError, "'a' is in the bank already"),
        (lambda: bank.replace(edit("b")), uk.PatchError, "'b' is no edit of the bank"),
        (lambda: bank.remove("b"), uk.PatchError, "'b' is no edit of the bank"),
        (lambda: bank.add(edit("c", activation="relu")), uk.MismatchError, "it is for relu FFNs, the bank's are silu"),
        (lambda: bank.add(edit("c", layers=(2, 7))), uk.MismatchError, r"no layers \[7\], it has \[2, 5\]"),
        (lambda: bank.pool(3, [["a"]]), ValueError, r"layer: expected one of \[2, 5\], got 3"),
        (lambda: bank.pool(2, []), ValueError, "rows: expected at least one row"),
        (lambda: bank.pool(2, [[], ["a", "z"]]), uk.PatchError, r"rows\[1\]: unknown edit ids \['z'\]"),
        (lambda: uk.EditBank([], D, "silu"), ValueError, "layers: expected distinct layers"),
        (lambda: uk.EditBank([1], 0, "silu"), ValueError, "hidden_size: expected at least 1"),
        (lambda: uk.EditBank([1], D, "tanh"), ValueError, "activation: expected one of relu"),
    ]:
        with pytest.raises(error, match=message):
            call()
    assert (list(bank), bank.nbytes) == (["a"], before)
    assert torch.equal(bank.apply(5, torch.ones(1, D), torch.ones(1, D), [[]]), torch.ones(1, D))
    assert "a" in bank and "z" not in bank
