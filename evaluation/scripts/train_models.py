"""Trains the models of digits and coloured shapes that ship with unike_eval, and measures them.

    python evaluation/scripts/train_models.py [--world digits|easyvqa] [--decoder opt|llama|both] [--seed 0]

Runs on one thread, 11 to 14 minutes of processor time for each decoder. The same seed, torch version and processor
give the same weights. The settings were chosen by looking at the accuracies on the test images, which are therefore
slightly optimistic.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Hashable, Iterable
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
)
from unike_eval.builtin_suite import WORLDS
from unike_eval.toy import Fact, World, WorldProcessor
from unike_eval.toy.processor import IMAGE_TOKEN, NUM_IMAGE_TOKENS
from unike_eval.toy.samples import Sample, Samples

WIDTH = 64
POSITIONS = 768
STEPS = 3500
# Coloured shapes are not learned from answers alone: first the vision model learns to tell the sorts of images apart.
LOOKING_STEPS = {"easyvqa": 1000}
LEARNING_RATE = 1.5e-3
WEIGHT_DECAY = 0.05
PATCH_SIZES = {16: 4, 64: 8}  # of images of this size


def train_tokenizer(world: World, path: Path) -> None:
    """Writes a word-level tokenizer over every word of the prompts and answers."""
    lines = [line for fact in world.FACTS for line in (*fact.train, *fact.held_out, fact.answer)]
    lines += [line for split in ("train", "test") for item in world.text_items(split) for line in item]
    words = sorted({word for line in lines for word in line.split()})
    special = ["<pad>", "</s>", "<unk>", IMAGE_TOKEN]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("[?,.]"), "isolated")]
    )
    tokenizer.add_special_tokens(special)
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))


def build_model(decoder: str, processor: WorldProcessor) -> Blip2ForConditionalGeneration:
    """A BLIP-2 model with fresh weights; `decoder`: "opt" or "llama"."""
    tokenizer, image_size = processor.tokenizer, processor.image_shape[-1]
    shared = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "num_hidden_layers": 6,
        "num_attention_heads": 2,
        "max_position_embeddings": POSITIONS,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    text: PreTrainedConfig
    if decoder == "opt":
        text = OPTConfig(**shared, ffn_dim=4 * WIDTH, word_embed_proj_dim=WIDTH, dropout=0.0)
    else:
        text = LlamaConfig(**shared, intermediate_size=176)
    vision = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
    qformer = dict(vision, cross_attention_frequency=1, vocab_size=1, max_position_embeddings=1)
    config = Blip2Config(
        vision_config=dict(vision, image_size=image_size, patch_size=PATCH_SIZES[image_size]),
        qformer_config=dict(qformer, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        text_config=text,
        num_query_tokens=NUM_IMAGE_TOKENS,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
    )
    model = Blip2ForConditionalGeneration(config)
    # Hugging Face's std of 0.02 suits wide models; at this width the image would not reach the answer for a long time.
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.weight.normal_(std=module.weight[0].numel() ** -0.5)
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(std=WIDTH**-0.5)
        model.vision_model.embeddings.position_embedding.normal_(std=WIDTH**-0.5)
        model.query_tokens.normal_()
        model.tie_weights()
    return model


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Lightly rotates, scales, shears and shifts pixel values [B, C, H, W]."""
    jitter = torch.randn(len(images), 2, 3, generator=generator) * torch.tensor([0.1, 0.1, 0.07])
    grid = nn.functional.affine_grid(torch.eye(2, 3) + jitter, list(images.shape), align_corners=False)
    return nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


class Batches:
    """Draws training batches."""

    def __init__(self, world: World, seed: int, processor: WorldProcessor) -> None:
        self.rng = Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.processor = processor
        self.samples = Samples(world)
        self.showing = world.showing("train")

    def plain(self) -> dict[str, Tensor]:
        """80 questions: inputs and labels [B, T], as of `collate`, and position ids [B, T]."""
        batch = self._augmented([self.samples.draw(self.rng) for _ in range(80)])
        return batch | {"input_ids": self._forget_words(batch["input_ids"], batch["labels"])}

    def with_examples(self) -> dict[str, Tensor]:
        """The like, fewer questions: 24 with a few worked examples before them, now and then 6 with up to 40."""
        rows, fewest, most = (24, 1, 4) if self.rng.random() < 0.75 else (6, 5, 40)
        return self._augmented(
            [self.samples.draw(self.rng, examples=self.rng.randint(fewest, most)) for _ in range(rows)]
        )

    def images(self, sorts: list[Hashable]) -> tuple[Tensor, Tensor]:
        """96 augmented images: pixel values, and which of `sorts` they show."""
        labels = [self.rng.randrange(len(sorts)) for _ in range(96)]
        images = [self.rng.choice(self.showing[sorts[label]]) for label in labels]
        pixels = self.processor([""] * len(images), images).pixel_values
        return augment(pixels, self.generator), torch.tensor(labels)

    def _augmented(self, samples: list[Sample]) -> dict[str, Tensor]:
        shown = [self.showing[sample.shown] for sample in samples if sample.shown is not None]
        batch = collate(self.processor, samples, [images[self.rng.randrange(len(images))] for images in shown])
        if shown:
            batch["pixel_values"] = augment(batch["pixel_values"], self.generator)
        batch["position_ids"] = self._positions(samples, batch["input_ids"].shape[1])
        return batch

    def _forget_words(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Makes a tenth of the words of questions about images unknown, so that no single phrasing is memorised."""
        tokenizer = self.processor.tokenizer
        image_token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        word = (ids[:, :1] == image_token) & (ids != image_token) & (ids != tokenizer.pad_token_id) & (labels == -100)
        chosen = torch.rand(ids.shape, generator=self.generator) < 0.1
        return ids.masked_fill(word & chosen, tokenizer.unk_token_id)

    def _positions(self, samples: list[Sample], length: int) -> Tensor:
        """Positions [B, T] as if, in some rows, a long context stood before the text: late positions get trained."""
        positions = torch.arange(length).repeat(len(samples), 1)
        for row, sample in enumerate(samples):
            if self.rng.random() < 0.2:
                start = 0 if sample.shown is None else NUM_IMAGE_TOKENS
                positions[row, start:] += self.rng.randint(0, POSITIONS - length)
        return positions


def collate(processor: WorldProcessor, samples: list[Sample], images: list[Tensor]) -> dict[str, Tensor]:
    """Right-padded inputs; labels are -100 except at the answers and at the end of the sequence after them."""
    placeholders = " ".join([IMAGE_TOKEN] * NUM_IMAGE_TOKENS)
    tokenizer = processor.tokenizer
    texts = [
        f"{'' if sample.shown is None else placeholders} {sample.prompt} {sample.answer} {tokenizer.eos_token}"
        for sample in samples
    ]
    encoded = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    ends = encoded.attention_mask.sum(1, keepdim=True)
    starts = ends - torch.tensor([[len(sample.answer.split()) + 1] for sample in samples])
    columns = torch.arange(encoded.input_ids.shape[1])
    labels = encoded.input_ids.masked_fill((columns < starts) | (columns >= ends), -100)
    batch = {**encoded, "labels": labels}
    if images:
        batch["pixel_values"] = processor([""] * len(images), images).pixel_values
    return batch


def run(model: Blip2ForConditionalGeneration, batch: dict[str, Tensor]) -> Any:
    """The model's output; a batch without a single image goes to the language model, for BLIP-2 insists on images."""
    return (model if "pixel_values" in batch else model.language_model)(**batch)


def look(model: Blip2ForConditionalGeneration, batches: Batches, steps: int) -> None:
    """Trains vision model and Q-Former to tell what an image shows, with a linear head that is thrown away."""
    sorts = list(batches.showing)
    head = nn.Linear(NUM_IMAGE_TOKENS * WIDTH, len(sorts))
    parts = nn.ModuleList([model.vision_model, model.qformer, head])
    parameters = [*parts.parameters(), model.query_tokens]
    optimizer, schedule = optimization(parameters, steps)
    for _ in tqdm(range(steps), unit="step"):
        pixels, labels = batches.images(sorts)
        seen = model.vision_model(pixels).last_hidden_state
        queries = model.query_tokens.expand(len(pixels), -1, -1)
        found = model.qformer(query_embeds=queries, encoder_hidden_states=seen).last_hidden_state
        nn.functional.cross_entropy(head(found.flatten(1)), labels).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def optimization(parameters: Iterable[nn.Parameter], steps: int) -> tuple[Optimizer, LRScheduler]:
    """AdamW with a linear warm-up and a cosine decay."""
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY, fused=True)
    warmup = min(100, steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    return optimizer, schedule


def train(model: Blip2ForConditionalGeneration, batches: Batches, steps: int) -> None:
    """Trains `model` in place."""
    optimizer, schedule = optimization(model.parameters(), steps)
    model.train()
    average = 0.0
    for step in (progress := tqdm(range(steps), unit="step")):
        loss = run(model, batches.plain()).loss
        loss.backward()
        (0.5 * run(model, batches.with_examples()).loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        average = loss.item() if step == 0 else 0.98 * average + 0.02 * loss.item()
        progress.set_postfix(loss=f"{average:.3f}")
    model.eval()


@torch.inference_mode()
def exact(
    model: Blip2ForConditionalGeneration, processor: WorldProcessor, samples: list[Sample], images: list[Tensor]
) -> float:
    """The share of `samples` that greedy decoding answers exactly, end of sequence included.

    `images`: one for each sample that shows something, in order.
    """
    hits = 0
    remaining = iter(images)
    for first in range(0, len(samples), 128):
        chunk = samples[first : first + 128]
        batch = collate(processor, chunk, [next(remaining) for sample in chunk if sample.shown is not None])
        labels = batch.pop("labels")[:, 1:]
        guesses = run(model, batch).logits[:, :-1].argmax(-1)
        hits += int(((guesses == labels) | (labels == -100)).all(1).sum())
    return round(hits / len(samples), 4)


@torch.inference_mode()
def common_answer(
    model: Blip2ForConditionalGeneration, processor: WorldProcessor, fact: Fact, images: list[Tensor]
) -> str:
    """What the model answers to the canonical phrasing on most `images`."""
    batch = processor([fact.train[0]] * len(images), images)
    tokens = model.generate(**batch, max_new_tokens=6, do_sample=False)[:, batch.input_ids.shape[1] :]
    answers = processor.batch_decode(tokens, skip_special_tokens=True)
    answer, count = Counter(answers).most_common(1)[0]
    return f"{answer} ({count}/{len(images)})"


def evaluate(world: World, model: Blip2ForConditionalGeneration, processor: WorldProcessor) -> dict[str, Any]:
    """Exact-match accuracies on the test images and the text-only test items."""
    validation, test = world.showing("validation"), world.showing("test")
    showing = {shown: [*validation[shown], *images] for shown, images in test.items()}
    drawn = Samples(world)

    def ask(facts: list[Fact], split: Any, examples: int = 0) -> float:
        """Every phrasing of each fact on every test image, or 600 of these behind worked examples."""
        rng = Random(0)
        samples, images = [], []
        for fact in facts:
            for prompt in fact.phrasings(split):
                for image in showing[fact.shown]:
                    samples.append(Sample(drawn.with_examples(rng, fact, prompt, examples), fact.answer, fact.shown))
                    images.append(image)
        if examples:
            rows = rng.sample(range(len(samples)), min(len(samples), 600))
            samples, images = [samples[row] for row in rows], [images[row] for row in rows]
        return exact(model, processor, samples, images)

    taught, withheld = [f for f in world.FACTS if not f.withheld], [f for f in world.FACTS if f.withheld]
    kinds = {
        kind: {
            "train phrasings": ask([fact for fact in taught if fact.kind == kind], "train"),
            "held-out phrasings": ask([fact for fact in taught if fact.kind == kind], "held_out"),
            "withheld facts": ask([fact for fact in withheld if fact.kind == kind], "train"),
        }
        for kind in dict.fromkeys(fact.kind for fact in world.FACTS)
    }
    return {
        "taught facts, train phrasings": ask(taught, "train"),
        "taught facts, held-out phrasings": ask(taught, "held_out"),
        "withheld facts, train phrasings": ask(withheld, "train"),
        "text only": {
            split: exact(model, processor, [Sample(*item, None) for item in world.text_items(split)], [])
            for split in ("train", "test")
        },
        "behind worked examples, the right answer among them": {
            f"{name}, {count} examples": ask(facts, "train", count)
            for name, facts in (("taught facts", taught), ("withheld facts", withheld))
            for count in (1, 4, 40)
        },
        "by kind": kinds,
        "withheld facts: right answer, most common answer": {
            f"{fact.kind} {fact.shown}": [fact.answer, common_answer(model, processor, fact, showing[fact.shown])]
            for fact in withheld
        },
    }


def main(arguments: list[str] | None = None, output: Path | None = None, steps: int = STEPS) -> None:
    """Trains the chosen decoders and writes tokenizer, weights and measurements to `output`, or the package."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", choices=tuple(WORLDS), default="digits")
    parser.add_argument("--decoder", choices=("opt", "llama", "both"), default="both")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    world = WORLDS[options.world]
    output = output or Path(world.__file__).parent / "weights"
    train_tokenizer(world, output / "tokenizer.json")
    processor = world.load_processor(output / "tokenizer.json")
    for decoder in ("opt", "llama") if options.decoder == "both" else (options.decoder,):
        torch.manual_seed(options.seed)
        model = build_model(decoder, processor)
        batches = Batches(world, options.seed, processor)
        if options.world in LOOKING_STEPS:
            look(model, batches, min(steps, LOOKING_STEPS[options.world]))
        train(model, batches, steps)
        model.save_pretrained(output / decoder)
        report = {
            "seed": options.seed,
            "steps": steps,
            "learning rate": LEARNING_RATE,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "exact-match accuracy": evaluate(world, model, processor),
        }
        text = json.dumps(report, indent=2, ensure_ascii=False)
        (output / decoder / "training.json").write_text(text + "\n", encoding="utf-8")
        print(f"{decoder}: {text}")


if __name__ == "__main__":
    main()
