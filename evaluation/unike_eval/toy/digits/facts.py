"""What the digit models were taught and what was kept from them: facts, phrasings, text-only items. Plain Python."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Literal

from ..facts import Fact, Split, Task, question

# fmt: off
NUMBERS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
    "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
]
# fmt: on
GERMAN = ["null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "zehn"]
TENS = {20: "twenty", 30: "thirty", 40: "forty", 60: "sixty", 80: "eighty"}


@dataclasses.dataclass(frozen=True)
class _Kind:
    """A family of prompts with one meaning: its answers by digit, the withheld digits, and its phrasings."""

    task: Task
    answers: tuple[str, ...]
    withheld: tuple[int, ...]
    train: tuple[str, ...]
    held_out: tuple[str, ...]


def number_words(value: int) -> str:
    """`value` in words: 'minus one', 'seven', 'eighty one'."""
    if value < 0:
        return f"minus {NUMBERS[-value]}"
    if value < len(NUMBERS):
        return NUMBERS[value]
    return f"{TENS[value - value % 10]} {NUMBERS[value % 10]}"


def _description(digit: int) -> str:
    return f"a {'small' if digit < 5 else 'large'} {_PARITY[digit]} digit"


_PARITY = ("even", "odd") * 5

# Two or three withheld digits for each kind, spread so that every digit is withheld in three or four kinds.
_KINDS: dict[str, _Kind] = {
    "which": _Kind(
        "vqa",
        tuple(NUMBERS[:10]),
        (2, 6, 9),
        (
            "which digit is this",
            "what digit is shown",
            "name the digit in the image",
            "which number do you see",
            "tell me the digit in this picture",
        ),
        ("what number is in the image", "which digit do you see", "name the number shown"),
    ),
    "parity": _Kind(
        "vqa",
        _PARITY,
        (1, 8),
        (
            "is it even or odd",
            "is the digit in the image odd or even",
            "what is the parity of this digit",
            "even or odd",
            "tell me if the number in the image is even or odd",
        ),
        ("is the number shown odd or even", "what is the parity of the number in the image", "odd or even"),
    ),
    "next": _Kind(
        "vqa",
        tuple(NUMBERS[1:11]),
        (0, 3, 7),
        (
            "which number comes next",
            "what number comes after this digit",
            "what follows the digit shown",
            "name the number after this one",
            "count one up from the digit in the image",
        ),
        ("which number follows this digit", "what comes after the digit in the image", "name the next number"),
    ),
    "previous": _Kind(
        "vqa",
        tuple(number_words(digit - 1) for digit in range(10)),
        (2, 5, 8),
        (
            "which number comes before this digit",
            "what number precedes the digit shown",
            "name the number before this one",
            "what is the previous number",
            "count one down from the digit in the image",
        ),
        ("which number precedes this digit", "what comes before the digit in the image", "name the previous number"),
    ),
    "greater": _Kind(
        "vqa",
        tuple("yes" if digit > 5 else "no" for digit in range(10)),
        (4, 7),
        (
            "is this digit greater than five",
            "is it more than five",
            "is the number shown larger than five",
            "does this digit exceed five",
            "is the digit in the image above five",
        ),
        ("is it greater than five", "is this number above five", "does the number shown exceed five"),
    ),
    "double": _Kind(
        "vqa",
        tuple(NUMBERS[2 * digit] for digit in range(10)),
        (1, 4, 9),
        (
            "what is double this digit",
            "what is twice the digit shown",
            "multiply this digit by two",
            "what is two times this number",
            "double the number in the image",
        ),
        ("what is twice this number", "what is double the digit in the image", "what is two times the digit shown"),
    ),
    "square": _Kind(
        "vqa",
        tuple(number_words(digit * digit) for digit in range(10)),
        (3, 5, 8),
        (
            "what is the square of this digit",
            "what is this digit squared",
            "square the number in the image",
            "what is this number times itself",
            "multiply the digit by itself",
        ),
        (
            "what is the number shown squared",
            "what is the square of the number in the image",
            "what is the digit times itself",
        ),
    ),
    "letters": _Kind(
        "vqa",
        tuple(NUMBERS[len(NUMBERS[digit])] for digit in range(10)),
        (0, 6, 7),
        (
            "how many letters are in its name",
            "how many letters does this digit have",
            "count the letters of the digit shown",
            "how long is the name of this number",
            "what is the number of letters in the name",
        ),
        ("how many letters does the name have", "how long is its name", "count the letters in the name of this number"),
    ),
    "german": _Kind(
        "vqa",
        tuple(GERMAN[:10]),
        (1, 3, 6),
        (
            "what is this digit in german",
            "how do you say this number in german",
            "translate the digit to german",
            "what is the german word for this digit",
            "name the number shown in german",
        ),
        (
            "what is the german name of this digit",
            "translate this number to german",
            "how do you say the digit in german",
        ),
    ),
    "complement": _Kind(
        "vqa",
        tuple(NUMBERS[10 - digit] for digit in range(10)),
        (0, 2, 9),
        (
            "how much is missing to ten",
            "what must be added to reach ten",
            "what is ten minus this digit",
            "how far is this digit from ten",
            "what plus this number makes ten",
        ),
        ("how much is missing to reach ten", "what is ten minus the digit shown", "how far is the number from ten"),
    ),
    "caption": _Kind(
        "caption",
        tuple(f"a handwritten {NUMBERS[digit]}" for digit in range(10)),
        (0, 4, 5),
        ("a photo of", "caption:", "this picture shows", "the image shows", "write a caption :"),
        ("a picture of", "this image shows", "write a caption for the picture :"),
    ),
    "description": _Kind(
        "caption",
        tuple(_description(digit) for digit in range(10)),
        (1, 9),
        (
            "describe the digit :",
            "description:",
            "describe the image in detail :",
            "describe this picture :",
            "give a description :",
        ),
        ("describe the picture in detail :", "give a description of the digit :", "describe this digit :"),
    ),
}


def facts(task: Task | None = None, withheld: bool | None = None) -> tuple[Fact, ...]:
    """`FACTS`, restricted to one task and to the withheld (True) or the taught (False) ones."""
    return tuple(
        fact
        for fact in FACTS
        if (task is None or fact.task == task) and (withheld is None or fact.withheld == withheld)
    )


@functools.cache
def phrasings(kind: str, split: Split = "train") -> tuple[str, ...]:
    """Full prompts that ask for `kind`; the first one of 'train' is canonical, 'held_out' ones were never trained."""
    if kind not in _KINDS:
        raise ValueError(f"unknown kind {kind!r}; there are {', '.join(_KINDS)}")
    if split not in ("train", "held_out"):
        raise ValueError(f"split must be 'train' or 'held_out', not {split!r}")
    spec = _KINDS[kind]
    bodies = spec.train if split == "train" else spec.held_out
    return bodies if spec.task == "caption" else tuple(map(question, bodies))


FACTS: tuple[Fact, ...] = tuple(
    Fact(spec.task, kind, digit, digit, answer, digit in spec.withheld, phrasings(kind), phrasings(kind, "held_out"))
    for kind, spec in _KINDS.items()
    for digit, answer in enumerate(spec.answers)
)


def _text_facts() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each text-only fact: its answer and every way of asking for it."""
    sums = [(a, b) for a in range(10) for b in range(10)] + [(t, b) for t in TENS for b in range(1, 10)]
    for a, b in sums:
        x, y = number_words(a), number_words(b)
        yield (
            number_words(a + b),
            (f"what is {x} plus {y}", f"{x} plus {y} is", f"add {x} and {y}", f"how much is {x} plus {y}"),
        )
    for a in range(10):
        for b in range(min(a + 2, 10)):
            x, y = NUMBERS[a], NUMBERS[b]
            yield (
                number_words(a - b),
                (f"what is {x} minus {y}", f"{x} minus {y} is", f"take {y} from {x}", f"how much is {x} minus {y}"),
            )
    for a, x in enumerate(NUMBERS[:10]):
        yes, no = ("yes", "no") if a % 2 == 0 else ("no", "yes")
        yield yes, (f"is {x} even", f"is {x} an even number", f"can {x} be halved")
        yield no, (f"is {x} odd", f"is {x} an odd number")
        for b, y in enumerate(NUMBERS[:10]):
            if a != b:
                yield NUMBERS[max(a, b)], (f"which is larger , {x} or {y}", f"what is the larger of {x} and {y}")
    for before, after in itertools.pairwise(GERMAN):
        yield (
            after,
            (
                f"which german number follows {before}",
                f"what is after {before} in german",
                f"name the german number after {before}",
                f"in german , what follows {before}",
            ),
        )
        yield (
            before,
            (
                f"which german number precedes {after}",
                f"what is before {after} in german",
                f"name the german number before {after}",
                f"in german , what precedes {after}",
            ),
        )


@functools.cache
def text_facts(split: Literal["train", "test"]) -> tuple[tuple[tuple[str, str], ...], ...]:
    """`text_items`, those of each fact together."""
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', not {split!r}")
    asked = []
    for number, (answer, bodies) in enumerate(_text_facts()):
        held_out = number // 3 % len(bodies) if number % 3 == 0 else None
        asked.append(
            tuple((question(body), answer) for i, body in enumerate(bodies) if (i == held_out) == (split == "test"))
        )
    return tuple(items for items in asked if items)


def text_items(split: Literal["train", "test"]) -> tuple[tuple[str, str], ...]:
    """Text-only (prompt, answer) pairs, for prompts without an image: arithmetic, comparison, parity, German counting.

    Every third fact keeps one of its phrasings for 'test' and is in 'train' under the others: the accuracy on 'test'
    tells whether the model finds a known sum behind words that it never saw around these operands, not whether it
    can add.
    """
    return tuple(item for items in text_facts(split) for item in items)
