"""What a patched layer launches on a GPU: one kernel for its memory, one for its FFN."""

from __future__ import annotations

import pytest
import torch
from backbones.zoo import ZOO, logits, model_of

import unike_kernels as uk
from unike_kernels.nn import patched_ffn


@pytest.mark.parametrize("name", ["llama", pytest.param("opt", marks=pytest.mark.slow)])
def test_launches_of_a_layer(name, launched, make_edit, make_memory, monkeypatch):
    model = model_of(ZOO[name], torch.float32)
    memory = make_memory(model, entries=20, layers=(1, 3))
    uk.patch(model, [make_edit(model, "a", memory, layers=(1, 3))], memory)
    ids = torch.tensor([[7], [9]])
    with torch.no_grad():
        wanted = logits(model, ids)  # by the CPU's kernels
        monkeypatch.setattr(patched_ffn, "_on_gpu", lambda t: True)
        with uk.backend("triton"):
            found, session = launched(lambda: logits(model, ids))
    assert [launch.kernel for launch in session.launches] == ["memory_attention_kernel", "patched_ffn_kernel"] * 2
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
