"""Answers: greedy, without the prompt and special tokens, whatever the batch."""

import pytest
import torch
from configs import every_token
from unike_eval import answers

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
