"""A folder of edits: what is there now, what somebody still holds, and what other processes can reach."""

import gc
import os
import socket
import subprocess
import sys
import threading

import pytest

import unike_kernels as uk
from unike_kernels.errors import ArtifactError
from unike_kernels.serving import EditFolder


@pytest.fixture
def edit(make_model, make_edit):
    model = make_model("opt")
    return lambda id, seed=2: make_edit(model, id, seed=seed)


def put(path, edit):
    edit.save(path / f"{edit.id}.safetensors")


def put_in_place(path, edit):
    """As cp does over a file that is there; gives the content."""
    put(path / "..", edit)
    content = (path / ".." / f"{edit.id}.safetensors").read_bytes()
    (path / f"{edit.id}.safetensors").write_bytes(content)
    return content


def first_key(edit):
    return float(edit.layers[2].keys[0, 0])


def test_an_edit_comes_is_replaced_and_goes(tmp_path, edit):
    folder = EditFolder(tmp_path)
    with pytest.raises(ValueError, match="there is no edit 'a'"):
        folder.get("a")
    put(tmp_path, edit("a"))
    old = folder.get("a")
    assert folder.get("a") is old
    put(tmp_path, edit("a", seed=3))
    new = folder.get("a")
    assert new.key != old.key
    assert first_key(new.edit) != first_key(old.edit)
    assert folder.held(old.key) is old  # somebody, this test, holds it
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(ValueError, match="there is no edit 'a'"):
        folder.get("a")
    assert folder.held(new.key) is new
    assert EditFolder(tmp_path)._last == {}


def test_what_did_not_change_is_not_loaded_again(tmp_path, edit, monkeypatch):
    folder, loads, load = EditFolder(tmp_path), [], uk.Edit.read
    monkeypatch.setattr(uk.Edit, "read", lambda file, path: (loads.append(path), load(file, path))[1])
    put(tmp_path, edit("a"))
    for _ in range(3):
        folder.get("a")
    assert len(loads) == 1
    put(tmp_path, edit("a", seed=3))
    folder.get("a")
    assert len(loads) == 2


def test_what_nobody_holds_is_gone_with_its_file(tmp_path, edit):
    folder = EditFolder(tmp_path)
    put(tmp_path, edit("a"))
    key = folder.get("a").key
    put(tmp_path, edit("a", seed=3))
    folder.get("a")
    gc.collect()
    with pytest.raises(ValueError, match="'a' was replaced or revoked before its request began"):
        folder.held(key)


def test_another_process_reaches_what_is_retained(tmp_path, edit):
    put(tmp_path, edit("a"))
    engine, worker = EditFolder(tmp_path), EditFolder(tmp_path)
    wanted = first_key(engine.get("a").edit)
    key = engine.get("a").key
    retained = engine.retain(key)
    assert engine.retain(key) is retained
    content = put_in_place(tmp_path, edit("a", seed=3))
    assert worker.held(key) is not engine.held(key)
    assert first_key(worker.held(key).edit) == wanted
    engine._last.clear()
    gc.collect()
    other = EditFolder(tmp_path)  # a third process, which has it from the first one's copy
    again = other.retain(key)
    del retained
    gc.collect()
    assert first_key(worker.held(key).edit) == wanted
    assert (tmp_path / "a.safetensors").read_bytes() == content
    (tmp_path / "a.safetensors").unlink()
    del again
    gc.collect()
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    with pytest.raises(ValueError, match="replaced or revoked"):
        worker.held(key)


def test_what_dead_processes_retained_is_swept(tmp_path, edit):
    put(tmp_path, edit("a"))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = socket.gethostname()
    for name in (f"{host}-{dead.pid}", f"elsewhere-{dead.pid}", f"{host}-{os.getppid()}"):
        (tmp_path / ".retained" / name).mkdir(parents=True)
    folder = EditFolder(tmp_path)
    retained = folder.retain(folder.get("a").key)
    names = {path.name for path in (tmp_path / ".retained").iterdir()}
    assert names == {f"elsewhere-{dead.pid}", f"{host}-{os.getppid()}", f"{host}-{os.getpid()}"}
    del retained


def test_a_version_whose_file_is_gone_can_be_retained_by_who_holds_it(tmp_path, edit):
    put(tmp_path, edit("a"))
    folder = EditFolder(tmp_path)
    version = folder.get("a")
    put(tmp_path, edit("a", seed=3))
    retained = folder.retain(version.key)
    assert first_key(EditFolder(tmp_path).held(version.key).edit) == first_key(version.edit)
    key = folder.get("a").key
    put(tmp_path, edit("a", seed=4))
    with pytest.raises(ValueError, match="'a' was replaced or revoked"):
        EditFolder(tmp_path).retain(key)
    del retained


def test_versions_are_retained_and_let_go_at_once(tmp_path, edit):
    """By threads, while folders of dead processes are swept: nobody's file goes with another's."""
    for id in "ab":
        put(tmp_path, edit(id))
    folder, others = EditFolder(tmp_path), tmp_path / ".retained"
    keys = [folder.get(id).key for id in "ab"]
    failed = []

    def work(key):
        try:
            for _ in range(300):
                retained = folder.retain(key)
                assert any(folder._retained_files(key))
                del retained
        except BaseException as error:
            failed.append(error)
            raise

    threads = [threading.Thread(target=work, args=(key,)) for key in keys]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        (others / "elsewhere-1").mkdir(parents=True, exist_ok=True)
        (others / "elsewhere-1").rmdir()
    assert failed == []


@pytest.mark.parametrize("id", ["../a", "", ".a", "a/b", 3, "a b"])
def test_ids_are_names(tmp_path, id):
    with pytest.raises(ValueError, match="expected an id of letters"):
        EditFolder(tmp_path).get(id)


def test_what_does_not_fit_is_refused(tmp_path, edit):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        EditFolder(tmp_path / "none")

    def refuse(edit):
        raise uk.MismatchError(f"edit {edit.id!r}: not today")

    folder = EditFolder(tmp_path, refuse)
    put(tmp_path, edit("a"))
    with pytest.raises(uk.MismatchError, match="not today"):
        folder.get("a")
    edit("b").save(tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="holds the edit 'b'; its name must be its id"):
        EditFolder(tmp_path).get("c")
    (tmp_path / "d.safetensors").write_bytes(b"no")
    with pytest.raises(ArtifactError, match=r"d\.safetensors"):
        EditFolder(tmp_path).get("d")


def test_a_key_belongs_to_the_content_that_was_read(tmp_path, edit, monkeypatch):
    """Whatever takes the file's place, or is written to it, at that moment."""
    put(tmp_path, edit("a"))
    folder, read = EditFolder(tmp_path), uk.Edit.read

    def replaced(file, path):
        put(tmp_path, edit("a", seed=3))
        return read(file, path)

    monkeypatch.setattr(uk.Edit, "read", replaced)
    old = folder.get("a")
    assert first_key(old.edit) == first_key(edit("a"))
    monkeypatch.setattr(uk.Edit, "read", read)
    new = folder.get("a")
    assert new.key != old.key
    assert first_key(new.edit) == first_key(edit("a", seed=3))

    def written_to(file, path):
        found = read(file, path)
        os.utime(path, ns=(1, 1))
        return found

    put(tmp_path, edit("a", seed=4))
    monkeypatch.setattr(uk.Edit, "read", written_to)
    with pytest.raises(ValueError, match=r"a\.safetensors was written to while it was read; replace it by renaming"):
        folder.get("a")
