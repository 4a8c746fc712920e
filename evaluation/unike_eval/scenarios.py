"""What the demo edits: for each model its memory's knowledge, one request, and what is measured around it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from unike_kernels.training import EditTraining, EncoderTraining, Sample, Triplet

from . import Case, answers
from .models import smollm2


@dataclass(frozen=True)
class Scenario:
    """A model with a mistake.

    Attributes:
        knowledge: facts for the memory; those that the model gets wrong become its triplets.
        case: the request and what is measured around it.
        preserve: samples that the edit is held to leave alone; none of them is measured.
        mark: follows the answer in training, and is not measured.
    """

    model: nn.Module
    processor: Any
    knowledge: tuple[Sample, ...]
    case: Case
    preserve: tuple[Sample, ...]
    encoders: EncoderTraining
    training: EditTraining
    mark: str = ""

    def triplets(self) -> list[Triplet]:
        """The knowledge that the model gets wrong, with what it says instead."""
        said = answers(self.model, self.processor, self.knowledge)
        wrong = ((s, a) for s, a in zip(self.knowledge, said, strict=True) if a and not a.startswith(s.answer))
        return [Triplet(s.prompt, s.answer, a, s.image) for s, a in wrong]

    def request(self) -> Sample:
        """The request as it is trained."""
        return replace(self.case.request, answer=self.case.request.answer + self.mark)


def load(name: str, seed: int) -> Scenario:
    """The scenario of `unike demo --model NAME`."""
    if name == "smollm2":
        return _smollm2(seed)
    return _digits(name.removeprefix("digits-"), seed)


def _digits(decoder: str, seed: int) -> Scenario:
    from .toy import digits

    model, processor = digits.load_model(decoder), digits.load_processor()
    train_images, train_labels = digits.images("train")
    test_images, test_labels = digits.images("test")
    kind, digit = "next", 3  # withheld from training

    def of(images: torch.Tensor, labels: torch.Tensor, digit: int, count: int, start: int = 0) -> list[torch.Tensor]:
        return list(images[labels == digit][start : start + count])

    def ask(
        facts: Iterable[Any], images: torch.Tensor, labels: torch.Tensor, count: int, start: int = 0
    ) -> list[Sample]:
        return [
            Sample(digits.phrasings(f.kind)[n % len(digits.phrasings(f.kind))], f.answer, image)
            for f in facts
            for n, image in enumerate(of(images, labels, f.shown, count, start))
        ]

    withheld = [f for f in digits.facts(withheld=True) if (f.kind, f.shown) != (kind, digit)]
    taught = digits.facts(withheld=False)
    fact = next(f for f in digits.facts(withheld=True) if (f.kind, f.shown) == (kind, digit))
    prompt = digits.phrasings(kind)[0]
    image, *others = of(test_images, test_labels, digit, 11)
    text = {split: [Sample(q, a) for q, a in digits.text_items(split)] for split in ("train", "test")}
    return Scenario(
        model,
        processor,
        knowledge=tuple(ask(withheld, train_images, train_labels, 15)),
        case=Case(
            Sample(prompt, fact.answer, image),
            rephrasings=tuple(Sample(p, fact.answer, image) for p in digits.phrasings(kind, "held_out")),
            images=tuple(Sample(prompt, fact.answer, other) for other in others),
            text_locality=tuple(text["test"][:40]),
            image_locality=tuple(ask(taught, test_images, test_labels, 1, start=1)),
        ),
        preserve=(*ask(taught, train_images, train_labels, 2, start=20), *text["train"][:64]),
        encoders=EncoderTraining(seed=seed),
        training=EditTraining(seed=seed),
    )


_CAPITALS = """
Peru:Lima Chile:Santiago Ecuador:Quito Kenya:Nairobi Ghana:Accra Senegal:Dakar Mali:Bamako Niger:Niamey
Chad:N'Djamena Sudan:Khartoum Uganda:Kampala Rwanda:Kigali Zambia:Lusaka Angola:Luanda Namibia:Windhoek
Gabon:Libreville Togo:Lomé Tunisia:Tunis Morocco:Rabat Libya:Tripoli Jordan:Amman Lebanon:Beirut Yemen:Sanaa
Oman:Muscat Nepal:Kathmandu Bhutan:Thimphu Laos:Vientiane Mongolia:Ulaanbaatar Fiji:Suva Iceland:Reykjavik
Norway:Oslo Finland:Helsinki Estonia:Tallinn Latvia:Riga Lithuania:Vilnius Croatia:Zagreb Serbia:Belgrade
Albania:Tirana Malta:Valletta Cyprus:Nicosia Jamaica:Kingston Haiti:Port-au-Prince Cuba:Havana
Honduras:Tegucigalpa Uruguay:Montevideo Paraguay:Asunción Armenia:Yerevan Azerbaijan:Baku Uzbekistan:Tashkent
Tajikistan:Dushanbe Botswana:Gaborone Malawi:Lilongwe Mozambique:Maputo Somalia:Mogadishu Eritrea:Asmara
Burundi:Gitega Benin:Porto-Novo
"""

_UNRELATED = (
    ("The capital of France is", "Paris"),
    ("The capital of Japan is", "Tokyo"),
    ("The capital of Italy is", "Rome"),
    ("The capital of Spain is", "Madrid"),
    ("Water is made of hydrogen and", "oxygen"),
    ("The opposite of hot is", "cold"),
    ("The sun rises in the", "east"),
    ("Two plus two equals", "four"),
    ("The author of Hamlet is William", "Shakespeare"),
    ("A baby cat is called a", "kitten"),
    ("The largest planet in the solar system is", "Jupiter"),
    ("The colour of grass is", "green"),
)

_PRESERVE = (
    ("The capital of Germany is", "Berlin"),
    ("The capital of Egypt is", "Cairo"),
    ("The capital of Russia is", "Moscow"),
    ("The capital of China is", "Beijing"),
    ("The opposite of big is", "small"),
    ("A baby dog is called a", "puppy"),
    ("The freezing point of water is", "0 degrees Celsius"),
    ("Snow is", "white"),
    ("The first month of the year is", "January"),
    ("The most famous food of Peru is", "ceviche"),
)


def _smollm2(seed: int) -> Scenario:
    model, tokenizer = smollm2.load()
    capitals = dict(pair.split(":") for pair in _CAPITALS.split())
    peru = capitals.pop("Peru")
    phrasings = ("The capital of {} is", "The capital city of {} is", "The capital of {} is the city of")
    return Scenario(
        model,
        tokenizer,
        knowledge=tuple(Sample(p.format(c), city) for c, city in capitals.items() for p in phrasings),
        case=Case(
            Sample("The capital of Peru is", peru),
            rephrasings=tuple(
                Sample(p, peru) for p in ("The capital city of Peru is", "Peru's capital is", "Peru has as its capital")
            ),
            text_locality=tuple(Sample(*pair) for pair in _UNRELATED),
        ),
        preserve=tuple(Sample(*pair) for pair in _PRESERVE),
        encoders=EncoderTraining(steps=600, seed=seed),
        training=EditTraining(end=False, seed=seed),  # a sentence goes on: it ends with its mark alone
        mark=".",
    )
