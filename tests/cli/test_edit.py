"""`unike edit` and `unike memory`: files of requests and of triplets, in the forms that people have them in."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import chats
import pytest
import torch
from PIL import Image

import unike_kernels as uk
from unike_kernels.cli import main
from unike_kernels.cli.rows import Form, read_edits, read_triplets
from unike_kernels.training import Sample, predicted


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a tiny chat model."""
    folder = tmp_path_factory.mktemp("model")
    chats.model().save_pretrained(folder)
    chats.tokenizer().save_pretrained(folder)
    return folder


def form(folder: Path, *, chat: bool = False, template: str = "{}") -> Form:
    return Form(chat, template, folder)


def written(folder: Path, rows: object, name: str = "edits.json") -> Path:
    file = folder / name
    file.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return file


def test_edits_are_trained_saved_and_told(model, tmp_path, capsys):
    rows = [
        {"id": "ann", "prompt": "Who?", "target": "Ann", "rephrasings": ["Who?", "What else is there?"], "note": "x"},
        {"messages": [{"role": "user", "content": "Where?"}], "target": "Bo", "preserve": [{"prompt": "When?"}]},
    ]
    out = tmp_path / "out"
    assert main(["edit", str(model), str(written(tmp_path, rows)), "--chat", "--out", str(out), "--steps", "60"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "fields that are not known: note"
    assert said[1].split() == ["edit", "prompt", "target", "met", "steps", "loss", "divergence", "rephrasings"]
    assert said[2].split()[:4] == ["ann", "Who?", "Ann", "yes"] and said[2].endswith("1 of 2")
    assert said[3].split()[:4] == ["edit-1", "Where?", "Bo", "yes"] and said[3].endswith("-")
    assert said[4] == "2 of 2 targets met"
    assert {path.name for path in out.iterdir()} == {"ann.safetensors", "edit-1.safetensors", "report.json"}
    first, second = json.loads((out / "report.json").read_text())
    assert (first["id"], first["met"], first["stopped"], first["rephrasings"]) == (
        "ann",
        True,
        first["stopped"],
        [1, 2],
    )
    assert 0 < second["steps"] <= 60 and second["loss"] < 0.5 and second["divergence"] > 0
    loaded, edit = chats.model(), uk.Edit.load(out / "ann.safetensors")
    asked = [Sample(messages=[{"role": "user", "content": "Who?"}], answer="Ann")]
    assert predicted(loaded, chats.tokenizer(), asked) == [False]
    with uk.patched(loaded, [edit]):
        assert predicted(loaded, chats.tokenizer(), asked) == [True]


def test_a_target_that_is_not_met(model, tmp_path, capsys):
    """Each with those before it in force: the report says so, and so does the exit status."""
    rows = [{"prompt": prompt, "target": "A long and improbable answer"} for prompt in ("Who?", "Where?")]
    arguments = [str(written(tmp_path, rows)), "--out", str(tmp_path / "out"), "--steps", "1", "--sequence"]
    assert main(["edit", str(model), *arguments]) == 1
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[-5] for line in said[1:3]] == ["NO", "NO"]
    assert said[3] == "0 of 2 targets met"


@pytest.mark.smoke
@pytest.mark.slow
def test_a_memory_is_made_extended_and_used(model, tmp_path, capsys):
    rows = [{"src": f"What is {n}?", "alt": f"{n}", "pred": f"not {n}"} for n in "abcdef"]
    file, memory, more = written(tmp_path, rows), tmp_path / "made" / "memory", tmp_path / "more"
    assert main(["memory", str(model), str(file), "--out", str(memory), "--layers", "2", "3"]) == 0
    assert "6 entries, layers [2, 3]" in capsys.readouterr().out
    assert main(["memory", str(model), str(file), "--out", str(more), "--extend", str(memory)]) == 0
    assert "6 entries and 6 more" in capsys.readouterr().out
    assert len(uk.MemoryBank.load(more)) == 12
    refused = ["memory", str(model), str(file), "--out", str(more), "--extend", str(memory), "--layers", "2"]
    assert main(refused) == 1
    assert "--extend: expected no --layers and no --values" in capsys.readouterr().err
    asked = written(tmp_path, {"prompt": "Who?", "target": "Ann"}, "one.json")
    arguments = [str(asked), "--out", str(tmp_path / "out"), "--memory", str(more), "--steps", "2"]
    assert main(["edit", str(model), *arguments]) in (0, 1)
    edit = uk.Edit.load(tmp_path / "out" / "edit-0.safetensors")
    assert edit.memory_id == uk.MemoryBank.load(more).id and sorted(edit.layers) == [2, 3]


ROWS = {
    "own": {"id": 7, "prompt": "P", "target": "T", "rephrasings": ["R", "S"], "preserve": ["K", {"prompt": "L"}]},
    "easyedit": {
        "case_id": 7, "prompt": "P", "target_new": "T", "rephrase_prompt": ["R", "S"], "subject": "Q",
        "ground_truth": "N", "locality": {"neighborhood": {"prompt": ["K", "L"], "ground_truth": ["k", "l"]}},
    },
    "counterfact": {
        "case_id": 7, "requested_rewrite": {"prompt": "{}", "subject": "P", "target_new": {"str": "T"},
        "target_true": {"str": "N"}}, "paraphrase_prompts": ["R", "S"], "neighborhood_prompts": ["K", "L"],
    },
    "zsre": {"id": "7", "src": "P", "alt": "T", "rephrase": "R", "loc": "K", "loc_ans": "k", "pred": "N"},
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_forms_of_rows(name, tmp_path):
    """As JSON, as JSON lines and as YAML, one or many."""
    import yaml

    row = ROWS[name]
    files = [
        written(tmp_path, row),
        written(tmp_path, [row], "list.json"),
        written(tmp_path, json.dumps(row) + "\n\n", "lines.jsonl"),
        written(tmp_path, yaml.safe_dump([row]), "list.yaml"),
        written(tmp_path, yaml.safe_dump(row), "one.yml"),
    ]
    for file in files:
        ((request,), unused) = read_edits(file, form(tmp_path))
        assert (request.id, request.sample) == ("7", Sample("P", "T"))
        assert [s.prompt for s in request.rephrasings] == ["R", "S"][: 1 if name == "zsre" else 2]
        assert {s.answer for s in request.rephrasings} == {"T"}
        assert [s.prompt for s in request.preserve] == ["K", "L"][: 1 if name == "zsre" else 2]
        wanted = {"own": ["", ""], "easyedit": ["k", "l"], "counterfact": ["N", "N"], "zsre": ["k"]}[name]
        assert [s.answer for s in request.preserve] == wanted
        assert (request.wrong, unused) == ("" if name == "own" else "N", [])
        if name != "own":
            ((triplet,), _) = read_triplets(file, form(tmp_path))
            assert (triplet.prompt, triplet.positive, triplet.negative) == ("P", "T", "N")


def test_rows_about_images_in_a_chat_and_in_a_template(tmp_path):
    (tmp_path / "seen").mkdir()
    Image.fromarray((torch.rand(4, 4, 3) * 255).to(torch.uint8).numpy()).save(tmp_path / "seen" / "a.png")
    row = {
        "src": "What is it?", "alt": "a kea", "image": "seen/a.png", "rephrase": "What is that?", "loc": "nq question",
        "loc_ans": "yes", "m_loc": "seen/a.png", "m_loc_q": "How many?", "m_loc_a": "two", "pred": "a crow",
    }  # fmt: skip
    file = written(tmp_path, [row])
    ((request,), unused) = read_edits(file, form(tmp_path, template="Question: {} Answer:"))
    assert (request.sample.prompt, request.sample.image) == (
        "Question: What is it? Answer:",
        str(tmp_path / "seen/a.png"),
    )
    assert request.rephrasings[0].image == request.sample.image and unused == []
    assert [len(sample.images) for sample in request.preserve] == [0, 1]
    ((request,), _) = read_edits(file, form(tmp_path, chat=True))
    assert request.sample.messages == [{"role": "user", "content": "What is it?"}] and len(request.sample.images) == 1
    ((triplet,), _) = read_triplets(file, form(tmp_path, chat=True))
    assert (triplet.answered("").question, len(triplet.answered("").images)) == ("What is it?", 1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "[]", "a.txt: expected a name that ends with .json, .jsonl, .yaml or .yml"),
        ("a.json", "{", "a.json: Expecting property name"),
        ("a.jsonl", '{"prompt": "a", "target": "b"}\nx', "a.jsonl: Expecting value"),
        ("a.yaml", "a: [", "a.yaml: while parsing a flow"),
        ("a.json", "[]", "a.json: expected at least one row, got none"),
        ("a.json", "[3]", "row 0: expected an object of fields, got 3"),
        ("a.json", '[{"target": "b"}]', r"row 0: prompt: expected a text \(in one of prompt, src, text\), got None"),
        ("a.json", '[{"prompt": "a", "target": 3}]', "row 0: target: expected a text .* got 3"),
        ("a.json", '[{"prompt": "a", "target": "b", "rephrase": 3}]', "rephrasings: expected a text or a list"),
        ("a.json", '[{"prompt": "a", "target": "b", "preserve": [3]}]', "preserve: expected texts, or objects"),
        ("a.json", '[{"prompt": "a", "target": "b", "image": "none.png"}]', "there is no file .*none.png"),
        ("a.json", '[{"prompt": "a", "target": "b", "image": "a.json"}]', "a.json is no image"),
        ("a.json", '[{"prompt": "a", "messages": [], "target": "b"}]', "expected a prompt or messages, got both"),
        ("a.json", '[{"messages": [], "target": "b"}]', "row 0: messages: expected a list of one message or more"),
        ("a.json", '[{"prompt": "a", "target": "b", "id": 1}, {"prompt": "a", "target": "b", "id": "1"}]', "distinct"),
        ("a.json", '[{"prompt": "a", "target": "b", "id": "../up"}]', "id: expected a name for a file, got '../up'"),
    ],
)
def test_files_of_another_form(name, content, message, tmp_path, capsys):
    """Nothing is trained, and nothing written."""
    out = tmp_path / "out"
    assert main(["edit", "no-model", str(written(tmp_path, content, name)), "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("unike edit: ")
    assert re.search(message, error)
    assert not out.exists()


def test_what_else_is_refused(model, tmp_path, capsys):
    file = written(tmp_path, {"prompt": "a", "target": "b"})
    for arguments, message in [
        (["--template", "none"], "--template: expected one {} in it, got 'none'"),
        (["--memory", str(tmp_path / "none")], "none: there is no such file"),
        (["--layers", "9"], "layers: expected indices in 0..3"),
    ]:
        assert main(["edit", str(model), str(file), "--out", str(tmp_path / "out"), *arguments]) == 1
        assert message in capsys.readouterr().err
    assert main(["edit", str(tmp_path / "none"), str(file), "--out", str(tmp_path / "out")]) == 1
    assert "neither a folder with a config.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_version_and_a_reader_that_has_had_enough(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"unike_kernels {uk.__version__}\n"
    run = subprocess.Popen(
        [sys.executable, "-m", "unike_kernels", "info"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    run.stdout.close()
    assert run.stderr.read() == b""
    assert run.wait() == 1
