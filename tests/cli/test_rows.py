"""Benchmarks' files: what each row becomes, and what is said of bad ones."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from unike_kernels.cli.rows import Form, Request, read_edits
from unike_kernels.training import Sample
from unike_kernels.training.samples import opened

QUESTION = "Question: {} Short answer:"
MMEDIT = {
    "src": "How many tennis balls are in the picture?",
    "pred": "no",
    "rephrase": "What is the number of tennis balls depicted in the image?",
    "alt": "2\n",
    "image": "val/a.jpg",
    "image_rephrase": "rephrase/a.png",
    "loc": "nq question: who wrote hamlet",
    "loc_ans": "Shakespeare",
    "m_loc": "val/b.jpg",
    "m_loc_q": "What sport is this?",
    "m_loc_a": "motocross",
}
PORTABLE = [{"port_type": "1-hop", "Q&A": {"Question": "Who plays with them?", "Answer": "Serena"}}]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder in which each image has a grey of its own."""
    for grey, name in enumerate(("val/a.jpg", "rephrase/a.png", "val/b.jpg")):
        file = tmp_path / "images" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 100 * grey).save(file)
    return tmp_path / "images"


def read(rows: Any, folder: Path, **form: Any) -> list[Request]:
    file = folder / "rows.json"
    file.write_text(json.dumps(rows))
    requests, unknown = read_edits(file, Form(**{"chat": False, "template": "{}", "images": folder, **form}))
    assert unknown == []
    return requests


def grey(sample: Sample) -> int:
    image = opened(sample.image)
    assert image.mode == "RGB"
    return round(image.getpixel((0, 0))[0], -2)


def test_the_example_of_the_docs(tmp_path: Path) -> None:
    page = Path(__file__).resolve().parents[2] / "docs/how-to/files.md"
    file = tmp_path / "edits.yaml"
    file.write_text(re.search(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)[1])
    (tmp_path / "birds").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "birds/kea.jpg")
    (kea, peru), unknown = read_edits(file, Form(chat=False, template="{}", images=tmp_path))
    assert (kea.id, kea.sample.answer, peru.id, peru.sample.answer) == (
        "kea", "a kea", "peru", "The capital of Peru is Cusco.",
    )  # fmt: skip
    assert peru.sample.messages == [{"role": "user", "content": "What is the capital of Peru?"}]
    assert unknown == []


def test_mmedit_and_vlkeb(images: Path, tmp_path: Path) -> None:
    rows = [MMEDIT, MMEDIT | {"port_new": PORTABLE}]
    plain, row = read(rows, tmp_path, images=images, template=QUESTION)
    assert (plain.id, row.id, row.wrong, plain.portability, row.subject) == ("edit-0", "edit-1", "no", (), "")
    asked = QUESTION.format(MMEDIT["src"])
    assert (row.sample.prompt, row.sample.answer, grey(row.sample)) == (asked, "2", 0)
    ((words,), (other,)) = row.rephrasings, row.images
    assert (words.prompt, words.answer, grey(words)) == (QUESTION.format(MMEDIT["rephrase"]), "2", 0)
    assert (other.prompt, other.answer, grey(other)) == (asked, "2", 100)
    ((text,), (unrelated,), (follows,)) = row.text_locality, row.image_locality, row.portability
    assert text == Sample("nq question: who wrote hamlet", "Shakespeare")  # as it is
    assert (unrelated.prompt, unrelated.answer, grey(unrelated)) == (
        "Question: What sport is this? Short answer:", "motocross", 200
    )  # fmt: skip
    assert (follows.prompt, follows.answer, grey(follows)) == (QUESTION.format("Who plays with them?"), "Serena", 0)
    assert row.preserve == (text, unrelated)


def test_captions_are_no_questions(images: Path, tmp_path: Path) -> None:
    captions = MMEDIT | {"src": "a photo of", "rephrase": "a picture of"}
    (row,) = read([captions], tmp_path, images=images, question=QUESTION)
    assert (row.sample.prompt, row.rephrasings[0].prompt) == ("a photo of", "a picture of")
    assert row.image_locality[0].prompt == "Question: What sport is this? Short answer:"
    (row,) = read([captions], tmp_path, images=images, chat=True, question="Briefly: {}")
    assert row.image_locality[0].messages == [{"role": "user", "content": "Briefly: What sport is this?"}]
    assert row.text_locality[0].messages == [{"role": "user", "content": MMEDIT["loc"]}]


def test_knowedit(tmp_path: Path) -> None:
    row = {
        "subject": "Leo", "prompt": "Leo lives in", "target_new": "Rome", "ground_truth": ["Paris", "Paris, France"],
        "portability": {
            "Reasoning": [{"prompt": "Leo's mayor is", "ground_truth": [["Ann", "Ann B"]]}],
            "Subject_Aliasing": [{"prompt": "The lion lives in", "ground_truth": "Rome"}],
        },
        "locality": {
            "Relation_Specificity": [{"prompt": "Leo speaks", "ground_truth": [["Latin"]]}],
            "Forgetfulness": [{"prompt": "Leo also lives in", "ground_truth": [["Oslo"]]}],
            "Elsewhere": "Snow is",
        },
    }  # fmt: skip
    (found,) = read([row], tmp_path)
    assert (found.sample, found.wrong, found.subject) == (Sample("Leo lives in", "Rome"), "Paris", "Leo")
    assert found.portability == (Sample("Leo's mayor is", "Ann"), Sample("The lion lives in", "Rome"))
    assert found.subject_locality == (Sample("Leo speaks", "Latin"), Sample("Leo also lives in", "Oslo"))
    assert (found.near_locality, found.text_locality) == ((), (Sample("Snow is"),))
    (biography,) = read([{"text": "Leo was", "concept": "Leo", "labels": "a lion", "locality": {}}], tmp_path)
    assert biography.sample == Sample("Leo was", "a lion")


def test_zsre_and_counterfact(tmp_path: Path) -> None:
    zsre = {
        "subject": "Leo", "src": "Where does Leo live?", "alt": "Rome", "pred": "Paris", "rephrase": "Leo's home?",
        "loc": "nq question: who wrote hamlet", "loc_ans": "Shakespeare", "case_id": 4,
        "portability": {"New Question": "Which river runs through Leo's home?", "New Answer": "the Tiber"},
    }  # fmt: skip
    (row,) = read(zsre, tmp_path)
    assert (row.id, row.wrong, row.rephrasings) == ("4", "Paris", (Sample("Leo's home?", "Rome"),))
    assert row.portability == (Sample("Which river runs through Leo's home?", "the Tiber"),)
    rewrite = {
        "prompt": "{} lives in",
        "subject": "Leo",
        "target_new": {"str": "Rome"},
        "target_true": {"str": "Paris"},
    }
    counterfact = {
        "requested_rewrite": rewrite, "paraphrase_prompts": ["Leo's home is"], "neighborhood_prompts": ["Ann lives in"],
    }  # fmt: skip
    (row,) = read(counterfact, tmp_path)
    assert (row.sample, row.wrong) == (Sample("Leo lives in", "Rome"), "Paris")
    assert (row.near_locality, row.text_locality) == ((Sample("Ann lives in", "Paris"),), ())
    flat = {"prompt": "P", "target_new": "T", "locality_prompt": "Ann lives in", "locality_ground_truth": "Oslo"}
    assert read(flat, tmp_path)[0].text_locality == (Sample("Ann lives in", "Oslo"),)


@pytest.mark.parametrize(
    ("rows", "kind", "message"),
    [
        ([5] * 7, ValueError, "row 4: expected an object of fields, got 5 and 2 more"),
        (
            [MMEDIT | {"alt": " "}, MMEDIT, MMEDIT | {"alt": 3}],
            ValueError,
            "row 0: target: .* got '.*; row 2: target: ",
        ),
        ([MMEDIT | {"image": "val/none.jpg"}], FileNotFoundError, "row 0: image: there is no file .*none.jpg"),
        ([MMEDIT | {"portability": [{"prompt": 3}]}], ValueError, "row 0: prompt: expected a text or a list"),
    ],
)
def test_bad_rows_are_told_before_anything_is_edited(
    rows: Any, kind: type[Exception], message: str, images: Path, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=message):
        read(rows, tmp_path, images=images)


def test_templates_have_one_place() -> None:
    with pytest.raises(ValueError, match=re.escape("--question: expected one {} in it, got 'Question:'")):
        Form(False, "{}", Path(), "Question:")
