"""Trains the projector of the world of flags that ships with unike_eval, and measures it.

    python -m unike_eval.flags.pictures                    (once: installs the drawings)
    python evaluation/scripts/train_flags.py [--out FILE] [--seed 0]

First the projector learns to tell flags and things apart in three vendors' drawings, changed at random, from the states
of the frozen vision tower, which are computed once. Then its prompts, one for each flag, are trained through the frozen
language model to say the country's name and continent. The fourth vendor's drawings and the test's wordings are for
measuring alone. Runs on one thread.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from unike_eval.countries import Fact, codes, prompts
from unike_eval.countries.facts import Relation, facts
from unike_eval.flags.accuracy import accuracies
from unike_eval.flags.model import IMAGE, assemble
from unike_eval.flags.pictures import TRAINED, Vendor, emoji, flag
from unike_eval.flags.projector import FILE, STAGES, TOKENS, Projector
from unike_eval.flags.things import THINGS
from unike_eval.flags.tower import EfficientNetLite0, load_tower
from unike_eval.models import smollm2

from unike_kernels.training.samples import Sample, encode

CHANGED = 10  # drawings made of each, the first as it is
SEEING_STEPS, SEEING_BATCH, SEEING_RATE = 600, 256, 2e-3
PROMPT_STEPS, PROMPT_BATCH, PROMPT_RATE = 300, 16, 3e-3
STAY = 0.1  # weight of the squared distance of a prompt's tokens from where they began
TAUGHT: tuple[Relation, ...] = ("name", "continent")


def changed(picture: Tensor, rng: Random) -> Tensor:
    """A picture [3, S, S] in 0..1 as another vendor might have drawn it: corners, outline, waves, size, colours."""
    line = torch.linspace(-1, 1, picture.shape[-1])
    y, x = torch.meshgrid(line, line, indexing="ij")
    if rng.random() < 0.5:
        corner = rng.uniform(0.1, 0.4)
        beyond = [(place.abs() - (1 - corner)).clamp(min=0) for place in (x, y)]
        picture = picture.masked_fill(torch.hypot(*beyond) > corner, 1.0)
    if rng.random() < 0.3:
        outline = torch.maximum(x.abs(), y.abs()) > 1 - rng.uniform(0.03, 0.1)
        picture = picture.masked_fill(outline, rng.uniform(0, 0.3))
    height = rng.uniform(0, 0.12) if rng.random() < 0.5 else 0.0
    along = math.pi * rng.uniform(0.5, 1.3) * x + rng.uniform(0, 2 * math.pi)
    sizes = [rng.uniform(0.85, 1.12) for _ in range(2)]
    moved = [rng.uniform(-0.08, 0.08) for _ in range(2)]
    places = (x * sizes[0] + moved[0], (y + height * along.sin()) * (sizes[1] + height) + moved[1])
    around = 1 - F.grid_sample(1 - picture[None], torch.stack(places, -1)[None], align_corners=False)[0]
    shaded = around * (1 + 2 * height * rng.random() * along.cos())
    grey = shaded.mean(0, keepdim=True)
    coloured = grey + (shaded - grey) * rng.uniform(0.7, 1.15)
    gains = torch.tensor([rng.uniform(0.8, 1.1) * rng.uniform(0.9, 1.08) for _ in range(3)])
    picture = coloured * gains.view(3, 1, 1) + rng.uniform(-0.02, 0.05)
    if rng.random() < 0.3:
        small = F.interpolate(picture[None], size=rng.randrange(48, 100), mode="bilinear", antialias=True)
        picture = F.interpolate(small, size=picture.shape[-1], mode="bilinear")[0]
    return picture.clamp(0, 1)


def drawings(vendor: Vendor) -> list[tuple[int, Tensor]]:
    """Entry and picture of all flags and things that a vendor draws: flags come first, in the order of `codes`."""
    flags = [flag(iso, vendor) for iso in codes().values()]
    things = [] if vendor == "flag-icons" else [emoji(text, vendor) for text in THINGS.values()]
    return list(enumerate([*flags, *things]))


@torch.no_grad()
def states_of(tower: EfficientNetLite0, vendor: Vendor, copies: int, seed: int) -> tuple[Tensor, Tensor]:
    """What the tower sees in the drawings of a vendor, [n, 49, 472] bfloat16, and the entry of each."""
    states, entries = [], []
    for entry, picture in tqdm(drawings(vendor), vendor):
        plain = picture.float() / 255
        rng = Random(f"{vendor} {entry} {seed}")
        made = torch.stack([plain, *(changed(plain, rng) for _ in range(copies - 1))])
        seen = tower((made * 255 - 127) / 128).hidden_states
        states.append(torch.cat([seen[stage] for stage in STAGES], -1).bfloat16())
        entries += [entry] * copies
    return torch.cat(states), torch.tensor(entries)


def learn_to_see(projector: Projector, states: Tensor, entries: Tensor, seed: int) -> None:
    """Train what chooses the prompts; channels are standardized, which becomes a part of the weights."""
    torch.manual_seed(seed)
    some = states[:: max(1, len(states) // 1000)].float().flatten(0, 1)
    mean, spread = some.mean(0), some.std(0).clamp(min=1e-3)
    learned = [*projector.narrow.parameters(), *projector.choose.parameters()]
    optimizer = torch.optim.AdamW(learned, SEEING_RATE, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, SEEING_RATE, total_steps=SEEING_STEPS)
    for _ in tqdm(range(SEEING_STEPS), "seeing"):
        rows = torch.randint(len(states), (SEEING_BATCH,))
        scores = projector.scores(F.dropout((states[rows].float() - mean) / spread, 0.2))
        loss = F.cross_entropy(scores, entries[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        projector.narrow.weight /= spread
        projector.narrow.bias -= projector.narrow.weight @ mean


@torch.no_grad()
def begin(projector: Projector, names: Sequence[str], tokenizer: Any, embeddings: Tensor) -> None:
    """Each prompt begins as the name's tokens, behind some of the words "the country of"."""
    for entry, name in enumerate(names):
        lead = tokenizer(" the country of" if entry < len(codes()) else " a picture of").input_ids
        ids = tokenizer(f" {name}").input_ids
        ids = (lead[: max(TOKENS - len(ids), 0)] + ids)[:TOKENS]
        projector.prompts[entry] = embeddings[torch.tensor(ids)]


def learn_prompts(projector: Projector, model: nn.Module, processor: Any, seed: int) -> None:
    """Train the prompts of the flags through the language model, which says what is asked of each."""
    rng, names = Random(seed), list(codes())
    taught = [f for f in facts() if f.relation in TAUGHT] + [Fact(name, "name", name) for name in names]
    began, image_id = projector.prompts.detach().clone(), model.config.image_token_id
    projector.prompts.requires_grad_()
    optimizer = torch.optim.Adam([projector.prompts], PROMPT_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PROMPT_RATE, total_steps=PROMPT_STEPS)
    queue: list[Fact] = []
    for _ in (bar := tqdm(range(PROMPT_STEPS), "prompts")):
        if len(queue) < PROMPT_BATCH:
            queue += rng.sample(taught, len(taught))
        batch, queue = queue[:PROMPT_BATCH], queue[PROMPT_BATCH:]
        wordings = [rng.choice(prompts(Fact(IMAGE * TOKENS, f.relation, ""), "train", object())) for f in batch]
        samples = [Sample(words, fact.answer) for words, fact in zip(wordings, batch, strict=True)]
        asked = encode(processor.tokenizer, samples, ended=True)
        ids, mask = asked.inputs["input_ids"], asked.answer_mask()
        shown = projector.prompts[torch.tensor([names.index(f.country) for f in batch])]
        embedded = model.get_input_embeddings()(ids)
        embedded = embedded.masked_scatter((ids == image_id).unsqueeze(-1), shown)
        states = model.model.language_model(inputs_embeds=embedded, attention_mask=asked.inputs["attention_mask"])
        logits = model.lm_head(states.last_hidden_state[:, :-1][mask[:, 1:]])
        said = F.cross_entropy(logits.float(), ids[mask])
        loss = said + STAY * (projector.prompts - began).square().sum((1, 2)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(said=f"{float(said.detach()):.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    began = time.process_time()

    language_model, tokenizer = smollm2.load()
    embeddings = language_model.get_input_embeddings().weight.detach()
    projector = Projector(len(codes()) + len(THINGS), embeddings.shape[1])
    begin(projector, [*codes(), *THINGS], tokenizer, embeddings)
    tower = load_tower()
    seen = [states_of(tower, vendor, CHANGED, args.seed) for vendor in TRAINED]
    learn_to_see(projector, *map(torch.cat, zip(*seen, strict=True)), args.seed)
    model, processor = assemble(language_model.requires_grad_(False), tokenizer, projector)
    learn_prompts(projector, model, processor, args.seed)

    tensors = {name: t.bfloat16().contiguous() for name, t in projector.state_dict().items()}
    save_file(tensors, args.out)
    projector.load_state_dict({name: t.float() for name, t in tensors.items()})
    print(accuracies(model, processor))
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB, {time.process_time() - began:.0f} s of processor time")


if __name__ == "__main__":
    main()
