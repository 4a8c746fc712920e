"""On a real GPU (`pytest -m gpu`): the same bits as on the CPU, through torch, streams and graphs."""

from __future__ import annotations

import pytest
import torch

import unike_kernels as uk
from unike_kernels.ops import _backend
from unike_kernels.ops.cosine_topk import cpu, cuda

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def cuda_kernels():
    if reason := _backend.gpu_missing():
        pytest.fail(reason)  # it was asked for
    if reason := cuda.missing():
        pytest.skip(reason)  # a build without nvcc


def same(found, wanted):
    for got, expected in zip(found, wanted, strict=True):
        assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("scan", ["int8", "float16", "bfloat16", "float32"])
@pytest.mark.parametrize(
    ("n", "d", "m", "k"), [(1, 3, 1, 1), (15_000, 576, 1, 40), (15_000, 577, 64, 40), (999, 70, 1500, 7)]
)
def test_the_answer_of_the_cpu(n, d, m, k, scan):
    index, queries = uk.CosineIndex(torch.randn(n, d), scan), torch.randn(m, d)
    same(index.to("cuda").search(queries.cuda(), k), index.search(queries, k))


@pytest.mark.parametrize("k", [300, 2048])
def test_many_results_of_keys_that_are_much_alike(k):
    index = uk.CosineIndex(1 + 1e-5 * torch.randn(20_000, 64))
    queries = torch.randn(9, 64)
    same(index.to("cuda").search(queries.cuda(), k), index.search(queries, k))


def test_the_operator_takes_plain_keys():
    keys, queries = torch.randn(500, 33), torch.randn(3, 33)
    wanted = uk.ops.cosine_topk(queries, keys, 5)
    with uk.backend("cuda"):
        same(uk.ops.cosine_topk(queries.cuda(), keys.cuda(), 5), wanted)


def test_ranges_and_values():
    rows, queries = cpu.normalize_rows(torch.randn(300, 24)), torch.randn(2, 24)
    ranges, values = torch.tensor([[10, 200], [5, 5]]), torch.randn(300, 7)
    scores, ids, gathered = cuda.search(queries.cuda(), rows.cuda(), None, 4, ranges.cuda(), values=values.cuda())
    same((scores, ids), uk.ops.cosine_topk(queries, rows, 4, normalized=True, ranges=ranges))
    assert torch.equal(gathered[0].cpu(), values[ids[0].cpu()])
    assert not gathered[1].any()


def test_in_a_graph_and_in_a_stream_of_its_own():
    index = uk.CosineIndex(torch.randn(5000, 64)).to("cuda")
    queries = torch.randn(4, 64, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        index.search(queries, 8)  # the stream's workspace
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            found = index.search(queries, 8)
        for _ in range(3):
            queries.copy_(torch.randn(4, 64))
            graph.replay()
            stream.synchronize()
            same(found, index.to("cpu").search(queries.cpu(), 8))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_on_another_device_than_the_current_one():
    index, queries = uk.CosineIndex(torch.randn(500, 24)), torch.randn(3, 24)
    with torch.cuda.device(0):
        same(index.to("cuda:1").search(queries.to("cuda:1"), 5), index.search(queries, 5))
        assert torch.cuda.current_device() == 0
