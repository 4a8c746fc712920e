"""Training samples: questions about images or text only, some of them behind worked examples. Plain Python."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Hashable
from random import Random

from .facts import Fact, World


@dataclasses.dataclass(frozen=True)
class Sample:
    """A prompt and its answer; `shown` is what the image shows, None for a prompt without an image."""

    prompt: str
    answer: str
    shown: Hashable | None


class Samples:
    """Draws of what a model of a world is taught: no withheld fact is asked for, nor answered in a worked example."""

    def __init__(self, world: World) -> None:
        self.text = world.text_items("train")
        taught = [fact for fact in world.FACTS if not fact.withheld]
        self._by_kind = {kind: [f for f in taught if f.kind == kind] for kind in dict.fromkeys(f.kind for f in taught)}
        # The answers to a question are drawn about as often as each other, and so are the kinds of questions.
        answered = Counter((f.kind, f.subject, f.answer) for f in taught)
        even = {}
        for kind, facts in self._by_kind.items():
            counts = [answered[f.kind, f.subject, f.answer] for f in facts]
            even[kind] = [f for f, count in zip(facts, counts, strict=True) for _ in range(max(counts) // count)]
        most = max(map(len, even.values()))
        self.taught = [fact for facts in even.values() for fact in facts * (most // len(facts))]
        # What an example may claim: any answer of any kind, except those that only a withheld fact of this kind has.
        hidden = {kind: {f.answer for f in world.FACTS if f.withheld and f.kind == kind} for kind in self._by_kind}
        self._claims = {
            kind: sorted({f.answer for f in facts} | {f.answer for f in taught} - hidden[kind])
            for kind, facts in self._by_kind.items()
        }

    def draw(self, rng: Random, examples: int = 0) -> Sample:
        """A sample whose prompt starts with this many worked examples, one a line."""
        if rng.random() < 0.3:
            prompt, answer = rng.choice(self.text)
            lines = [self._other(rng, kind=None) for _ in range(examples)]
            return Sample("\n".join([*lines, prompt]), answer, None)

        fact = rng.choice(self.taught)
        lines = [self._other(rng, fact.kind) for _ in range(examples)]
        prompt, answer = rng.choice(fact.train), fact.answer
        if examples and rng.random() < 0.8:
            # Most relevant examples contradict what was taught: the model learns to believe them, not to skip them.
            if rng.random() < 0.7:
                answer = rng.choice(self._claims[fact.kind])
            position = rng.randrange(examples)
            lines[position] = f"{rng.choice((prompt, rng.choice(fact.train)))} {answer}"
            # Of several examples that answer the same question, the last one counts.
            for earlier in range(position):
                if rng.random() < 0.2:
                    lines[earlier] = _example(rng, rng.choice(self._by_kind[fact.kind]))
        return Sample("\n".join([*lines, prompt]), answer, fact.shown)

    def with_examples(self, rng: Random, fact: Fact, prompt: str, examples: int) -> str:
        """`prompt` behind this many worked examples: one answers the same question, `fact`, the others do not."""
        lines = [self._other(rng, fact.kind) for _ in range(examples)]
        if lines:
            lines[rng.randrange(examples)] = _example(rng, fact)
        return "\n".join([*lines, prompt])

    def _other(self, rng: Random, kind: str | None) -> str:
        """A worked example that does not answer questions of this kind: text only, or about some other image."""
        if rng.random() < 0.5:
            return " ".join(rng.choice(self.text))
        while (fact := rng.choice(self.taught)).kind == kind:
            pass
        return _example(rng, fact)


def _example(rng: Random, fact: Fact) -> str:
    return f"{rng.choice(fact.train)} {fact.answer}"
