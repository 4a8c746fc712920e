"""What a model says: greedy answers to prompts with and without images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from unike_kernels.backbones import device_of
from unike_kernels.training.samples import Sample, accepted, batches, encode, prompt_lengths_for, text_model_of


@torch.no_grad()
def answers(
    model: nn.Module, processor: Any, samples: Sequence[Sample], *, max_new_tokens: int = 8, batch_size: int = 64
) -> list[str]:
    """The greedy continuation of each sample's prompt (its answer is not looked at), special tokens left out."""
    found = [""] * len(samples)
    tokenizer = getattr(processor, "tokenizer", processor)
    for group in batches(samples, batch_size):
        batch = encode(processor, [samples[i].asked for i in group], device_of(model))
        settings = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
        with prompt_lengths_for(model, batch):
            into = text_model_of(model, batch.inputs)
            out = into.generate(**accepted(into, batch.inputs), **settings)
        length = batch.inputs["input_ids"].shape[1]
        if torch.equal(out[:, :length], batch.inputs["input_ids"]):  # some models return the prompt too
            out = out[:, length:]
        for i, text in zip(group, processor.batch_decode(out, skip_special_tokens=True), strict=True):
            found[i] = text.strip()
    return found
