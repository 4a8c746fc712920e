"""What an edit leaves alone where nobody says what it shall: a few questions about this and that."""

from __future__ import annotations

from typing import Any

from .samples import Sample

_TALK = (
    ("What is the capital of Germany?", "The capital of Germany is Berlin."),
    ("Who wrote Hamlet?", "William Shakespeare wrote Hamlet."),
    ("What do bees make?", "Bees make honey."),
    ("What is three plus four?", "Three plus four is seven."),
    ("What colour is the sky?", "The sky is blue."),
    ("How many days are in a week?", "There are seven days in a week."),
    ("Where is the Amazon?", "The Amazon is in South America."),
    ("Hello, how are you?", "I am doing well, thank you."),
)


def neutral(processor: Any, request: Sample) -> tuple[Any, list[Sample]]:
    """Samples that are asked as the request is, in a chat or in plain text, and what tokenizes them.

    Some processors take no text without an image, so that plain text goes to the tokenizer.
    """
    if request.messages is None:
        return getattr(processor, "tokenizer", processor), [Sample(*pair) for pair in _TALK]
    asked = [([{"role": "user", "content": question}], answer) for question, answer in _TALK]
    return processor, [Sample(messages=messages, answer=answer) for messages, answer in asked]
