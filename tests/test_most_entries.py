"""k is bounded where it comes from a file, and work is done for no more entries than there are."""

from __future__ import annotations

import pytest
import torch
from configs import every_token

import unike_kernels as uk
from unike_kernels import _native
from unike_kernels.config import MOST_ENTRIES
from unike_kernels.ops.cosine_topk.cpu import Keys
from unike_kernels.ops.latent_attention.cpu import Gate, Memory
from unike_kernels.ops.memory_attention.cpu import attend

IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.mark.parametrize("k", [0, -1, MOST_ENTRIES + 1, 2**31, 2**60, 2**61, 2**62, 2**63, 10**30])
def test_a_config_is_refused(k):
    with pytest.raises(ValueError, match=r"Config\.k: expected (an integer of at least 1|at most 1048576), got"):
        every_token(k=k)


@pytest.mark.parametrize("kind", ["memory", "edit"])
@pytest.mark.parametrize("k", [MOST_ENTRIES + 1, 2**60, 2**61, 2**62, 2**63])
def test_a_file_is_refused(make_model, make_memory, make_edit, tmp_path, kind, k):
    model, path, config = make_model("llama"), tmp_path / "file", every_token(values="pre")
    object.__setattr__(config, "k", k)  # as somebody would who writes such a file, checksums and all
    (make_memory(model, config) if kind == "memory" else make_edit(model, config=config)).save(path)
    with pytest.raises(uk.ArtifactError, match=r"Config\.k"):
        (uk.MemoryBank if kind == "memory" else uk.Edit).load(path)


@pytest.mark.parametrize("k", [MOST_ENTRIES + 1, 2**31, 2**61, 2**62])
def test_the_operators_refuse_it(k):
    x = torch.randn(3, 8)
    encoder = uk.ops.SemanticEncoder(torch.randn(4, 8), torch.randn(4), torch.randn(8, 4), torch.randn(8))
    unit = uk.ops.normalize_rows(x)
    for run in (
        lambda: uk.ops.cosine_topk(x, x, k),
        lambda: uk.CosineIndex(x).search(x, k),
        lambda: uk.ops.memory_attention(x, x, unit, x, x, encoder, k=k),
    ):
        with pytest.raises(ValueError, match=f"k: expected at most {MOST_ENTRIES}, got {k}"):
            run()


def test_columns_beyond_the_entries_are_padding():
    x, unit = torch.randn(6, 8), uk.ops.normalize_rows(torch.randn(5, 8))
    encoder = uk.ops.SemanticEncoder(torch.randn(4, 8), torch.randn(4), torch.randn(8, 4), torch.randn(8))
    few, many = (uk.ops.memory_attention(x, x, unit, unit, unit, encoder, k=k) for k in (5, 1000))
    assert torch.equal(few[0], many[0]) and torch.equal(few[1], many[1])
    assert many[2].shape == (6, 1000)
    assert torch.equal(few[2], many[2][:, :5]) and (many[2][:, 5:] == -1).all()
    scores, ids = uk.ops.cosine_topk(x, unit, 1000, normalized=True)
    assert scores.shape == ids.shape == (6, 1000)
    assert (ids[:, 5:] == -1).all() and (scores[:, 5:] == float("-inf")).all()


@pytest.mark.parametrize("switches", [{}, {"retrieval": "sequence"}, {"alpha": 0.4}, {"values": "projected"}])
def test_a_model_with_a_large_k_is_that_with_all_entries(make_model, make_memory, monkeypatch, switches):
    """The same bits, and the core is asked for no more: 50 entries, k = 100,000."""
    asked, core = [], _native.core()
    k_of = {"Tokens": lambda args: args[4][2], "cosine_topk": lambda args: args[3]}

    class Spy:
        def __getattr__(self, name):
            run = getattr(core, name)
            return run if name not in k_of else lambda *args: (asked.append(k_of[name](args)), run(*args))[1]

    monkeypatch.setattr(_native, "_C", Spy())
    model, outputs = make_model("llama"), []
    ids = torch.randint(4, 40, (4, 8))
    for k in (50, 100_000):
        memory = make_memory(model, every_token(k=k, **{"values": "pre", **switches}))
        with uk.patched(model, memory=memory), uk.rows(model, prompt_lengths=[8] * 4):
            with torch.no_grad():
                outputs.append(model(input_ids=ids).logits)
            x = model.get_input_embeddings()(ids).detach().requires_grad_()
            model(inputs_embeds=x).logits.square().mean().backward()
        outputs.append(x.grad)
    assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[3])
    assert len(asked) >= 8 and set(asked) == {50}


def test_the_workspace_of_a_large_k_is_that_of_all_entries():
    """The ids of such a k alone would take 2.6 TB: the core has no room for entries that are not there."""
    x, unit = torch.randn(300, 8), uk.ops.normalize_rows(torch.randn(5, 8))
    encoder = uk.ops.SemanticEncoder(torch.randn(4, 8), torch.randn(4), torch.randn(8, 4), torch.randn(8))
    keys, memory = Keys(unit, None), Memory(unit[:, None], unit[:, None], None, encoder)
    gate = Gate(0.3, False, True)
    few, many = (attend(x, x, x, k, None, keys, memory, gate, details=False) for k in (5, 2**30))
    assert torch.equal(few[0], many[0])


def test_what_a_pass_tells_still_has_k_columns(make_model, make_memory):
    model = make_model("llama")
    memory = make_memory(model, every_token(k=60, values="pre"))
    with torch.no_grad(), uk.patched(model, memory=memory), uk.explain(model) as told:
        model(input_ids=IDS)
    told = told.passes[0][3]
    assert told.entries.shape == told.scores.shape == (1, 4, 60)
    assert (told.entries[..., 50:] == -1).all() and (told.scores[..., 50:] == float("-inf")).all()
    assert (told.entries[..., :50].sort(-1).values == torch.arange(50)).all()


@pytest.mark.parametrize("size", [2**60, 2**61, 2**62, 2**63 - 1])
def test_sizes_that_wrap_are_refused_by_the_core(size):
    """As the bindings pass them on: no workspace of a wrapped size, and nothing is written."""
    core = _native._C
    x, out, ids = torch.randn(4, 8), torch.full((4, 8), 7.0), torch.zeros(4, 1, dtype=torch.int64)
    rows, at = (x.data_ptr(), 0, 8), x.data_ptr()
    keys, many = core.Keys(4, 8, at, 8, 0, 0, 0, 0), core.Keys(size, 8, at, 8, 0, 0, 0, 0)
    outputs = (0, out.data_ptr(), ids.data_ptr(), 1)
    calls = [
        lambda: core.cosine_topk(keys, rows, 4, size, *outputs),
        lambda: core.cosine_topk(keys, rows, size, 1, *outputs),
        lambda: core.cosine_topk(many, rows, 4, 1, *outputs),
        lambda: core.normalize_rows(rows, size, 8, out.data_ptr(), 1),
        lambda: core.normalize_rows((at, 0, size), 4, 8, out.data_ptr(), 1),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"size|large|at least"):
            call()
    assert (out == 7.0).all() and not ids.any()
