"""What a patched model compiles before its first request, and that nothing is left to be compiled then."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from backbones.zoo import ZOO, logits, model_of
from configs import every_token
from ops.test_patched_ffn import make_pool
from ptxsim import Session
from ptxsim.triton_driver import InterpreterDriver, interpreting
from triton.runtime.jit import JITFunction

import unike_kernels as uk
from unike_kernels import ops
from unike_kernels.nn import patched_ffn
from unike_kernels.nn.layer_edits import csr
from unike_kernels.ops import _triton, _workspace
from unike_kernels.ops.latent_attention import blend_of
from unike_kernels.ops.memory_attention import triton as memory
from unike_kernels.ops.patched_ffn import FUSED_TOKENS, FFNWeights
from unike_kernels.ops.patched_ffn import triton as side
from unike_kernels.ops.patched_ffn import triton_fused as fused
from unike_kernels.serving import RaggedRuntime, RequestSlice, Version

DEVICE = 999  # of no other test: Triton keeps what it has compiled by device


@pytest.fixture
def compiled(monkeypatch):
    """The kernels that Triton was asked to compile. It does not, and launches do nothing, on a GPU of 132
    multiprocessors."""
    names, kernels = [], set()

    def do_compile(self, key, *_):
        names.append(self.__name__)
        kernels.add(self)
        nothing = SimpleNamespace(launch_metadata=lambda *_: None, run=lambda *_: None, function=0, packed_metadata=0)
        return self.device_caches[DEVICE][0].setdefault(key, nothing)

    monkeypatch.setattr(JITFunction, "_do_compile", do_compile)
    monkeypatch.setattr(InterpreterDriver, "get_current_device", lambda self: DEVICE)
    monkeypatch.setattr(_triton, "_multiprocessors", lambda device: 132)
    monkeypatch.setattr(patched_ffn, "on_gpu", lambda t: True)
    _triton._workspaces.clear()
    with interpreting(Session(), 90), ops.backend("triton"), torch.no_grad():
        yield names
    _triton._workspaces.clear()
    for kernel in kernels:
        kernel.device_caches.pop(DEVICE, None)


def patched(make_edit, make_memory, config, base="vendor", edits=("a", "b"), **more):
    model = model_of(ZOO["llama"], torch.bfloat16)
    memory = None if config is None else make_memory(model, config, entries=300, layers=(1, 3))
    uk.patch(model, [make_edit(model, name, memory, layers=(1, 3)) for name in edits], memory, base=base, **more)
    return model


CONFIGS = [
    None,
    every_token(k=7, values="pre"),
    every_token(k=7, values="projected"),
    uk.Config(k=7, alpha="last"),
    uk.Config(k=7, alpha=0.5, retrieval="sequence"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["edits alone", "token", "projected", "last", "sequence"])
@pytest.mark.parametrize("base", ["vendor", "fused"])
@pytest.mark.parametrize("counts", [(1, 3), (8, 80)])
def test_nothing_is_left_to_be_compiled(config, base, counts, compiled, make_edit, make_memory):
    """One row, and as many rows as tokens, some without edits and padded, of each number of tokens."""
    model = patched(make_edit, make_memory, config, base)
    assert uk.warm_up(model, counts) >= 0
    assert ("patched_ffn_kernel" in compiled) == (base == "fused")
    compiled.clear()
    uk.warm_up(model, counts)
    for tokens in counts:
        row = torch.full((1, tokens), 7)
        with uk.rows(model, prompt_lengths=[max(tokens // 2, 1)]):
            logits(model, row)
        names = [["a", "b"][: i % 3] for i in range(tokens)]
        with uk.rows(model, edits=names, prompt_lengths=[1] * tokens):
            logits(model, row.T)
            model(input_ids=row.T, attention_mask=torch.ones_like(row.T))
    assert not compiled


def test_a_model_in_another_dtype_or_of_other_edits_is_compiled_anew(compiled, make_edit, make_memory):
    model = patched(make_edit, make_memory, None)
    uk.warm_up(model)
    compiled.clear()
    other = model_of(ZOO["llama"], torch.float32)
    uk.patch(other, [make_edit(other, "a", layers=(1, 3))])
    uk.warm_up(other)
    assert compiled


def test_what_is_offloaded_is_left_alone(compiled, make_edit, make_memory):
    model = patched(make_edit, make_memory, None, "fused")
    for i in (1, 3):
        model.model.layers[i].mlp.down_proj.to("meta"), model.model.layers[i].mlp.gate_proj.to("meta")
    uk.warm_up(model, (1,))
    assert {*compiled} == {"add_extra_neurons_kernel"}


def test_a_scope_is_compiled_for(compiled, make_edit, make_memory):
    """Its tokens have a row each."""
    model = patched(make_edit, make_memory, None)
    uk.warm_up(model, (8,))
    before = Counter(compiled)
    scoped = SimpleNamespace(config=uk.Config(scope="memory"), current=model._unike.context.current)
    record = model._unike.ffns[1]
    record.context = scoped
    record.warm_up(8, torch.bfloat16)
    assert Counter(compiled) - before == {"add_extra_neurons_kernel": 1}


def test_there_are_counters_for_graphs_behind_it(compiled, make_edit, make_memory):
    device = torch.device("cpu")
    model = patched(make_edit, make_memory, None)
    _workspace._spare.pop(device, None)
    uk.warm_up(model, (1,))
    del _workspace._spare[device][3:]
    uk.warm_up(model, (1,))
    assert len(_workspace._spare[device]) == _workspace.SPARE


@pytest.mark.parametrize("base", ["vendor", pytest.param("fused", marks=pytest.mark.slow)])
def test_it_computes_with_what_is_installed(base, on_gpu, make_edit, monkeypatch):
    """Really: the interpreter finds what would read or write beside it. Nothing changes."""
    model = patched(make_edit, None, None, base, edits=("a",))
    monkeypatch.setattr(patched_ffn, "on_gpu", lambda t: True)
    version, calls = model._unike.context.current, []
    model.model.layers[1].mlp.register_forward_hook(lambda *_: calls.append(1))
    _triton._workspaces.clear()
    with on_gpu() as session, ops.backend("triton"), uk.explain(model) as trace:
        uk.warm_up(model, (1, 2))
    kernels = Counter(launch.kernel for launch in session.launches)
    of_base = {"patched_ffn_kernel": 8} if base == "fused" else {}
    assert kernels == {"add_extra_neurons_kernel": 8, **of_base}
    assert not calls and not trace.passes and model._unike.context.current is version


@pytest.mark.parametrize("entries", [0, 300])
def test_an_engine_has_nothing_left_to_compile(entries, compiled, make_edit, make_memory):
    """Steps of requests with other edits, without, that decline the memory, and with padding behind them."""
    model = model_of(ZOO["llama"], torch.bfloat16)
    config = every_token(k=7, values="pre")
    memory = make_memory(model, config, entries=entries, layers=(1, 3)) if entries else None
    flat = RaggedRuntime([1, 3], 64, "silu", memory)
    for name in "ab":
        flat.hold(Version(name, make_edit(model, name, memory, layers=(1, 3))))
    assert flat.warm_up(torch.bfloat16, (1, 8)) >= 0
    assert {"add_extra_neurons_kernel"} <= {*compiled}
    assert ("memory_attention_kernel" in compiled) == bool(entries)
    compiled.clear()
    steps = [[RequestSlice(1)], [RequestSlice(5, ("a",)), RequestSlice(3, ("b", "a"), memory=False)]]
    for shares in (*steps, [RequestSlice(2, ("b",)), *[RequestSlice(1)] * 4]):
        x = torch.zeros(8, 64, dtype=torch.bfloat16)
        flat.begin(shares)
        for layer in flat.layers:
            flat.ffn(layer, x, x.clone())
            flat.attention(layer, x, x.clone())
    assert not compiled
    flat.end()


# --- how many there are ---------------------------------------------------------------------------------------------

D, F, R, K, N = 4096, 11008, 512, 40, 15_000  # LLaMA-7B
MOST = {
    "add_extra_neurons_kernel": 2,
    "patched_ffn_kernel": 3,
    "memory_attention_kernel": 7,
    "cosine_topk_kernel": 3,
    "latent_attention_kernel": 9,
}


@pytest.mark.parametrize("bounded", [False, True])
def test_all_numbers_of_tokens_share_a_few_kernels(bounded, compiled):
    half = torch.bfloat16
    zeros = lambda *shape, dtype=torch.float32: torch.zeros(shape, dtype=dtype)  # noqa: E731
    pool = make_pool(D, sizes=(16,), rows=([0],), dtype=half)
    base = FFNWeights(zeros(F, D, dtype=half), None, zeros(F, D, dtype=half), None, zeros(D, F, dtype=half), None)
    encoder = ops.SemanticEncoder(zeros(R, D), zeros(R), zeros(D, R), zeros(D))
    index, keys, values, projected = zeros(N, D), zeros(N, 1, D), zeros(N, 1, D), zeros(N, 1, R)
    blend = blend_of(keys, None, "inclusion", "match")
    for tokens in range(1, 513):
        x = zeros(tokens, D, dtype=half)
        ranges = zeros(tokens, 2, dtype=torch.int64) if bounded else None
        side.add_extra_neurons(x, x, pool, "silu")
        if tokens <= FUSED_TOKENS:
            fused.patched_ffn(x, base, pool, "silu")
        memory.memory_attention(
            x, index, K, ranges, x.unsqueeze(1), x, keys, values, encoder, None, None, blend, None, projected
        )
    found = Counter(compiled)
    assert {*found} == {*MOST}
    assert not found - Counter(MOST)


def test_any_number_of_rows_shares_one_kernel(compiled):
    """Their lists lie where Triton has compiled its code for."""
    for rows in range(1, 9):
        lists = csr([[0] * (i % 2) for i in range(rows)], "cpu")
        assert all(t.data_ptr() % 16 == 0 for t in lists if t.numel())
        pool = make_pool(D, sizes=(3,), rows=([0],))._replace(row_indptr=lists[0], row_edits=lists[1])
        x = torch.zeros(rows, D)
        side.add_extra_neurons(x, x, pool, "silu")
    assert len(compiled) == 1
