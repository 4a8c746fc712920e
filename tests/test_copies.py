"""What holds tensors, their addresses or an index of another library: copied, pickled, and sent to another process."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

import unike_kernels as uk
from unike_kernels.nn.memory_attention import MemoryTables
from unike_kernels.ops.latent_attention import blend_of
from unike_kernels.ops.memory_attention import PreparedMemory
from unike_kernels.ops.patched_ffn import PreparedNeurons
from unike_kernels.retrieval import ApproximateIndex, CosineIndex
from unike_kernels.retrieval.sharded import ShardedIndex

X, BASE = torch.linspace(-2, 3, 2 * 64).sin().view(2, 64), torch.linspace(0, 5, 2 * 64).cos().view(2, 64)
SWITCHES = blend_of(X.unsqueeze(1), None, "inclusion", "match")


def computed(thing: Any) -> list[torch.Tensor]:
    """What it says of fixed inputs; after it everything that can be laid out is."""
    with torch.no_grad():
        if isinstance(thing, uk.EditBank):
            return [thing.apply(3, X, BASE, [["a"], ["a", "b"]])]
        if isinstance(thing, PreparedNeurons):
            return [thing(X, BASE)]
        if isinstance(thing, PreparedMemory):
            return [thing(X, X.unsqueeze(1), BASE, 7, None, None, None, SWITCHES)]
        if isinstance(thing, MemoryTables):
            if thing.retriever is not None:
                return list(thing.retrieve(X, 7, None))
            return [thing.prepared()(X, X.unsqueeze(1), BASE, 7, None, None, None, SWITCHES)]
        if isinstance(thing, (CosineIndex, ApproximateIndex)):
            return list(thing.search(X, 5))
        if isinstance(thing, uk.Edit):
            return [t for layer in thing.layers.values() for t in layer.tensors().values()]
        layers = [layer for _, layer in sorted(thing.layers.items())]
        return [t for layer in layers for t in (layer.index, layer.keys, *layer.encoder, layer.zeta)]


@pytest.fixture(scope="module")
def things(make_model, make_memory, make_edit):
    model = make_model("llama")
    memory = make_memory(model)
    bank = uk.EditBank([2, 3, 4, 5], 64, "silu")
    for seed, name in enumerate("ab"):
        bank.add(make_edit(model, name, seed=seed))
    layer, keys = memory.layers[3], memory.layers[3].index
    tables = [
        MemoryTables(layer.index, layer.keys, layer.values, layer.encoder, memory.id, r)
        for r in (None, CosineIndex(keys))
    ]
    return {
        "edit": make_edit(model, "c", memory), "memory": memory, "bank": bank,
        "prepared neurons": bank.prepared(3, [["a"], ["b", "a"]]), "tables": tables[0],
        "tables of an index": tables[1], "prepared memory": tables[0].prepared(),
        "index": CosineIndex(keys), "index of codes": CosineIndex(keys, "float16", exact=False),
        "approximate index": ApproximateIndex(keys, uk.ANNConfig("hnsw")),
    }  # fmt: skip


def tensors_of(thing: Any, seen: set[int]) -> list[torch.Tensor]:
    """All that it holds, however deep."""
    if isinstance(thing, torch.Tensor):
        return [thing]
    if id(thing) in seen or isinstance(thing, (str, type)):
        return []
    seen.add(id(thing))
    inner = list(thing.values()) if isinstance(thing, dict) else list(thing) if isinstance(thing, (list, tuple)) else []
    inner += getattr(thing, "__dict__", {}).values()
    return [t for each in inner for t in tensors_of(each, seen)]


def both(thing: Any, name: str) -> Any:
    return copy.deepcopy(thing) if name == "deepcopy" else pickle.loads(pickle.dumps(thing))


KINDS = [
    "edit", "memory", "bank", "prepared neurons", "tables", "tables of an index", "prepared memory", "index",
    "index of codes", "approximate index",
]  # fmt: skip


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_stands_alone(things, kind, way):
    """It says the same, also when the memory of what it was copied from has been overwritten."""
    first = both(things[kind], way)
    want = [t.clone() for t in computed(first)]
    second = both(first, way)
    held = tensors_of(first, set())
    assert held or kind == "approximate index"
    for t in held:
        t.zero_()
    for got, expected in zip(computed(second), want, strict=True):
        assert torch.equal(got, expected)


def answer(things: dict[str, Any], queue: Any) -> None:
    queue.put(pickle.dumps({kind: computed(thing) for kind, thing in things.items()}))
    queue.close()


def test_in_another_process(things):
    """Which is spawned, and gets them through torch.multiprocessing, that is in shared memory."""
    context = mp.get_context("spawn")
    want = {kind: computed(thing) for kind, thing in things.items()}
    queue = context.SimpleQueue()
    process = context.Process(target=answer, args=(things, queue))
    process.start()
    found = pickle.loads(queue.get())
    process.join()
    assert process.exitcode == 0 and set(found) == set(things) == set(KINDS)
    for kind, thing in things.items():  # there, and here, where the tensors have moved into shared memory meanwhile
        for got, after, before in zip(found[kind], computed(thing), want[kind], strict=True):
            assert torch.equal(got, before) and torch.equal(after, before), kind


def test_a_group_of_processes_stays_with_them(things):
    sharded = ShardedIndex.__new__(ShardedIndex)
    sharded.__dict__.update(index=things["index"], group=None, first=0, _total=50)
    assert torch.equal(pickle.loads(pickle.dumps(sharded)).index.search(X, 5)[1], things["index"].search(X, 5)[1])
    sharded.group = object()
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="a process group is of its process; send `index`"):
            copied(sharded)


def test_a_memory_that_moves_under_its_tables(things, make_model, make_memory):
    """The tables of a patched model share tensors with the memory, which may be sent elsewhere."""
    model = make_model("llama")
    memory = make_memory(model)
    layer = memory.layers[3]
    tables = MemoryTables(layer.index, layer.keys, layer.values, layer.encoder, memory.id)
    want, before = computed(tables)[0].clone(), tables.prepared()._native
    for t in tensors_of(memory, set()):
        t.share_memory_()
    assert torch.equal(computed(tables)[0], want)  # which freed memory may hold by chance
    assert tables.prepared()._native is not before
