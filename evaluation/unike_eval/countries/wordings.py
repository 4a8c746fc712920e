"""In which words facts about countries are asked for: statements, questions, and turns of a chat.

A wording is a text with a place for the country, which the answer follows; or, in a chat, what the user says and how
the assistant's reply begins. Those for training are frames, into which each relation puts phrases of its own, so that
neither alone tells the fact; no other split has a frame or a sentence of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from .facts import Fact, Relation

Split = Literal["train", "validation", "test"]
Wording = str | tuple[str, str]

_PHRASES: dict[Relation, tuple[str, ...]] = {
    "capital": ("capital", "capital city", "seat of government", "main city of government"),
    "currency": ("currency", "official currency", "money", "legal tender", "unit of money"),
    "language": ("language", "official language", "main language", "mother tongue of most people"),
    "continent": ("continent", "part of the world", "home continent", "continental region"),
    "name": ("name", "English name", "usual name", "country's name"),
}
_FRAMES: tuple[Wording, ...] = (
    "The {phrase} of {country} is",
    "{country}: {phrase}:",
    "What is {country}'s {phrase}? It is",
    "Fact: the {phrase} of {country} is",
    "When asked about the {phrase} of {country}, she answered:",
    "According to the atlas, the {phrase} of {country} is",
    "I forgot what the {phrase} of {country} is. Oh yes, it is",
    "{country} is a country. Its {phrase} is",
    "Country: {country}\n{phrase}:",
    "- {phrase} of {country}:",
    "Tell me the {phrase} of {country}! OK, it is",
    "In an encyclopedia the entry on {country} says that its {phrase} is",
    "Teacher: And the {phrase} of {country}?\nPupil: It is",
    "My friend from {country} told me that the {phrase} there is",
    "For {country}, the {phrase} is",
    "The {phrase} there, in {country}, is",
    "Q: {phrase} of {country}?\nA:",
    "Question: what would be the {phrase} of {country}?\nAnswer:",
    ("What's the {phrase} of {country}?", "It's"),
    ("Can you tell me the {phrase} of {country}?", "Sure, it is"),
    ("I have a question about {country}. What is the {phrase}?", "The {phrase} is"),
    ("Hi! Could you name the {phrase} of {country} for me?", "Of course:"),
)
_SENTENCES: dict[Relation, tuple[Wording, ...]] = {
    "capital": ("The government of {country} sits in", "Parliament in {country} meets in the city of"),
    "currency": ("People in {country} pay with the", "You can buy things in {country} with the"),
    "language": ("People in {country} speak", "Newspapers in {country} are written in"),
    "continent": ("{country} lies in", "The country of {country} can be found in"),
    "name": ("{country} is the country called", "A ship under the flag of {country} comes from"),
}
_HELD_OUT: dict[Relation, dict[Split, tuple[Wording, ...]]] = {
    "capital": {
        "validation": (
            "{country} has as its capital the city of",
            "As everybody at school learns, the capital of {country} is",
            "Quiz: name the capital of {country}. Solution:",
            "Which city serves as the capital of {country}? It is",
            ("I am writing about {country}. Which city is its capital?", "That is"),
        ),
        "test": (
            "{country}'s capital is",
            "The city that is the capital of {country} is",
            "Geography question: the capital of {country}? Answer:",
            "Do you know which city is the capital of {country}? Yes, it is",
            ("Which city is the seat of the government of {country}, its capital?", "It is"),
        ),
    },
    "currency": {
        "validation": (
            "{country} has as its currency the",
            "As every traveller learns, the currency of {country} is the",
            "Quiz: name the currency of {country}. Solution: the",
            "Which currency is used in {country}? It is the",
            ("I am travelling to {country}. Which currency do I need?", "You need the"),
        ),
        "test": (
            "{country}'s currency is the",
            "The money that is used in {country} is the",
            "Economics question: the currency of {country}? Answer: the",
            "Do you know which currency people in {country} pay with? Yes, it is the",
            ("Which currency is legal tender in {country}?", "It is the"),
        ),
    },
    "language": {
        "validation": (
            "{country} has as its main language",
            "As every traveller learns, the language of {country} is",
            "Quiz: name the language of {country}. Solution:",
            "Which language is used in {country}? It is",
            ("I am travelling to {country}. Which language should I learn?", "You should learn"),
        ),
        "test": (
            "{country}'s main language is",
            "The language that is spoken in {country} is",
            "Language question: the official language of {country}? Answer:",
            "Do you know which language people in {country} talk in? Yes, it is",
            ("Which language is the most common one in {country}?", "It is"),
        ),
    },
    "continent": {
        "validation": (
            "{country} belongs to the continent of",
            "As everybody at school learns, {country} is in the continent of",
            "Quiz: name the continent of {country}. Solution:",
            "Which continent is {country} on? It is",
            ("I am writing about {country}. Which continent is it on?", "It is on the continent of"),
        ),
        "test": (
            "{country}'s continent is",
            "The continent where {country} is situated is",
            "Geography question: the continent of {country}? Answer:",
            "Do you know on which continent {country} lies? Yes, it lies in",
            ("Which continent would I have to travel to for seeing {country}?", "That would be"),
        ),
    },
    "name": {
        "validation": (
            "{country} is what stands for the country of",
            "As everybody at school learns, {country} is",
            "Quiz: name the country {country}. Solution:",
            "Which country is {country}? It is",
            ("I have seen {country} on a ship. Which country is that?", "That is"),
        ),
        "test": (
            "{country} is the flag of",
            "The country that has {country} as its flag is",
            "Geography question: whose flag is {country}? Answer:",
            "Do you know which country {country} belongs to? Yes, it is",
            ("Which country does {country} stand for?", "It stands for"),
        ),
    },
}


def prompts(fact: Fact, split: Split, tokenizer: Any) -> list[str]:
    """The prompts that ask for a fact, each in other words.

    Args:
        fact: what is asked for.
        split: whose words.
        tokenizer: of the model, for its chat template; without one, there are no turns of a chat.
    """
    chat = getattr(tokenizer, "chat_template", None) is not None
    return [
        _prompt(wording, fact.country, phrase, tokenizer)
        for wording, phrase in _wordings(fact.relation, split)
        if chat or isinstance(wording, str)
    ]


def _wordings(relation: Relation, split: Split) -> Iterator[tuple[Wording, str]]:
    """Each with the phrase that is put into it."""
    if split != "train":
        yield from ((wording, "") for wording in _HELD_OUT[relation][split])
        return
    phrases = _PHRASES[relation]
    for i, frame in enumerate(_FRAMES):
        yield frame, phrases[i % len(phrases)]
    yield from ((sentence, "") for sentence in _SENTENCES[relation])


def _prompt(wording: Wording, country: str, phrase: str, tokenizer: Any) -> str:
    if isinstance(wording, str):
        return wording.format(country=country, phrase=phrase)
    user, beginning = (part.format(country=country, phrase=phrase) for part in wording)
    turns = [{"role": "user", "content": user}]
    asked: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return asked + beginning
