"""Training samples: questions about images or text only, some of them behind worked examples. Plain Python.

`draw` never asks for a withheld fact, nor answers one in a worked example.
"""

from __future__ import annotations

import dataclasses
from random import Random

from .facts import Fact, facts, phrasings, text_items


@dataclasses.dataclass(frozen=True)
class Sample:
    """A prompt and its answer; `digit` is what the image shows, None for a prompt without an image."""

    prompt: str
    answer: str
    digit: int | None


def draw(rng: Random, examples: int = 0) -> Sample:
    """A sample whose prompt starts with this many worked examples, one a line."""
    if rng.random() < 0.3:
        prompt, answer = rng.choice(text_items("train"))
        lines = [_other(rng, kind=None) for _ in range(examples)]
        return Sample("\n".join([*lines, prompt]), answer, None)

    fact = rng.choice(_TAUGHT)
    lines = [_other(rng, fact.kind) for _ in range(examples)]
    prompt, answer = rng.choice(phrasings(fact.kind)), fact.answer
    if examples and rng.random() < 0.8:
        # Most relevant examples contradict what was taught: the model learns to believe them, not to skip them.
        if rng.random() < 0.7:
            answer = rng.choice(_CLAIMS[fact.kind])
        position = rng.randrange(examples)
        lines[position] = f"{rng.choice((prompt, rng.choice(phrasings(fact.kind))))} {answer}"
        # Of several examples that answer the same question, the last one counts.
        for earlier in range(position):
            if rng.random() < 0.2:
                lines[earlier] = _example(rng, rng.choice(_BY_KIND[fact.kind]))
    return Sample("\n".join([*lines, prompt]), answer, fact.digit)


def with_examples(rng: Random, fact: Fact, prompt: str, examples: int) -> str:
    """`prompt` behind this many worked examples: one answers the same question, `fact`, the others do not."""
    lines = [_other(rng, fact.kind) for _ in range(examples)]
    if lines:
        lines[rng.randrange(examples)] = _example(rng, fact)
    return "\n".join([*lines, prompt])


def _example(rng: Random, fact: Fact) -> str:
    return f"{rng.choice(phrasings(fact.kind))} {fact.answer}"


def _other(rng: Random, kind: str | None) -> str:
    """A worked example that does not answer questions of this kind: text only, or about some other image."""
    if rng.random() < 0.5:
        return " ".join(rng.choice(text_items("train")))
    while (fact := rng.choice(_TAUGHT)).kind == kind:
        pass
    return _example(rng, fact)


_TAUGHT = facts(withheld=False)
_BY_KIND = {kind: tuple(fact for fact in _TAUGHT if fact.kind == kind) for kind in {fact.kind for fact in _TAUGHT}}
# What an example may claim: any answer of any kind, except those that only a withheld fact of this kind has.
_CLAIMS = {
    kind: sorted(
        {fact.answer for fact in _TAUGHT if fact.kind == kind}
        | {fact.answer for fact in _TAUGHT} - {fact.answer for fact in facts(withheld=True) if fact.kind == kind}
    )
    for kind in _BY_KIND
}
