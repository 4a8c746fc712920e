"""What a model says: greedy answers to prompts with and without images, and whether two of them are the same."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from unike_kernels.backbones import device_of
from unike_kernels.training.samples import (
    Batch,
    Sample,
    accepted,
    batches,
    encode,
    evaluating,
    prompt_lengths_for,
    text_model_of,
)

_END = re.compile(r"\n|(?<=[.!?])[\"')\]]*\s")  # of a line, or of a sentence that another one follows
_ARTICLES = re.compile(r"\b(a|an|the)\b")


@torch.no_grad()
def answers(
    model: nn.Module, processor: Any, samples: Sequence[Sample], *, max_new_tokens: int = 8, batch_size: int = 64
) -> list[str]:
    """The greedy continuation of each sample's prompt (its answer is not looked at), special tokens left out."""
    found = [""] * len(samples)
    for group in batches(samples, batch_size):
        out = _continued(model, processor, [samples[i] for i in group], max_new_tokens)
        for i, tokens in zip(group, out, strict=True):
            found[i] = _spelled(processor, tokens)
    return found


Within = Callable[[Batch], AbstractContextManager[None]]


def nothing(batch: Batch) -> AbstractContextManager[None]:
    """What most systems need to do around a pass."""
    return nullcontext()


@torch.no_grad()
def ended_answers(
    model: nn.Module,
    processor: Any,
    samples: Sequence[Sample],
    *,
    batch_size: int = 32,
    within: Within = nothing,
) -> list[str]:
    """The greedy answer to each sample's prompt as far as it goes by itself.

    It ends where the model ends its turn, or with its first line or sentence; for a wanted answer of several sentences
    with as many of them, so that "St. Louis" can be said. What has not ended after 8 tokens more than twice those of
    the wanted answer is cut off there.

    Args:
        model: patched or not.
        processor: its processor or tokenizer.
        samples: their answers tell how many sentences and tokens may be said.
        batch_size: samples at a time.
        within: batch of prompts -> what the model answers in, for systems that look at where a prompt ends.
    """
    found = [""] * len(samples)
    tokenizer = getattr(processor, "tokenizer", processor)
    for group in batches(samples, batch_size):
        asked = [samples[i] for i in group]
        limits = [8 + 2 * len(tokenizer(s.answer, add_special_tokens=False)["input_ids"]) for s in asked]

        def over(tokens: Tensor, asked: Sequence[Sample] = asked, limits: Sequence[int] = limits) -> list[bool]:
            said = [_spelled(processor, row) for row in tokens]
            short = [_sentences(s.answer, text) != text for s, text in zip(asked, said, strict=True)]
            return [cut or tokens.shape[1] >= limit for cut, limit in zip(short, limits, strict=True)]

        with evaluating(model):
            out = _continued(model, processor, asked, max(limits), over, within)
        for i, tokens, sample, limit in zip(group, out, asked, limits, strict=True):
            found[i] = _sentences(sample.answer, _spelled(processor, tokens[:limit]))
    return found


def same_answer(one: str, other: str) -> bool:
    """Exact match but for case, punctuation, articles and white space, as question answering is usually scored."""
    return _normal(one) == _normal(other)


def _normal(text: str) -> str:
    plain = unicodedata.normalize("NFKC", text).casefold()
    words = _ARTICLES.sub(" ", "".join(c for c in plain if not unicodedata.category(c).startswith("P")))
    return " ".join(words.split())


def _sentences(wanted: str, said: str) -> str:
    """As many lines and sentences of what is said as the wanted answer has."""
    count = 1 + len(_END.findall(wanted.strip()))
    ends = list(_END.finditer(said))
    return said if len(ends) < count else said[: ends[count - 1].start()]


def _spelled(processor: Any, tokens: Tensor) -> str:
    tokenizer = getattr(processor, "tokenizer", processor)
    text: str = tokenizer.decode(tokens, skip_special_tokens=True)
    return text.strip()


def _continued(
    model: nn.Module,
    processor: Any,
    samples: Sequence[Sample],
    most: int,
    over: Callable[[Tensor], list[bool]] | None = None,
    within: Within = nothing,
) -> Tensor:
    """The tokens [B, n] that follow the prompts, `most` at most; a row that is over by what it says is padded."""
    from transformers import StoppingCriteriaList

    tokenizer = getattr(processor, "tokenizer", processor)
    side, tokenizer.padding_side = tokenizer.padding_side, "left"  # what is said follows the prompt at once
    try:
        batch = encode(processor, [sample.asked for sample in samples], device_of(model))
    finally:
        tokenizer.padding_side = side
    into, prompt = text_model_of(model, batch.inputs), batch.inputs["input_ids"]
    length = prompt.shape[1]

    def new(ids: Tensor) -> Tensor:  # some models return the prompt too
        return ids[:, length:] if torch.equal(ids[:, :length], prompt) else ids

    def criterion(ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return torch.tensor(over(new(ids)) if over else [False] * len(ids), dtype=torch.bool, device=ids.device)

    settings = {"max_new_tokens": most, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    if over:
        settings["stopping_criteria"] = StoppingCriteriaList([criterion])
    with prompt_lengths_for(model, batch), within(batch):
        return new(into.generate(**accepted(into, batch.inputs), **settings))
