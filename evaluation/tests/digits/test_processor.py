"""The processor: token layout, padding, pixel values and its errors."""

import pytest
import torch
from unike_eval.toy import digits

PROMPT = digits.phrasings("next")[0]


@pytest.fixture(scope="module")
def processor():
    return digits.load_processor()


def test_images_split():
    (train, train_labels), (test, test_labels) = digits.images("train"), digits.images("test")
    assert train.shape == (1437, 16, 16)
    assert test.shape == (360, 16, 16)
    assert train.dtype == torch.float32
    assert train_labels.dtype == torch.int64
    assert len(train_labels) == 1437
    assert train.min() == 0
    assert train.max() == 1
    assert test_labels.bincount().min() >= 34
    with pytest.raises(ValueError, match="'train' or 'test'"):
        digits.images("valid")


def test_image_tokens_come_first_and_padding_is_left(processor):
    batch = processor([PROMPT, "a photo of"], torch.rand(2, 16, 16), padding=True, return_tensors="pt")
    tokens = [processor.tokenizer.convert_ids_to_tokens(row) for row in batch.input_ids]
    assert tokens[0][:5] == ["<image>"] * 4 + ["question:"]
    assert tokens[1] == ["<pad>"] * 4 + ["<image>"] * 4 + ["a", "photo", "of"]
    assert batch.attention_mask[1].tolist() == [0] * 4 + [1] * 7
    assert batch.pixel_values.shape == (2, 3, 16, 16)
    assert batch.pixel_values.dtype == torch.float32


def test_text_only_and_a_single_image(processor):
    assert set(processor(PROMPT)) == {"input_ids", "attention_mask"}
    assert processor(PROMPT, torch.rand(16, 16)).pixel_values.shape == (1, 3, 16, 16)


def test_every_word_is_known_and_answers_extend_prompts(processor):
    cases = [(p, f.answer) for f in digits.FACTS for s in ("train", "held_out") for p in digits.phrasings(f.kind, s)]
    for prompt, answer in (*cases, *digits.text_items("train"), *digits.text_items("test")):
        prefix = processor(prompt, return_tensors=None).input_ids[0]
        whole = processor(f"{prompt} {answer}", return_tensors=None).input_ids[0]
        assert whole[: len(prefix)] == prefix
        assert len(whole) == len(prefix) + len(answer.split())
        assert processor.tokenizer.unk_token_id not in whole
    assert processor.decode(whole) == f"{prompt} {answer}"


def test_case_and_attached_question_marks_are_accepted(processor):
    assert torch.equal(
        processor("Question: Which digit is this? Answer:").input_ids, processor(digits.phrasings("which")[0]).input_ids
    )


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(2, 16, 16), "1 texts but 2 images"),
        ([torch.rand(8, 8)], r"\(16, 16\), not \(8, 8\)"),
        ([[0.5]], "not list"),
        (torch.zeros(1, 16, 16, dtype=torch.uint8), "float tensor"),
        (torch.full((1, 16, 16), 16.0), "outside 0..1"),
        (torch.full((1, 16, 16), float("nan")), "outside 0..1"),
    ],
)
def test_image_errors(processor, images, message):
    with pytest.raises(ValueError, match=message):
        processor([PROMPT], images)
