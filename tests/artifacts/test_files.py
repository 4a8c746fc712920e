"""The files: what makes one invalid is found and named; writing is atomic; nothing in them is ever executed."""

import json
import os
import pickle
import stat

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
    """The file again, with parts of it replaced; None as a value takes the part out."""
    with safe_open(str(path), framework="pt") as file:
        meta = file.metadata()
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)

    def change(old, new):
        return {k: v for k, v in {**old, **(new or {})}.items() if v is not None}

    if header is not None:
        fields = {**json.loads(meta["header"]), **header}
        meta["header"] = json.dumps({k: v for k, v in fields.items() if v is not ...})
    save_file(change(kept, tensors), path, change(meta, metadata))


BOTH = ("memory", "edit")


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
        ({"version": "2"}, "expected version 1, got '2'"),
        ({"format": None}, f"expected the format unike.{kind}, got None"),
        ({"format": f"unike.{kind}", "version": "1", "header": "{"}, "its header cannot be read: JSONDecodeError"),
        ({"header": "[]"}, "expected a JSON object as header, got list"),
        ({"header": None}, "its header cannot be read: KeyError"),
    ):
        rewrite(path, metadata=metadata | ({} if "version" in metadata else {"version": "1"}))
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
        ("edit", {"id": ""}, "Edit.id: expected a non-empty string"),
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
    for path in (tmp_path / "missing.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match=path.name):
            cls.load(path)


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


@pytest.mark.parametrize("step", ["save_file", "replace"])
def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(saved, monkeypatch, step):
    path, cls = saved["edit"]
    before, around = path.read_bytes(), sorted(os.listdir(path.parent))
    edit = cls.load(path)

    def fail(tensors, name, *rest):
        if step == "save_file":
            with open(name, "wb") as file:
                file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(*((files, "save_file") if step == "save_file" else (os, "replace")), fail)
    with pytest.raises(OSError, match="no space left"):
        edit.save(path)
    assert path.read_bytes() == before
    assert sorted(os.listdir(path.parent)) == around


def test_the_file_appears_whole_and_in_one_step(saved, monkeypatch, tmp_path):
    """While it is written, the target is not there; then it is, readable for those whom the umask lets."""
    edit = uk.Edit.load(saved["edit"][0])
    target = tmp_path / "new" / "edit.safetensors"
    seen = []
    write = files.save_file

    def watching(tensors, name, metadata):
        write(tensors, name, metadata)
        seen.append((target.exists(), os.path.dirname(name) == str(target.parent)))

    monkeypatch.setattr(files, "save_file", watching)
    old = os.umask(0o027)
    try:
        edit.save(target)
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(old)
    assert seen == [(False, True)]
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
    """As when an edit is revoked at that moment."""
    files.save(tmp_path / "a", "edit", {}, {"t": torch.zeros(100)})
    opened = files.safe_open

    def remove_and_open(name, **kwargs):
        (tmp_path / "a").unlink()
        return opened(name, **kwargs)

    monkeypatch.setattr(files, "safe_open", remove_and_open)
    with pytest.raises(FileNotFoundError, match="it was removed while it was read"):
        files.load(tmp_path / "a", "edit")
