"""Requests that are chats: their messages, the images in them, and what the model's own template makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Messages = Sequence[Mapping[str, Any]]

_HELD = ("image", "path", "url")  # the keys under which an image part may hold its image
_ANSWER = "\ue000"  # of Unicode's private use: it stands for an answer whose surroundings are looked for


class Turn(NamedTuple):
    """What a chat template writes around an answer.

    Attributes:
        prompt: the text that the model is given.
        lead: between that and the answer, "" in most templates.
        end: behind the answer, up to and including the token that ends the turn; "" where there is no such token.
    """

    prompt: str
    lead: str
    end: str


def check(messages: Messages) -> None:
    """Whether these are the messages of a chat whose next turn is the model's. Raises ValueError."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(f"messages: expected a list of one message or more, got {messages!r}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise ValueError(f"messages[{i}]: expected a dict of 'role' and 'content', got {message!r}")
        content = message["content"]
        if not isinstance(content, str | list | tuple) or not all(map(_is_part, parts_of(message))):
            raise ValueError(
                f"messages[{i}].content: expected a string or a list of parts {{'type': 'text', 'text': ...}} and "
                f"{{'type': 'image', 'image': ...}}, got {content!r}"
            )
    if messages[-1]["role"] == "assistant":
        raise ValueError("messages: expected the last one to be the user's, got the assistant's; it is the `answer`")


def _is_part(part: Any) -> bool:
    if not isinstance(part, Mapping):
        return False
    return part.get("type") == "image" or (part.get("type") == "text" and isinstance(part.get("text"), str))


def parts_of(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The parts of a message's content; of a string the one that it is."""
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def text_of(message: Mapping[str, Any]) -> str:
    """The words of a message."""
    return "".join(part["text"] for part in parts_of(message) if part["type"] == "text")


def images_of(messages: Messages, beside: Any) -> tuple[Any, ...]:
    """The images of a chat in their order, as `placed` has them.

    Raises ValueError for an image part without an image, and for an image beside that has no place.
    """
    held = [
        next((part[name] for name in _HELD if part.get(name) is not None), None)
        for message in placed(messages, beside)
        for part in parts_of(message)
        if part["type"] == "image"
    ]
    empty = sum(image is None for image in held)
    if empty != (beside is not None):
        raise ValueError(
            f"messages: {empty} of {len(held)} image parts hold no image, and {0 if beside is None else 1} is given "
            "beside them; expected as many"
        )
    return tuple(beside if image is None else image for image in held)


def placed(messages: Messages, beside: Any) -> Messages:
    """The messages with a place for an image that is given beside them: in front of the last one, if there is none."""
    if beside is None or any(part["type"] == "image" for message in messages for part in parts_of(message)):
        return messages
    *before, last = messages
    return [*before, {**last, "content": [{"type": "image"}, *parts_of(last)]}]


def turn(processor: Any, messages: Messages, beside: Any) -> Turn:
    """What the model's own template writes, without the answer itself.

    A template that renders a chat with an answer in another way than one without (and some do) tells neither what leads
    to the answer nor what ends it; then the tokenizer's end of text ends the turn.

    Args:
        processor: the model's processor or tokenizer.
        messages: as `check` has them.
        beside: the image that is given beside them, if any.

    Raises:
        ValueError: there is no chat template.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    template = next((each for each in (processor, tokenizer) if getattr(each, "chat_template", None)), None)
    if template is None:
        raise ValueError(
            f"messages: {type(processor).__name__} has no chat template (its chat_template is empty); write the "
            "request as a `prompt`, or set the template that the model was trained with"
        )
    # Processors' templates are of parts, those of tokenizers of strings.
    written = _plain if template is tokenizer else _in_parts
    told = [{**message, "content": written(message)} for message in placed(messages, beside)]
    prompt = template.apply_chat_template(told, add_generation_prompt=True, tokenize=False)
    reply = {"role": "assistant", "content": _ANSWER}
    whole = template.apply_chat_template([*told, {**reply, "content": written(reply)}], tokenize=False)
    lead, found, behind = whole.removeprefix(prompt).partition(_ANSWER)
    if not found or not whole.startswith(prompt):
        return Turn(prompt, "", end_of_text(processor))
    marks = [(behind.index(mark), -len(mark)) for mark in _marks(tokenizer) if mark in behind]
    at, size = min(marks, default=(0, 0))
    return Turn(prompt, lead, behind[: at - size] if marks else end_of_text(processor))


def end_of_text(processor: Any) -> str:
    """The tokenizer's token that ends a text, "" if there is none."""
    return getattr(getattr(processor, "tokenizer", processor), "eos_token", None) or ""


def begins(processor: Any, prompt: str) -> bool:
    """Whether a rendered prompt has all special tokens that it needs; by the rules of transformers."""
    tokenizer = getattr(processor, "tokenizer", None)
    return tokenizer is None or bool(tokenizer.bos_token and prompt.startswith(tokenizer.bos_token))


def _in_parts(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a template looks at; images are given to the processor apart."""
    return [{"type": "image"} if part["type"] == "image" else dict(part) for part in parts_of(message)]


def _plain(message: Mapping[str, Any]) -> Any:
    parts = _in_parts(message)
    return text_of(message) if all(part["type"] == "text" for part in parts) else parts


def _marks(tokenizer: Any) -> set[str]:
    """The special tokens, as they are written."""
    return {*tokenizer.all_special_tokens, *(str(t) for t in tokenizer.added_tokens_decoder.values() if t.special)}
