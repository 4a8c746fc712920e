"""CUDA graphs on a real GPU; what can be seen of them without one: test_graphs.py."""

from __future__ import annotations

import pytest
import torch
from ops.gpu.test_graphs import OPERATORS, D, Tables, same, states

import unike_kernels as uk
from unike_kernels import ops

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("device")]


@pytest.fixture(autouse=True)
def triton():
    with torch.no_grad(), ops.backend("triton"):
        yield


def captured(compute, x):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = compute(x)
    return graph, result


@pytest.mark.parametrize("name", [*OPERATORS, "remember"])
def test_graphs_are_replayed_in_any_order_and_at_the_same_time(name):
    compute, inputs = getattr(Tables(), name), (states(), states())
    compute(inputs[0])  # loads the code
    graphs = [captured(compute, x) for x in inputs]
    for which in (1, 1, 0, 1, 0):
        inputs[which].copy_(states())
        graph, result = graphs[which]
        graph.replay()
        assert same(result, compute(inputs[which]))
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    for _ in range(50):
        for x in inputs:
            x.copy_(states())
        wanted = [compute(x) for x in inputs]
        torch.cuda.synchronize()
        for stream, (graph, _) in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        compute(states())
        torch.cuda.synchronize()
        assert all(same(result, each) for (_, result), each in zip(graphs, wanted, strict=True))


def test_code_that_is_not_loaded_is_asked_for():
    """The capture itself goes on."""
    compute, x, graph = Tables().fused, torch.randn(2, D).half(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        before = x + 1
        with pytest.raises(RuntimeError, match=r"unike_kernels\.warm_up\(model"):
            compute(x)  # no other test computes in this dtype
    graph.replay()
    assert torch.equal(before, x + 1)


def test_torch_compile_records_graphs_of_its_own():
    tables = Tables()
    compute = lambda x: ops.patched_ffn(x, x, tables.pool, activation="relu")  # noqa: E731
    compiled = torch.compile(compute, mode="reduce-overhead")
    for _ in range(4):  # it warms up, records, and replays
        x = states()
        assert same(compiled(x).clone(), compute(x))


def test_warm_up_leaves_nothing_to_be_compiled(make_model, make_edit, make_memory):
    with torch.device("cpu"):
        model = make_model("llama")
        memory = make_memory(model)
        edit = make_edit(model, "a", memory)
    model.to("cuda")
    uk.patch(model, [edit], memory)
    first = uk.warm_up(model, (1, 8))
    assert uk.warm_up(model, (1, 8)) < max(0.2 * first, 0.5)
    ids = torch.full((1, 8), 7)
    graph, result = captured(lambda ids: model(input_ids=ids, use_cache=False).logits, ids)
    graph.replay()
    torch.testing.assert_close(result, model(input_ids=ids, use_cache=False).logits)
