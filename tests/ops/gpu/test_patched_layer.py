"""What a patched layer launches on a GPU: one kernel for its memory, one for the neurons of its FFN or all of it."""

from __future__ import annotations

import pytest
import torch
from backbones.zoo import ZOO, logits, model_of

import unike_kernels as uk
from unike_kernels.nn import patched_ffn


@pytest.mark.parametrize(
    ("base", "name"),
    [("vendor", "llama"), ("fused", "llama"), pytest.param("fused", "opt", marks=pytest.mark.slow)],
)
def test_launches_of_a_layer(base, name, launched, make_edit, make_memory, monkeypatch):
    model = model_of(ZOO[name], torch.float32)
    memory = make_memory(model, entries=20, layers=(1, 3))
    uk.patch(model, [make_edit(model, "a", memory, layers=(1, 3))], memory, base=base)
    ids = torch.tensor([[7], [9]])
    with torch.no_grad():
        wanted = logits(model, ids)  # by the CPU's kernels
        monkeypatch.setattr(patched_ffn, "on_gpu", lambda t: True)
        with uk.backend("triton"):
            found, session = launched(lambda: logits(model, ids))
    ffn = "patched_ffn_kernel" if base == "fused" else "add_extra_neurons_kernel"
    assert [launch.kernel for launch in session.launches] == ["memory_attention_kernel", ffn] * 2
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("base", ["vendor", "fused"])
def test_a_row_without_edits_keeps_its_bits_unless_its_base_is_fused(base, launched, make_edit, monkeypatch):
    """The default is the first; a fused base rounds as its kernel does."""
    model = model_of(ZOO["llama"], torch.float32)
    ids = torch.tensor([[7], [9]])
    with torch.no_grad():
        plain = logits(model, ids)
        uk.patch(model, [make_edit(model, "a", layers=(1, 3))], **({} if base == "vendor" else {"base": base}))
        monkeypatch.setattr(patched_ffn, "on_gpu", lambda t: True)
        with uk.backend("triton"), uk.rows(model, edits=[["a"], []]):
            found, session = launched(lambda: logits(model, ids))
    assert len(session.launches) == 2
    assert not torch.equal(found[0], plain[0])
    assert torch.equal(found[1], plain[1]) == (base == "vendor")
    torch.testing.assert_close(found[1], plain[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("base", ["vendor", "fused"])
def test_on_a_gpu_it_compiles_in_one_graph(base, make_edit, make_memory, monkeypatch):
    model = model_of(ZOO["llama"], torch.float32)
    memory = make_memory(model, entries=20, layers=(1, 3))
    uk.patch(model, [make_edit(model, "a", memory, layers=(1, 3))], memory, base=base)
    seen = []

    def backend(graph, _):
        seen.append([str(node.target) for node in graph.graph.nodes if str(node.target).startswith("unike.")])
        return graph

    torch._dynamo.reset()
    ids = torch.tensor([[7], [9]])
    with torch.no_grad():
        wanted = logits(model, ids)
        monkeypatch.setattr(patched_ffn, "on_gpu", lambda t: True)
        found = logits(torch.compile(model, fullgraph=True, backend=backend), ids)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    ffn = "unike.patched_ffn" if base == "fused" else "unike.add_extra_neurons"
    assert seen == [["unike.memory_attention", ffn] * 2]
