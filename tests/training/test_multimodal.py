"""Edits of prompts with images, in every multimodal family: what a model is given, trained with, and shifts."""

from __future__ import annotations

import pytest
import torch
from backbones.zoo import V5, ZOO, model_of
from configs import every_token

import unike_kernels as uk
from unike_kernels.training import EditTraining, Sample, train_edit
from unike_kernels.training.samples import encode, forward

# mistral3's own code takes an image of one token, as these are, for none.
SIGHTED = [name for name, f in ZOO.items() if ("language_" in f.layers or "text_" in f.layers) and name != "mistral3"]
IMAGE = 3  # the placeholder


class Processor:
    """Word tokens behind as many placeholders as the model makes of an image, and what else its family's returns."""

    def __init__(self, name, model, tokenizer):
        self.name, self.model, self.tokenizer = name, model, tokenizer
        with torch.no_grad():
            self.count = self._tokens(self._seen([torch.rand(3, 16, 16)]))

    def _seen(self, images):
        pixels = torch.stack(images)
        if self.name.startswith("qwen"):
            patches = pixels.reshape(-1, 3, 1, 2, 8, 2, 8).expand(-1, -1, 2, -1, -1, -1, -1)
            flat = patches.permute(0, 3, 5, 1, 2, 4, 6).reshape(4 * len(images), -1)
            return {"pixel_values": flat, "image_grid_thw": torch.tensor([[1, 2, 2]] * len(images))}
        if self.name in ("idefics3", "smolvlm"):
            return {"pixel_values": pixels.unsqueeze(1)}
        if self.name in ("llava_next", "llava_onevision"):
            sizes = torch.tensor([[16, 16]] * len(images))
            return {"pixel_values": pixels.unsqueeze(1).repeat(1, 2, 1, 1, 1), "image_sizes": sizes}
        return {"pixel_values": pixels}

    def _tokens(self, seen):
        if self.name in ("blip-2, opt", "blip-2, llama", "instructblip"):
            return self.model.config.num_query_tokens
        features = self.model.get_image_features(**seen)
        features = getattr(features, "pooler_output", features)  # transformers 4 returns them as they are
        if self.name == "qwen3_vl" and not V5:
            features, _of_other_depths = features
        parts = features if isinstance(features, list | tuple) else [features]
        return sum(part[..., 0].numel() for part in parts)

    def __call__(self, text, images=None, **kwargs):
        seeing = f"{'<image> ' * self.count}" if images is not None else ""
        encoded = dict(self.tokenizer([f"{seeing}{t}" for t in text], **kwargs))
        ids = encoded["input_ids"]
        if images is None:
            return encoded
        if self.name == "instructblip":
            encoded |= {"qformer_input_ids": ids.new_ones(len(ids), 2)}
            encoded |= {"qformer_attention_mask": ids.new_ones(len(ids), 2)}
        if self.name in ("gemma3", "paligemma"):
            encoded["token_type_ids"] = (ids == IMAGE).long()
            if self.name == "paligemma":  # it tells what follows the prompt
                encoded["token_type_ids"] = (torch.arange(ids.shape[1]) == ids.shape[1] - 1).long().expand_as(ids)
        if self.name.startswith("qwen"):
            encoded["mm_token_type_ids"] = (ids == IMAGE).long()
        return {**encoded, **self._seen(images)}


@pytest.mark.parametrize("name", SIGHTED)
def test_an_edit_of_an_image_is_trained(name, processor):
    """In several steps, with samples to preserve, which are replayed; the second step is as good as a whole pass."""
    model = model_of(ZOO[name], torch.float32)
    sighted = Processor(name, model, processor.tokenizer)
    image, other = torch.rand(2, 3, 16, 16)
    training = EditTraining(steps=6, neurons=2, prompt_dropout=0.2, stop_loss=1e-3)
    result = train_edit(
        model, sighted, Sample("w1 w2", "w9", image), preserve=[Sample("w3", "w5", other)], training=training,
        progress=False,
    )  # fmt: skip
    assert len(result.losses) == 7
    assert result.losses[-1] < result.losses[0]
    inputs = encode(sighted, [Sample("w1 w2", "w9", image)]).inputs
    with torch.no_grad():
        before = forward(model, inputs)
        with uk.patched(model, [result.edit]):
            assert (forward(model, inputs) - before).abs().max() > 1e-3
        assert torch.equal(forward(model, inputs), before)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("name", ["gemma3", "paligemma", "blip-2, opt"])
@torch.no_grad()
def test_where_a_prompt_ends_is_found_behind_a_mask_that_the_model_prepares(
    name, padding_side, make_processor, make_memory
):
    """In rows of several lengths: tokens before the prompt's last one are as they were, the others are shifted."""
    model = model_of(ZOO[name], torch.float32)
    memory = make_memory(model, every_token(k=7, values="pre", tokens="answer", alpha=0.5), layers=(3,))
    sighted = Processor(name, model, make_processor(padding_side).tokenizer)
    batch = encode(sighted, [Sample(f"w1{' w2' * n}", "w9 w8", torch.rand(3, 16, 16)) for n in range(3)])
    before, mask = forward(model, batch.inputs), batch.inputs["attention_mask"].bool()
    with uk.patched(model, memory=memory), uk.rows(model, prompt_lengths=batch.prompt_lengths):
        after = forward(model, batch.inputs)
    ended = torch.arange(mask.shape[1]) >= batch.ends.unsqueeze(1)
    changed = (after - before).abs().amax(-1) > 1e-4
    assert torch.equal(changed[mask], ended[mask])


@pytest.mark.parametrize("name", ["gemma3", "paligemma"])
@torch.no_grad()
def test_token_types_reach_the_model(name, processor):
    """They switch its attention mask on, so that states are others without them."""
    if name == "paligemma" and not V5:
        pytest.skip("in transformers 4 it looks at them in training alone")
    model = model_of(ZOO[name], torch.float32)
    inputs = encode(
        Processor(name, model, processor.tokenizer), [Sample("w1 w2 w3", "w9", torch.rand(3, 16, 16))]
    ).inputs
    with_types = forward(model, inputs)
    assert torch.equal(with_types, model(**inputs, use_cache=False).logits)
    without = forward(model, {k: v for k, v in inputs.items() if k != "token_type_ids"})
    assert (with_types - without).abs().max() > 1e-3


def shifted_tokens(model, memory, run):
    """bool [B, T]: the tokens that the last patched layer was told to shift."""
    seen = []
    with uk.patched(model, memory=memory):
        state = uk.patching.session.require_state(model)
        *_, last = state.attentions.values()
        last.module.register_forward_pre_hook(lambda *_: seen.append(state.context.now().shifted))
        run()
    return seen[-1]


@pytest.mark.parametrize(
    ("name", "beyond"), [("llava", False), ("gemma3", True), ("paligemma", True), ("qwen2_vl", False)]
)
@torch.no_grad()
def test_no_placeholder_is_shifted(name, beyond, processor, make_memory):
    """Of an image or a video, though the model may replace its id before the embedding sees it."""
    model = model_of(ZOO[name], torch.float32)
    memory = make_memory(model, every_token(k=7, values="pre", tokens="text"), layers=(3,))
    sighted = Processor(name, model, processor.tokenizer)
    inputs = encode(sighted, [Sample("w1 w2 w3", "", torch.rand(3, 16, 16))]).inputs
    wanted = inputs["input_ids"] != IMAGE
    assert not wanted.all()
    if beyond:  # the placeholder is no word of the vocabulary
        inputs["input_ids"] = inputs["input_ids"].masked_fill(~wanted, 1000)
        model.config.image_token_id = 1000
    if name == "qwen2_vl":
        inputs["input_ids"][0, -1], wanted[0, -1] = model.config.video_token_id, False
        inputs = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
    got = shifted_tokens(model, memory, lambda: model(**inputs, use_cache=False))
    assert torch.equal(got, wanted)
