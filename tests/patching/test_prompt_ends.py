"""Where prompts end is found as a model is used; with the results of `rows(prompt_lengths=...)`, which says it."""

from contextlib import nullcontext

import pytest
import torch
from configs import every_token
from transformers import DynamicCache, pipeline

import unike_kernels as uk

IDS = torch.tensor([[5, 6, 7, 8, 9], [0, 0, 3, 11, 12], [0, 21, 22, 23, 24]])
MASK = (IDS > 0).long()
LENGTHS = [5, 3, 4]
CONFIGS = {
    "answer": every_token(k=7, values="pre", tokens="answer"),
    "last": every_token(k=7, values="pre", alpha="last"),
    "sequence": every_token(k=7, values="pre", retrieval="sequence", tokens="answer"),
}


@pytest.fixture(params=["opt", "llama"])
def kind(request):
    return request.param


def setup(make_model, make_memory, make_edit, kind, config):
    model = make_model(kind)
    memory = make_memory(model, config)
    uk.patch(model, [make_edit(model, "a", memory)], memory)
    return model


def told(model, lengths=LENGTHS):
    return uk.rows(model, prompt_lengths=lengths)


def generated(model, ids=IDS, mask=MASK, **options):
    return model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False,
        return_dict_in_generate=True, output_logits=True, **options,
    )  # fmt: skip


def same(one, other, rtol=0.0, atol=0.0):
    assert torch.equal(one.sequences, other.sequences)
    for a, b in zip(one.logits, other.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generate(make_model, make_memory, make_edit, kind, config, options):
    """Batches with padding on the left."""
    model = setup(make_model, make_memory, make_edit, kind, CONFIGS[config])
    with told(model):
        wanted = generated(model, **options)
    same(generated(model, **options), wanted)
    everywhere = setup(make_model, make_memory, make_edit, kind, every_token(k=7, values="pre"))
    assert not torch.allclose(generated(everywhere, **options).logits[0], wanted.logits[0], atol=1e-2)  # it matters


@pytest.mark.parametrize("config", CONFIGS)
def test_a_prompt_of_one_token(make_model, make_memory, make_edit, kind, config):
    model = setup(make_model, make_memory, make_edit, kind, CONFIGS[config])
    ids = IDS[:, -1:]
    with told(model, [1, 1, 1]):
        wanted = generated(model, ids, torch.ones_like(ids))
    same(generated(model, ids, torch.ones_like(ids)), wanted)


@pytest.mark.parametrize("config", ["answer", "last"])
def test_a_static_cache(make_model, make_memory, make_edit, kind, config):
    """Whose prepared mask does not tell what is padding; generations are padded on the left."""
    model = setup(make_model, make_memory, make_edit, kind, CONFIGS[config])
    static = generated(model, IDS[:1], MASK[:1], cache_implementation="static")
    same(static, generated(model, IDS[:1], MASK[:1]), rtol=1e-4, atol=1e-4)


def test_a_pipeline(make_model, make_memory, make_edit, make_processor, kind):
    model = setup(make_model, make_memory, make_edit, kind, CONFIGS["answer"])
    talk = pipeline("text-generation", model=model, tokenizer=make_processor().tokenizer, batch_size=2)
    prompts = ["w1 w2 w3", "w4 w5 w6 w7 w8"]

    def said(block):
        with block:
            found = talk(prompts, max_new_tokens=5, min_new_tokens=5, do_sample=False, return_tensors=True)
        return [one[0]["generated_token_ids"] for one in found]

    assert said(nullcontext()) == said(told(model, [3, 5]))


@torch.no_grad()
def turns(model, block):
    """Logits of two turns of a chat over one cache: a prompt, two tokens, a further prompt, another token."""
    cache, found, past = DynamicCache(config=model.config), [], 0
    for turn in (IDS[:1], IDS[2:, 1:]):
        with block([past + turn.shape[1]]):
            for part in (turn, torch.tensor([[13]]), torch.tensor([[14]])):
                found.append(model(input_ids=part, past_key_values=cache).logits[0])
                past += part.shape[1]
    return found


def test_a_chat_that_goes_on_with_its_cache(make_model, make_memory, make_edit, kind):
    model = setup(make_model, make_memory, make_edit, kind, CONFIGS["answer"])
    free, wanted = turns(model, lambda lengths: nullcontext()), turns(model, lambda lengths: told(model, lengths))
    assert all(torch.equal(a, b) for a, b in zip(free, wanted, strict=True))
    uk.unpatch(model)
    plain = turns(model, lambda lengths: nullcontext())
    assert not torch.allclose(free[3][:-1], plain[3][:-1], atol=1e-2)  # the edit acts, on the second prompt too


@torch.no_grad()
@pytest.mark.parametrize("config", CONFIGS)
def test_without_a_cache_it_must_be_said(make_model, make_memory, make_edit, kind, config):
    """A pass without one may be teacher forcing, of which nobody knows where the answer begins."""
    model = setup(make_model, make_memory, make_edit, kind, CONFIGS[config])
    with pytest.raises(ValueError, match=r"prompt's end.* inside uk.rows\(model, prompt_lengths=\[...\]\)"):
        model(input_ids=IDS, attention_mask=MASK, use_cache=False)
    with told(model):
        without = model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits
    torch.testing.assert_close(model(input_ids=IDS, attention_mask=MASK).logits, without, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_chunks_and_padding_behind(make_model, make_memory, make_edit, kind):
    """Each chunk ends at its last token; of a row that is padded on the right, the last one that is no padding."""
    model = setup(make_model, make_memory, make_edit, kind, CONFIGS["answer"])
    right, mask = IDS.clone(), MASK.clone()
    for row, n in enumerate(LENGTHS):
        right[row], mask[row] = right[row].roll(n - 5), mask[row].roll(n - 5)
    with told(model):
        wanted = model(input_ids=right, attention_mask=mask).logits
    assert torch.equal(model(input_ids=right, attention_mask=mask).logits, wanted)
    cache = DynamicCache(config=model.config)
    with told(model, [2]):
        model(input_ids=IDS[:1, :2], past_key_values=cache)
    with told(model, [5]):
        wanted = model(input_ids=IDS[:1, 2:], past_key_values=cache).logits
    cache = DynamicCache(config=model.config)
    model(input_ids=IDS[:1, :2], past_key_values=cache)
    assert torch.equal(model(input_ids=IDS[:1, 2:], past_key_values=cache).logits, wanted)


@torch.no_grad()
@pytest.mark.parametrize("config", ["last", "sequence"])
def test_whole_prompts_do_not_come_in_chunks(make_model, make_memory, make_edit, kind, config):
    model = setup(make_model, make_memory, make_edit, kind, CONFIGS[config])
    cache = DynamicCache(config=model.config)
    model(input_ids=IDS[:1, :2], past_key_values=cache)
    with pytest.raises(ValueError, match="the whole prompt must come in one forward pass; 2 tokens of it came before"):
        model(input_ids=IDS[:1, 2:], past_key_values=cache)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_code_that_would_have_to_remember(make_model, make_memory, make_edit):
    """It knows nothing of the pass with the prompt's end, and so does not take each token for one."""
    torch._dynamo.reset()
    model = setup(make_model, make_memory, make_edit, "llama", CONFIGS["last"])
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(Exception, match="prompt's end"):
        compiled(input_ids=IDS[:1])
