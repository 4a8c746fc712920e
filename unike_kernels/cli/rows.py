"""Files of edits and of triplets: JSON, JSONL or YAML, with the library's own names of fields, or benchmarks'."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..training import Sample, Triplet

# The library's own name of a field first, then EasyEdit's, ZsRE's, CounterFact's and MMEdit's.
_PROMPT = ("prompt", "src")
_TARGET = ("target", "answer", "target_new", "alt")
_REPHRASINGS = ("rephrasings", "wordings", "rephrase_prompt", "rephrase_prompts", "rephrase", "paraphrase_prompts")
_KEPT = ("preserve", "locality", "neighborhood_prompts", "loc")
_POSITIVE = ("positive", *_TARGET)
_NEGATIVE = ("negative", "pred", "ground_truth", "target_true")
_ID = ("id", "case_id")
_SHOWN = 5  # of a long list


@dataclass(frozen=True)
class Request:
    """A row that asks for an edit.

    Attributes:
        id: of the edit.
        sample: the request itself.
        rephrasings: the same in other words.
        preserve: what must not change.
    """

    id: str
    sample: Sample
    rephrasings: tuple[Sample, ...]
    preserve: tuple[Sample, ...]


@dataclass(frozen=True)
class Form:
    """How the texts of a file are meant.

    Attributes:
        chat: prompts are what a user says in a chat.
        template: that prompts are put into, with one {}.
        images: the folder that paths of images start from.
    """

    chat: bool
    template: str
    images: Path

    def __post_init__(self) -> None:
        if self.template.count("{}") != 1:
            raise ValueError(f"--template: expected one {{}} in it, got {self.template!r}")

    def asked(self, prompt: str, answer: str = "", image: Any = None) -> Sample:
        """A prompt of the file as a sample."""
        text = self.template.replace("{}", prompt)
        if self.chat:
            return Sample(messages=[{"role": "user", "content": text}], answer=answer, image=image)
        return Sample(text, answer, image)

    def opened(self, path: str) -> Any:
        """The image in a file. Raises FileNotFoundError, and ValueError where it is none."""
        from PIL import Image, UnidentifiedImageError

        if not (self.images / path).is_file():
            raise FileNotFoundError(f"image: there is no file {self.images / path}")
        try:
            with Image.open(self.images / path) as image:
                return image.convert("RGB")
        except UnidentifiedImageError as error:
            raise ValueError(f"image: {self.images / path} is no image") from error


def read_edits(file: Path, form: Form) -> tuple[list[Request], list[str]]:
    """The requests of a file, and the names of fields that are not used.

    Raises:
        FileNotFoundError: there is no such file, or an image is missing.
        ValueError: not of that form. The message names the row and the field.
    """
    requests, unused = _all(file, lambda row, number: _request(row, number, form))
    ids = [request.id for request in requests]
    if len(set(ids)) != len(ids):
        twice = sorted({id for id in ids if ids.count(id) > 1})[:_SHOWN]
        raise ValueError(f"{file}: id: expected distinct ones, got more than one {', '.join(twice)}")
    return requests, unused


def read_triplets(file: Path, form: Form) -> tuple[list[Triplet], list[str]]:
    """The triplets of a file, as `read_edits`."""
    return _all(file, lambda row, number: _triplet(row, form))


class _Row:
    """The fields of a row, and which of them were asked for."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        rewrite = fields.get("requested_rewrite")  # CounterFact's
        self.fields = {**fields, **rewrite} if isinstance(rewrite, Mapping) else dict(fields)
        self.used = {"requested_rewrite"}

    def get(self, names: Sequence[str]) -> Any:
        """The first of these fields that is there, else None."""
        self.used.update(names)
        return next((self.fields[name] for name in names if self.fields.get(name) is not None), None)

    def text(self, names: Sequence[str]) -> str:
        """The same, of a text that must be there; {"str": text} is one, too."""
        found = self.get(names)
        if isinstance(found, Mapping):
            found = found.get("str")
        if isinstance(found, list) and len(found) == 1:
            (found,) = found
        if not isinstance(found, str) or not found.strip():
            raise ValueError(f"{names[0]}: expected a text (in one of {', '.join(names)}), got {found!r:.80}")
        return found.strip()


def _all(file: Path, read: Callable[[_Row, int], Any]) -> tuple[list[Any], list[str]]:
    made, unused = [], set[str]()
    for number, fields in enumerate(_rows(file)):
        try:
            if not isinstance(fields, Mapping):
                raise ValueError(f"expected an object of fields, got {fields!r:.80}")
            row = _Row(fields)
            made.append(read(row, number))
        except ValueError as error:
            raise ValueError(f"{file}: row {number}: {error}") from error
        unused |= row.fields.keys() - row.used
    if not made:
        raise ValueError(f"{file}: expected at least one row, got none")
    return made, sorted(unused)


def _rows(file: Path) -> Iterator[Any]:
    """What a file lists; a single object is one row."""
    text = file.read_text(encoding="utf-8")
    try:
        if file.suffix == ".jsonl":
            yield from (json.loads(line) for line in text.splitlines() if line.strip())
            return
        if file.suffix == ".json":
            found = json.loads(text)
        elif file.suffix in (".yaml", ".yml"):
            import yaml

            try:
                found = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise ValueError(str(error)) from error
        else:
            raise ValueError("expected a name that ends with .json, .jsonl, .yaml or .yml")
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    yield from found if isinstance(found, list) else [found]


def _request(row: _Row, number: int, form: Form) -> Request:
    sample = _sample(row, row.text(_TARGET), form)
    words = [form.asked(prompt, sample.answer, sample.image) for prompt in _texts(row.get(_REPHRASINGS), "rephrasings")]
    kept = tuple(_kept(row.get(_KEPT), row.get(("loc_ans",)), form))
    if row.get(("m_loc_q",)) is not None:
        image = form.opened(row.text(("m_loc",)))
        kept += (form.asked(row.text(("m_loc_q",)), row.text(("m_loc_a",)), image),)
    id = row.get(_ID)
    return Request(f"edit-{number}" if id is None else str(id), sample, tuple(words), kept)


def _triplet(row: _Row, form: Form) -> Triplet:
    asked = _sample(row, "", form)
    positive, negative = row.text(_POSITIVE), row.text(_NEGATIVE)
    return Triplet(asked.prompt, positive, negative, asked.image, messages=asked.messages)


def _sample(row: _Row, answer: str, form: Form) -> Sample:
    path = row.get(("image",))
    image = None if path is None else form.opened(row.text(("image",)))
    messages = row.get(("messages",))
    if messages is None:
        prompt, subject = row.text(_PROMPT), row.get(("subject",))
        if isinstance(subject, str):
            prompt = prompt.replace("{}", subject)
        return form.asked(prompt, answer, image)
    if row.get(_PROMPT) is not None:
        raise ValueError("expected a prompt or messages, got both")
    return Sample(messages=messages, answer=answer, image=image)


def _texts(found: Any, name: str) -> list[str]:
    texts = [found] if isinstance(found, str) else found or []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name}: expected a text or a list of texts, got {found!r:.80}")
    return [text.strip() for text in texts if text.strip()]


def _kept(found: Any, answer: Any, form: Form) -> Iterator[Sample]:
    """What must not change: texts, or objects with a prompt and its answer, or lists or named groups of these."""
    if found is None:
        return
    if isinstance(found, str):
        yield form.asked(found, answer if isinstance(answer, str) else "")
    elif isinstance(found, list):
        for each in found:
            yield from _kept(each, None, form)
    elif isinstance(found, Mapping) and "messages" in found:
        yield Sample(messages=found["messages"], answer=found.get("answer", ""))
    elif isinstance(found, Mapping) and "prompt" in found:
        prompts = _texts(found["prompt"], "preserve.prompt")
        answers = _texts(found.get("answer", found.get("ground_truth")), "preserve.answer")
        for i, prompt in enumerate(prompts):
            yield form.asked(prompt, answers[i] if len(answers) == len(prompts) else "")
    elif isinstance(found, Mapping):
        for each in found.values():
            yield from _kept(each, None, form)
    else:
        raise ValueError(f"preserve: expected texts, or objects with a prompt, got {found!r:.80}")
