"""A memory whose entries lie on several ranks, here threads that wait for each other, against the whole one."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from configs import every_token

import unike_kernels as uk
from unike_kernels.nn import Ranks, SharedMemory
from unike_kernels.serving import RaggedRuntime, RequestSlice

D, LAYER, TOKENS = 64, 2, 9


class Threads:
    """Ranks that are threads; `calls` has the shapes of what one of them gave to the others."""

    def __init__(self, count):
        self._barrier, self._given, self.calls = threading.Barrier(count, timeout=60), [None] * count, []
        self.each = [Ranks(i, count, self._gathering(i), self._summing(i)) for i in range(count)]

    def _exchanged(self, rank, t):
        self._given[rank] = t
        self._barrier.wait()
        found = list(self._given)
        self._barrier.wait()
        return found

    def _gathering(self, rank):
        def gather(t):
            self.calls += [("gather", tuple(t.shape))] if rank == 0 else []
            return torch.cat(self._exchanged(rank, t), 1)

        return gather

    def _summing(self, rank):
        def total(t):
            self.calls += [("total", tuple(t.shape))] if rank == 0 else []
            return sum(self._exchanged(rank, t))

        return total

    def run(self, function):
        """What each rank returns for itself."""
        with ThreadPoolExecutor(len(self.each)) as pool:
            return list(pool.map(function, self.each))


def shifted(memory, hidden, base, shares=None, ranks=None, graphs=False):
    runtime = RaggedRuntime([LAYER], D, "silu", memory, ranks=ranks)
    tables = runtime.for_graphs(TOKENS + 3, 4) if graphs else None
    runtime.begin(shares or [RequestSlice(len(hidden))])
    out = base.clone()
    if graphs:
        assert runtime.write()
        tables.attention(LAYER, hidden, out)
    else:
        runtime.attention(LAYER, hidden, out)
    return out


@pytest.fixture
def memory(make_model, make_memory):
    def make(entries=50, **how):
        config = every_token(**{"k": 7, "values": "out", **how})
        return make_memory(make_model("llama"), config, layers=(LAYER,), entries=entries)

    return make


def check(memory, hidden, base, count, **how):
    """Each rank gives what the whole memory gives, to the bit what the others give; a rank's tables are a part."""
    threads = Threads(count)
    wanted = shifted(memory, hidden, base, **how)
    found = threads.run(lambda ranks: shifted(memory, hidden, base, ranks=ranks, **how))
    for each in found:
        torch.testing.assert_close(each, wanted, atol=1e-5, rtol=1e-5)
        assert torch.equal(each, found[0])
        assert torch.equal(each[(wanted == base).all(1)], base[(wanted == base).all(1)])
    return threads, wanted


def random_tokens(tokens=TOKENS):
    g = torch.Generator().manual_seed(3)
    return torch.randn(tokens, D, generator=g), torch.randn(tokens, D, generator=g)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(
    "how",
    [
        {}, {"values": "pre", "alpha": 0.4}, {"values": "context", "norm": "none", "alpha": 0.6},
        {"scale": "cosine", "tau": 0.1}, {"convention": "eq7", "scale": 3.0}, {"k": 1},
    ],
    ids=str,
)  # fmt: skip
def test_as_one_memory(how, count, memory):
    hidden, base = random_tokens()
    whole = memory(**how)
    threads, wanted = check(whole, hidden, base, count)
    assert not torch.allclose(wanted, base, atol=1e-3)
    k = whole.config.k
    assert threads.calls == [("gather", (TOKENS, 2 * k)), ("gather", (TOKENS, 1)), ("total", (TOKENS, D))]


def test_a_rank_has_its_own_entries(memory):
    """As many as the others, or one more or less; all of them are somewhere."""
    whole, threads = memory(entries=50), Threads(3)
    runtimes = [RaggedRuntime([LAYER], D, "silu", whole, ranks=ranks) for ranks in threads.each]
    tables = [runtime._tables[LAYER] for runtime in runtimes]
    for counts in ([t.entries for t in tables], [len(t.keys) for t in tables], [len(t.codes) for t in tables]):
        assert counts == [16, 17, 17]
    assert torch.equal(torch.cat([t.values for t in tables]), whole.layers[LAYER].values)
    assert torch.equal(torch.cat([t.retrieval_keys for t in tables]), whole.layers[LAYER].index)


@pytest.mark.parametrize("k", [1, 3, 5, 12])
def test_ties_between_ranks(k, memory):
    """Equal keys with unlike values: those of the lowest numbers are taken, wherever they are."""
    whole = memory(entries=20, k=k, alpha=0.5)
    layer = whole.layers[LAYER]
    layer = replace(layer, index=layer.index[:4].repeat(5, 1))
    whole = replace(whole, layers={LAYER: layer})
    hidden, base = random_tokens()
    hidden[:4] = layer.index[:4]
    for count in (2, 3):
        check(whole, hidden, base, count)


@pytest.mark.parametrize(("entries", "count"), [(5, 2), (10, 3), (3, 3)])
def test_fewer_entries_than_are_asked_for(entries, count, memory):
    """On a rank, and on all of them together; by some tokens none."""
    whole = memory(entries=entries)
    for shares in (None, [RequestSlice(4), RequestSlice(5, memory=False)]):
        check(whole, *random_tokens(), count, shares=shares)


@pytest.mark.parametrize("size", [1e-3, 40.0])
def test_logits_of_any_size(size, memory):
    """Whose exponentials are infinite, or which the ranks have unlike ones of."""
    hidden, base = random_tokens()
    whole = memory(entries=40, scale=float(size), k=30)
    keys = whole.layers[LAYER].keys.clone()
    keys[20:] *= 3
    whole = replace(whole, layers={LAYER: replace(whole.layers[LAYER], keys=keys)})
    check(whole, hidden, base, 2)


@pytest.mark.parametrize("graphs", [False, True])
def test_who_may_retrieve_what(graphs, memory):
    """Tenants whose entries lie on one rank or on several, requests that decline, prompts that are not shifted."""
    one = memory(tokens="answer", alpha=0.4)
    turned = {i: replace(m, index=-m.index, values=-m.values) for i, m in one.layers.items()}
    few = {i: replace(m, index=m.index[:6], keys=m.keys[:6], values=m.values[:6]) for i, m in one.layers.items()}
    whole = uk.MemoryBank.joined({"a": one, "b": replace(one, layers=few), "c": replace(one, layers=turned)})
    for shares in (
        [RequestSlice(2, memory="a"), RequestSlice(3, memory="b"), RequestSlice(4, memory="c", prompt=2)],
        [RequestSlice(3, memory=False), RequestSlice(6, memory="b")],
        [RequestSlice(9)],
        [RequestSlice(9, prompt=20)],
    ):
        for count in (2, 3):
            check(whole, *random_tokens(), count, shares=shares, graphs=graphs)


def test_tokens_that_are_not_finite(memory):
    hidden, base = random_tokens()
    hidden[3] = float("nan")
    check(memory(), hidden, base, 2)


def test_an_approximate_search_of_each_part(memory):
    pytest.importorskip("faiss")
    check(replace(memory(), search=uk.ANNConfig(lists=4, probes=4)), *random_tokens(), 2)


def test_a_memory_that_is_too_small():
    ranks = Ranks(0, 4, torch.clone, torch.clone)
    with pytest.raises(ValueError, match="memory: 3 entries cannot be shared by 4 ranks"):
        SharedMemory(3, ranks)
