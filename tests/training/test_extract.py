"""The extracted states against hooks on one unpadded sequence at a time."""

import sys

import pytest
import torch

import unike_kernels as uk
from unike_kernels.artifacts import files
from unike_kernels.backbones import find_decoder
from unike_kernels.errors import ArtifactError
from unike_kernels.training import Triplet, extract
from unike_kernels.training.extract import Hidden

extract_module = sys.modules["unike_kernels.training.extract"]

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


IN_CONTEXT = [
    Triplet("w1 w2 w3", "w4 w30", "w5 w6"),
    Triplet("w7 w8", "w9 w10 w11!", "w12 w13", IMAGES[0]),
    Triplet("w13", "w14", "w15 w16", IMAGES[1]),
    Triplet("w22", " ".join(f"w{i}" for i in range(23, 33)), "w25 w31 w32"),
]


@torch.no_grad()
def behind_knowledge(model, processor, triplet, knowledge, layer):
    """Input and output of the layer's attention where the first eight tokens of the positive answer are produced."""
    text = " ".join([*knowledge, triplet.prompt, triplet.positive])
    inputs = dict(processor([text], None if triplet.image is None else triplet.image[None]))
    tokens = len(triplet.positive.split())
    last = inputs["input_ids"].shape[1] - 1
    at, seen = [last - tokens + i for i in range(min(tokens, 8))], {}

    def look(module, args, kwargs, output):
        seen["pre"], seen["out"] = kwargs["hidden_states"], output[0]

    handle = find_decoder(model).layers[layer].attention.module.register_forward_hook(look, with_kwargs=True)
    target = model.language_model if triplet.image is None and hasattr(model, "language_model") else model
    target(**inputs)
    handle.remove()
    return {site: seen[site][0, at] for site in ("pre", "out")}


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("kind", ["llama", "blip2-opt"])
def test_states_in_context_are_those_of_each_text_alone(make_model, make_processor, kind, padding_side):
    """A token of the answer is an entry: without knowledge, behind the true and behind the wrong one."""
    model, processor = make_model(kind), make_processor(padding_side)
    triplets = [t for t in IN_CONTEXT if kind == "blip2-opt" or t.image is None]
    found = extract(model, processor, triplets, layers=[1, 5], context=True, batch_size=3, progress=False)
    for layer, hidden in found.items():
        start = 0
        for t in triplets:
            entries = slice(start, start := start + min(len(t.positive.split()), 8))
            known, wrong = t.positive + ("" if t.positive.endswith("!") else "."), t.negative + "."
            for name, knowledge in (("sem", []), ("pos", [t.prompt, known]), ("neg", [t.prompt, wrong])):
                alone = behind_knowledge(model, processor, t, knowledge, layer)
                for site in ("pre", "out"):
                    states = getattr(hidden, f"{name}_{site}")[entries]
                    torch.testing.assert_close(states, alone[site], atol=2e-5, rtol=1e-5)
        assert {getattr(hidden, name).shape for name in Hidden.__dataclass_fields__} == {(start, 64)}
        assert not torch.allclose(hidden.pos_out, hidden.neg_out)


def test_an_image_of_which_the_prompt_speaks_comes_once(make_model, processor, monkeypatch):
    """Its placeholders are those of the model's config, and what else the processor calls an image."""
    model = make_model("blip2-opt")
    monkeypatch.setattr(processor, "boi_token", "<begin>", raising=False)
    image = IMAGES[0]
    triplet = Triplet("w0 <image> <begin> w1", "w2", "w3", image)
    for t, again in ((triplet, "w0   w1"), (Triplet("<image> <begin> w1", "w2", "w3", image), "w1")):
        runs = extract_module._runs(t, True, extract_module._placeholders(model, processor))
        assert [(s.prompt, s.answer, s.image is image) for s, _ in runs] == [
            (t.prompt, "w2", True), (f"{t.prompt} w2. {again}", "w2", True), (f"{t.prompt} w3. {again}", "w2", True),
        ]  # fmt: skip
    text = Triplet("w0 <image>", "w2!", "w3")
    assert extract_module._runs(text, True, ["<image>"])[1][0].prompt == "w0 <image> w2! w0 <image>"


def test_what_is_refused_in_context(make_model, processor, monkeypatch):
    model = make_model("opt")
    with pytest.raises(ValueError, match=r"triplets\[1\]: the positive answer '' has no tokens"):
        extract(model, processor, [TRIPLETS[0], Triplet("w1", "", "w2")], context=True, progress=False)
    original = extract_module.encode

    def other(*args):
        batch = original(*args)
        batch.inputs["input_ids"][:, -1] += int(batch.inputs["input_ids"].shape[1] > 5)
        return batch

    monkeypatch.setattr(extract_module, "encode", other)
    with pytest.raises(ValueError, match=r"triplets\[0\]: the positive answer 'w4' has other tokens behind the know"):
        extract(model, processor, TRIPLETS[:1], context=True, progress=False)


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
    with pytest.raises(ValueError, match="triplets: expected at least one, got none"):
        extract(model, processor, [])
    with pytest.raises(ValueError, match=r"triplets\[1\]: the positive and the negative answer are both 'w2'"):
        extract(model, processor, [TRIPLETS[0], Triplet("w1", "w2", "w2")])
    with pytest.raises(ValueError, match=r"layers: expected indices in 0..5, got \[6\]"):
        extract(model, processor, TRIPLETS[:1] * 2, layers=[6])
    with uk.patched(model), pytest.raises(uk.PatchError, match="extract: the model is patched"):
        extract(model, processor, TRIPLETS[:1] * 2)


# --- a store --------------------------------------------------------------------------------------------------------

LONG = [Triplet(f"w{i % 30} w2", f"w{i % 29}", f"w{i % 29 + 1}") for i in range(11)]


@pytest.fixture
def passes(monkeypatch):
    """The sizes of the batches that go through the model, in parts of four triplets."""
    sizes = []
    monkeypatch.setattr(extract_module, "_PART", 4)
    original = extract_module.forward
    monkeypatch.setattr(
        extract_module, "forward", lambda m, inputs: (sizes.append(len(inputs["input_ids"])), original(m, inputs))[1]
    )
    return sizes


def same_states(one, two):
    assert list(one) == list(two)
    assert all(
        torch.equal(getattr(one[i], name), getattr(two[i], name)) for i in one for name in Hidden.__dataclass_fields__
    )


def test_a_store_holds_the_same_states(make_model, processor, tmp_path, passes):
    model = make_model("opt")
    kept = extract(model, processor, LONG, layers=[1, 5], batch_size=4, progress=False)
    assert passes == [4, 4, 4, 4, 3, 3]  # positive and negative answers, of each part
    stored = extract(model, processor, LONG, layers=[1, 5], batch_size=4, store=tmp_path / "s", progress=False)
    same_states(kept, stored)
    assert len(stored) == 2
    with pytest.raises(KeyError):
        stored[0]
    passes.clear()
    same_states(kept, extract(model, processor, LONG, layers=[1, 5], store=tmp_path / "s", progress=False))
    assert passes == []


def test_a_store_holds_the_same_states_in_context(make_model, processor, tmp_path, passes):
    model = make_model("opt")
    triplets = [Triplet(t.prompt, t.positive + " w3" * (i % 3), t.negative) for i, t in enumerate(LONG)]
    kept = extract(model, processor, triplets, layers=[1], context=True, batch_size=4, progress=False)
    assert passes == [4] * 6 + [3] * 3
    assert len(kept[1].pos_out) == sum(1 + i % 3 for i in range(11))
    for _ in range(2):
        again = extract(
            model, processor, triplets, layers=[1], context=True, batch_size=4, store=tmp_path, progress=False
        )
        same_states(kept, again)
    assert len(passes) == 18
    with pytest.raises(ArtifactError, match=r"its context are others; give another store"):
        extract(model, processor, triplets, layers=[1], store=tmp_path, progress=False)


def test_a_store_of_an_older_version_goes_on(make_model, processor, tmp_path, passes):
    """It does not say that its states are without context."""
    model = make_model("opt")
    extract(model, processor, LONG[:4], layers=[1], store=tmp_path, progress=False)
    (part,) = tmp_path.iterdir()
    header, tensors = files.load(part, "states")
    assert header.pop("context") is False
    files.save(part, "states", {k: v for k, v in header.items() if k not in ("kind", "format")}, tensors)
    passes.clear()
    extract(model, processor, LONG[:4], layers=[1], store=tmp_path, progress=False)
    assert passes == []
    with pytest.raises(ArtifactError, match="its context are others"):
        extract(model, processor, LONG[:4], layers=[1], context=True, store=tmp_path, progress=False)


def test_an_interrupted_extraction_goes_on(make_model, processor, tmp_path, passes):
    """A mistake in the second part: the first is kept; with the mistake corrected only the rest is run."""
    model = make_model("opt")
    broken = [*LONG[:5], Triplet("w1", "w2", "w2"), *LONG[6:]]
    with pytest.raises(ValueError, match=r"triplets\[5\]: the positive and the negative answer are both 'w2'"):
        extract(model, processor, broken, layers=[1], batch_size=4, store=tmp_path, progress=False)
    passes.clear()
    found = extract(model, processor, LONG, layers=[1], batch_size=4, store=tmp_path, progress=False)
    assert passes == [4, 4, 3, 3]
    same_states(found, extract(model, processor, LONG, layers=[1], batch_size=4, progress=False))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"layers": [2]}, "layers"),
        ({"triplets": [Triplet("w1 w3", "w2", "w4"), *LONG[1:]]}, "triplets"),
        ({"model": "llama"}, "model"),
    ],
)
def test_a_store_of_something_else_is_refused(make_model, processor, tmp_path, change, told):
    extract(make_model("opt"), processor, LONG, layers=[1], store=tmp_path, progress=False)
    wanted = {"triplets": LONG, "layers": [1]} | {k: v for k, v in change.items() if k != "model"}
    with pytest.raises(ArtifactError, match=f"states-0000000.safetensors: its {told} are others; give another store"):
        extract(make_model(change.get("model", "opt")), processor, **wanted, store=tmp_path, progress=False)


def test_a_store_that_is_damaged_is_refused(make_model, processor, tmp_path):
    extract(make_model("opt"), processor, LONG, layers=[1], store=tmp_path, progress=False)
    file = tmp_path / "states-0000000.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ArtifactError, match="not a complete safetensors file"):
        extract(make_model("opt"), processor, LONG, layers=[1], store=tmp_path, progress=False)


def test_a_lazy_sequence_is_looked_at_some_at_a_time(make_model, processor, passes):
    class Lazy(list):
        def __iter__(self):
            raise AssertionError("all at once")

    found = extract(make_model("opt"), processor, Lazy(LONG), layers=[1], progress=False)
    assert found[1].sem_pre.shape == (11, 64)


def test_a_stored_part_that_is_damaged(make_model, processor, tmp_path):
    """Whatever happened to it: refused when the extraction goes on, and when a layer is read."""
    from safetensors.torch import load_file

    model, triplets = make_model("opt"), [Triplet("w1", "w2", "w3"), Triplet("w4", "w5", "w6")]

    def run():
        return extract(model, processor, triplets, layers=[2, 3], store=tmp_path, progress=False)

    found = run()
    (part,) = tmp_path.iterdir()
    content, tensors, header = part.read_bytes(), load_file(part), files.load(part, "states")[0]
    for at in (len(content) - 3, 12, len(content) // 2):
        part.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        with pytest.raises(uk.ArtifactError, match=part.name):
            run()
        with pytest.raises(uk.ArtifactError, match=part.name):
            [found[layer] for layer in (2, 3)]
    part.unlink()  # it is mapped
    states = tensors["3.pos_out"]
    nan = states.clone()
    nan[1, 5] = float("nan")
    for wrong, message in (
        (nan, "'3.pos_out' holds NaN"),
        (states.to(torch.int32), "expected float32"),
        (states.T.contiguous(), "expected float32"),
        (None, "expected the tensors"),
    ):
        kept = {name: t for name, t in {**tensors, "3.pos_out": wrong}.items() if t is not None}
        files.save(part, "states", header, kept)
        with pytest.raises(uk.ArtifactError, match=f"{part.name}: .*{message}"):
            run()
        with pytest.raises(uk.ArtifactError, match=part.name):
            found[3]
    files.save(part, "states", header, tensors)
    assert torch.equal(run()[3].pos_out, states)
