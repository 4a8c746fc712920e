"""The files: what makes one invalid is found and named; writing is atomic; nothing in them is ever executed."""

import dataclasses
import errno
import io
import json
import os
import pickle
import socket
import stat
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import unike_kernels as uk
from unike_kernels.artifacts import files


@pytest.fixture
def saved(tmp_path, make_model, make_memory, make_edit):
    """kind -> (path of a valid file, its class)."""
    model = make_model("llama")
    memory = make_memory(model, uk.Config(k=7, values="out"))
    memory.save(tmp_path / "memory.safetensors")
    make_edit(model, "a", memory, gated=True).save(tmp_path / "edit.safetensors")
    return {
        "memory": (tmp_path / "memory.safetensors", uk.MemoryBank),
        "edit": (tmp_path / "edit.safetensors", uk.Edit),
    }


def rewrite(path, *, header=None, tensors=None, metadata=None):
    """The file again, with parts of it replaced and checksums that agree; None as a value takes the part out."""
    with safe_open(str(path), framework="pt") as file:
        meta = file.metadata()
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)

    def change(old, new):
        return {k: v for k, v in {**old, **(new or {})}.items() if v is not None}

    if header is not None:
        fields = {**json.loads(meta["header"]), **header}
        meta["header"] = json.dumps({k: v for k, v in fields.items() if v is not ...})
    meta = {k: v for k, v in change(meta, metadata).items() if k not in ("checksum", "digests")}
    files._write(content := io.BytesIO(), meta, change(kept, tensors))
    path.write_bytes(content.getvalue())


BOTH = ("memory", "edit")
BASE = {"model_type": "llama", "hidden_size": 64, "layers": 6, "parameters": 57, "samples": {}}


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1, -5000])
def test_truncated(saved, kind, keep):
    path, cls = saved[kind]
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(uk.ArtifactError, match=f"{path.name}: not a complete safetensors file"):
        cls.load(path)


@given(data=st.data())
def test_a_damaged_file_is_an_artifact_error_or_still_valid(tmp_path_factory, data):
    """Whatever bytes are changed, no other exception gets out, and a memory's contents cannot change unseen."""
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    path = folder / "m.safetensors"
    encoder = uk.ops.SemanticEncoder(torch.ones(2, 4), torch.ones(2), torch.ones(4, 2), torch.ones(4))
    layer = uk.MemoryLayer(torch.ones(3, 4), torch.ones(3, 1, 4), None, encoder, torch.ones(2), torch.ones(4))
    base = {"model_type": "opt", "hidden_size": 4, "layers": 1, "parameters": 1, "samples": {}}
    bank = uk.MemoryBank({0: layer}, uk.Config(values="pre"), base)
    bank.save(path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content))
    try:
        loaded = uk.MemoryBank.load(path)
    except uk.ArtifactError:
        return
    assert loaded.id == bank.id


@pytest.mark.parametrize("kind", BOTH)
def test_the_other_kind_another_version_no_header(saved, kind):
    path, cls = saved[kind]
    other = saved["edit" if kind == "memory" else "memory"][0]
    with pytest.raises(uk.ArtifactError, match=f"{other.name}: expected the format unike.{kind}, got 'unike."):
        cls.load(other)
    for metadata, message in (
        ({"version": "3"}, "expected version 2, got '3'"),
        ({"format": None}, f"expected the format unike.{kind}, got None"),
        ({"format": f"unike.{kind}", "version": "2", "header": "{"}, "its header cannot be read: JSONDecodeError"),
        ({"header": "[]"}, "expected a JSON object as header, got list"),
        ({"header": None}, "its header cannot be read: KeyError"),
    ):
        rewrite(path, metadata=metadata | ({} if "version" in metadata else {"version": "2"}))
        with pytest.raises(uk.ArtifactError, match=f"{path.name}: {message}"):
            cls.load(path)
        rewrite(path, metadata={"format": f"unike.{kind}"})


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"hidden_size": 32}, "expected floating .*32"),
        ({"hidden_size": "64"}, "'hidden_size': expected int, got '64'"),
        ({"hidden_size": True}, "'hidden_size': expected int, got True"),
        ({"hidden_size": ...}, "the header lacks 'hidden_size'"),
        ({"layers": [2, 3, 4]}, "unexpected tensors: layers.5"),
        ({"layers": [2, 3, 4, 5, 6]}, "'layers.6.keys' is missing"),
        ({"layers": [2, 3, 5, 4]}, "'layers': expected distinct ascending indices"),
        ({"layers": [2, 2, 3, 4, 5]}, "'layers': expected distinct ascending indices"),
        ({"layers": []}, "'layers': expected a list of layer indices"),
        ({"layers": [-1, 2, 3, 4, 5]}, "'layers': expected a list of layer indices"),
        ({"layers": "all"}, "'layers': expected list, got 'all'"),
        ({"id": 5}, "'id': expected str, got 5"),
        ({"config": {}}, "Config: expected the fields"),
        ({"config": {**uk.Config().to_dict(), "k": 0}}, "Config.k: expected an integer of at least 1, got 0"),
        (
            {"config": {**uk.Config().to_dict(), "beta": 10**400}},
            "its header cannot be read: .*it holds the number 1000",
        ),
        ({"config": {**uk.Config().to_dict(), "scale": float("inf")}}, "it holds the number inf"),
        ({"notes": {"answer": "\ud800"}}, "its header cannot be read: UnicodeEncodeError"),
        ({"notes": {"answer": [[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]}}, "it is nested more than 16 deep"),
        ({"base_model": {**BASE, "samples": {"w": [1e200] * 8}}}, "finite numbers of float32"),
        ({"base_model": {**BASE, "hidden_size": "64"}}, "expected 'hidden_size' to be an integer, got '64'"),
        ({"base_model": {**BASE, "model_type": 5}}, "expected 'model_type' to be a string, got 5"),
        ({"base_model": {}}, "base_model: expected the fields"),
        ({"base_model": ...}, "the header lacks 'base_model'"),
        ({"notes": []}, r"'notes': expected dict, got \[\]"),
        ({"surplus": 1}, "unexpected header fields: surplus"),
    ],
)
def test_a_header_that_lies(saved, kind, header, message):
    path, cls = saved[kind]
    rewrite(path, header=header)
    with pytest.raises(uk.ArtifactError, match=f"{path.name}: .*{message}"):
        cls.load(path)


@pytest.mark.parametrize(
    ("kind", "header", "message"),
    [
        ("memory", {"entries": 49}, r"'layers.2.keys': expected floating \[49, '\*', '\*'\], got .*\[50, 1, 64\]"),
        ("memory", {"entries": -1}, "expected floating"),
        ("memory", {"id": "0" * 32}, "its contents have the id .*, the header says '0000"),
        ("memory", {"tenants": {"a\nb": [0, 1, "c"]}}, r"MemoryBank.tenants: expected printable .*got 'a\\nb'"),
        ("edit", {"id": ""}, "Edit.id: expected a non-empty string"),
        ("edit", {"id": "a\nevent=patch"}, r"Edit.id: expected printable characters, got 'a\\nevent=patch'"),
        ("edit", {"id": "a\u202eb"}, r"Edit.id: expected printable characters, got 'a\\u202eb'"),
        ("edit", {"memory_id": "m\x1b[2J"}, "Edit.memory_id: expected printable characters"),
        ("edit", {"activation": "swish"}, "Edit.activation: expected one of .*got 'swish'"),
        ("edit", {"memory_id": 3}, "'memory_id': expected str or NoneType, got 3"),
    ],
)
def test_a_header_that_lies_about_its_own_kind(saved, kind, header, message):
    path, cls = saved[kind]
    rewrite(path, header=header)
    with pytest.raises(uk.ArtifactError, match=f"{path.name}: .*{message}"):
        cls.load(path)


NAN = torch.full((64,), float("nan"))


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("layers.3.keys", None, "'layers.3.keys' is missing"),
        ("layers.3.values", torch.zeros(2, 2), "'layers.3.values': expected floating"),
        ("layers.3.values", torch.zeros(50, 1, 64, dtype=torch.int64), "'layers.3.values': expected floating"),
        ("layers.3.extra", torch.zeros(1), "unexpected tensors: layers.3.extra"),
        ("other", torch.zeros(1), "unexpected tensors: other"),
    ],
)
def test_tensors_that_do_not_fit(saved, kind, name, tensor, message):
    path, cls = saved[kind]
    rewrite(path, tensors={name: tensor})
    with pytest.raises(uk.ArtifactError, match=f"{path.name}: .*{message}"):
        cls.load(path)


@pytest.mark.parametrize(
    ("kind", "name", "tensor", "message"),
    [
        ("memory", "layers.3.zeta_prime", NAN, "'layers.3.zeta_prime' holds NaN or infinity"),
        ("memory", "layers.2.encoder.b1", torch.zeros(17), "'layers.2.encoder.b1': expected floating"),
        ("memory", "layers.2.values", None, "layer 2 should have values of its own"),
        ("edit", "layers.3.zeta", NAN, "'layers.3.zeta' holds NaN or infinity"),
        ("edit", "layers.3.up_bias", None, "'layers.3.up_bias' is missing"),
        ("edit", "layers.3.up", None, "unexpected tensors: layers.3.up_bias"),
        ("edit", "layers.3.beta", torch.zeros(1), "'layers.3.beta': expected floating"),
        ("edit", "layers.3.zeta", torch.zeros(64, dtype=torch.float16), "EditLayer.zeta: expected torch.float32"),
    ],
)
def test_tensors_that_do_not_fit_one_kind(saved, kind, name, tensor, message):
    path, cls = saved[kind]
    rewrite(path, tensors={name: tensor})
    with pytest.raises(uk.ArtifactError, match=f"{path.name}: .*({message})"):
        cls.load(path)


@pytest.mark.parametrize("kind", BOTH)
def test_a_file_of_version_1_still_loads(saved, kind):
    """It has no checksums; this is how it was written."""
    path, cls = saved[kind]
    before = cls.load(path)
    with safe_open(str(path), framework="pt") as file:
        meta = {**file.metadata(), "version": "1"}
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    save_file(kept, path, {k: v for k, v in meta.items() if k not in ("checksum", "digests")})
    after = cls.load(path)
    assert after.config == before.config
    assert after.base_model == before.base_model
    for i, layer in before.layers.items():
        for name, t in layer.tensors().items():
            assert torch.equal(t, after.layers[i].tensors()[name])


@pytest.mark.parametrize("kind", BOTH)
def test_any_byte_that_changes_is_found(saved, kind):
    path, cls = saved[kind]
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    generator = torch.Generator().manual_seed(0)
    places = {*range(0, start, 97), *range(100), start - 1, start, len(content) - 1}
    places |= set(torch.randint(len(content), (60,), generator=generator).tolist())
    for at in places:
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
        with pytest.raises(uk.ArtifactError, match=path.name):
            cls.load(path)
    path.write_bytes(content.replace(b'"version": "2"', b'"version": "1"'))  # which would need no checksums
    with pytest.raises(uk.ArtifactError, match="it does not agree with its checksum"):
        cls.load(path)
    path.write_bytes(content)
    cls.load(path)


def test_a_file_is_one_of_safetensors(saved):
    path, cls = saved["edit"]
    with safe_open(str(path), framework="pt") as file:
        assert file.metadata()["format"] == "unike.edit"
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    for i, layer in cls.load(path).layers.items():
        for name, t in layer.tensors().items():
            assert torch.equal(t, found.pop(f"layers.{i}.{name}"))
    assert not found


@pytest.mark.parametrize("kind", BOTH)
def test_what_is_loaded_does_not_change_with_its_file(saved, kind):
    """Neither a write in place nor a truncation, which would end the process if it were mapped."""
    path, cls = saved[kind]
    loaded = cls.load(path)
    copies = {(i, n): t.clone() for i, layer in loaded.layers.items() for n, t in layer.tensors().items()}
    with open(path, "r+b") as file:
        file.seek(4096)
        file.write(bytes(path.stat().st_size - 4096))
    os.truncate(path, 100)
    for (i, name), t in copies.items():
        assert torch.equal(t, loaded.layers[i].tensors()[name])


def test_a_mapped_memory_is_verified_and_shares_the_files_pages(saved):
    path, cls = saved["memory"]
    mapped, loaded = cls.load(path, mmap=True), cls.load(path)
    assert mapped.id == loaded.id
    before = mapped.layers[3].index.clone()
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(path.stat().st_size // 2))
    assert any(
        not torch.equal(t, loaded.layers[i].tensors()[name])
        for i, layer in mapped.layers.items()
        for name, t in layer.tensors().items()
    )
    assert torch.equal(loaded.layers[3].index, before)
    with pytest.raises(uk.ArtifactError, match="does not agree with its checksum"):
        cls.load(path, mmap=True)


def test_a_header_that_claims_much_is_not_read(tmp_path):
    path = tmp_path / "large.safetensors"
    with open(path, "wb") as file:
        file.write((1 << 30).to_bytes(8, "little"))
        file.truncate(2 << 30)  # sparse
    with pytest.raises(uk.ArtifactError, match="claims 1,073,741,824 bytes, more than 16,777,216"):
        uk.Edit.load(path)
    path.write_bytes((n := 400_000).to_bytes(8, "little") + b"[" * n)
    with pytest.raises(uk.ArtifactError, match="not a complete safetensors file"):
        uk.Edit.load(path)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "'t' has the wrong place or size"),
        ({"t": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "'t' has the wrong place or size"),
        ({"t": {"dtype": "F32", "shape": [1 << 59, 4, 0], "data_offsets": [0, 0]}}, "'t' has the wrong place or size"),
        ({"t": {"dtype": "F7", "shape": [1], "data_offsets": [0, 4]}}, "'t' has the unknown dtype 'F7'"),
        ({"t": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, "'t' has no valid shape"),
        ({"t": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, "'t' has no valid shape"),
        ({"t": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, "'t' has no valid data_offsets"),
        ({"t": 5}, "'t' is not described"),
        ([], "its header is no JSON object"),
        ({"__metadata__": {"format": 5}}, "its metadata are not texts"),
    ],
)
def test_a_table_that_lies(tmp_path, table, message):
    text = json.dumps(table).encode()
    (tmp_path / "a").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(uk.ArtifactError, match=f"a: not a complete safetensors file: .*{message}"):
        uk.Edit.load(tmp_path / "a")


def test_changed_contents_are_found_by_the_memorys_id(saved):
    path, cls = saved["memory"]
    index = cls.load(path).layers[3].index.clone()
    index[17, 5] += 1e-6
    rewrite(path, tensors={"layers.3.index": index})
    with pytest.raises(uk.ArtifactError, match="its contents have the id"):
        cls.load(path)


@pytest.mark.parametrize("kind", BOTH)
def test_no_such_file(saved, tmp_path, kind):
    _, cls = saved[kind]
    with pytest.raises(FileNotFoundError, match=r"missing\.safetensors: there is no such file"):
        cls.load(tmp_path / "missing.safetensors")


def special(folder):
    """What is no regular file, by kind."""
    os.mkfifo(folder / "fifo")
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(folder / "socket"))
    (folder / "below").mkdir()
    return {"a pipe": folder / "fifo", "a socket": folder / "socket", "a folder": folder / "below"}


def test_only_regular_files_are_read_and_replaced(saved, tmp_path):
    """At once: nobody waits for a pipe's writer."""
    edit = uk.Edit.load(saved["edit"][0])
    for kind, path in special(tmp_path).items():
        for use in (uk.Edit.load, uk.MemoryBank.load, uk.CosineIndex.load, edit.save):
            with pytest.raises(uk.ArtifactError, match=f"{path.name}: expected a file, found {kind}"):
                use(path)
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)
    assert stat.S_ISSOCK((tmp_path / "socket").stat().st_mode)
    for mode in (stat.S_IFCHR, stat.S_IFBLK):
        state = os.stat_result((mode | 0o666, *[0] * 9))
        with pytest.raises(uk.ArtifactError, match="null: expected a file, found a device"):
            files.check_regular("null", state)


def test_an_old_file_keeps_its_mode_and_a_link_stays_one(saved, tmp_path):
    edit = uk.Edit.load(saved["edit"][0])
    secret, link = tmp_path / "secret", tmp_path / "link"
    edit.save(secret)
    for mode in (0o600, 0o640, 0o666, 0o400):  # whatever the umask would take away
        secret.chmod(mode)
        edit.save(secret)
        assert stat.S_IMODE(secret.stat().st_mode) == mode
    before = secret.stat().st_ino
    link.symlink_to("secret")
    edit.save(link)
    assert link.is_symlink()
    assert secret.stat().st_ino != before
    assert stat.S_IMODE(secret.stat().st_mode) == 0o400
    other = tmp_path / "other name"
    other.hardlink_to(secret)  # the old contents stay there, whole: a copy that was made so is no place to write to
    old = other.read_bytes()
    dataclasses.replace(edit, id="b").save(secret)
    assert other.read_bytes() == old and other.stat().st_ino != secret.stat().st_ino
    (tmp_path / "dangling").symlink_to("new")
    edit.save(tmp_path / "dangling")
    assert uk.Edit.load(tmp_path / "new").id == edit.id


def test_long_names(saved, tmp_path):
    edit = uk.Edit.load(saved["edit"][0])
    edit.save(tmp_path / ("x" * 255))
    assert uk.Edit.load(tmp_path / ("x" * 255)).id == edit.id
    with pytest.raises(OSError, match="x" * 256):
        edit.save(tmp_path / ("x" * 256))
    assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == []


def test_what_killed_writers_left_is_swept(saved, tmp_path):
    """And nothing else: neither what lives, nor what is of another machine, nor what has another name."""
    edit = uk.Edit.load(saved["edit"][0])
    folder = tmp_path / "artifacts"
    code = (
        "import os, sys, time; from unike_kernels.artifacts import files\n"
        "with files.replacing(sys.argv[1]) as file: file.write(b'half'); file.flush(); print('ready', flush=True); "
        "time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(folder / "a")], stdout=subprocess.PIPE) as writer:
        writer.stdout.readline()
        (left,) = os.listdir(folder)
        edit.save(folder / "b")
        assert left in os.listdir(folder)  # its writer lives
        writer.kill()
    other = left.replace(files.machine(), "0" * 12)
    old = other.replace(".tmp", "0.tmp")
    for name in (other, old, ".unike-notes", ".a.x1y2.tmp"):
        (folder / name).write_bytes(b"")
    os.utime(folder / old, (0, 0))
    edit.save(folder / "b")
    assert sorted(os.listdir(folder)) == sorted([other, ".unike-notes", ".a.x1y2.tmp", "b"])


def test_a_full_disk_names_the_file_and_leaves_the_old_one(saved, tmp_path):
    path = saved["edit"][0]
    before = path.read_bytes()
    code = (
        "import resource, sys, unike_kernels as uk\n"
        "edit = uk.Edit.load(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "try: edit.save(sys.argv[1])\n"
        "except OSError as error: print(error.errno, error.filename)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(errno.EFBIG), str(path)]
    assert path.read_bytes() == before
    assert not [name for name in os.listdir(path.parent) if name.startswith(".")]


def test_file_and_folder_are_on_the_disk(saved, tmp_path, monkeypatch):
    """Before the name is given to the new file its contents are there, and behind it the name is."""
    edit, told = uk.Edit.load(saved["edit"][0]), []
    sync, replace = os.fsync, os.replace

    def watching(descriptor):
        told.append(stat.S_IFMT(os.fstat(descriptor).st_mode))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", watching)
    monkeypatch.setattr(os, "replace", lambda *names: told.append("replace") or replace(*names))
    edit.save(tmp_path / "a")
    assert told == [stat.S_IFREG, "replace", stat.S_IFDIR]


def test_what_cannot_be_written_leaves_nothing(saved, tmp_path):
    edit = uk.Edit.load(saved["edit"][0])
    for notes, message in (
        ({"answer": "\ud800"}, "new: its header cannot be written: .*surrogates"),
        ({"answer": "x" * (1 << 24)}, "new: its header has .* bytes, more than 16,777,216"),
        ({"answer": torch.ones(1)}, "new: its header cannot be written: .*not JSON serializable"),
    ):
        with pytest.raises(uk.ArtifactError, match=message):
            dataclasses.replace(edit, notes=notes).save(tmp_path / "new")
    for name in ("a\n", "a\x1b[0m", "\ud800", ""):
        with pytest.raises(ValueError, match=r"Edit\.id: expected"):
            dataclasses.replace(edit, id=name)
    assert "new" not in os.listdir(tmp_path)


class Trap:
    """Pickled, it would write a file when read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("kind", BOTH)
def test_a_pickle_is_refused_unread(saved, tmp_path, kind):
    _, cls = saved[kind]
    trap, sprung = tmp_path / "trap.safetensors", tmp_path / "sprung"
    trap.write_bytes(pickle.dumps(Trap(str(sprung))))
    with pytest.raises(uk.ArtifactError, match="not a complete safetensors file"):
        cls.load(trap)
    torch.save({"x": Trap(str(sprung))}, trap)
    with pytest.raises(uk.ArtifactError, match="not a complete safetensors file"):
        cls.load(trap)
    assert not sprung.exists()


@pytest.mark.parametrize("step", ["_write", "replace"])
def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(saved, monkeypatch, step):
    path, cls = saved["edit"]
    before, around = path.read_bytes(), sorted(os.listdir(path.parent))
    edit = cls.load(path)

    def fail(file, *rest):
        if step == "_write":
            file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(files if step == "_write" else os, step, fail)
    with pytest.raises(OSError, match="no space left"):
        edit.save(path)
    assert path.read_bytes() == before
    assert sorted(os.listdir(path.parent)) == around


def test_the_file_appears_whole_and_in_one_step(saved, monkeypatch, tmp_path):
    """While it is written, the target is not there; then it is, readable for those whom the umask lets."""
    edit = uk.Edit.load(saved["edit"][0])
    target = tmp_path / "new" / "edit.safetensors"
    seen = []
    write = files._write

    def watching(file, *rest):
        write(file, *rest)
        seen.append((target.exists(), len(os.listdir(target.parent))))

    monkeypatch.setattr(files, "_write", watching)
    old = os.umask(0o027)
    try:
        edit.save(target)
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(old)
    assert seen == [(False, 1)]
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert os.listdir(target.parent) == [target.name]


def test_digest_depends_on_names_dtypes_shapes_and_contents():
    x = torch.arange(6.0)
    made = [
        {"a": x},
        {"b": x},
        {"a": x.double()},
        {"a": x.view(2, 3)},
        {"a": x + 1},
        {"a": x.bfloat16()},
        {"a": x, "b": x},
    ]
    assert len({files.digest(tensors) for tensors in made}) == len(made)
    strided = torch.arange(12.0).view(2, 6).T[:, 0]
    assert files.digest({"a": strided, "b": x}) == files.digest({"b": x.clone(), "a": strided.clone()})


def test_a_file_that_goes_while_it_is_read(tmp_path, monkeypatch):
    """As when an edit is revoked at that moment: before it is opened it is missed, then it is read to its end."""
    files.save(tmp_path / "a", "edit", {}, {"t": torch.ones(100)})
    parsed, check = files._parsed, files.check_regular

    def remove_and(go_on):
        (tmp_path / "a").unlink(missing_ok=True)
        return go_on

    monkeypatch.setattr(files, "_parsed", lambda file: remove_and(parsed)(file))
    assert torch.equal(files.load(tmp_path / "a", "edit")[1]["t"], torch.ones(100))
    files.save(tmp_path / "a", "edit", {}, {"t": torch.ones(100)})
    monkeypatch.setattr(files, "check_regular", lambda *args: remove_and(check)(*args))
    with pytest.raises(FileNotFoundError, match="a: there is no such file"):
        files.load(tmp_path / "a", "edit")
