"""Memories as values and as files."""

import copy
import dataclasses
import pickle

import pytest
import torch
from PIL import Image

import unike_kernels as uk
from unike_kernels.artifacts import files
from unike_kernels.artifacts.pictures import Pictures
from unike_kernels.ops import SemanticEncoder


def layer(n=5, d=8, r=3, heads=1, width=8, own_values=False, **changes):
    encoder = {"w1": torch.randn(r, d), "b1": torch.randn(r), "w2": torch.randn(d, r), "b2": torch.randn(d)}
    encoder |= {name: changes.pop(name) for name in list(changes) if name in encoder}
    tensors = {
        "index": torch.randn(n, d),
        "keys": torch.randn(n, heads, width),
        "values": torch.randn(n, heads, d) if own_values else None,
        "zeta": torch.randn(2),
        "zeta_prime": torch.randn(d),
    }
    return uk.MemoryLayer(encoder=SemanticEncoder(**encoder), **{**tensors, **changes})


BASE = {"model_type": "opt", "hidden_size": 8, "layers": 4, "parameters": 2, "samples": {}}


PRE = uk.Config(k=2, values="pre")


def bank(layers=None, **changes):
    return uk.MemoryBank(layers or {2: layer(), 3: layer()}, **{"config": PRE, "base_model": BASE, **changes})


@pytest.mark.parametrize(
    ("values", "shape"),
    [
        ("pre", {}),
        ("out", {"own_values": True}),
        ("projected", {"heads": 2, "width": 4, "own_values": True}),
        ("pre", {"n": 0}),
    ],
)
def test_round_trip(tmp_path, values, shape):
    config = uk.Config(k=2, alpha=0.25, values=values)
    memory = bank({0: layer(**shape), 9: layer(**shape)}, config=config, notes={"a": "b"})
    memory.save(tmp_path / "memory.safetensors")
    found = uk.MemoryBank.load(tmp_path / "memory.safetensors")
    same = ("config", "base_model", "notes", "id")
    assert [getattr(found, name) for name in same] == [getattr(memory, name) for name in same]
    assert (len(found), found.hidden_size, found.nbytes) == (shape.get("n", 5), 8, memory.nbytes)
    for index, mine in memory.layers.items():
        theirs = found.layers[index].tensors()
        assert theirs.keys() == mine.tensors().keys()
        assert all(torch.equal(theirs[name], t) for name, t in mine.tensors().items())


def test_id_is_of_the_contents():
    one, two = layer(), layer()
    assert bank({2: one, 3: two}).id == bank({3: two, 2: one}, config=uk.Config(k=1, values="pre"), notes={"x": "y"}).id
    assert bank({2: one, 3: two}).id != bank({2: two, 3: one}).id
    assert bank({2: one}).id != bank({3: one}).id


def test_nbytes_counts_shared_tables_once():
    encoder = 3 * 8 + 3 + 8 * 3 + 8
    assert bank({0: layer()}).nbytes == 4 * (2 * 5 * 8 + encoder + 2 + 8)
    assert bank({0: layer(own_values=True)}, config=uk.Config(values="out")).nbytes == 4 * (3 * 5 * 8 + encoder + 2 + 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index": torch.zeros(5)}, r"expected index \[N, d\] and keys \[N, H, c\], got \[5\]"),
        ({"keys": torch.zeros(5, 8)}, r"expected index \[N, d\] and keys \[N, H, c\]"),
        ({"keys": torch.zeros(4, 1, 8)}, "MemoryLayer.keys: expected 5 entries as index, got 4"),
        ({"keys": torch.zeros(5, 2, 4)}, r"keys of shape \[5, 2, 4\] cannot serve as values"),
        ({"values": torch.zeros(5, 1, 7)}, r"MemoryLayer.values: expected shape \[5, 1, 8\], got \[5, 1, 7\]"),
        ({"zeta_prime": torch.zeros(7)}, r"MemoryLayer.zeta_prime: expected shape \[8\], got \[7\]"),
        ({"b1": torch.zeros(4)}, r"MemoryLayer.b1: expected shape \[3\], got \[4\]"),
        ({"w2": torch.zeros(3, 8)}, r"MemoryLayer.w2: expected shape \[8, 3\], got \[3, 8\]"),
        ({"index": torch.eye(5, 8).log()}, "MemoryLayer.index: row 0 holds NaN or infinity"),
        (
            {"keys": torch.zeros(5, 1, 8).index_fill(0, torch.tensor([3]), float("nan"))},
            "MemoryLayer.keys: row 3 holds",
        ),
        ({"b2": torch.tensor([0.0] * 6 + [float("inf"), 0])}, "MemoryLayer.encoder.b2: row 6 holds NaN or infinity"),
    ],
)
def test_a_layer_whose_tensors_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        layer(**changes)


@pytest.mark.parametrize("name", ["index", "keys", "zeta", "w1"])
def test_a_layer_of_integers(name):
    shape = {"index": (5, 8), "keys": (5, 1, 8), "zeta": (2,), "w1": (3, 8)}[name]
    with pytest.raises(TypeError, match=f"{name}: expected a floating dtype, got torch.int64"):
        layer(**{name: torch.zeros(shape, dtype=torch.int64)})


def test_a_bank_whose_layers_do_not_fit():
    with pytest.raises(ValueError, match=r"MemoryBank.layers: expected at least one layer"):
        uk.MemoryBank({}, PRE, BASE)
    with pytest.raises(ValueError, match=r"the same \[N, d\] in every layer, got \[\(5, 8\), \(6, 8\)\]"):
        bank({0: layer(), 1: layer(n=6)})
    for values, tables in (("pre", True), ("out", False), ("projected", False)):
        with pytest.raises(ValueError, match=rf"MemoryBank.layers: with Config\(values='{values}'\) layer 1 should"):
            bank({1: layer(own_values=tables)}, config=uk.Config(values=values))


def test_the_id_follows_the_tables(monkeypatch):
    """Another object of the same tables has the id without hashing them anew; of other tables it has another one."""
    made = bank()
    hashed = []
    digest = files.digest
    monkeypatch.setattr(files, "digest", lambda tensors: hashed.append(1) or digest(tensors))
    again = dataclasses.replace(made, search=uk.ANNConfig())
    assert again.id == made.id and not hashed
    one = dataclasses.replace(made.layers[2], index=made.layers[2].index + 1)
    other = dataclasses.replace(made, layers={**made.layers, 2: one})
    assert other.id != made.id
    swapped = dataclasses.replace(made, layers={2: made.layers[3], 3: made.layers[2]})
    assert swapped.id == digest(swapped._tensors()) and len(hashed) == 2
    assert dataclasses.replace(made, layers={3: made.layers[3]}).id not in (made.id, swapped.id)
    assert copy.deepcopy(made).id == pickle.loads(pickle.dumps(made)).id == made.id


TEXTS = ("What is this? -> a kea, not a parrot", "", "wörd \0 <b> \U0001f99c", "d", "e")


@pytest.mark.parametrize("texts", [None, TEXTS, ("",) * 5])
def test_texts_of_entries(tmp_path, texts):
    memory = bank({2: layer()}, texts=texts)
    assert memory.id == dataclasses.replace(memory, texts=None).id
    memory.save(tmp_path / "m")
    for mmap in (False, True):
        assert uk.MemoryBank.load(tmp_path / "m", mmap=mmap).texts == texts
    older = dataclasses.replace(memory, texts=None)
    joined = uk.MemoryBank.joined({"acme": memory, "globex": older})
    assert joined.texts == (None if texts is None else (*texts, *("",) * 5))
    assert uk.MemoryBank.joined({"acme": older, "globex": older}).texts is None


def test_texts_need_no_room_in_the_header(tmp_path):
    """More of them than a header may have bytes."""
    texts = ("\N{BIRD}" * 2_000,) * 3_000
    bank({2: layer(n=3_000)}, texts=texts).save(tmp_path / "m")
    assert uk.MemoryBank.load(tmp_path / "m").texts == texts


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        (TEXTS[:4], ValueError, "MemoryBank.texts: expected one for each of 5 entries, got 4"),
        ("abcde", ValueError, "MemoryBank.texts: expected one for each of 5 entries, got 5"),
        ((*TEXTS[:4], 5), TypeError, r"MemoryBank.texts\[4\]: expected a string, got 5"),
        ((*TEXTS[:4], "\ud800"), ValueError, r"MemoryBank.texts\[4\]: expected what UTF-8 can hold, got '\\ud800'"),
    ],
)
def test_texts_that_are_none(texts, error, message):
    with pytest.raises(error, match=message):
        bank({2: layer()}, texts=texts)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (torch.zeros(3), r"tensor 'texts': expected uint8 \[\*\], got torch.float32 \[3\]"),
        (torch.zeros(1, 3, dtype=torch.uint8), r"tensor 'texts': expected uint8 \[\*\], got torch.uint8 \[1, 3\]"),
        (b"", "tensor 'texts' holds no JSON"),
        (b"\xff", "tensor 'texts' holds no JSON"),
        (b"[" * 100_000, "tensor 'texts' holds no JSON"),
        (b'["\\ud800"]', "tensor 'texts' holds no JSON"),
        (b'{"a": 1}', r"tensor 'texts': expected a JSON list of strings, got \{'a': 1\}"),
        (b'["a", 1, "", "", ""]', r"tensor 'texts': expected a JSON list of strings, got \['a', 1"),
        (b'["a"]', "MemoryBank.texts: expected one for each of 5 entries, got 1"),
    ],
)
def test_texts_in_a_damaged_file(tmp_path, monkeypatch, held, message):
    if isinstance(held, bytes):
        held = torch.tensor(list(held), dtype=torch.uint8)
    monkeypatch.setattr(files, "spelled", lambda texts: held)
    bank({2: layer()}, texts=TEXTS).save(tmp_path / "m")
    with pytest.raises(uk.ArtifactError, match=message):
        uk.MemoryBank.load(tmp_path / "m")


def drawn(*of, count=2):
    g = torch.Generator().manual_seed(0)
    return Pictures(torch.randint(0, 256, (count, 48, 48, 3), generator=g, dtype=torch.uint8), torch.tensor(of))


@pytest.mark.parametrize("pictures", [None, drawn(0, 1, -1, 1, 0), drawn(*[-1] * 5, count=0)])
def test_pictures_of_entries(tmp_path, pictures):
    memory = bank({2: layer()}, pictures=pictures)
    assert memory.id == dataclasses.replace(memory, pictures=None).id
    memory.save(tmp_path / "m")
    for mmap in (False, True):
        found = uk.MemoryBank.load(tmp_path / "m", mmap=mmap).pictures
        assert (found is None) == (pictures is None)
        assert found is None or (torch.equal(found.pixels, pictures.pixels) and torch.equal(found.of, pictures.of))


def test_pictures_of_joined_memories():
    one, none = bank({2: layer()}, pictures=drawn(0, 1, -1, 1, 0)), bank({2: layer(n=2)}, pictures=None)
    other = bank({2: layer(n=1)}, pictures=drawn(0, count=1))
    shared = {name: getattr(one.layers[2], name) for name in ("encoder", "zeta", "zeta_prime")}
    same = lambda b: dataclasses.replace(b, layers={2: dataclasses.replace(b.layers[2], **shared)})  # noqa: E731
    joined = uk.MemoryBank.joined({"a": one, "b": same(none), "c": same(other)}).pictures
    assert joined.of.tolist() == [0, 1, -1, 1, 0, -1, -1, 2]
    assert torch.equal(joined[7], other.pictures[0]) and torch.equal(joined[3], one.pictures[1]) and joined[2] is None
    assert uk.MemoryBank.joined({"a": same(none), "b": same(none)}).pictures is None
    assert joined.part(slice(1, 3)).of.tolist() == [1, -1]


@pytest.mark.parametrize(
    ("name", "held", "message"),
    [
        ("pictures", torch.zeros(2, 48, 48, 3), "tensor 'pictures': expected torch.uint8, got torch.float32"),
        ("pictures", torch.zeros(2, 48, 48, dtype=torch.uint8), r"expected uint8 \[\*, 48, 48, 3\], got torch.uint8"),
        ("pictures", torch.zeros(2, 9, 9, 3, dtype=torch.uint8), r"expected uint8 \[\*, 48, 48, 3\], got torch.uint8"),
        ("pictures", torch.zeros(1, 48, 48, 3, dtype=torch.uint8), "Pictures.of: expected numbers from -1 to 0"),
        ("pictures", None, "tensor 'pictures' is missing"),
        ("picture_of", None, "tensor 'picture_of' is missing"),
        ("picture_of", torch.zeros(5), "tensor 'picture_of': expected torch.int64, got torch.float32"),
        ("picture_of", torch.zeros(5, 1, dtype=torch.int64), r"Pictures.of: expected int64 \[\*\], got torch.int64"),
        ("picture_of", torch.full((5,), -2), "Pictures.of: expected numbers from -1 to 1"),
        ("picture_of", torch.zeros(4, dtype=torch.int64), "MemoryBank.pictures: expected those of 5 entries, got of 4"),
    ],
)
def test_pictures_in_a_damaged_file(tmp_path, monkeypatch, name, held, message):
    tensors = Pictures.tensors

    def damaged(self):
        found = tensors(self) | {name: held}
        return {name: t for name, t in found.items() if t is not None}

    monkeypatch.setattr(Pictures, "tensors", damaged)
    bank({2: layer()}, pictures=drawn(0, 1, -1, 1, 0)).save(tmp_path / "m")
    with pytest.raises(uk.ArtifactError, match=message):
        uk.MemoryBank.load(tmp_path / "m")


def test_pictures_are_drawn_of_what_can_be():
    grey, red = torch.rand(16, 16), torch.zeros(96, 48, 3, dtype=torch.uint8)
    red[..., 0] = 200
    tall = Image.fromarray(red.numpy())
    images = [grey, None, tall, grey.clone(), "text", red, torch.ones(4, 8, 8) / 2, torch.zeros(2, 2, 2, 2), {}]
    made = Pictures.made(images, [2, *[1] * 8])
    assert made.of.tolist() == [0, 0, -1, 1, 0, -1, 1, 2, -1, -1]
    assert (made[3][:, 12:36] == torch.tensor([200, 0, 0])).all() and (made[3][:, :12] == 255).all()
    assert (made[7] == 128).all() and made[0].float().std() > 20
    assert Pictures.made([None, "text"], [1, 3]) is None
