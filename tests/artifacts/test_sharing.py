"""Folders that edits and memories are shared as: what is in them, what comes back, what is refused, and the hub."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from PIL import Image

import unike_kernels as uk
from unike_kernels.artifacts import files


@pytest.fixture
def made(make_model, make_memory, make_edit):
    """A model, a memory, and an edit that was trained with it."""
    model = make_model("llama")
    memory = make_memory(model)
    notes = {"prompt": "What is this?\n```\n# a | bird", "answer": "a kea", "target loss": "4.476 -> 0.003"}
    return model, memory, dataclasses.replace(make_edit(model, "kea", memory), notes=notes)


def tensors(artifact):
    return {f"{i}.{name}": t for i, layer in artifact.layers.items() for name, t in layer.tensors().items()}


def same(one, other):
    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_an_edit_and_its_memory_in_one_folder(made, tmp_path):
    model, memory, edit = made
    picture = Image.new("RGB", (3, 2), "red")
    edit.save_pretrained(tmp_path / "new" / "kea", memory=memory, picture=picture)
    folder = tmp_path / "new" / "kea"
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", "edit.safetensors", "memory.safetensors", "request.png",
    ]  # fmt: skip
    found, beside = uk.Edit.from_pretrained(folder), uk.MemoryBank.from_pretrained(str(folder))
    assert same(found, edit) and found.notes == edit.notes and beside.id == memory.id
    uk.patch(model, [found], beside)
    assert Image.open(folder / "request.png").getpixel((2, 1)) == (255, 0, 0)


def test_the_card(made, tmp_path):
    _, memory, edit = made
    edit.save_pretrained(tmp_path / "kea", memory=memory, picture=Image.new("L", (1, 1)))
    card = (tmp_path / "kea" / "README.md").read_text()
    head = "---\nlibrary_name: unike_kernels\ntags:\n- unike\n- knowledge-editing\n---\n\n"
    assert card.startswith(f"{head}# kea: an edit of a llama")
    assert "    What is this?\n    ```\n    # a | bird\n" in card and "    a kea\n" in card  # as code, whatever it says
    assert "![The picture that the request is about](request.png)" in card
    whole = files.digest(edit._tensors())
    for told in (
        f"| hash of the edit | {whole} |", f"| memory that it needs | {memory.id} |",
        f"| hash of the memory | {memory.id} |", r"| target loss | 4.476 -\> 0.003 |",
        f"| torch | {torch.__version__} |", "| base model | llama, 6 layers, d = 64 |",
    ):  # fmt: skip
        assert told in card, told
    for package in (r"unike\_kernels", "transformers"):
        assert re.search(rf"\| {re.escape(package)} \| \d+\.\d+", card)
    assert re.search(r"\| fingerprint of the base model \| [0-9a-f]{32} \|", card)
    assert 'uk.Edit.from_pretrained("kea")' in card and 'uk.MemoryBank.from_pretrained("kea")' in card
    changed = dataclasses.replace(edit, base_model={**edit.base_model, "parameters": 7}, notes={"bytes": "1 | 2\n<b>"})
    changed.save_pretrained(tmp_path / "other", name="me/other")
    other = (tmp_path / "other" / "README.md").read_text()
    print_of = lambda text: re.search(r"fingerprint of the base model \| (\w+)", text)[1]  # noqa: E731
    assert print_of(other) != print_of(card) and "request.png" not in other and 'from_pretrained("me/other")' in other
    memory.save_pretrained(tmp_path / "memory")
    assert "# A memory of a llama model" in (tmp_path / "memory" / "README.md").read_text()
    assert sorted(p.name for p in (tmp_path / "memory").iterdir()) == ["README.md", "memory.safetensors"]


def test_a_memory_of_another_edit_is_refused_and_nothing_is_written(made, make_memory, make_edit, tmp_path):
    model, memory, edit = made
    alone = make_edit(model, "alone")
    other = make_memory(model, seed=5)
    for wrong, given in ((edit, other), (alone, memory)):
        with pytest.raises(uk.MismatchError, match=f"edit '{wrong.id}': it was trained with the memory"):
            wrong.save_pretrained(tmp_path / "folder", memory=given)
    scoped = dataclasses.replace(edit, entries=torch.eye(2), scope_id="s")
    with pytest.raises(uk.MismatchError, match=r"and the scope s; this is the memory .* with the scope None"):
        scoped.save_pretrained(tmp_path / "folder", memory=memory)
    assert not (tmp_path / "folder").exists()
    edit.save_pretrained(tmp_path / "folder", memory=uk.MemoryBank.joined({"mine": memory}))


def test_folders_that_are_none(made, tmp_path):
    _, memory, edit = made
    edit.save_pretrained(tmp_path / "kea")
    file = tmp_path / "kea" / "edit.safetensors"
    with pytest.raises(uk.ArtifactError, match=r"kea: expected a folder with memory\.safetensors, found README\.md"):
        uk.MemoryBank.from_pretrained(tmp_path / "kea")
    with pytest.raises(uk.ArtifactError, match=r"expected a folder, found a file, which Edit\.load reads"):
        uk.Edit.from_pretrained(file)
    with pytest.raises(uk.ArtifactError, match="expected a folder, found a file"):
        edit.save_pretrained(file)
    (tmp_path / "empty").mkdir()
    with pytest.raises(uk.ArtifactError, match=r"empty: expected a folder with edit\.safetensors, found nothing"):
        uk.Edit.from_pretrained(tmp_path / "empty")
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(uk.ArtifactError, match=r"edit\.safetensors: tensor .* does not agree with its checksum"):
        uk.Edit.from_pretrained(tmp_path / "kea")
    memory.save(file)  # of another kind
    with pytest.raises(uk.ArtifactError, match=r"expected the format unike\.edit, got 'unike\.memory'"):
        uk.Edit.from_pretrained(tmp_path / "kea")


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("offline")
def test_what_is_in_the_cache_is_read_without_a_network(made, tmp_path):
    _, memory, edit = made
    repository, commit = tmp_path / "models--me--kea", "a" * 40
    edit.save_pretrained(repository / "snapshots" / commit, memory=memory)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert same(uk.Edit.from_pretrained("me/kea", cache_dir=tmp_path), edit)
    assert uk.MemoryBank.from_pretrained("me/kea", cache_dir=tmp_path, revision=commit).id == memory.id
    for name in ("me/other", "me/kea/more", "no such folder"):
        with pytest.raises(
            FileNotFoundError, match=rf"{name}: neither a folder nor a repository of the hub that holds"
        ):
            uk.Edit.from_pretrained(name, cache_dir=tmp_path)
    (repository / "snapshots" / commit / "edit.safetensors").write_bytes(b"nonsense")
    with pytest.raises(uk.ArtifactError, match="not a complete safetensors file"):
        uk.Edit.from_pretrained("me/kea", cache_dir=tmp_path)


class FakeApi:
    """Of the hub: notes what it is asked for, and keeps what is uploaded."""

    calls: list

    def __init__(self, token=None):
        FakeApi.calls = [("token", token)]

    def create_repo(self, repo_id, **more):
        self.calls.append(("create_repo", repo_id, more))
        return SimpleNamespace(repo_id=f"me/{repo_id}")  # as the hub completes a name without an owner

    def upload_folder(self, *, repo_id, folder_path, **more):
        held = {p.name: p.read_bytes() for p in Path(folder_path).iterdir()}
        self.calls.append(("upload_folder", repo_id, held, more))
        return SimpleNamespace(commit_url="https://hub/commit/1")


def test_what_is_pushed_is_what_is_saved(made, tmp_path, monkeypatch):
    _, memory, edit = made
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    address = edit.push_to_hub("kea", memory=memory, private=True, token="t", commit_message="new")
    assert address == "https://hub/commit/1"
    token, create, (_, repo_id, held, more) = FakeApi.calls
    assert token == ("token", "t") and create == ("create_repo", "kea", {"private": True, "exist_ok": True})
    assert repo_id == "me/kea" and more == {"commit_message": "new", "revision": None}
    edit.save_pretrained(tmp_path / "kea", memory=memory)
    assert held == {p.name: p.read_bytes() for p in (tmp_path / "kea").iterdir()}
    memory.push_to_hub("me/memory")
    assert set(FakeApi.calls[-1][2]) == {"README.md", "memory.safetensors"}
    assert b'from_pretrained("me/memory")' in FakeApi.calls[-1][2]["README.md"]
    with pytest.raises(uk.MismatchError):
        edit.push_to_hub("kea", memory=dataclasses.replace(memory, layers={4: memory.layers[4]}))
    assert [call[0] for call in FakeApi.calls] == ["token"]


def test_without_the_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'unike-kernels\[hf\]'"):
        uk.Edit.from_pretrained("me/kea")
