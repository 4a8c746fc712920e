"""Memories of tenants in one: a row of one of them has the bits that it has with its own memory alone."""

import dataclasses

import pytest
import torch
from configs import every_token

import unike_kernels as uk
from unike_kernels.patching.session import require_state
from unike_kernels.serving import RaggedRuntime, RequestSlice

IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5], [4, 4, 5, 5, 6]])


@pytest.fixture
def banks(make_model, make_memory):
    """Of three tenants of 50, 20 and 31 entries, with one Enc_sem."""
    base = make_memory(make_model("llama"), every_token(k=7, values="out"))

    def of(seed, entries):
        g = torch.Generator().manual_seed(seed)

        def like(t):
            return torch.randn(entries, *t.shape[1:], generator=g)

        layers = {
            i: dataclasses.replace(m, index=like(m.index), keys=like(m.keys), values=like(m.values))
            for i, m in base.layers.items()
        }
        return uk.MemoryBank(layers, base.config, base.base_model)

    return {"acme": of(1, 50), "globex": of(2, 20), "initech": of(3, 31)}


@torch.no_grad()
def logits(model, memory, rows):
    with uk.patched(model, memory=memory), uk.rows(model, memory=rows):
        return model(input_ids=IDS).logits


def test_a_row_has_its_tenants_memory_alone(make_model, banks):
    model, joined = make_model("llama"), uk.MemoryBank.joined(banks)
    assert len(joined) == 101
    plain = model(input_ids=IDS).logits
    found = logits(model, joined, ["globex", False, "acme"])
    for row, tenant in ((0, "globex"), (2, "acme")):
        alone = logits(model, banks[tenant], [True] * 3)
        assert torch.equal(found[row], alone[row])
        assert not torch.equal(found[row], plain[row])
    assert torch.equal(found[1], plain[1])
    everything = logits(model, joined, [True] * 3)
    assert not torch.equal(everything[0], found[0])


def test_no_other_tenants_entries_change_a_bit(make_model, banks):
    model = make_model("llama")
    found = logits(model, uk.MemoryBank.joined(banks), ["globex", "acme", "globex"])
    fewer = {"globex": banks["globex"], "acme": banks["initech"]}
    other = logits(model, uk.MemoryBank.joined(fewer), ["globex", "acme", "globex"])
    assert torch.equal(found[[0, 2]], other[[0, 2]])
    assert not torch.equal(found[1], other[1])


def test_flat_tokens(banks):
    joined = uk.MemoryBank.joined(banks)
    layers, hidden, base = sorted(joined.layers), torch.randn(9, 64), torch.randn(9, 64)

    def run(memory, shares):
        model = RaggedRuntime(layers, 64, "silu", memory)
        model.begin(shares)
        model.attention(layers[0], hidden, out := base.clone())
        return out

    found = run(
        joined,
        [
            RequestSlice(4, memory="initech"),
            RequestSlice(1, memory="acme"),
            RequestSlice(2, memory=False),
            RequestSlice(2),
        ],
    )
    assert torch.equal(found[:4], run(banks["initech"], [RequestSlice(9)])[:4])
    assert torch.equal(found[4], run(banks["acme"], [RequestSlice(9)])[4])
    assert torch.equal(found[5:7], base[5:7])
    with pytest.raises(ValueError, match="unknown tenant 'x'"):
        run(joined, [RequestSlice(9, memory="x")])


def test_it_is_saved_and_edits_of_its_parts_fit(make_model, make_edit, banks, tmp_path):
    model, joined = make_model("llama"), uk.MemoryBank.joined(banks)
    joined.save(tmp_path / "m")
    loaded = uk.MemoryBank.load(tmp_path / "m")
    assert (loaded.tenants, loaded.parts, loaded.id) == (joined.tenants, joined.parts, joined.id)
    assert loaded.tenants["globex"] == range(50, 70)
    edit = make_edit(model, "a", banks["globex"])
    with uk.patched(model, [edit], loaded):
        pass
    with pytest.raises(uk.MismatchError, match="it was trained with the memory"):
        uk.patch(model, [edit], uk.MemoryBank.joined({"acme": banks["acme"]}))


def test_what_cannot_be_joined_or_named(make_model, make_memory, banks):
    with pytest.raises(ValueError, match="at least one memory"):
        uk.MemoryBank.joined({})
    other = make_memory(make_model("llama"), every_token(k=7, values="out"), seed=9)
    with pytest.raises(uk.MismatchError, match="'acme' and 'x' differ in Enc_sem or zeta'"):
        uk.MemoryBank.joined({"acme": banks["acme"], "x": other})
    config = dataclasses.replace(banks["globex"], config=every_token(k=3, values="out"))
    with pytest.raises(uk.MismatchError, match="'acme' and 'globex' differ in config"):
        uk.MemoryBank.joined({"acme": banks["acme"], "globex": config})
    model, joined = make_model("llama"), uk.MemoryBank.joined(banks)
    with uk.patched(model, memory=joined):
        with pytest.raises(uk.PatchError, match=r"unknown tenants \['x'\]; the memory has \['acme', 'gl"):
            uk.rows(model, memory=["x", "acme", True]).__enter__()
        with pytest.raises(
            TypeError, match=r"memory\[1\]: expected True, False or the name of a tenant, got range\(0, 2\)"
        ):
            uk.rows(model, memory=[True, range(2), True]).__enter__()
        with uk.rows(model, memory=["acme"] * 3):
            model(input_ids=IDS)
            uk.swap_memory(model, uk.MemoryBank.joined({"acme": banks["globex"]}), running="switch")
            with pytest.raises(RuntimeError, match="the memory whose tenants these rows name was swapped"):
                model(input_ids=IDS)
    with pytest.raises(ValueError, match=r"'acme' has range\(0, 200\), the memory 101 entries"):
        dataclasses.replace(joined, tenants={**joined.tenants, "acme": range(200)})


def test_a_retriever_of_ones_own(make_model, banks):
    """A memory is searched with what it is given, tenants and compiled code included; it alone has the keys then."""
    pytest.importorskip("faiss")
    model, joined = make_model("llama"), uk.MemoryBank.joined(banks)
    everything = uk.ANNConfig(lists=4, probes=4)

    @torch.no_grad()
    def logits(run=model, memory=joined, **given):
        with uk.patched(model, memory=memory, **given):
            memories = [m.memory for m in require_state(model).attentions.values()]
            held = {name for tables in memories for name, t in tables.named_buffers() if t is not None}
            with uk.rows(model, memory=["globex", False, "acme"]):
                return run(input_ids=IDS, use_cache=False).logits, held

    exact, held = logits()
    assert {"index", "codes"} <= held
    for retriever in (uk.CosineIndex, lambda keys: uk.ApproximateIndex(keys, everything)):
        found, held = logits(retriever=retriever)
        torch.testing.assert_close(found, exact, atol=1e-5, rtol=1e-5)
        assert not {"index", "codes", "code_bounds"} & held
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled, retriever=uk.CosineIndex)[0], exact, atol=1e-5, rtol=1e-5)
    searched = dataclasses.replace(joined, search=everything)
    torch.testing.assert_close(logits(memory=searched)[0], exact, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="retriever: expected an index of the 101 keys it was given, got 3"):
        uk.patch(model, memory=joined, retriever=lambda keys: uk.CosineIndex(keys[:3]))
    with pytest.raises(ValueError, match="retriever: expected an index whose ids are the positions of keys"):
        uk.patch(model, memory=joined, retriever=lambda keys: uk.CosineIndex(keys, ids=range(7, 108)))
    assert not uk.is_patched(model)
