"""Trains the projector of the world of flags that ships with unike_eval, and measures it.

    python -m unike_eval.flags                  (once: installs the drawings)
    python evaluation/scripts/train_flags.py [--out FILE] [--seed 0]

First the projector learns to tell flags and things apart in three vendors' drawings, changed at random, from the states
of the frozen vision tower, which are computed once. Then its prompts, one for each flag, and low-rank changes of the
language model are trained to say the country's name and continent, and of the countries for training also the capital
and the currency. The fourth vendor's drawings and the wordings of validation and test are for measuring alone. Runs on
one thread; needs peft.
"""

from __future__ import annotations

import argparse
import math
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from unike_eval.countries import Fact, codes, prompts
from unike_eval.countries.facts import Relation
from unike_eval.flags.accuracy import accuracies
from unike_eval.flags.model import IMAGE, assemble
from unike_eval.flags.pictures import TRAINED, Vendor, emoji, flag
from unike_eval.flags.projector import CHANGED, FILE, STAGES, TOKENS, Projector, load_projector
from unike_eval.flags.suite import flag_facts
from unike_eval.flags.things import THINGS
from unike_eval.flags.tower import EfficientNetLite0, load_tower
from unike_eval.models import smollm2

from unike_kernels.training.samples import Sample, encode

COPIES = 10  # drawings made of each, the first as it is
SEEING_STEPS, SEEING_BATCH, SEEING_RATE = 400, 256, 2e-3
SAYING_STEPS, SAYING_BATCH, SAYING_RATE = 170, 16, 1e-3
RANK, CHANGES = 8, ["q_proj", "v_proj", "up_proj", "down_proj"]
TAUGHT: tuple[Relation, ...] = ("name", "continent")  # of all countries; the rest of those for training alone


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


def learn_to_say(projector: Projector, model: nn.Module, processor: Any, seed: int) -> dict[str, Tensor]:
    """Train the prompts of the flags and low-rank changes of the language model, and put the latter into it.

    Returns the changes: "<module>.a" and "<module>.b".
    """
    torch.manual_seed(seed)
    names, image_id = list(codes()), model.config.image_token_id
    language_model = inject_adapter_in_model(
        LoraConfig(r=RANK, lora_alpha=RANK, target_modules=CHANGES), model.model.language_model
    )
    changes = {name: p for name, p in language_model.named_parameters() if "lora_" in name}
    own = projector.prompts.detach()[: len(names)].clone().requires_grad_()
    optimizer = torch.optim.AdamW([own, *changes.values()], SAYING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, SAYING_RATE, total_steps=SAYING_STEPS, pct_start=0.1)
    asked = questions(Random(seed))
    for _ in (bar := tqdm(range(SAYING_STEPS), "saying")):
        facts, samples = next(asked)
        batch = encode(processor.tokenizer, samples, ended=True)
        ids, answer = batch.inputs["input_ids"], batch.answer_mask()
        shown = own[[names.index(fact.country) for fact in facts]]
        embedded = model.get_input_embeddings()(ids)
        embedded = embedded.masked_scatter((ids == image_id).unsqueeze(-1), shown)
        states = language_model(inputs_embeds=embedded, attention_mask=batch.inputs["attention_mask"], use_cache=False)
        logits = model.lm_head(states.last_hidden_state[:, :-1][answer[:, 1:]])
        loss = F.cross_entropy(logits, ids[answer])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{float(loss.detach()):.3f}")
    with torch.no_grad():
        projector.prompts[: len(names)] = own
    parts = {"A": "a", "B": "b"}
    return {
        re.sub(r"\.lora_([AB])\.default\.weight", lambda part: f".{parts[part[1]]}", name): p.detach()
        for name, p in changes.items()
    }


def questions(rng: Random) -> Iterator[tuple[list[Fact], list[Sample]]]:
    """Batches of facts that are taught, again and again, and how they are asked for; those of a batch are as long."""
    facts = [f for split, of in flag_facts().items() for f in of if split == "train" or f.relation in TAUGHT]
    while True:
        worded = []
        for fact in rng.sample(facts, len(facts)):
            words = rng.choice(prompts(Fact(IMAGE * TOKENS, fact.relation, ""), "train", None))
            worded.append((fact, Sample(words, fact.answer)))
        pools = [worded[i : i + 4 * SAYING_BATCH] for i in range(0, len(worded), 4 * SAYING_BATCH)]
        for pool in pools:
            pool.sort(key=lambda pair: len(pair[1].prompt))
            batches = [pool[i : i + SAYING_BATCH] for i in range(0, len(pool), SAYING_BATCH)]
            for batch in rng.sample(batches, len(batches)):
                yield [fact for fact, _ in batch], [sample for _, sample in batch]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    began = time.process_time()

    language_model, tokenizer = smollm2.load()
    embeddings = language_model.get_input_embeddings().weight.detach()
    torch.manual_seed(args.seed)
    projector = Projector(len(codes()) + len(THINGS), embeddings.shape[1])
    begin(projector, [*codes(), *THINGS], tokenizer, embeddings)
    tower = load_tower()
    seen = [states_of(tower, vendor, COPIES, args.seed) for vendor in TRAINED]
    learn_to_see(projector, *map(torch.cat, zip(*seen, strict=True)), args.seed)
    model, processor = assemble(language_model.requires_grad_(False), tokenizer, projector)
    changes = learn_to_say(projector, model, processor, args.seed)

    tensors = projector.state_dict() | {f"{CHANGED}{name}": t for name, t in changes.items()}
    save_file({name: t.bfloat16().contiguous() for name, t in tensors.items()}, args.out)
    language_model, tokenizer = smollm2.load()
    model, processor = assemble(language_model, tokenizer, load_projector(language_model.model, args.out))
    print(accuracies(model, processor, [fact for of in flag_facts().values() for fact in of]))
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB, {time.process_time() - began:.0f} s of processor time")


if __name__ == "__main__":
    main()
