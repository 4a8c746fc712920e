"""The extracted states against hooks on one unpadded sequence at a time."""

import pytest
import torch

import unike_kernels as uk
from unike_kernels.backbones import find_decoder
from unike_kernels.editing import Triplet, extract
from unike_kernels.editing.extract import Hidden

IMAGES = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(3))
TRIPLETS = [
    Triplet("w1 w2 w3", "w4", "w5 w6"),
    Triplet("w7 w8", "w9 w10 w11", "w12", IMAGES[0]),
    Triplet("w13", "w14", "w15"),
    Triplet("w16 w17 w18 w19", "w20", "w21", IMAGES[1]),
    Triplet("w22", "w23 w24", "w25", IMAGES[2]),
]


@torch.no_grad()
def states_alone(model, processor, triplet, answer, layer):
    """Input and output of the layer's attention at the prompt's and at the sequence's last token, [2 x 2 x d]."""
    inputs = dict(processor([f"{triplet.prompt} {answer}"], None if triplet.image is None else triplet.image[None]))
    at = [inputs["input_ids"].shape[1] - len(answer.split()) - 1, -1]
    where = find_decoder(model).layers[layer]
    seen = {}

    def look(module, args, kwargs, output):
        seen["pre"], seen["out"] = kwargs["hidden_states"], output[0]

    handle = where.attention.module.register_forward_hook(look, with_kwargs=True)
    target = model.language_model if triplet.image is None and hasattr(model, "language_model") else model
    target(**inputs)
    handle.remove()
    return {site: seen[site][0, at] for site in ("pre", "out")}


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("kind", ["opt", "llama", "blip2-opt", "blip2-llama"])
def test_states_are_those_of_each_sequence_alone(make_model, make_processor, kind, padding_side):
    model, processor = make_model(kind), make_processor(padding_side)
    triplets = TRIPLETS if kind.startswith("blip2") else [Triplet(t.prompt, t.positive, t.negative) for t in TRIPLETS]
    found = extract(model, processor, triplets, layers=[5, 1], batch_size=2, progress=False)
    assert list(found) == [1, 5]
    for layer, hidden in found.items():
        for row, t in enumerate(triplets):
            for answer, last in ((t.positive, "pos"), (t.negative, "neg")):
                alone = states_alone(model, processor, t, answer, layer)
                for site in ("pre", "out"):
                    # Another batch size and padding: float32 rounding through up to six layers.
                    close = {"atol": 2e-5, "rtol": 1e-5}
                    torch.testing.assert_close(getattr(hidden, f"{last}_{site}")[row], alone[site][1], **close)
                    torch.testing.assert_close(getattr(hidden, f"sem_{site}")[row], alone[site][0], **close)
        assert {getattr(hidden, name).shape for name in Hidden.__dataclass_fields__} == {(5, 64)}


def test_the_model_is_left_as_it_was(make_model, processor):
    model = make_model("opt").train()
    extract(model, processor, TRIPLETS[:1] * 2, layers=[0], progress=False)
    assert all(m.training for m in model.modules())
    with pytest.raises(ValueError, match="16, 16"):
        extract(model, processor, [*TRIPLETS[:2], Triplet("w1", "w2", "w3", torch.rand(4, 4))], progress=False)
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks for m in model.modules())


def test_half_precision_comes_out_as_float32(make_model, processor):
    found = extract(make_model("opt", dtype=torch.bfloat16), processor, TRIPLETS[:1] * 2, progress=False)
    assert list(found) == [2, 3, 4, 5]
    assert found[2].sem_pre.dtype == torch.float32


def test_what_is_refused(make_model, processor):
    model = make_model("opt")
    for triplets in ([], TRIPLETS[:1]):
        with pytest.raises(ValueError, match=f"triplets: expected at least 2, got {len(triplets)}"):
            extract(model, processor, triplets)
    with pytest.raises(ValueError, match=r"triplets\[1\]: the positive and the negative answer are both 'w2'"):
        extract(model, processor, [TRIPLETS[0], Triplet("w1", "w2", "w2")])
    with pytest.raises(ValueError, match=r"layers: expected indices in 0..5, got \[6\]"):
        extract(model, processor, TRIPLETS[:1] * 2, layers=[6])
    with uk.patched(model), pytest.raises(uk.PatchError, match="extract: the model is patched"):
        extract(model, processor, TRIPLETS[:1] * 2)
