"""Shards of an index in processes of their own, against one index of all keys."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from configs import every_token

import unike_kernels as uk

N, D, K = 60, 16, 7
SIZES = [(20, 25, 15), (45, 0, 15)]  # of the shards, an empty one among them


def keys_and_queries():
    generator = torch.Generator().manual_seed(0)
    keys, queries = torch.randn(N, D, generator=generator), torch.randn(5, D, generator=generator)
    keys[40:50] = keys[:10]  # ties between shards
    queries[0], queries[1, 0] = keys[3], float("nan")
    return keys, queries


def assert_shared(sharded, one, ids):
    """What all indexes share: as the index of all keys has it, bit for bit."""
    _, queries = keys_and_queries()
    assert (sharded.ntotal, sharded.d) == (N, D)
    for allowed in (ids[2::3], torch.arange(N) % 7 == 1, [int(ids[50]), 10**15, int(ids[7])]):
        for found, wanted in (
            (sharded.search(queries, K, allowed=allowed), one.search(queries, K, allowed=allowed)),
            (sharded.range_search(queries, 0.1, allowed=allowed), one.range_search(queries, 0.1, allowed=allowed)),
        ):
            assert all(map(torch.equal, found, wanted))
    assert np.array_equal(sharded.search(queries[2].numpy(), 3)[1], one.search(queries[2], 3)[1])
    assert torch.equal(sharded.reconstruct(int(ids[47])), one.reconstruct(int(ids[47])))
    with pytest.raises(IndexError, match="id: expected that of a key, got 123456"):
        sharded.reconstruct(123456)


def rank_of_three(rank, place, failures):
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=3)
    try:
        keys, queries = keys_and_queries()
        for sizes in SIZES:
            start = sum(sizes[:rank])
            shard = uk.CosineIndex(keys[start : start + sizes[rank]], scan="int8")
            sharded = uk.ShardedIndex(shard)
            assert (len(sharded), sharded.first) == (N, start)
            for k in (1, K, N + 5):
                found, wanted = sharded.search(queries, k), uk.CosineIndex(keys).search(queries, k)
                assert torch.equal(found[1], wanted[1]), (sizes, k)
                assert torch.equal(found[0].view(torch.int32), wanted[0].view(torch.int32)), (sizes, k)
            ranges = torch.tensor([[0, N], [3, 44], [19, 21], [50, 50], [45, N]])
            found, wanted = sharded.search(queries, K, ranges), uk.CosineIndex(keys).search(queries, K, ranges)
            assert torch.equal(found[1], wanted[1]), sizes
            assert_shared(sharded, uk.CosineIndex(keys), torch.arange(N))
            ids = torch.arange(N).flip(0) * 10**9
            own = ids[start : start + sizes[rank]]
            one = uk.CosineIndex(keys, ids=ids)
            assert_shared(uk.ShardedIndex(uk.CosineIndex(keys[start : start + sizes[rank]], ids=own)), one, ids)
        mixed = uk.CosineIndex(torch.randn(3, D), ids=None if rank else [1, 2, 3])
        with pytest.raises(ValueError, match="index: expected ids of the caller's own on all ranks or on none"):
            uk.ShardedIndex(mixed)
        coded = uk.ShardedIndex(uk.CosineIndex(torch.randn(3, D), exact=rank == 1))
        with pytest.raises(ValueError, match="reconstruct: expected indexes with rows"):
            coded.reconstruct(4)
        narrow = uk.CosineIndex(torch.randn(3, 8 if rank == 0 else D))
        with pytest.raises(ValueError, match=r"index: expected one width on all ranks, got \[8, 16, 16\]"):
            uk.ShardedIndex(narrow)
    except BaseException as error:
        failures.put(f"rank {rank}: {type(error).__name__}: {error}")
        raise
    finally:
        dist.destroy_process_group()


def test_the_bits_of_one_index(tmp_path):
    failures = mp.get_context("spawn").SimpleQueue()
    try:
        mp.spawn(rank_of_three, (tmp_path / "rendezvous", failures), nprocs=3)
    finally:
        assert failures.empty(), failures.get()


def rank_of_a_parallel_ffn(rank, world, place, failures):
    """Column- and row-parallel matrices, each rank's own neurons beside them, one sum."""
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=world)
    try:
        generator = torch.Generator().manual_seed(0)
        x, w_in, w_out = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((4, D), (12, D), (D, 12)))
        layer = uk.EditLayer(
            *(torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((5, D), (5,), (5, D), (D,))),
            torch.tensor(0.3, dtype=torch.float64), torch.randn(5, D, generator=generator, dtype=torch.float64),
            torch.randn(5, generator=generator, dtype=torch.float64),
        )  # fmt: skip
        edit = uk.Edit("a", {0: layer}, "silu", every_token(), {}, None)

        def computed(edit, columns):
            base = torch.nn.functional.silu(x @ w_in[columns].T) @ w_out[:, columns].T
            store = uk.nn.LayerEdits()
            store.set({"a": edit.layers[0]})
            return uk.ops.patched_ffn(x, base, store.pool(), activation="silu")

        columns = slice(12 * rank // world, 12 * (rank + 1) // world)
        found = computed(edit.shard(rank, world), columns)
        dist.all_reduce(found)
        torch.testing.assert_close(found, computed(edit, slice(None)), atol=1e-12, rtol=1e-12)
        sizes = [edit.shard(r, world).layers[0].keys.shape[0] for r in range(world)]
        assert sum(sizes) == 5
        assert edit.shard(0, 7).layers[0].keys.shape[0] == 0  # more ranks than neurons
    except BaseException as error:
        failures.put(f"rank {rank}: {type(error).__name__}: {error}")
        raise
    finally:
        dist.destroy_process_group()


def test_a_tensor_parallel_ffn_and_its_edit(tmp_path):
    failures = mp.get_context("spawn").SimpleQueue()
    try:
        mp.spawn(rank_of_a_parallel_ffn, (2, tmp_path / "rendezvous", failures), nprocs=2)
    finally:
        assert failures.empty(), failures.get()
    layer = uk.EditLayer(torch.zeros(2, D), torch.zeros(2), torch.zeros(2, D), torch.zeros(D), torch.tensor(0.0))
    with pytest.raises(ValueError, match="rank: expected 0 to 1, got 2"):
        uk.Edit("a", {0: layer}, "silu", every_token(), {}, None).shard(2, 2)


def test_without_a_group():
    with pytest.raises(RuntimeError, match="ShardedIndex needs torch"):
        uk.ShardedIndex(uk.CosineIndex(torch.randn(3, 4)))
