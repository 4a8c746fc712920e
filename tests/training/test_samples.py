"""Prompts and answers as tokens: where the prompt ends, whatever the padding."""

import copy

import pytest
import torch

from unike_kernels.training import Sample
from unike_kernels.training.samples import (
    accepted,
    batches,
    context_length,
    drop_tokens,
    encode,
    evaluating,
    forward,
    needs_image,
)

SAMPLES = [Sample("w1 w2 w3", "w4 w5"), Sample("w6", "w7"), Sample("w8 w9 w1 w2", "")]


def id_of(word):
    return 4 + int(word[1:])


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("image", [None, torch.rand(16, 16)], ids=["text", "image"])
def test_ends_lasts_and_answers(make_processor, padding_side, image):
    samples = [Sample(s.prompt, s.answer, image) for s in SAMPLES]
    batch = encode(make_processor(padding_side), samples)
    placeholders = 0 if image is None else 4
    assert batch.prompt_lengths == [placeholders + n for n in (3, 1, 4)]
    assert ("pixel_values" in batch.inputs) == (image is not None)
    ids, mask = batch.inputs["input_ids"], batch.answer_mask()
    for row, s in enumerate(samples):
        assert ids[row, batch.ends[row]] == id_of(s.prompt.split()[-1])
        assert ids[row, batch.lasts[row]] == id_of((s.prompt + " " + s.answer).split()[-1])
        assert ids[row][mask[row]].tolist() == [id_of(w) for w in s.answer.split()]
    assert batch.inputs["attention_mask"].sum(1).tolist() == [placeholders + n for n in (5, 2, 4)]


def test_a_tokenizer_serves_for_text(processor):
    one, two = (encode(p, SAMPLES).inputs for p in (processor, processor.tokenizer))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert one.keys() == two.keys()


class Merging:
    """A tokenizer in which a word can swallow what follows: letters, two at a time."""

    def __call__(self, text, padding, return_tensors):
        rows = [[int.from_bytes(t[i : i + 2].encode()) for i in range(0, len(t), 2)] for t in text]
        width = max(map(len, rows))
        return {
            "input_ids": torch.tensor([r + [0] * (width - len(r)) for r in rows]),
            "attention_mask": torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows]),
            "token_type_ids": torch.zeros(len(rows), width),
        }


def test_a_prompt_that_ends_within_a_token_is_refused():
    batch = encode(Merging(), [Sample("abcd", "ef")])
    assert batch.inputs["token_type_ids"].shape == batch.inputs["input_ids"].shape
    with pytest.raises(ValueError, match=r"samples\[1\]: the tokens of the prompt 'abc' are not the first tokens"):
        encode(Merging(), [Sample("abcd", "ef"), Sample("abc", "ef")])


def test_wrong_samples(processor):
    image = torch.rand(16, 16)
    with pytest.raises(ValueError, match="samples: expected at least one, got none"):
        encode(processor, [])
    with pytest.raises(ValueError, match="samples: expected all with an image or none, got both"):
        encode(processor, [Sample("w1", "w2"), Sample("w1", "w2", image)])
    with pytest.raises(ValueError, match=r"image 0 must be a tensor of shape \(16, 16\), not \(8, 8\)"):
        encode(processor, [Sample("w1", "w2", torch.rand(8, 8))])


def test_batches_are_of_one_kind_and_in_order():
    samples = [Sample("p", "a", image) for image in (None, 1, 1, None, 1, None, None)]
    assert list(batches(samples, 2)) == [[1, 2], [4], [0, 3], [5, 6]]
    assert list(batches([], 2)) == []


def test_text_goes_to_the_language_model_of_a_blip2(make_model, make_inputs):
    model = make_model("blip2-opt")
    text = make_inputs("opt", ["w1 w2", "w3"])
    assert needs_image(model)
    assert not needs_image(model.language_model)
    with torch.no_grad():
        assert torch.equal(forward(model, text), model.language_model(**text).logits)
        images = make_inputs("blip2-opt", ["w1 w2", "w3"])
        assert torch.equal(forward(model, images), model(**images).logits)


def test_evaluating_gives_each_module_its_own_mode_back(make_model):
    model = make_model("opt").train()
    model.model.decoder.layers[1].eval()
    before = [m.training for m in model.modules()]
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == before
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert [m.training for m in model.modules()] == before


def test_evaluating_reaches_patched_modules(make_model):
    import unike_kernels as uk

    model = make_model("opt").train()
    with uk.patched(model):
        with evaluating(model):
            assert not any(m.training for m in model.modules())
        assert all(m.training for m in model.modules())


@pytest.mark.parametrize("kind", ["opt", "blip2-llama"])
def test_a_sample_longer_than_the_context_is_refused(make_model, processor, kind):
    model = make_model(kind)
    most = context_length(model)
    words = " ".join(["w1"] * (most - 1))
    assert forward(model, encode(processor, [Sample(words, "w2")]).inputs).shape[1] == most
    with pytest.raises(ValueError, match=rf"samples\[1\]: {most + 1} tokens .* the model's context is {most}"):
        forward(model, encode(processor, [SAMPLES[0], Sample(words, "w2 w3")]).inputs)


def test_a_model_that_tells_no_context_takes_what_it_can():
    assert context_length(torch.nn.Linear(2, 2)) is None


class Counting:
    """A processor that counts its calls and returns more than most."""

    def __init__(self, processor):
        self.processor, self.tokenizer, self.calls = processor, processor.tokenizer, 0

    def __call__(self, text, images=None, **kwargs):
        self.calls += 1
        encoded = dict(self.processor(text=text, images=images, **kwargs))
        shape = encoded["input_ids"].shape
        types = (encoded["input_ids"] == 3).long()
        return {**encoded, "token_type_ids": types, "mm_extra": torch.ones(shape[0], 2), "labels": torch.zeros(shape)}


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_processor_runs_once_and_all_that_it_returns_is_kept(make_processor, padding_side):
    counting = Counting(make_processor(padding_side))
    samples = [Sample(s.prompt, s.answer, torch.rand(16, 16)) for s in SAMPLES]
    batch = encode(counting, samples)
    assert counting.calls == 1
    assert set(batch.inputs) == {"input_ids", "attention_mask", "pixel_values", "token_type_ids", "mm_extra"}
    assert batch.inputs["token_type_ids"].sum() == 4 * 3
    cut = drop_tokens(batch, {0: 1}, 0.9, {3})  # what is of tokens moves with them
    assert torch.equal(cut.inputs["token_type_ids"], (cut.inputs["input_ids"] == 3).long())


def test_token_types_are_passed_where_a_model_takes_them():
    class Model(torch.nn.Module):
        def forward(self, input_ids, token_type_ids=None):
            """With types."""

    ids = torch.zeros(1, 2, dtype=torch.long)
    inputs = {"input_ids": ids, "token_type_ids": ids, "unknown": ids}
    assert accepted(Model(), inputs).keys() == inputs.keys()
    assert accepted(torch.nn.Identity(), inputs).keys() == {"input_ids", "unknown"}


class WithSuffix:
    """As PaliGemma's: the answer is given apart, and ends with an end of text."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, text, suffix=None, **kwargs):
        pairs = {} if suffix is None else {"text_pair": [f"{s} </s>" for s in suffix]}
        texts = [f"{t} w0" for t in text]  # it ends a prompt with a word of its own
        encoded = self.tokenizer(texts, return_token_type_ids=True, **pairs, **kwargs)
        return {**encoded, "labels": encoded["input_ids"]}


def test_a_processor_that_takes_answers_apart(processor):
    batch = encode(WithSuffix(processor.tokenizer), SAMPLES)
    ids = batch.inputs["input_ids"]
    for row, s in enumerate(SAMPLES):
        assert ids[row, batch.ends[row]] == id_of("w0")
        assert ids[row, batch.lasts[row]] == id_of(f"{s.prompt} w0 {s.answer}".split()[-1])
        assert ids[row][batch.answer_mask()[row]].tolist() == [id_of(w) for w in s.answer.split()]
    assert "labels" not in batch.inputs
    assert encode(WithSuffix(processor.tokenizer), [Sample("w1", "")]).prompt_lengths == [2]


def test_advice_about_prompts(processor):
    from tokenizers.processors import TemplateProcessing

    with pytest.raises(ValueError, match=r"samples\[1\]: the prompt '' has no tokens; expected at least one"):
        encode(processor, [Sample("w1", "w2"), Sample("", "w9")])
    with pytest.raises(ValueError, match=r"samples\[0\]: the prompt '' has no tokens"):
        encode(processor, [Sample("", "")])
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    with pytest.raises(ValueError, match=r"the tokenizer ends every text with '</s>': pass one that does not"):
        encode(tokenizer, [Sample("w1", "w2")])
