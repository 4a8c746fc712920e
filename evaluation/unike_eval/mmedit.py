"""MMEdit's files (and VLKEB's, which have the same form): rows of JSON, and images in a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from unike_kernels.training.samples import Sample

from .metrics import Case
from .suite import Request, Task

_FIELDS = ("src", "pred", "rephrase", "alt", "image", "image_rephrase", "loc", "loc_ans", "m_loc", "m_loc_q", "m_loc_a")
_IMAGES = ("image", "image_rephrase", "m_loc")
QUESTION = "Question: {} Short answer:"
_SHOWN = 5  # of a long list of mistakes


class MMEdit(Sequence[Request]):
    """The requests of a file; their images are opened when a request is looked at.

    A row asks to change the answer of question `src` about `image` from `pred` to `alt`. `rephrase` and
    `image_rephrase` are the same in other words and with another image; `loc` is an unrelated question, and `m_loc_q`
    one about another image `m_loc`.

    Args:
        file: a JSON list of such rows.
        images: the folder that the rows' image paths start from.
        task: "vqa": `src` and `rephrase` are questions, put into `question`; "caption": they are prompts as they are.
        question: the template of a question about an image, with one {}.

    Raises:
        FileNotFoundError: no such file or folder, or some of the images are missing.
        ValueError: not a list of such rows. The message tells the first mistakes and counts the others.
    """

    def __init__(
        self, file: str | os.PathLike[str], images: str | os.PathLike[str], task: Task, *, question: str = QUESTION
    ) -> None:
        self._file, self._folder, self._task = Path(file), Path(images), task
        if question.count("{}") != 1:
            raise ValueError(f"question: expected a template with one {{}}, got {question!r}")
        self._question = question
        if not self._folder.is_dir():
            raise FileNotFoundError(f"images: there is no folder {self._folder}")
        with open(self._file, encoding="utf-8") as stream:
            try:
                rows = json.load(stream)
            except ValueError as error:
                raise ValueError(f"{self._file}: not JSON: {error}") from error
        if not isinstance(rows, list):
            raise ValueError(f"{self._file}: expected a list of rows, got {type(rows).__name__}")
        self._refuse(ValueError, "malformed rows", [m for i, row in enumerate(rows) for m in _mistakes(i, row)])
        wanted = dict.fromkeys(row[name] for row in rows for name in _IMAGES)
        missing = [name for name in wanted if not (self._folder / name).is_file()]
        self._refuse(FileNotFoundError, f"images missing below {self._folder}", missing)
        self._rows: list[dict[str, str]] = rows

    def _refuse(self, kind: type[Exception], what: str, mistakes: list[str]) -> None:
        if mistakes:
            more = f" and {len(mistakes) - _SHOWN} more" if len(mistakes) > _SHOWN else ""
            raise kind(f"{self._file}: {what}: {'; '.join(mistakes[:_SHOWN])}{more}")

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Request: ...
    @overload
    def __getitem__(self, index: slice) -> list[Request]: ...
    def __getitem__(self, index: int | slice) -> Request | list[Request]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = {name: text.strip() for name, text in self._rows[index].items() if name in _FIELDS}
        ask = self._question.format if self._task == "vqa" else str
        image = self._image(row["image"])
        case = Case(
            Sample(ask(row["src"]), row["alt"], image),
            rephrasings=(Sample(ask(row["rephrase"]), row["alt"], image),),
            images=(Sample(ask(row["src"]), row["alt"], self._image(row["image_rephrase"])),),
            text_locality=(Sample(row["loc"], row["loc_ans"]),),
            image_locality=(Sample(self._question.format(row["m_loc_q"]), row["m_loc_a"], self._image(row["m_loc"])),),
        )
        return Request(f"{self._file.stem}-{range(len(self))[index]}", self._task, case, row["pred"])

    def __iter__(self) -> Iterator[Request]:
        return (self[i] for i in range(len(self)))

    def _image(self, name: str) -> Any:
        try:
            from PIL import Image
        except ImportError as error:
            raise ImportError("MMEdit's images need Pillow: pip install pillow") from error
        with Image.open(self._folder / name) as image:
            return image.convert("RGB")


def _mistakes(index: int, row: Any) -> Iterator[str]:
    """What is wrong with a row."""
    if not isinstance(row, dict):
        yield f"row {index}: expected an object, got {type(row).__name__}"
        return
    for name in _FIELDS:
        if name not in row:
            yield f"row {index}: {name!r} is missing"
        elif not isinstance(row[name], str) or not row[name].strip():
            yield f"row {index}: {name!r}: expected some text, got {row[name]!r}"
    if isinstance(row.get("alt"), str) and row["alt"] == row.get("pred"):
        yield f"row {index}: 'alt' and 'pred' are both {row['alt']!r}"
