"""What the models were taught about coloured shapes and what was kept from them. Plain Python."""

from __future__ import annotations

from collections.abc import Iterator

from ..facts import Fact, question

COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
SORTS = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)

# Subjects of each kind of question that no model was asked about where they are in the image.
_WITHHELD = {
    "color": ("brown", "teal", "yellow"),
    "shape": ("triangle",),
    "presence": ("gray", "red", "circle"),
    "absence": ("blue", "green", "rectangle"),
}

_PRESENCE = ("is there a {}", "does the image contain a {}", "is a {} present", "is there a {} in the image")
_ABSENCE = (
    "is there not a {}",
    "does the image not contain a {}",
    "is no {} present",
    "is there not a {} in the image",
)


def _facts() -> Iterator[Fact]:
    """Every question of easy-VQA about every sort of image that it suits."""
    for sort in SORTS:
        color, shape = sort.split()
        yield _fact(
            "color", color, sort, color,
            ("what color is the shape", f"what is the color of the {shape}"),
            ("what is the color of the shape", f"what color is the {shape}"),
        )  # fmt: skip
        yield _fact(
            "shape", shape, sort, shape,
            ("what shape does the image contain", "what shape is present", f"what is the {color} shape"),
            ("what shape is in the image",),
        )  # fmt: skip
        for number, subject in enumerate((*COLORS, *SHAPES)):
            there = subject in (color, shape)
            thing = f"{subject} shape" if subject in COLORS else subject
            for kind, answers, wordings in (
                ("presence", ("no", "yes"), _PRESENCE),
                ("absence", ("yes", "no"), _ABSENCE),
            ):
                asked = [wording.format(thing) for wording in wordings]
                # Each wording is held out for some subjects and trained for others, so that the models understand it.
                asked = asked[number % 4 :] + asked[: number % 4]
                yield _fact(kind, subject, sort, answers[there], tuple(asked[:2]), tuple(asked[2:]))


def _fact(kind: str, subject: str, sort: str, answer: str, train: tuple[str, ...], held_out: tuple[str, ...]) -> Fact:
    withheld = subject in _WITHHELD[kind] and subject in sort.split()
    return Fact(
        "vqa", kind, subject, sort, answer, withheld, tuple(map(question, train)), tuple(map(question, held_out))
    )


FACTS: tuple[Fact, ...] = tuple(_facts())
