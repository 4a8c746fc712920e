"""Approximate retrieval: how much of the exact result it finds, and a memory that uses it."""

import dataclasses

import pytest
import torch
from configs import every_token

import unike_kernels as uk

pytest.importorskip("faiss")


def clustered(n, d=32, centres=50, seed=0):
    """Rows around random centres, as hidden states are."""
    g = torch.Generator().manual_seed(seed)
    middle = torch.randn(centres, d, generator=torch.Generator().manual_seed(7))
    return middle[torch.randint(centres, (n,), generator=g)] + 0.5 * torch.randn(n, d, generator=g)


@pytest.mark.parametrize("how", [uk.ANNConfig(), uk.ANNConfig("hnsw")], ids=["ivf", "hnsw"])
def test_finds_most_of_what_there_is(how):
    keys, queries = clustered(20_000), clustered(100, seed=1)
    index = uk.ApproximateIndex(keys, how)
    assert len(index) == 20_000
    scores, ids = index.search(queries, 10)
    assert (scores.dtype, ids.dtype, ids.shape) == (torch.float32, torch.int64, (100, 10))
    exact = torch.nn.functional.normalize(queries, dim=-1) @ torch.nn.functional.normalize(keys, dim=-1).T
    torch.testing.assert_close(scores, exact.gather(1, ids), atol=1e-5, rtol=1e-5)
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    true = exact.topk(10).indices
    share = sum(len(set(a.tolist()) & set(b.tolist())) for a, b in zip(ids, true, strict=True)) / 1000
    assert index.recall(queries, 10, uk.CosineIndex(keys)) == pytest.approx(share)
    assert share > 0.9


def test_a_wider_search_finds_more_and_all_lists_find_all():
    keys, queries = torch.randn(5_000, 32), torch.randn(50, 32)
    exact = uk.CosineIndex(keys)
    indexes = [uk.ApproximateIndex(keys, uk.ANNConfig(lists=64, probes=p)) for p in (1, 4, 64)]
    found = [index.recall(queries, 20, exact) for index in indexes]
    assert found[0] < found[1] < found[2] == 1.0


def test_too_few_keys_and_queries_that_are_not_finite():
    index = uk.ApproximateIndex(clustered(3))
    queries = clustered(2, seed=1)
    queries[1, 3] = float("nan")
    scores, ids = index.search(queries, 5)
    assert sorted(ids[0].tolist()) == [-1, -1, 0, 1, 2]
    assert (ids[1] == -1).all()
    assert torch.equal(scores == float("-inf"), ids == -1)


ALL = [uk.ANNConfig(lists=8, probes=8), uk.ANNConfig("hnsw", breadth=500)]  # which leave nothing out


@pytest.mark.parametrize("own", [False, True], ids=["positions", "own ids"])
@pytest.mark.parametrize("how", ALL, ids=["ivf", "hnsw"])
def test_keys_come_and_go_as_in_an_exact_index(how, own):
    keys, queries = clustered(600), clustered(5, seed=1)
    names = torch.randperm(5_000)[:600] if own else None
    indexes = [make(keys[:400], **({"ids": names[:400]} if own else {})) for make in (
        uk.CosineIndex, lambda keys, **more: uk.ApproximateIndex(keys, how, **more),
    )]  # fmt: skip

    def check():
        exact, approximate = indexes
        n = len(exact)
        assert len(approximate) == n and torch.equal(approximate.ids, exact.ids)
        ranges = torch.tensor([[0, n], [n // 3, n // 2], [n - 1, n], [0, 0], [5, n - 5]])
        for more in ({}, {"ranges": ranges}, {"allowed": exact.ids[::3]}):
            wanted, found = exact.search(queries, 8, **more), approximate.search(queries, 8, **more)
            assert torch.equal(found[1], wanted[1])
            torch.testing.assert_close(found[0], wanted[0], atol=1e-5, rtol=1e-5)
        for i in exact.ids[[0, n // 2, -1]].tolist():
            torch.testing.assert_close(approximate.reconstruct(i), exact.reconstruct(i))

    def add(start, stop):
        for index in indexes:
            index.add(keys[start:stop], names[start:stop] if own else None)
        check()

    check()
    add(400, 450)
    if how.kind == "hnsw":
        with pytest.raises(ValueError, match="remove: expected ANNConfig"):
            indexes[1].remove([0])
        return
    for start, some in ((450, slice(0, 200, 7)), (500, slice(100, 101)), (550, slice(300, None))):
        gone = indexes[0].ids[some]
        for index in indexes:
            index.remove(gone)
        check()
        add(start, start + 50)


def test_wrong_additions_and_removals_change_nothing():
    keys = clustered(50)
    index = uk.ApproximateIndex(keys, uk.ANNConfig(lists=2, probes=2))
    for wrong, message in (
        ((keys[:2, :5],), "keys: expected"),
        ((torch.full((1, 32), float("nan")),), "keys: expected finite numbers"),
        ((keys[:2], [50, 51]), "ids: expected None, as the keys before these have none of their own"),
    ):
        with pytest.raises(ValueError, match=message):
            index.add(*wrong)
    with pytest.raises(IndexError, match="ids: expected 0 to 49, got 50"):
        index.remove([3, 50])
    assert len(index) == 50
    assert torch.equal(index.search(keys, 1)[1].flatten(), torch.arange(50))


@pytest.mark.parametrize("how", ALL, ids=["ivf", "hnsw"])
def test_a_range_holds_all_that_it_has(how):
    """Not only what a search of all keys would have left of it."""
    keys, queries = clustered(500), clustered(6, seed=1)
    ranges = torch.tensor([[0, 500], [100, 110], [0, 0], [490, 500], [100, 110], [0, 500]])
    found = uk.ApproximateIndex(keys, how).search(queries, 8, ranges)
    wanted = uk.CosineIndex(keys).search(queries, 8, ranges)
    assert torch.equal(found[1], wanted[1])
    torch.testing.assert_close(found[0], wanted[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"ranges: expected 0 <= start <= stop <= n = 500, got \[3, 501\]"):
        uk.ApproximateIndex(keys, how).search(queries[:1], 8, torch.tensor([[3, 501]]))


def test_a_memory_that_retrieves_approximately(make_model, make_memory):
    """With all lists searched it computes what exact retrieval computes; with one, something else."""
    model, ids = make_model("llama"), torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])
    memory = make_memory(model, every_token(k=7, values="out"), entries=200)

    def logits(search, mask=None, **rows):
        bank = dataclasses.replace(memory, search=search)
        with torch.no_grad(), uk.patched(model, memory=bank), uk.rows(model, **rows):
            return model(input_ids=ids, attention_mask=mask).logits

    exact, all_lists = logits(None), uk.ANNConfig(lists=8, probes=8)
    torch.testing.assert_close(logits(all_lists), exact, atol=1e-5, rtol=1e-5)
    assert (logits(uk.ANNConfig(lists=50, probes=1)) - exact).abs().max() > 1e-2
    plain = model(input_ids=ids).logits
    assert torch.equal(logits(all_lists, memory=[False, True])[0], plain[0])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    torch.testing.assert_close(logits(all_lists, mask)[0, 2:], logits(None, mask)[0, 2:], atol=1e-5, rtol=1e-5)


def test_what_is_refused():
    with pytest.raises(ValueError, match="expected 'ivf' or 'hnsw', got 'lsh'"):
        uk.ANNConfig("lsh")
    with pytest.raises(ValueError, match=r"ANNConfig\.probes: expected at least 1, got 0"):
        uk.ANNConfig(probes=0)
    with pytest.raises(ValueError, match="with N at least 1"):
        uk.ApproximateIndex(torch.zeros(0, 4))
    with pytest.raises(ValueError, match="NaN or infinity"):
        uk.ApproximateIndex(torch.tensor([[float("inf"), 1.0]]))
    index = uk.ApproximateIndex(clustered(10))
    with pytest.raises(ValueError, match="k: expected an integer of at least 1, got 0"):
        index.search(clustered(1), 0)
    with pytest.raises(ValueError, match=r"queries: expected shape \[\.\.\., 32\]|queries: expected .*32"):
        index.search(torch.zeros(1, 3), 1)
