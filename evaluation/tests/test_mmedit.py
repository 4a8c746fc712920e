"""MMEdit's files: what a row becomes, and what is said of a bad one."""

import json
import re

import pytest
from PIL import Image
from unike_eval.mmedit import MMEdit

ROW = {
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


@pytest.fixture
def images(tmp_path):
    """A folder in which each image has a grey of its own."""
    for grey, name in enumerate(("val/a.jpg", "rephrase/a.png", "val/b.jpg")):
        file = tmp_path / "images" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 100 * grey).save(file)
    return tmp_path / "images"


@pytest.fixture
def write(tmp_path):
    def write(content):
        file = tmp_path / "vqa_eval.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        return file

    return write


def grey(sample):
    assert sample.image.mode == "RGB"
    return round(sample.image.getpixel((0, 0))[0], -2)


def test_a_row_of_questions(write, images):
    requests = MMEdit(write([ROW, ROW]), images, "vqa")
    assert [r.id for r in requests] == ["vqa_eval-0", "vqa_eval-1"]
    request = requests[-1]
    assert (request.id, request.task, request.wrong) == ("vqa_eval-1", "vqa", "no")
    case = request.case
    asked = "Question: How many tennis balls are in the picture? Short answer:"
    assert (case.request.prompt, case.request.answer, grey(case.request)) == (asked, "2", 0)
    (words,), (other,) = case.rephrasings, case.images
    assert words.prompt == "Question: What is the number of tennis balls depicted in the image? Short answer:"
    assert (words.answer, grey(words)) == ("2", 0)
    assert (other.prompt, other.answer, grey(other)) == (asked, "2", 100)
    (text,), (unrelated,) = case.text_locality, case.image_locality
    assert (text.prompt, text.answer, text.image) == ("nq question: who wrote hamlet", "Shakespeare", None)
    assert (unrelated.prompt, unrelated.answer) == ("Question: What sport is this? Short answer:", "motocross")
    assert grey(unrelated) == 200
    triplet = request.triplet
    assert (triplet.prompt, triplet.positive, triplet.negative) == (asked, "2", "no")


def test_captions_are_prompted_as_they_are(write, images):
    (request,) = MMEdit(write([ROW | {"src": "a photo of", "rephrase": "a picture of"}]), images, "caption")[:]
    assert request.case.request.prompt == "a photo of"
    assert request.case.rephrasings[0].prompt == "a picture of"
    assert request.case.image_locality[0].prompt == "Question: What sport is this? Short answer:"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{", "vqa_eval.json: not JSON"),
        ({"rows": []}, "expected a list of rows, got dict"),
        ([ROW, "text"], "row 1: expected an object, got str"),
        ([{k: v for k, v in ROW.items() if k != "loc"}], "row 0: 'loc' is missing"),
        ([ROW | {"alt": " "}], "row 0: 'alt': expected some text, got ' '"),
        ([ROW | {"pred": 3}], "row 0: 'pred': expected some text, got 3"),
        ([ROW | {"pred": ROW["alt"]}], "row 0: 'alt' and 'pred' are both"),
        ([5] * 7, "row 4: expected an object, got int and 2 more"),
    ],
)
def test_bad_rows_are_all_told(content, message, write, images):
    with pytest.raises(ValueError, match=re.escape(message)):
        MMEdit(write(content), images, "vqa")


def test_missing_images_are_told_before_anything_is_edited(write, images):
    (images / "val/b.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"images missing below .*images: val/b.jpg"):
        MMEdit(write([ROW]), images, "vqa")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        MMEdit(write([ROW]), images / "none", "vqa")
    with pytest.raises(ValueError, match="question: expected a template"):
        MMEdit(write([ROW]), images, "vqa", question="Question:")
