"""Files of edits and of triplets: JSON, JSONL or YAML, with the library's own names of fields, or benchmarks'.

Of EasyEdit's, KnowEdit's, ZsRE's, CounterFact's, MMEdit's and VLKEB's files all that is asked around an edit is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..training import Sample, Triplet

# The library's own name of a field first, then those of the benchmarks.
_PROMPT = ("prompt", "src", "text")
_TARGET = ("target", "answer", "target_new", "alt", "labels")
_REPHRASINGS = ("rephrasings", "wordings", "rephrase_prompt", "rephrase_prompts", "rephrase", "paraphrase_prompts")
_KEPT = ("preserve", "locality")
_UNRELATED, _UNRELATED_ANSWER = ("loc", "locality_prompt"), ("loc_ans", "locality_ground_truth")
_NEIGHBOURS = ("neighborhood_prompts",)
_PORTABILITY = ("portability", "port_new")
_POSITIVE = ("positive", *_TARGET)
_WRONG = ("pred", "ground_truth", "target_true")
_NEGATIVE = ("negative", *_WRONG)
_SUBJECT_OF = ("subject", "concept")
_ID = ("id", "case_id")
_ASKED = ("prompt", "Question", "New Question")  # within a group of samples
_ANSWERED = ("answer", "ground_truth", "Answer", "New Answer")
# Groups of what must not change by name, in small letters; others are unrelated.
_NEAR, _SUBJECT = ("near", "neighborhood", "distracting"), ("subject", "relation_specificity", "forgetfulness")
_SHOWN = 5  # of a long list


@dataclass(frozen=True)
class Request:
    """A row that asks for an edit, and all that is asked around it.

    Attributes:
        id: of the edit.
        sample: the request itself; an image is the name of its file, which is opened where it is needed.
        wrong: what the model says instead, "" where the row does not tell.
        rephrasings: the same in other words.
        images: the same about another image.
        text_locality, image_locality, near_locality, subject_locality: what must not change: unrelated, about an
            unrelated image, the same about other subjects, other questions about the subject.
        portability: what follows from the edit.
        subject: what it is about, "" where the row does not tell.
    """

    id: str
    sample: Sample
    wrong: str
    rephrasings: tuple[Sample, ...]
    images: tuple[Sample, ...]
    text_locality: tuple[Sample, ...]
    image_locality: tuple[Sample, ...]
    near_locality: tuple[Sample, ...]
    subject_locality: tuple[Sample, ...]
    portability: tuple[Sample, ...]
    subject: str

    @property
    def preserve(self) -> tuple[Sample, ...]:
        """All that must not change."""
        return (*self.text_locality, *self.near_locality, *self.subject_locality, *self.image_locality)


@dataclass(frozen=True)
class Form:
    """How the texts of a file are meant.

    Attributes:
        chat: prompts are what a user says in a chat.
        template: that prompts are put into, with one {}.
        images: the folder that paths of images start from.
        question: the template of questions about unrelated images, where prompts are no questions; None: `template`.
    """

    chat: bool
    template: str
    images: Path
    question: str | None = None

    def __post_init__(self) -> None:
        for name, template in (("template", self.template), ("question", self.question)):
            if template is not None and template.count("{}") != 1:
                raise ValueError(f"--{name}: expected one {{}} in it, got {template!r}")

    def asked(self, prompt: str, answer: str = "", image: Any = None) -> Sample:
        """A prompt of the file as a sample."""
        return self._made(self.template.replace("{}", prompt), answer, image)

    def plain(self, prompt: str, answer: str) -> Sample:
        """A prompt that has no template."""
        return self._made(prompt, answer, None)

    def questioned(self, question: str, answer: str, image: Any) -> Sample:
        """A question about an unrelated image."""
        return self._made((self.question or self.template).replace("{}", question), answer, image)

    def _made(self, text: str, answer: str, image: Any) -> Sample:
        if self.chat:
            return Sample(messages=[{"role": "user", "content": text}], answer=answer, image=image)
        return Sample(text, answer, image)

    def file(self, path: str) -> str:
        """The file of an image. Raises FileNotFoundError, and ValueError where it is none."""
        from PIL import Image, UnidentifiedImageError

        if not (self.images / path).is_file():
            raise FileNotFoundError(f"image: there is no file {self.images / path}")
        try:
            with Image.open(self.images / path):  # looks at its first bytes
                return str(self.images / path)
        except UnidentifiedImageError as error:
            raise ValueError(f"image: {self.images / path} is no image") from error


def read_edits(file: Path, form: Form) -> tuple[list[Request], list[str]]:
    """The requests of a file, and the names of fields that are not known.

    Raises:
        FileNotFoundError: there is no such file, or images are missing.
        ValueError: not of that form. The message names the first such rows with their field, and counts the others.
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
        """The same, of a text that must be there, see `_one`."""
        found = _one(self.get(names))
        if not isinstance(found, str) or not found.strip():
            raise ValueError(f"{names[0]}: expected a text (in one of {', '.join(names)}), got {found!r:.80}")
        return found.strip()


def _all(file: Path, read: Callable[[_Row, int], Any]) -> tuple[list[Any], list[str]]:
    made, unused, faults = [], set[str](), list[Exception]()
    for number, fields in enumerate(_rows(file)):
        try:
            if not isinstance(fields, Mapping):
                raise ValueError(f"expected an object of fields, got {fields!r:.80}")
            row = _Row(fields)
            made.append(read(row, number))
            unused |= row.fields.keys() - row.used
        except (ValueError, FileNotFoundError) as error:
            faults.append(type(error)(f"row {number}: {error}"))
    if faults:
        more = f" and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        kind = FileNotFoundError if isinstance(faults[0], FileNotFoundError) else ValueError
        raise kind(f"{file}: {'; '.join(map(str, faults[:_SHOWN]))}{more}")
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
    images = [_sample(row, sample.answer, form, "image_rephrase")] if row.get(("image_rephrase",)) is not None else []
    kept = _Kept(list(_samples(row.get(_UNRELATED), row.get(_UNRELATED_ANSWER), form.plain)), [], [])
    kept.add(row.get(_KEPT), form.asked)
    # A neighbour in CounterFact has the answer that the edit replaces.
    kept.near.extend(_samples(row.get(_NEIGHBOURS), row.get(("target_true",)), form.asked))
    unrelated: list[Sample] = []
    if row.get(("m_loc_q",)) is not None:
        image = form.file(row.text(("m_loc",)))
        unrelated.append(form.questioned(row.text(("m_loc_q",)), row.text(("m_loc_a",)), image))
    follows = _samples(row.get(_PORTABILITY), None, lambda q, a: form.asked(q, a, sample.image))
    id, wrong, subject = row.get(_ID), _one(row.get(_WRONG)), row.get(_SUBJECT_OF)
    return Request(
        f"edit-{number}" if id is None else str(id), sample, wrong.strip() if isinstance(wrong, str) else "",
        tuple(words), tuple(images), tuple(kept.unrelated), tuple(unrelated), tuple(kept.near), tuple(kept.subject),
        tuple(follows), subject if isinstance(subject, str) else "",
    )  # fmt: skip


def _triplet(row: _Row, form: Form) -> Triplet:
    asked = _sample(row, "", form)
    positive, negative = row.text(_POSITIVE), row.text(_NEGATIVE)
    return Triplet(asked.prompt, positive, negative, asked.image, messages=asked.messages)


def _sample(row: _Row, answer: str, form: Form, image_field: str = "image") -> Sample:
    image = None if row.get((image_field,)) is None else form.file(row.text((image_field,)))
    messages = row.get(("messages",))
    if messages is None:
        prompt, subject = row.text(_PROMPT), row.get(_SUBJECT_OF)
        if isinstance(subject, str):
            prompt = prompt.replace("{}", subject)
        return form.asked(prompt, answer, image)
    if row.get(_PROMPT) is not None:
        raise ValueError("expected a prompt or messages, got both")
    return Sample(messages=messages, answer=answer, image=image)


def _one(found: Any) -> Any:
    """A text as it is, in {"str": text}, or the first of a list of them."""
    if isinstance(found, Mapping):
        found = found.get("str")
    while isinstance(found, list) and found:
        found = found[0]
    return found


def _texts(found: Any, name: str) -> list[str]:
    texts = [found] if isinstance(found, str) else found or []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name}: expected a text or a list of texts, got {found!r:.80}")
    return [text.strip() for text in texts if text.strip()]


@dataclass
class _Kept:
    """What must not change: unrelated, about other subjects, about the same one."""

    unrelated: list[Sample]
    near: list[Sample]
    subject: list[Sample]

    def add(self, found: Any, asked: Callable[[str, str], Sample]) -> None:
        """Texts and samples; those in groups by their names."""
        named = found.items() if isinstance(found, Mapping) and not _is_sample(found) else [("", found)]
        for name, group in named:
            into = self.near if name.lower() in _NEAR else self.subject if name.lower() in _SUBJECT else self.unrelated
            into.extend(_samples(group, None, asked))


def _is_sample(found: Mapping[str, Any]) -> bool:
    return "messages" in found or any(name in found for name in _ASKED)


def _samples(found: Any, answer: Any, asked: Callable[[str, str], Sample]) -> Iterator[Sample]:
    """Texts, or objects with a prompt and its answer (lists of them, too), or lists or named groups of these."""
    if found is None or found == "":
        return
    if isinstance(found, str):
        said = _one(answer)
        yield asked(found.strip(), said.strip() if isinstance(said, str) else "")
    elif isinstance(found, list):
        each_its_own = isinstance(answer, list) and len(answer) == len(found)
        answers = answer if each_its_own else [None if isinstance(answer, list) else answer] * len(found)
        for each, told in zip(found, answers, strict=True):
            yield from _samples(each, told, asked)
    elif isinstance(found, Mapping) and "messages" in found:
        yield Sample(messages=found["messages"], answer=found.get("answer", ""))
    elif isinstance(found, Mapping) and _is_sample(found):
        prompts = next(found[name] for name in _ASKED if name in found)
        answers = next((found[name] for name in _ANSWERED if found.get(name) is not None), None)
        if not isinstance(prompts, str | list):
            raise ValueError(f"prompt: expected a text or a list of texts, got {prompts!r:.80}")
        yield from _samples(prompts, answers, asked)
    elif isinstance(found, Mapping):
        groups = [found["Q&A"]] if "Q&A" in found else found.values()  # VLKEB's, beside the number of its hops
        for each in groups:
            yield from _samples(each, None, asked)
    else:
        raise ValueError(f"preserve: expected texts, or objects with a prompt, got {found!r:.80}")
