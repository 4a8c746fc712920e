"""Scopes as values, in the files of memories, and what an edit has of one."""

import io
import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

import unike_kernels as uk
from unike_kernels.artifacts import Scope, files
from unike_kernels.ops import SemanticEncoder
from unike_kernels.ops.prompt_encoder import PromptEncoder, StateBlock, TextBlock

BASE = {"model_type": "opt", "hidden_size": 8, "layers": 4, "parameters": 2, "samples": {}}
SCOPED = uk.Config(k=2, scope="memory", values="pre")
E, H = 8, 3


def block(heads=2, c=4):
    return TextBlock(
        torch.randn(H, E), torch.randn(H, 256), torch.randn(H), torch.randn(H, H, 3), torch.randn(H),
        torch.randn(heads, H), torch.randn(heads), torch.randn(c, E), torch.randn(c, 256),
    )  # fmt: skip


def encoder(layers=0, **changes):
    wide = torch.randn(layers, 8), torch.randn(5, layers * 8)
    states = StateBlock(*wide, torch.randn(5), torch.randn(2, 5), torch.randn(2))
    first = block()._replace(**{name: t for name, t in changes.items() if name in TextBlock._fields})
    own = states._replace(**{name: t for name, t in changes.items() if name in StateBlock._fields}) if layers else None
    return PromptEncoder(changes.get("mean", torch.randn(E)), torch.rand(E) + 0.5, (first, block()), own)


def unit(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


def scope(layers=(), **changes):
    width = 8 + (2 if layers else 0)
    made = {
        "encoder": encoder(len(layers)), "pieces": ("", " a", "é"), "layers": layers, "entries": unit(4, width),
        "facts": torch.tensor([0, 0, 1, 2]), "threshold": 0.25, "false_alarms": 0.01, "same_fact": 0.5,
        "names": ("one", "two", "drei"),
    }  # fmt: skip
    return Scope(**{**made, **changes})


def memory(of=None, tables=False, **changes):
    layers = {}
    if tables:
        enc = SemanticEncoder(torch.randn(3, 8), torch.randn(3), torch.randn(8, 3), torch.randn(8))
        layers = {3: uk.MemoryLayer(torch.randn(5, 8), torch.randn(5, 1, 8), None, enc, torch.randn(2), torch.randn(8))}
    return uk.MemoryBank(layers, changes.pop("config", SCOPED), BASE, scope=of, **changes)


def assert_same(one, two):
    assert one.header() == two.header() and one.id == two.id
    assert one.tensors().keys() == two.tensors().keys()
    assert all(torch.equal(two.tensors()[name], t) for name, t in one.tensors().items())
    assert torch.equal(one.facts, two.facts) and two.facts.dtype == torch.int64


@pytest.mark.parametrize("layers", [(), (1, 3)])
@pytest.mark.parametrize("tables", [False, True])
@pytest.mark.parametrize("names", [None, ("one", "two", "drei")])
def test_round_trip(tmp_path, layers, tables, names):
    mine = memory(scope(layers, names=names), tables)
    mine.save(tmp_path / "m.safetensors")
    for mmap in (False, True):
        found = uk.MemoryBank.load(tmp_path / "m.safetensors", mmap=mmap)
        assert (found.id, found.config, list(found.layers)) == (mine.id, SCOPED, [3] if tables else [])
        assert (len(found), found.hidden_size, found.nbytes) == (5 if tables else 0, 8, mine.nbytes)
        assert_same(mine.scope, found.scope)
        assert found.scope.names == names and found.scope.count == 3


def test_a_scope_without_facts_and_whole_numbers(tmp_path):
    mine = scope(entries=torch.zeros(0, 8), facts=torch.zeros(0, dtype=torch.int64), threshold=0, same_fact=1, names=())
    memory(mine).save(tmp_path / "m")
    found = uk.MemoryBank.load(tmp_path / "m").scope
    assert_same(mine, found)
    assert (found.count, found.threshold, found.same_fact) == (0, 0.0, 1.0)


def test_a_memory_of_before_there_were_scopes(tmp_path):
    memory(None, tables=True, config=replace(SCOPED, scope="all")).save(tmp_path / "m")
    rewrite(tmp_path / "m", lambda h: (h.pop("scope"), h["config"].pop("scope")))
    found = uk.MemoryBank.load(tmp_path / "m")
    assert found.scope is None and found.config.scope == "all"


def rewrite(path, header=lambda h: None, tensors=lambda t: None):
    """The file again, with its header and its tensors changed, and checksums that agree."""
    with safe_open(str(path), framework="pt") as file:
        meta = file.metadata()
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    fields = json.loads(meta["header"])
    header(fields)
    tensors(kept)
    meta = {"format": meta["format"], "version": meta["version"], "header": json.dumps(fields)}
    files._write(content := io.BytesIO(), meta, kept)
    path.write_bytes(content.getvalue())


WIDE = (1, 3)


@pytest.mark.parametrize(
    ("layers", "changes", "message"),
    [
        ((), {"encoder": encoder(mean=torch.randn(7))}, r"spread: expected shape \[7\], got \[8\]"),
        ((), {"encoder": encoder(word=torch.randn(H, 255))}, r"blocks.0.word: expected shape \[3, 256\]"),
        ((), {"encoder": encoder(conv=torch.randn(H, H, 5))}, r"blocks.0.conv: expected shape \[3, 3, 3\]"),
        ((), {"encoder": encoder(query_bias=torch.randn(3))}, r"blocks.0.query_bias: expected shape \[2\]"),
        ((), {"encoder": encoder(token_value=torch.randn(5, E))}, r"blocks.0.token_value: expected shape \[4, 8\]"),
        ((), {"encoder": encoder(word_value=torch.randn(5, 256))}, "blocks.0: expected a multiple of 2 values, got 5"),
        ((), {"encoder": encoder(query=torch.randn(0, H))}, "blocks.0: expected a multiple of 0 values"),
        ((), {"encoder": encoder(bias=torch.full((H,), torch.nan))}, "blocks.0.bias: expected finite float32"),
        ((), {"encoder": encoder(bias=torch.randn(H).double())}, "blocks.0.bias: expected finite float32"),
        ((), {"encoder": encoder()._replace(blocks=())}, "expected blocks for the text"),
        ((), {"encoder": encoder()._replace(blocks=(block(), block(4)))}, r"blocks.1.query: expected shape \[2, 3\]"),
        ((), {"encoder": encoder(2)}, r"one for the states of the layers \[\]"),
        (WIDE, {"encoder": encoder()}, r"one for the states of the layers \[1, 3\]"),
        (WIDE, {"encoder": encoder(2, w2=torch.randn(2, 6))}, r"states.w2: expected shape \[2, 5\]"),
        (WIDE, {"encoder": encoder(3)}, r"states.means: expected shape \[2, 8\], got \[3, 8\]"),
        ((3, 1), {}, r"Scope.layers: expected ascending layer indices, got \[3, 1\]"),
        ((1, 1), {}, "Scope.layers: expected ascending"),
        ((-1, 1), {}, "Scope.layers: expected ascending"),
        ((), {"entries": unit(4, 11)}, r"Scope.entries: expected shape \[4, 8\], got \[4, 11\]"),
        ((), {"entries": 1.01 * unit(4, 8)}, "Scope.entries: expected unit rows"),
        ((), {"entries": unit(4, 8).double()}, "Scope.entries: expected finite float32"),
        ((), {"entries": torch.full((4, 8), torch.nan)}, "Scope.entries: expected finite float32"),
        ((), {"facts": torch.tensor([0, 0, 1])}, r"Scope.facts: expected int64 \[4\], got torch.int64 \[3\]"),
        ((), {"facts": torch.tensor([0.0, 0, 1, 2])}, r"Scope.facts: expected int64 \[4\], got torch.float32"),
        ((), {"facts": torch.tensor([0, -1, 1, 2])}, "Scope.facts: expected numbers from 0, got a negative one"),
        ((), {"names": ("one", "two")}, "Scope.names: expected one for each of 3 facts, got 2"),
        ((), {"threshold": float("nan")}, "Scope.threshold: expected a number in -2..2, got nan"),
        ((), {"same_fact": 2.5}, "Scope.same_fact: expected a number in -2..2"),
        ((), {"false_alarms": float("-inf")}, "Scope.false_alarms: expected a number in -2..2"),
    ],
)
def test_parts_that_do_not_fit(layers, changes, message):
    with pytest.raises(ValueError, match=message):
        scope(layers, **changes)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("threshold", ..., "'scope': expected .*'threshold'"),
        ("more", 1, "'scope': expected .*got .*'more'"),
        ("threshold", "0.5", "expected threshold of float, got '0.5'"),
        ("threshold", 7.0, "Scope.threshold: expected a number in -2..2"),
        ("same_fact", None, "expected same_fact of float, got None"),
        ("blocks", True, "expected blocks of int, got True"),
        ("blocks", 0, "Scope.samples: expected prompts of the first entries"),
        ("blocks", 10**9, "expected 0 to 16 blocks"),
        ("blocks", 1, "Scope.entries: expected shape|unexpected tensors: scope.blocks.1"),
        ("blocks", 3, "tensor 'scope.blocks.2.token' is missing"),
        ("pieces", "abc", "expected pieces of str, got 'abc'"),
        ("pieces", ["a", 1], "expected pieces of str"),
        ("layers", [1], "tensor 'scope.states.means' is missing"),
        ("layers", [-1], "expected 0 to 16 blocks, layers and facts from 0"),
        ("facts", [0, 0, 1], r"Scope.facts: expected int64 \[4\]"),
        ("facts", [0, 0, 1, 10**30], "expected 0 to 16 blocks, layers and facts from 0"),
        ("facts", [0, 0, 1, 2.0], "expected facts of int"),
        ("facts", None, "expected facts of int, got None"),
        ("names", ["one"], "Scope.names: expected one for each of 3 facts"),
        ("names", [1, 2, 3], "expected names of str"),
        ("own", [[0, 1]], r"Scope.own: expected int64 \[3, 2\], got torch.int64 \[1, 2\]"),
        ("own", [[0, 1], [1, 2], [3, 2]], r"Scope.own: expected \[start, end\)"),
        ("own", [[0, 1], [1, 2], [0, 1]], "Scope.own: the memory has 0 entries, a fact has up to number 2"),
        ("own", [[0, 1], [1], [3, 2]], "expected own of pairs from 0"),
        ("own", [[0, 1], [1, -2], [3, 2]], "expected own of pairs from 0"),
        ("own", [[0, 1], [1, True], [3, 2]], "expected own of pairs from 0"),
        ("own", 3, "expected own of list"),
        ("samples", None, "expected samples of list, got None"),
        ("samples", [[1], 2], "expected samples of list"),
        ("samples", [[1, -1]], "expected samples of token ids"),
        ("samples", [[1, "2"]], "expected samples of token ids"),
    ],
)
def test_a_header_that_is_wrong(tmp_path, field, value, message):
    memory(scope()).save(path := tmp_path / "m.safetensors")
    rewrite(path, lambda h: h["scope"].pop(field) if value is ... else h["scope"].update({field: value}))
    with pytest.raises(uk.ArtifactError, match=f"m.safetensors: .*({message})"):
        uk.MemoryBank.load(path)


def test_a_file_without_its_scope(tmp_path):
    memory(scope(), tables=True).save(path := tmp_path / "m.safetensors")
    whole = path.read_bytes()
    for header, message in (
        (lambda h: h.update(scope=None), r"Config\(scope='memory'\) needs one, got None"),
        (lambda h: h.pop("scope"), r"Config\(scope='memory'\) needs one, got None"),
        (lambda h: h.update(scope=[]), "'scope': expected dict or NoneType"),
        (lambda h: (h.update(scope=None), h["config"].update(scope="all")), "unexpected tensors: scope."),
    ):
        rewrite(path, header)
        with pytest.raises(uk.ArtifactError, match=message):
            uk.MemoryBank.load(path)
        path.write_bytes(whole)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("entries", lambda t: torch.full_like(t, torch.nan), "holds NaN or infinity"),
        ("entries", lambda t: 2 * t, "Scope.entries: expected unit rows"),
        ("entries", lambda t: t[:, 1:], r"Scope.entries: expected shape \[4, 10\], got \[4, 9\]"),
        ("entries", lambda t: t.flatten(), r"expected floating \['\*', '\*'\]"),
        ("mean", lambda t: t[None], r"expected floating \['\*'\]"),
        ("blocks.1.conv", lambda t: t[0], r"expected floating \['\*', '\*', '\*'\]"),
        ("blocks.1.query", lambda t: t.long(), "expected floating"),
        ("states.means", lambda t: t[0], r"expected floating \['\*', '\*'\]"),
        ("states.w1", lambda t: t[:, 1:], r"Scope.states.w1: expected shape \[5, 16\]"),
        ("states.b2", None, "'scope.states.b2' is missing"),
    ],
)
def test_tensors_that_are_wrong(tmp_path, name, change, message):
    memory(scope((1, 3))).save(path := tmp_path / "m.safetensors")

    def tensors(kept):
        t = kept.pop(f"scope.{name}")
        if change is not None:
            kept[f"scope.{name}"] = change(t).contiguous()

    rewrite(path, tensors=tensors)
    with pytest.raises(uk.ArtifactError, match=f"m.safetensors: .*{message}"):
        uk.MemoryBank.load(path)


@pytest.mark.parametrize("keep", [0, 8, 1000, -1])
def test_truncated(tmp_path, keep):
    memory(scope()).save(path := tmp_path / "m.safetensors")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(uk.ArtifactError, match="not a complete safetensors file"):
        uk.MemoryBank.load(path)


def test_a_memory_needs_the_scope_that_its_config_names():
    with pytest.raises(ValueError, match=r"Config\(scope='memory'\) needs one, got None"):
        memory(None, tables=True)
    with pytest.raises(ValueError, match="expected at least one layer, or a scope"):
        memory(None, config=uk.Config())


def test_a_memory_of_a_scope_alone_is_a_memory():
    assert memory(scope()) and len(memory(scope())) == 0


def test_the_id_is_that_of_what_makes_keys():
    one = scope((1, 3))
    same = replace(one, entries=unit(2, 10), facts=torch.tensor([0, 5]), threshold=0.1, same_fact=0.9, names=None)
    assert same.id == one.id
    assert replace(one, layers=(1, 2)).id != one.id
    assert replace(one, pieces=("", " a", "e")).id != one.id
    assert replace(one, pieces=("", " aé")).id != one.id
    for name, t in one.encoder.tensors().items():
        tensors = {**one.encoder.tensors(), name: t + 1e-3}
        assert replace(one, encoder=PromptEncoder.of(tensors, 2, True)).id != one.id


def test_the_id_of_a_memory_of_a_scope_alone_is_of_its_entries_too():
    one = scope()
    assert memory(one).id == memory(replace(one, threshold=0.1)).id
    assert memory(one).id != memory(replace(one, entries=unit(4, 8))).id
    tables = memory(one, tables=True)
    assert replace(tables, scope=replace(one, entries=unit(4, 8))).id == tables.id


def test_further_facts():
    one, new = scope(), unit(3, 8)
    more = one.extended(new, torch.tensor([0, 1, 1]), ("vier", "fünf"))
    assert torch.equal(more.entries, torch.cat([one.entries, new])) and more.id == one.id
    assert more.facts.tolist() == [0, 0, 1, 2, 3, 4, 4] and more.count == 5
    assert more.names == ("one", "two", "drei", "vier", "fünf")
    assert one.count == 3 and one.names == ("one", "two", "drei")
    assert one.extended(new, torch.tensor([0, 1, 1])).names == ("one", "two", "drei", "", "")
    nameless = replace(one, names=None)
    assert nameless.extended(new, torch.tensor([0, 1, 1])).names is None
    assert nameless.extended(new, torch.tensor([0, 1, 1]), ("vier", "fünf")).names == ("", "", "", "vier", "fünf")
    longer = replace(one, names=("one", "two", "drei", "of none"))
    assert longer.extended(new, torch.tensor([0, 1, 1]), ("vier", "fünf")).names[3:] == ("vier", "fünf")
    with pytest.raises(ValueError, match=r"Scope.entries: expected unit rows"):
        one.extended(2 * new, torch.tensor([0, 1, 1]))


# --- memories of tenants --------------------------------------------------------------------------------------------


def test_a_joined_memory_knows_the_facts_of_all(tmp_path):
    """Each of them once: as two, a fact would be its own rival."""
    acme = memory(scope(), tables=True)
    rounded = torch.nn.functional.normalize(acme.scope.entries[2:] + 1e-7, dim=-1)
    new = unit(2, 8)
    entries = torch.cat([new[:1], rounded[:1], new[1:], rounded[1:]])
    theirs = replace(
        acme.scope, entries=entries, facts=torch.tensor([0, 1, 2, 2]), names=("new", "two", "drei in other words")
    )
    globex = replace(acme, scope=theirs)
    joined = uk.MemoryBank.joined({"acme": acme, "globex": globex, "initech": acme})
    both = joined.scope
    assert torch.equal(both.entries, torch.cat([acme.scope.entries, new]))
    assert both.facts.tolist() == [0, 0, 1, 2, 3, 2] and both.id == acme.scope.id
    assert both.names == ("one", "two", "drei", "new")
    joined.save(tmp_path / "m")
    assert_same(uk.MemoryBank.load(tmp_path / "m").scope, both)
    assert len(joined) == 15
    assert_same(uk.MemoryBank.joined({"acme": acme, "initech": acme}).scope, acme.scope)


def test_memories_of_scopes_alone_are_joined():
    one = scope()
    other = replace(one, entries=unit(4, 8), names=None)
    none = replace(one, entries=one.entries[:0], facts=one.facts[:0])
    for banks, facts in (((one, other), 6), ((one, none), 3), ((none, one), 3)):
        joined = uk.MemoryBank.joined({str(i): memory(bank) for i, bank in enumerate(banks)})
        assert joined.scope.count == facts and not joined.layers and len(joined) == 0
        assert list(joined.tenants) == ["0", "1"]
    both = uk.MemoryBank.joined({"0": memory(one), "1": memory(other)}).scope
    assert both.names == ("one", "two", "drei", "", "", "")


def test_memories_of_different_scopes_are_not_joined():
    one = scope()
    others = [scope(), replace(one, threshold=0.3), replace(one, same_fact=0.6), None]
    for other in others:
        bank = memory(other) if other else memory(None, tables=True, config=replace(SCOPED, scope="all"))
        with pytest.raises(uk.MismatchError, match=r"'acme' and 'globex' differ in .*scope"):
            uk.MemoryBank.joined({"acme": memory(one), "globex": bank})


# --- edits ----------------------------------------------------------------------------------------------------------


def edit(**changes):
    d = {"keys": torch.randn(3, 8), "key_bias": torch.randn(3), "values": torch.randn(3, 8), "zeta": torch.randn(8)}
    layer = uk.EditLayer(**d, beta=torch.tensor(0.1))
    return uk.Edit("e", {1: layer}, "relu", SCOPED, BASE, None, **{"entries": unit(2, 8), "scope_id": "s", **changes})


def test_an_edits_entries(tmp_path):
    one = edit()
    one.save(tmp_path / "e")
    found = uk.Edit.load(tmp_path / "e")
    assert torch.equal(found.entries, one.entries) and found.scope_id == "s"
    assert found.nbytes == one.nbytes == edit(entries=None, scope_id=None).nbytes + 2 * 8 * 4
    for rank in (0, 1):
        shard = one.shard(rank, 2)
        assert torch.equal(shard.entries, one.entries) and shard.scope_id == "s"
    edit(entries=None, scope_id=None).save(tmp_path / "none")
    assert uk.Edit.load(tmp_path / "none").entries is None
    rewrite(tmp_path / "none", lambda h: (h.pop("scope_id"), h["config"].pop("scope")))  # of before
    old = uk.Edit.load(tmp_path / "none")
    assert (old.entries, old.scope_id, old.config.scope) == (None, None, "all")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"entries": None}, "expected entries and scope_id together, got one of them"),
        ({"scope_id": None}, "expected entries and scope_id together, got one of them"),
        ({"scope_id": ""}, "Edit.scope_id: expected a non-empty string"),
        ({"entries": unit(8)}, r"Edit.entries: expected float32 \[n, c\], got torch.float32 \[8\]"),
        ({"entries": unit(0, 8)}, r"got torch.float32 \[0, 8\]"),
        ({"entries": unit(2, 8).double()}, "got torch.float64"),
        ({"entries": 1.1 * unit(2, 8)}, "Edit.entries: expected unit rows"),
        ({"entries": torch.full((2, 8), torch.nan)}, "Edit.entries: expected unit rows"),
    ],
)
def test_an_edit_whose_entries_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        edit(**changes)


def test_an_edits_file_whose_entries_are_wrong(tmp_path):
    edit().save(path := tmp_path / "e.safetensors")
    whole = path.read_bytes()
    for header, tensors, message in (
        (lambda h: h.update(scope_id=None), lambda t: None, "entries and scope_id together"),
        (lambda h: h.update(scope_id=3), lambda t: None, "'scope_id': expected str or NoneType"),
        (lambda h: None, lambda t: t.pop("entries"), "entries and scope_id together"),
        (lambda h: None, lambda t: t.update(entries=torch.ones(2, 10)), "expected unit rows"),
        (lambda h: None, lambda t: t.update(entries=torch.ones(2)), r"expected floating \['\*', '\*'\]"),
    ):
        rewrite(path, header, tensors)
        with pytest.raises(uk.ArtifactError, match=f"e.safetensors: .*{message}"):
            uk.Edit.load(path)
        path.write_bytes(whole)


def lengths(prompts):
    """A function of the user's own: unit vectors of ten, by the sum of the ids."""
    angle = torch.tensor([sum(ids) for ids in prompts], dtype=torch.float32).unsqueeze(1)
    return torch.cat([angle.cos(), angle.sin(), torch.zeros(len(prompts), 8)], 1)


def own(**changes):
    samples = ((1, 2), (5,))
    entries = torch.cat([lengths(samples), unit(2, 10)])
    return scope(**{"encoder": None, "pieces": (), "entries": entries, "samples": samples, "key": lengths, **changes})


def test_a_function_of_the_users_own_makes_the_keys(tmp_path):
    """The file does not hold it; it is told from others by the keys of some prompts."""
    one = own()
    memory(one).save(path := tmp_path / "m.safetensors")
    found = uk.MemoryBank.load(path)
    assert found.scope.encoder is None and found.scope.samples == ((1, 2), (5,)) and found.scope.width == 10
    assert found.scope.id == one.id != own(samples=((1, 2),)).id and found.id == memory(one).id
    with pytest.raises(ValueError, match=r"made by a function that no file holds; give it: memory\.with_key"):
        found.scope.needing_key()
    assert found.with_key(lengths).scope.needing_key() is lengths and scope().needing_key() is None
    assert one.extended(unit(1, 10), torch.tensor([0])).key is one.joined(found.scope).key is lengths
    for other, message in [
        (
            lambda prompts: lengths(prompts).roll(1, 1),
            "expected the function that the scope was built with; .* down to -0",
        ),
        (lambda prompts: lengths(prompts)[:, :4], r"expected .* finite numbers \[2, 10\], got torch.float32 \[2, 4\]"),
        (lambda prompts: lengths(prompts)[:1], r"expected .* a tensor \[2, 10\], got torch.float32 \[1, 10\]"),
        (lambda prompts: lengths(prompts) / 0, "expected .* finite numbers"),
        (lambda prompts: lengths(prompts).long(), r"expected .* got torch.int64 \[2, 10\]"),
        (lambda prompts: lengths(prompts).tolist(), "expected .* got list"),
    ]:
        with pytest.raises(ValueError, match=f"^key: {message}"):
            found.with_key(other)
    with pytest.raises(ValueError, match="key: expected a scope that was built with one"):
        scope().with_key(lengths)
    with pytest.raises(ValueError, match=r"MemoryBank.scope: expected one whose keys a function makes, got None"):
        memory(None, tables=True, config=uk.Config(values="pre")).with_key(lengths)


def test_facts_with_entries_in_the_tables(tmp_path):
    """A known fact gets those of a later triplet; joined, they are where their tables are."""
    one = scope(same_fact=0.9)
    own = torch.tensor([[0, 1], [1, 3], [3, 4], [4, 5]])
    fresh = torch.cat([one.entries[1:2], unit(2, 8)])
    found = one.with_own(torch.cat([fresh, fresh[1:2]]), own, ("a", "b", "c", "d"))
    assert found.facts.tolist() == [0, 0, 1, 2, 0, 3, 4, 3] and found.names == ("one", "two", "drei", "b", "c")
    assert found.own.tolist() == [[0, 1], [0, 0], [0, 0], [4, 5], [3, 4]] and one.own is None
    unnamed = replace(one, names=None).with_own(fresh, own[:3])
    assert unnamed.names is None and unnamed.own.tolist()[3:] == [[1, 3], [3, 4]]
    assert found.extended(unit(1, 8), torch.tensor([0])).own.tolist() == [*found.own.tolist(), [0, 0]]
    assert scope(entries=unit(0, 8), facts=torch.zeros(0, dtype=torch.int64), names=None).with_own(
        unit(2, 8), own[:2]
    ).own.tolist() == [[0, 1], [1, 3]]
    bank = memory(found, tables=True)
    bank.save(tmp_path / "m")
    assert_same(uk.MemoryBank.load(tmp_path / "m").scope, found)
    assert torch.equal(uk.MemoryBank.load(tmp_path / "m").scope.own, found.own)
    other = replace(one, entries=torch.cat([unit(1, 8), fresh[1:2], fresh[2:]]), facts=torch.arange(3), names=None)
    other = replace(other, own=torch.tensor([[0, 2], [2, 5], [0, 0]]))
    layers = {3: replace(bank.layers[3])}
    joined = uk.MemoryBank.joined({"acme": bank, "globex": replace(bank, layers=layers, scope=other)}).scope
    assert joined.own.tolist() == [[0, 1], [0, 0], [0, 0], [4, 5], [3, 4], [5, 7]]
    back = uk.MemoryBank.joined({"globex": replace(bank, layers=layers, scope=other), "acme": bank}).scope
    assert back.own.tolist() == [[0, 2], [2, 5], [8, 9], [5, 6], [0, 0], [0, 0]]


@pytest.mark.parametrize("changes", [{"samples": ()}, {"samples": ((1,),) * 5}, {"layers": (1,)}])
def test_a_scope_that_no_function_could_be_told_by(changes):
    with pytest.raises(ValueError, match=r"Scope\.samples: expected prompts of the first entries, and no layers"):
        own(**changes)
