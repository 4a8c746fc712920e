"""A folder of edits: what is there now, what somebody still holds, and what other processes can reach."""

import dataclasses
import errno
import gc
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

import unike_kernels as uk
from unike_kernels.artifacts import files
from unike_kernels.errors import ArtifactError
from unike_kernels.serving import EditRepository
from unike_kernels.serving import repository as module


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
    folder = EditRepository(tmp_path)
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
    assert EditRepository(tmp_path)._last == {}


def test_what_did_not_change_is_not_loaded_again(tmp_path, edit, monkeypatch):
    folder, loads, load = EditRepository(tmp_path), [], uk.Edit.read
    monkeypatch.setattr(uk.Edit, "read", lambda file, path: (loads.append(path), load(file, path))[1])
    put(tmp_path, edit("a"))
    for _ in range(3):
        folder.get("a")
    assert len(loads) == 1
    put(tmp_path, edit("a", seed=3))
    folder.get("a")
    assert len(loads) == 2


def test_what_nobody_holds_is_gone_with_its_file(tmp_path, edit):
    folder = EditRepository(tmp_path)
    put(tmp_path, edit("a"))
    key = folder.get("a").key
    put(tmp_path, edit("a", seed=3))
    folder.get("a")
    gc.collect()
    with pytest.raises(ValueError, match="'a' was replaced or revoked before its request began"):
        folder.held(key)


def test_another_process_reaches_what_is_retained(tmp_path, edit):
    put(tmp_path, edit("a"))
    engine, worker = EditRepository(tmp_path), EditRepository(tmp_path)
    wanted = first_key(engine.get("a").edit)
    key = engine.get("a").key
    retained = engine.retain(key)
    assert engine.retain(key) is retained
    content = put_in_place(tmp_path, edit("a", seed=3))
    assert worker.held(key) is not engine.held(key)
    assert first_key(worker.held(key).edit) == wanted
    engine._last.clear()
    gc.collect()
    other = EditRepository(tmp_path)  # a third process, which has it from the first one's copy
    again = other.retain(key)
    del retained
    gc.collect()
    assert first_key(worker.held(key).edit) == wanted
    assert (tmp_path / "a.safetensors").read_bytes() == content
    (tmp_path / "a.safetensors").unlink()
    del again
    gc.collect()
    assert list(tmp_path.rglob("*.safetensors")) == []
    with pytest.raises(ValueError, match="replaced or revoked"):
        worker.held(key)


HOLD = """
import sys
from unike_kernels.serving import EditRepository
folder = EditRepository(sys.argv[1])
retained = folder.retain(folder.get("a").key)
print(folder._own.folder.name, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that retains the edit a, and the name of its folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    yield process, process.stdout.readline().strip()
    process.kill()
    process.communicate()


def folders(path):
    return {entry.name for entry in (path / ".retained").iterdir()}


def test_what_dead_processes_retained_is_swept(tmp_path, edit, request):
    """Whatever their machines and numbers: who lives holds a lock."""
    put(tmp_path, edit("a"))
    process, name = request.getfixturevalue("holder")
    machine, number, _ = name.split("-")
    assert machine == files.machine() and number == str(process.pid)

    def with_locks(*names):
        return {*names, *(f"{name}.lock" for name in names)}

    def retaining():
        folder = EditRepository(tmp_path)
        return folder, folder.retain(folder.get("a").key), folder._own.folder.name

    # Other machines' that show us no locks, called as ours with a number; one of them has left its own long ago.
    new, old = f"{machine[:-1]}-{number}-1", f"{machine}0-{number}-1"
    for other in (new, old):
        (tmp_path / ".retained" / other).mkdir()
        (tmp_path / ".retained" / f"{other}.lock").touch()
    os.utime(tmp_path / ".retained" / old, (1, 1))
    first = retaining()
    assert folders(tmp_path) == with_locks(name, new, old, first[2])
    for path in (tmp_path / ".retained").glob(f"{name}*"):
        os.utime(path, (1, 1))  # not even then: it lives
    os.utime(tmp_path / ".retained" / f"{old}.lock", (1, 1))
    second = retaining()
    assert folders(tmp_path) == with_locks(name, new, first[2], second[2])
    process.kill()
    process.wait()
    third = retaining()
    assert folders(tmp_path) == with_locks(new, first[2], second[2], third[2])
    del first, second, third
    gc.collect()
    assert folders(tmp_path) == with_locks(new)


def test_folders_without_a_lock_are_swept_after_a_day(tmp_path, edit):
    put(tmp_path, edit("a"))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    old, new = f"{socket.gethostname()}-{dead.pid}", f"{socket.gethostname()}-0-{dead.pid}"
    for name in (old, new):
        (tmp_path / ".retained" / name).mkdir(parents=True)
    os.utime(tmp_path / ".retained" / old, (1, 1))
    folder = EditRepository(tmp_path)
    retained = folder.retain(folder.get("a").key)
    own = folder._own.folder.name
    assert folders(tmp_path) == {new, own, f"{own}.lock"}
    del retained


def test_a_file_system_without_locks(tmp_path, edit, monkeypatch):
    def refuse(descriptor):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(module, "_take", refuse)
    put(tmp_path, edit("a"))
    folder = EditRepository(tmp_path)
    version = folder.get("a")
    assert folder.retain(version.key).version is version
    assert folders(tmp_path) == set()


def test_a_lock_that_was_swept_before_it_was_taken(tmp_path, edit, monkeypatch):
    put(tmp_path, edit("a"))
    folder, take, taken = EditRepository(tmp_path), module._take, []

    def sweeping(descriptor):
        if not taken:
            (lock,) = (tmp_path / ".retained").glob("*.lock")
            lock.unlink()
        taken.append(take(descriptor))
        return taken[-1]

    monkeypatch.setattr(module, "_take", sweeping)
    retained = folder.retain(folder.get("a").key)
    assert len(taken) == 2
    own = folder._own.folder.name
    assert folders(tmp_path) == {own, f"{own}.lock"}
    del retained


FORK = """
import gc, os, sys
from unike_kernels.serving import EditRepository
folder = EditRepository(sys.argv[1])
key = folder.get("a").key
retained = folder.retain(key)
own = folder._own.folder.name
files = lambda: {p.parent.name for p in folder._retained_files(key)}
ready, done = os.pipe(), os.pipe()
folder._lock.acquire()  # as another thread may have it
if not (child := os.fork()):
    again = folder.retain(key)
    assert again is not retained and folder._own.folder.name != own
    assert files() == {own, folder._own.folder.name}
    del again, retained
    gc.collect()
    assert files() == {own}
    os.write(ready[1], b"1")
    os.read(done[0], 1)  # lives on when the parent is gone
    sys.exit()
folder._lock.release()
os.close(ready[1])  # the read ends when the child does
assert os.read(ready[0], 1) == b"1"
assert files() == {own}
if sys.argv[2] == "the child ends first":
    os.write(done[1], b"1")
    assert os.waitpid(child, 0)[1] == 0
    assert files() == {own}
else:
    print(child, own, flush=True)
    os._exit(0)  # without a word
"""


def test_a_forked_child_leaves_the_parents_files(tmp_path, edit):
    put(tmp_path, edit("a"))
    subprocess.run([sys.executable, "-c", FORK, tmp_path, "the child ends first"], check=True, timeout=60)
    assert folders(tmp_path) == set()


def test_a_forked_child_does_not_keep_the_parents_lock(tmp_path, edit):
    put(tmp_path, edit("a"))
    parent = [sys.executable, "-c", FORK, tmp_path, "the parent ends first"]
    with subprocess.Popen(parent, stdout=subprocess.PIPE, text=True) as process:
        child, own = process.stdout.readline().split()
        process.wait(60)
        try:
            assert own in folders(tmp_path)
            folder = EditRepository(tmp_path)
            retained = folder.retain(folder.get("a").key)
            assert own not in folders(tmp_path)
            del retained
        finally:
            os.kill(int(child), signal.SIGKILL)


def test_a_folder_that_cannot_be_written(tmp_path, edit, caplog):
    """Requests go on; of a version that is replaced, only this process knows."""
    for id in "ab":
        put(tmp_path, edit(id))
    (tmp_path / ".retained").write_bytes(b"")  # in the way; nobody is refused as root
    folder = EditRepository(tmp_path)
    key = folder.get("a").key
    retained = [folder.retain(key), folder.retain(folder.get("b").key)]
    assert folder.retain(key) is retained[0]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("edits: versions that are replaced cannot be kept for other processes")
    assert EditRepository(tmp_path).held(key).key == key
    put(tmp_path, edit("a", seed=3))
    folder._last.clear()
    gc.collect()
    assert folder.held(key).key == key
    with pytest.raises(ValueError, match="'a' was replaced or revoked"):
        EditRepository(tmp_path).retain(key)


def test_what_was_asked_for_lately_is_kept(tmp_path, edit, monkeypatch):
    monkeypatch.setattr(module, "_RECENT", 3)
    folder = EditRepository(tmp_path)
    for id in "abc":
        put(tmp_path, edit(id))
        folder.get(id)
    folder.get("a")
    assert list(folder._last) == ["b", "c", "a"]
    (tmp_path / "c.safetensors").unlink()
    put(tmp_path, edit("d"))
    folder.get("d")
    assert list(folder._last) == ["b", "a", "d"]  # the revoked one went
    put(tmp_path, edit("e"))
    folder.get("e")
    assert list(folder._last) == ["a", "d", "e"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (3, "names: expected the id of an edit or a list"),
        ({"a": 1}, "names: expected the id of an edit or a list"),
        (None, "names: expected the id of an edit or a list"),
        ([["a"]], "expected an id of letters"),
        ([{"a": 1}], "expected an id of letters"),
        (["a", "b", "c", "d"], "names: expected at most 3 edits, got 4"),
        (["a", "b", "a"], "names: expected distinct ids"),
    ],
)
def test_what_a_request_may_name(asked, message):
    with pytest.raises(ValueError, match=message):
        module.check_ids("names", asked, 3)
    assert module.check_ids("names", "a", 3) == ["a"]
    assert module.check_ids("names", ["b", "a"], 3) == ["b", "a"]


@pytest.mark.parametrize("most", [0, -1, True, 2.0, "3", None])
def test_limits_are_counts(most):
    with pytest.raises(ValueError, match="max_edits: expected an integer of at least 1"):
        module.check_most(most)


def test_a_version_whose_file_is_gone_can_be_retained_by_who_holds_it(tmp_path, edit):
    put(tmp_path, edit("a"))
    folder = EditRepository(tmp_path)
    version = folder.get("a")
    put(tmp_path, edit("a", seed=3))
    retained = folder.retain(version.key)
    assert first_key(EditRepository(tmp_path).held(version.key).edit) == first_key(version.edit)
    key = folder.get("a").key
    put(tmp_path, edit("a", seed=4))
    with pytest.raises(ValueError, match="'a' was replaced or revoked"):
        EditRepository(tmp_path).retain(key)
    del retained


def test_versions_are_retained_and_let_go_at_once(tmp_path, edit):
    """By threads, while folders of dead processes are swept: nobody's file goes with another's."""
    for id in "ab":
        put(tmp_path, edit(id))
    folder, others = EditRepository(tmp_path), tmp_path / ".retained"
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


@pytest.mark.parametrize(
    "id", ["../a", "", ".a", "..", "a/b", 3, "a b", "a\0", "a\n", "a" * 200, "a" * 10_000, None, True, ["a"], {"a": 1}]
)
def test_ids_are_names(tmp_path, id):
    with pytest.raises(ValueError, match="expected an id of letters"):
        EditRepository(tmp_path).get(id)


def test_what_does_not_fit_is_refused(tmp_path, edit, caplog):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        EditRepository(tmp_path / "none")

    def refuse(edit):
        raise uk.MismatchError(f"edit {edit.id!r}: not today")

    folder = EditRepository(tmp_path, refuse)
    put(tmp_path, edit("a"))
    with pytest.raises(uk.MismatchError, match="not today"):
        folder.get("a")
    edit("b").save(tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="holds the edit 'b'; its name must be its id"):
        EditRepository(tmp_path).get("c")
    (tmp_path / "d.safetensors").write_bytes(b"no")
    with pytest.raises(ArtifactError, match=r"^edit: the file of 'd' is not valid$"):
        EditRepository(tmp_path).get("d")
    assert f"{tmp_path / 'd.safetensors'}: not a complete safetensors file" in caplog.text  # for the log alone
    (tmp_path / "e.safetensors").symlink_to("e.safetensors")
    with pytest.raises(ValueError, match=r"^edit: the file of 'e' cannot be read$"):
        EditRepository(tmp_path).get("e")


def test_a_key_belongs_to_the_content_that_was_read(tmp_path, edit, monkeypatch):
    """Whatever takes the file's place, or is written to it, at that moment."""
    put(tmp_path, edit("a"))
    folder, read = EditRepository(tmp_path), uk.Edit.read

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


def test_a_version_that_is_retained_anew_keeps_its_file(tmp_path, edit):
    """While the one before it lets go of its own."""
    folder = EditRepository(tmp_path)
    put(tmp_path, edit("a"))
    key = folder.get("a").key
    one, another = folder._kept(key), folder._kept(key)
    assert len(list(folder._retained_files(key))) == 2
    del one
    gc.collect()
    (left,) = folder._retained_files(key)
    assert uk.Edit.load(left).id == "a"
    del another


@pytest.mark.parametrize("what", ["time", "size", "file"])
def test_each_of_three_things_tells_a_replaced_file(tmp_path, edit, what):
    folder, path, aside = EditRepository(tmp_path), tmp_path / "a.safetensors", tmp_path / "aside"
    put(tmp_path, edit("a"))
    before, state = folder.get("a"), path.stat()
    if what == "file":  # another one, of the same size and time
        edit("a", seed=3).save(aside)
        os.replace(aside, path)
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
        assert (path.stat().st_size, path.stat().st_mtime_ns) == (state.st_size, state.st_mtime_ns)
    elif what == "size":  # written in place, at the same time
        dataclasses.replace(edit("a", seed=3), notes={"more": "text " * 9}).save(aside)
        path.write_bytes(aside.read_bytes())
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    else:
        edit("a", seed=3).save(aside)
        path.write_bytes(aside.read_bytes())
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    after = folder.get("a")
    assert after.key != before.key and first_key(after.edit) != first_key(before.edit)
