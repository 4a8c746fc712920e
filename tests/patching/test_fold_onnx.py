"""A folded model is a plain one: torch.onnx exports it as it exports the base model, and onnxruntime runs it."""

from __future__ import annotations

import pytest
import torch
from backbones.zoo import ZOO, model_of

import unike_kernels as uk


class Logits(torch.nn.Module):
    """Tokens to logits, without a cache."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits


@pytest.mark.slow
@pytest.mark.parametrize("name", ["opt", "llama"])
def test_onnxruntime_computes_what_the_patched_model_does(name, make_edit, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    import onnxruntime

    model = model_of(ZOO[name], torch.float32)
    edit = make_edit(model, "a", layers=(1, 3))
    ids = torch.tensor([[7, 8, 9, 10, 11]])
    with torch.no_grad():
        unpatched = model(input_ids=ids).logits
        with uk.patched(model, [edit]):
            wanted = model(input_ids=ids).logits
    file = tmp_path / "folded.onnx"
    torch.onnx.export(Logits(uk.fold(model, edit)).eval(), (ids,), str(file), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), wanted, rtol=0, atol=1e-4)
    assert float((torch.from_numpy(got) - unpatched).abs().max()) > 1e-2
