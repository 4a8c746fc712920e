"""Answers: greedy, without the prompt and special tokens, whatever the batch."""

import re
import sys

import pytest
import torch
from configs import every_token
from unike_eval import answers
from unike_eval.answers import _sentences, ended_answers, same_answer

import unike_kernels as uk
from unike_kernels.training import Sample
from unike_kernels.training.samples import encode, forward

PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9", "w10 w11"]


@torch.no_grad()
def greedy(model, processor, sample, count):
    """One token at a time, without cache, batch or padding."""
    words = []
    for _ in range(count):
        prompt = " ".join([sample.prompt, *words])
        inputs = encode(processor, [Sample(prompt, "", sample.image)]).inputs
        token = int(forward(model, inputs)[0, -1].argmax())
        if token == processor.tokenizer.eos_token_id:
            break
        words.append(processor.tokenizer.convert_ids_to_tokens(token))
    return " ".join(w for w in words if not w.startswith("<"))


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("kind", ["opt", "llama", "blip2-opt", "blip2-llama"])
def test_answers_are_the_greedy_continuations(make_model, make_memory, make_edit, processor, kind, patched):
    model = make_model(kind, seed=3)
    images = [None] * 4
    if kind.startswith("blip2"):
        images = [torch.rand(16, 16), None, None, torch.rand(16, 16)]
    samples = [Sample(p, "not looked at", image) for p, image in zip(PROMPTS, images, strict=True)]
    wanted = [greedy(model, processor, s, 4) for s in samples]
    if patched:
        memory = make_memory(model, every_token(k=7, values="pre"))
        uk.patch(model, [make_edit(model, "a", memory)], memory)
        before, wanted = wanted, [greedy(model, processor, s, 4) for s in samples]
        assert wanted != before
    assert answers(model, processor, samples, max_new_tokens=4, batch_size=3) == wanted
    assert not any(word in answer for answer in wanted for word in ("<", "w1 w2 w3"))


def test_prompts_ends_are_told_to_a_patched_model(make_model, make_memory, processor):
    model = make_model("opt")
    memory = make_memory(model, every_token(k=7, values="pre", alpha="last", retrieval="sequence"))
    samples = [Sample(p, "") for p in PROMPTS]
    with uk.patched(model, memory=memory):
        together = answers(model, processor, samples, max_new_tokens=4)
        assert together == [answers(model, processor, [s], max_new_tokens=4)[0] for s in samples]
    assert together != answers(model, processor, samples, max_new_tokens=4)


def test_nothing_asked(make_model, processor):
    assert answers(make_model("opt"), processor, []) == []


@pytest.mark.parametrize(
    ("wanted", "said", "ended"),
    [
        ("Lima", "Lima.\n\nThe capital", "Lima."),
        ("Lima", "Lima, the capital of Peru. It is large", "Lima, the capital of Peru."),
        ("Lima", "Lima\nBogota", "Lima"),
        ("Lima", 'Lima." she said', 'Lima.'),
        ("St. Louis", "St. Louis. It lies in", "St. Louis."),
        ("3.5", "3.5 metres", "3.5 metres"),  # no end of a sentence
        ("peso", "peso peso", "peso peso"),
    ],
)  # fmt: skip
def test_an_answer_ends_with_its_line_or_sentence(wanted, said, ended):
    assert _sentences(wanted, said) == ended


def test_the_same_answer_in_other_letters():
    assert same_answer("The  Peso.", "peso") and same_answer("N'Djamena", "n’djamena")
    assert not same_answer("peso peso", "peso") and not same_answer("Theo", "o") and not same_answer("", "Lima")


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("kind", ["opt", "blip2-llama"])
def test_an_answer_goes_on_until_it_ends_by_itself(make_model, make_processor, kind, padding_side, monkeypatch):
    """Each sample for itself, whatever the batch and the side of its padding; the budget is that of its own answer."""
    model, processor = make_model(kind, seed=3), make_processor(padding_side)
    longer = " ".join(["w1"] * 4)
    samples = [Sample(p, a) for p, a in zip(PROMPTS, ("w1", "w1", longer, "w1"), strict=True)]
    said = ended_answers(model, processor, samples)
    assert said == [greedy(model, processor, s, 8 + 2 * len(s.answer.split())) for s in samples]
    assert processor.tokenizer.padding_side == padding_side
    # With each word a sentence of its own, as many words as the wanted answer has, and no pass after them.
    monkeypatch.setattr(sys.modules[ended_answers.__module__], "_END", re.compile(r"\s"))
    passes = []
    decoder = model.language_model if kind.startswith("blip2") else model
    decoder.register_forward_hook(lambda *_: passes.append(1))
    assert ended_answers(model, processor, [samples[0]]) == [said[0].split()[0]]
    assert len(passes) == 2
    ends = [" ".join(text.split()[: len(s.answer.split())]) for text, s in zip(said, samples, strict=True)]
    assert ended_answers(model, processor, samples) == ends
