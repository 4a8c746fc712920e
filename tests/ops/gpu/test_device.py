"""A patched model on a real GPU (`pytest -m gpu`): in CUDA graphs, compiled, and on two devices."""

from __future__ import annotations

import pytest
import torch
from backbones.zoo import ZOO, model_of

import unike_kernels as uk

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("device")]
IDS = torch.tensor([[7, 8, 9], [9, 5, 6]])


@pytest.fixture
def patched(make_edit, make_memory):
    """A LLaMA on a GPU with edits "a" and "b" and a memory, and the same on the CPU."""
    with torch.device("cpu"):
        model = model_of(ZOO["llama"], torch.float32)
        memory = make_memory(model, entries=20, layers=(1, 3))
        edits = [make_edit(model, name, memory, layers=(1, 3), seed=seed) for name, seed in (("a", 2), ("b", 3))]
        here = model_of(ZOO["llama"], torch.float32)
        for each in (model, here):
            uk.patch(each, edits, memory)
    return model.to("cuda"), here


def logits(model, ids):
    return model(input_ids=ids).logits  # with a cache: without one transformers waits for the device


def close(found, wanted):
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_the_logits_of_the_cpu(patched):
    model, here = patched
    for rows in ([["a"], ["b"]], [["b"], []]):
        with torch.device("cpu"), uk.rows(here, edits=rows):
            wanted = logits(here, IDS)
        with uk.rows(model, edits=rows):
            close(logits(model, IDS.cuda()), wanted)


@torch.no_grad()
def test_a_graph_computes_with_what_its_buffers_hold(patched):
    model, here = patched
    ids = IDS.cuda()
    with uk.rows(model, edits=[["a"], ["b"]]):
        logits(model, ids)  # what is compiled and laid out at first
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = logits(model, ids)
    for prompt, beta in ((IDS, 0.1), (IDS.flip(0), 0.1), (IDS, 0.7)):
        ids.copy_(prompt)
        for each in (model, here):
            uk.set_beta(each, "a", beta)
        graph.replay()
        with torch.device("cpu"), uk.rows(here, edits=[["a"], ["b"]]):
            close(found, logits(here, prompt))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@torch.no_grad()
def test_compiled(patched, mode):
    model, here = patched
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    for prompt in (IDS, IDS, IDS.flip(0), IDS):
        with torch.device("cpu"):
            wanted = logits(here, prompt)
        close(logits(compiled, prompt.cuda()), wanted)


@torch.no_grad()
def test_layers_of_two_devices(patched):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    from accelerate import dispatch_model

    model, here = patched
    half = {f"model.layers.{i}": i % 2 for i in range(len(model.model.layers))}
    spread = dispatch_model(
        model, half | {"model.embed_tokens": 0, "model.norm": 1, "model.rotary_emb": 0, "lm_head": 1}
    )
    with torch.device("cpu"):
        wanted = logits(here, IDS)
    close(logits(spread, IDS.cuda()), wanted)
