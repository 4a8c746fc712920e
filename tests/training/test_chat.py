"""Requests written as chat messages, through the templates of the models themselves."""

from __future__ import annotations

import chats
import pytest
import torch
from PIL import Image

import unike_kernels as uk
from unike_kernels.training import EditTraining, Fact, Sample, Triplet, chat, encode, train_edit
from unike_kernels.training.extract import _runs
from unike_kernels.training.samples import batches, forward

ASK = [{"role": "user", "content": "Who?"}]


def picture(seed: int = 0) -> Image.Image:
    pixels = torch.rand(16, 16, 3, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray((pixels * 255).to(torch.uint8).numpy())


def texts(processor, batch):
    """What the model reads, and what is the answer's, of each row."""
    tokenizer, ids, mask = getattr(processor, "tokenizer", processor), batch.inputs["input_ids"], batch.answer_mask()
    visible = batch.inputs["attention_mask"].bool()
    return [(tokenizer.decode(i[v & ~m]), tokenizer.decode(i[m])) for i, m, v in zip(ids, mask, visible, strict=True)]


def test_a_chat_of_text():
    """As transformers tokenizes it, and with no space in front of the answer."""
    tokenizer = chats.tokenizer()
    longer = [{"role": "system", "content": "Be brief."}, *ASK, {"role": "assistant", "content": "I."}, *ASK]
    samples = [Sample(messages=ASK, answer="Ann"), Sample(messages=longer, answer="Bo")]
    batch = encode(tokenizer, samples)
    said = "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    assert texts(tokenizer, batch) == [
        (said, "Ann"),
        (f"<|im_start|>system\nBe brief.<|im_end|>\n{said}I.<|im_end|>\n{said}", "Bo"),
    ]
    for sample, end, length in zip(samples, batch.ends.tolist(), batch.prompt_lengths, strict=True):
        own = tokenizer.apply_chat_template(sample.messages, add_generation_prompt=True, return_dict=False)
        assert length == len(own)
        row = batch.inputs["input_ids"][samples.index(sample)]
        assert row[end + 1 - length : end + 1].tolist() == own
    parts = [{"role": "user", "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "o?"}]}]
    assert texts(tokenizer, encode(tokenizer, [Sample(messages=parts)])) == [(said, "")]
    assert texts(tokenizer, encode(tokenizer, [Sample("Who?", "Ann")])) == [("Who?", " Ann")]


def test_the_end_of_a_turn_is_the_templates_own():
    tokenizer = chats.tokenizer()
    samples = [Sample(messages=ASK, answer="Ann"), Sample(messages=ASK, answer="Bo<|im_end|>")]
    assert [answer for _, answer in texts(tokenizer, encode(tokenizer, samples, ended=True))] == [
        "Ann<|im_end|>", "Bo<|im_end|>",
    ]  # fmt: skip
    assert texts(tokenizer, encode(tokenizer, [Sample("Who?", "Ann")], ended=True)) == [("Who?", " Ann</s>")]
    assert texts(tokenizer, encode(tokenizer, [Sample("Who?")], ended=True)) == [("Who?", "")]
    tokenizer.eos_token = None
    assert texts(tokenizer, encode(tokenizer, [Sample("Who?", "Ann")], ended=True)) == [("Who?", " Ann")]


THINKS = chats.CHATML.replace("{% if add", "{% if false %}{% endif %}{% if add").replace(
    "assistant\n{% endif %}", "assistant\n<think>{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "turn"),
    [
        (chats.LLAVA, chat.Turn("USER: Who? ASSISTANT:", " ", "</s>")),  # it ends no turn
        (
            "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
            "{% else %} {{ m['content'] | trim }} {{ eos_token }}{% endif %}{% endfor %}",
            chat.Turn("</s>[INST] Who? [/INST]", " ", " </s>"),
        ),
        (  # the first special token is the end
            chats.CHATML.replace("<|im_end|>\n", " <|im_end|></s>\n"),
            chat.Turn("<|im_start|>user\nWho? <|im_end|></s>\n<|im_start|>assistant\n", "", " <|im_end|>"),
        ),
        (THINKS, chat.Turn("<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n<think>", "", "</s>")),
    ],
    ids=["llava", "mistral", "two", "thinks"],
)
def test_what_templates_write_around_an_answer(template, turn):
    tokenizer = chats.tokenizer(template)
    asked = ASK if template != chats.LLAVA else [{"role": "user", "content": [{"type": "text", "text": "Who?"}]}]
    if template == chats.LLAVA:
        tokenizer = chats.llava()[1]
    assert chat.turn(tokenizer, asked, None) == turn


@pytest.mark.parametrize("family", ["llava", "qwen"])
def test_a_chat_about_an_image(family, tmp_path):
    """However the image is given, the model reads what the processor itself makes of the chat."""
    model, processor = getattr(chats, family)()
    image = picture()
    image.save(tmp_path / "a.png")
    words = {"type": "text", "text": "Who?"}
    inside = [{"role": "user", "content": [{"type": "image", "image": image}, words]}]
    ways = [
        Sample(messages=ASK, image=image, answer="Ann"),
        Sample(messages=[{"role": "user", "content": [{"type": "image"}, words]}], image=image, answer="Ann"),
        Sample(messages=inside, answer="Ann"),
        Sample(messages=[{"role": "user", "content": [{"type": "image", "path": str(tmp_path / "a.png")}, words]}],
               answer="Ann"),
    ]  # fmt: skip
    batch = encode(processor, ways, ended=True)
    wanted = processor.apply_chat_template(
        inside, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    length = wanted["input_ids"].shape[1]
    assert batch.prompt_lengths == [length] * 4
    assert all(torch.equal(row[:length], wanted["input_ids"][0]) for row in batch.inputs["input_ids"])
    assert torch.equal(batch.inputs["pixel_values"], torch.cat([wanted["pixel_values"]] * 4))
    assert {answer for _, answer in texts(processor, batch)} == {" Ann</s>" if family == "llava" else "Ann<|im_end|>"}
    with torch.no_grad():
        logits = forward(model, batch.inputs)[0, length - 1]
        torch.testing.assert_close(logits, model(**wanted).logits[0, -1], atol=1e-4, rtol=1e-4)
    several = Sample(messages=[*inside, {"role": "assistant", "content": [words]}, *inside], answer="Bo")
    assert len(several.images) == 2
    two = encode(processor, [several])
    assert two.inputs["pixel_values"].shape[0] == 2 * wanted["pixel_values"].shape[0]


@pytest.mark.parametrize(
    ("family", "said"), [("text", "Ann<|im_end|>"), ("llava", "Ann</s>"), ("qwen", "Ann<|im_end|>")]
)
def test_an_edited_chat_model_stops_by_itself(family, said):
    model, processor = (chats.model(), chats.tokenizer()) if family == "text" else getattr(chats, family)()
    request = Sample(messages=ASK, image=None if family == "text" else picture(), answer="Ann")
    other = Sample(messages=[{"role": "user", "content": "Where?"}], answer="At home.")
    result = train_edit(
        model, processor, request, preserve=[other], training=EditTraining(lr=3e-2, steps=60), progress=False
    )
    assert result.reached
    assert result.edit.notes["prompt"] == "Who?"
    prompt = encode(processor, [request.asked]).inputs
    with uk.patched(model, [result.edit]):
        out = model.generate(**prompt, max_new_tokens=20, do_sample=False)[:, prompt["input_ids"].shape[1] :]
    assert getattr(processor, "tokenizer", processor).decode(out[0]).strip() == said


def test_what_is_no_chat():
    ask, image = dict(ASK[0]), picture()
    for messages, message in [
        ([], r"messages: expected a list of one message or more, got \[\]"),
        ("Who?", "messages: expected a list of one message or more, got 'Who\\?'"),
        ([ask, {"role": "user"}], r"messages\[1\]: expected a dict of 'role' and 'content', got {'role': 'user'}"),
        ([{"role": 1, "content": "a"}], r"messages\[0\]: expected a dict"),
        (
            [{"role": "user", "content": None}],
            r"messages\[0\].content: expected a string or a list of parts .*, got None",
        ),
        ([{"role": "user", "content": ["Who?"]}], r"messages\[0\].content: expected"),
        ([{"role": "user", "content": [{"type": "video", "path": "a"}]}], r"messages\[0\].content: expected"),
        ([ask, {"role": "assistant", "content": "Ann"}], "expected the last one to be the user's, got the assistant's"),
        ([{"role": "user", "content": [{"type": "image"}]}], "1 of 1 image parts hold no image, and 0 is given beside"),
    ]:
        with pytest.raises(ValueError, match=message):
            Sample(messages=messages)
        with pytest.raises(ValueError, match=message):
            Triplet(positive="a", negative="b", messages=messages)
    held = [{"role": "user", "content": [{"type": "image", "image": image}]}]
    with pytest.raises(ValueError, match="0 of 1 image parts hold no image, and 1 is given beside them"):
        Sample(messages=held, image=image)
    with pytest.raises(ValueError, match="Sample: expected a prompt or messages, got both; the prompt is 'Who'"):
        Sample("Who", messages=ASK)


def test_processors_without_a_template(processor):
    for each in (chats.tokenizer(None), processor):
        with pytest.raises(ValueError, match=f"messages: {type(each).__name__} has no chat template"):
            encode(each, [Sample(messages=ASK, answer="Ann")])


def test_chats_and_prompts_are_encoded_apart():
    samples = [Sample("Who?", "Ann"), Sample(messages=ASK, answer="Ann"), Sample("Who?", "Bo")]
    with pytest.raises(ValueError, match="samples: expected all of messages or none, got both"):
        encode(chats.tokenizer(), samples)
    assert list(batches(samples, 2)) == [[1], [0, 2]]


def test_what_else_is_made_of_chats():
    asked = Sample(messages=ASK, answer="Ann")
    assert hash(asked) == hash(Sample(messages=list(ASK), answer="Ann"))
    assert (asked.question, asked.asked.answer, asked.images) == ("Who?", "", ())
    assert Fact([asked, asked]).name == "Who?"
    triplet = Triplet(positive="Ann", negative="Bo", messages=ASK)
    (known, states), *_ = _runs(triplet, True, ())[1:]
    assert states == ("pos",)
    assert texts(chats.tokenizer(), encode(chats.tokenizer(), [known])) == [
        ("<|im_start|>user\nWho? Ann. Who?<|im_end|>\n<|im_start|>assistant\n", "Ann")
    ]
