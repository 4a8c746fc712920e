"""CUDA graphs: what is captured shares no memory with anything else, and computes the same in any order of replays."""

from __future__ import annotations

import functools
import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from backbones.zoo import ZOO, logits, model_of
from configs import every_token
from ops.gpu.graphs import STREAM, Graph, on_stream, overlaps, tensors
from ops.test_patched_ffn import make_pool
from ptxsim.triton_driver import InterpreterDriver
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import masking_utils
from triton import knobs

import unike_kernels as uk
from unike_kernels import ops
from unike_kernels.nn import LayerEdits, Pass, Ranks, Selection, patched_ffn
from unike_kernels.nn.passes import NOTHING
from unike_kernels.ops import _triton, _workspace
from unike_kernels.ops.cosine_topk import cuda
from unike_kernels.ops.cosine_topk import reference as reference_search
from unike_kernels.ops.latent_attention import blend_of
from unike_kernels.ops.memory_attention import PreparedMemory
from unike_kernels.ops.memory_attention import triton as memory_kernel
from unike_kernels.ops.patched_ffn import FFNWeights, PreparedNeurons, api, fused_ffn
from unike_kernels.serving import RaggedRuntime, RequestSlice, Version

D, N = 160, 40  # several blocks, which meet
SHARED = {"counters", "everybody", "scratch", "extra", "units", "found", "know", "squares"}  # of the workspace


@pytest.fixture(autouse=True)
def session(on_gpu):
    _triton._workspaces.clear()
    _workspace._spare.clear()
    with on_gpu() as session, torch.no_grad(), ops.backend("triton"):
        yield session


class Tables:
    """What all graphs read."""

    def __init__(self) -> None:
        self.pool = make_pool(D, sizes=(3, 2), rows=([1], [0, 1]))
        self.base = FFNWeights(torch.randn(96, D), None, None, None, torch.randn(D, 96), None)
        self.encoder = ops.SemanticEncoder(torch.randn(16, D), torch.randn(16), torch.randn(D, 16), torch.randn(D))
        self.index = ops.normalize_rows(torch.randn(N, D))
        self.keys, self.values = torch.randn(N, 1, D), torch.randn(N, 1, D)
        self.ids = torch.tensor([[0, 3, 39], [7, -1, 5]])
        self.neurons = PreparedNeurons(self.pool, "relu")
        self.memory = PreparedMemory(self.index, None, self.keys, self.values, None, self.encoder)

    def beside(self, x):
        return self.neurons(x, x)

    def fused(self, x):
        return fused_ffn(x, self.base, self.pool, "relu")

    def search(self, x):
        return ops.cosine_topk(x, self.index, 3, normalized=True)

    def attention(self, x):
        return ops.latent_attention(x, x, self.keys, self.values, self.ids, self.encoder)

    def remember(self, x):
        return self.memory(
            x, x.unsqueeze(1), x, 3, None, None, None, blend_of(x.unsqueeze(1), None, "inclusion", "match")
        )


OPERATORS = ("beside", "search", "attention", "fused")


@pytest.fixture(params=OPERATORS)
def compute(request):
    return getattr(Tables(), request.param)


def states():
    return torch.randn(2, D)


def captured(session, compute, x=None):
    x = states() if x is None else x
    return Graph(session, lambda: compute(x))


def loaded(compute, warm=True):
    """Its code is; and not warm: nothing else is known of it."""
    compute(states())
    if not warm:
        _triton._workspaces.clear()
        _workspace._spare.clear()


def same(found, wanted):
    return all(map(torch.equal, tensors(found), tensors(wanted)))


@pytest.mark.parametrize(
    ("compute", "warm"),
    [("beside", True), ("beside", False)]
    + [pytest.param(name, warm, marks=pytest.mark.slow) for name in OPERATORS[1:] for warm in (True, False)],
    indirect=["compute"],
)
def test_graphs_of_one_stream_are_replayed_in_any_order(compute, warm, session):
    """Also where there is no memory before the capture; then passes outside of graphs on the same stream."""
    contents = [states() for _ in range(3)]
    wanted = [[t.clone() for t in tensors(compute(x))] for x in contents]
    loaded(compute, warm)
    inputs = states(), states()
    graphs = [captured(session, compute, x) for x in inputs]
    for which, what in ((1, 0), (1, 1), (0, 2), (0, 1), (1, 2)):
        inputs[which].copy_(contents[what])
        assert same(graphs[which].replay(), wanted[what])
    with on_stream(STREAM):
        assert same(compute(contents[0]), wanted[0])
    assert same(graphs[0].replay(), wanted[1]) and same(graphs[1].replay(), wanted[2])


@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
def test_graphs_share_no_memory_that_they_write_to(compute, warm, session):
    """So that they can be replayed at the same time, and beside what runs on the stream of the capture."""
    loaded(compute, warm)
    graphs = [captured(session, compute) for _ in range(2)]
    with on_stream(STREAM):
        eager = _triton.workspace_of(torch.device("cpu"))
        compute(states())
    assert not session.launches or all(launch.stores for launch in session.launches)
    first, second = (graph.memory(lambda name: name in SHARED) for graph in graphs)
    assert first and second and not overlaps(first, second)
    for t in (eager.counters, *eager.floats(1)):
        own = {(t.data_ptr(), t.data_ptr() + 4)}
        assert not overlaps(own, first | second)


def test_what_a_graph_zeroes(compute, session):
    """Its counters, where it has none that nobody else uses, and nothing else."""
    loaded(compute, warm=False)
    cold = captured(session, compute)
    assert cold.operators.count("zeros") == len(cold.launches) == 1
    compute(states())
    warm = captured(session, compute)
    assert not {"zeros", "zero_"} & {*warm.operators}


def test_what_a_graph_allocates_is_its_own(compute, session):
    """Else the memory pool that it is captured in would never be given back; torch.compile refuses that."""
    compute(states())
    before = {*_triton._workspaces}
    graph = captured(session, compute)
    left = graph.forget()
    assert left and all(storage.expired() for storage in left)
    assert {*_triton._workspaces} == before


def test_spare_counters_outlive_those_who_have_them(session, monkeypatch):
    monkeypatch.setattr(_workspace, "SPARE", 2)
    compute = Tables().beside
    compute(states())
    (slab,) = {StorageWeakRef(t.untyped_storage()) for t in _workspace._spare[torch.device("cpu")][:1]}
    graphs = [captured(session, compute) for _ in range(3)]
    zeroed = [graph.operators.count("zeros") for graph in graphs]
    assert zeroed == [0, 0, 1]
    for graph in graphs:
        graph.forget()
    del graphs, graph
    gc.collect()
    assert not slab.expired()


def test_there_are_spare_counters_again_after_a_restock(session, monkeypatch):
    monkeypatch.setattr(_workspace, "SPARE", 1)
    compute = Tables().beside
    compute(states())
    for _ in range(3):
        graph = captured(session, compute)
        assert "zeros" not in graph.operators
        _workspace.stock(torch.device("cpu"))


@pytest.mark.slow
def test_a_graph_of_several_launches(session):
    """Each has counters of its own; the second reads what the first one has written."""
    tables, x = Tables(), states()
    both = lambda x: tables.remember(tables.beside(x))  # noqa: E731
    wanted = both(x)
    graph = captured(session, both, x)
    assert len(graph.launches) == 2
    assert same(graph.replay(), wanted) and same(graph.replay(), wanted)


@pytest.mark.parametrize("warm", [False, True])
def test_code_that_is_not_there_is_asked_for_before_the_capture(warm, compute, session, monkeypatch):
    """Without trying to compile or load it, which would take long and end the capture."""
    device = 998  # on which no test has compiled anything
    monkeypatch.setattr(InterpreterDriver, "get_current_device", lambda self: device)
    compiled = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **what: compiled.append(what["fn"].jit_function))
    if warm:
        compute(states())
        assert compiled
        captured(session, compute)
    else:
        with pytest.raises(RuntimeError, match=r"unike_kernels\.warm_up\(model"):
            captured(session, compute)
        assert not compiled
    assert knobs.runtime.jit_cache_hook is None
    for kernel in compiled:
        kernel.device_caches.pop(device)


def test_another_thread_compiles_during_a_capture(session, monkeypatch):
    """And its own hook is told."""
    told = []
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda **what: told.append(what["repr"]))
    with _triton._compiling_nothing(), ThreadPoolExecutor(1) as other:
        hook = knobs.runtime.jit_cache_hook
        assert other.submit(hook, repr="theirs").result() is None and hook(repr="mine") is True
    assert told == ["theirs"]


# --- what waits for the device --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_memory_whose_tokens_have_ranges_takes_two_launches_without_waiting(session, monkeypatch):
    """And what lies outside of the memory is cut off, as in the one launch of fewer tokens."""
    tables, x = Tables(), states()
    ranges = torch.tensor([[2, 9], [0, 0]])
    blend = blend_of(x.unsqueeze(1), None, "inclusion", "match")
    compute = lambda: tables.memory(x, x.unsqueeze(1), x, 3, ranges, None, None, blend)  # noqa: E731
    contents = [torch.tensor(c) for c in ([[2, 9], [0, 0]], [[0, N], [38, 99]], [[-7, 2], [N, N + 3]])]
    wanted = []
    for given in contents:
        ranges.copy_(given)
        wanted.append(compute())
    tables.memory = PreparedMemory(tables.index, None, tables.keys, tables.values, None, tables.encoder)
    monkeypatch.setattr(memory_kernel, "MOST_TOKENS", 1)
    ranges.copy_(contents[0])
    torch.testing.assert_close(compute(), wanted[0])
    graph = Graph(session, compute)
    assert len(graph.launches) == 2
    for given, result in zip(contents, wanted, strict=True):
        ranges.copy_(given)
        torch.testing.assert_close(graph.replay()[0], result)


@pytest.mark.parametrize("base", ["vendor", pytest.param("fused", marks=pytest.mark.slow)])
def test_a_patched_model_is_captured_with_the_rows_of_a_pass_before(base, session, make_edit, monkeypatch):
    """Nothing of them comes from the host again."""
    model = model_of(ZOO["llama"], torch.float32)
    uk.patch(model, [make_edit(model, name, seed=i, layers=(1, 3)) for i, name in enumerate("ab")], base=base)
    monkeypatch.setattr(patched_ffn, "on_gpu", lambda t: True)
    monkeypatch.setattr(masking_utils, "is_tracing", lambda *_: True)  # as it says in a capture
    ids = torch.tensor([[7], [9]])
    with uk.rows(model, edits=[["a"], ["b"]]):
        before = logits(model, ids)
        graph = Graph(session, lambda: logits(model, ids))
        assert len(graph.launches) == 2
        ids.copy_(torch.tensor([[11], [12]]))
        (found,) = graph.replay()
        wanted = logits(model, ids)
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(found, before)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "launches"), [(None, 2), (Ranks(0, 1, torch.clone, torch.clone), 4)])
def test_steps_of_an_engine_are_written_before_a_replay(ranks, launches, session, make_model, make_memory, make_edit):
    """Other requests, edits and uses of the memory, whole or shared by ranks, an edit that comes later, padding."""
    model, layer, tokens = make_model("llama"), 2, 5
    memory = make_memory(model, every_token(k=3, values="out", alpha=0.4), layers=(layer,))
    runtime = RaggedRuntime([layer], 64, "silu", memory, ranks=ranks)
    edits = [make_edit(model, name, memory, seed=seed, layers=(layer,)) for seed, name in enumerate("abc")]
    for edit in edits[:2]:
        runtime.hold(Version(edit.id, edit))
    tables = runtime.for_graphs(tokens, 3, edits=4, like=edits[0])
    x, base = torch.randn(2, tokens, 64)

    def compute(of=tables):
        of.ffn(layer, x, ffn := base.clone())
        of.attention(layer, x, attention := base.clone())
        return ffn, attention

    compute()
    graph = Graph(session, compute)
    assert len(graph.launches) == launches and not {"zeros", "zero_"} & {*graph.operators}
    for shares in (
        [RequestSlice(2, ("a",)), RequestSlice(3, ("b", "a"), memory=False)],
        [RequestSlice(1), RequestSlice(1, ("c",)), RequestSlice(2, ("b",), memory=False)],
        [],
        [RequestSlice(5, ("c",))],
    ):
        x.normal_()
        if ("c",) in [share.edits for share in shares] and "c" not in runtime.bank:
            runtime.hold(Version("c", edits[2]))
        runtime.begin(shares)
        assert runtime.write()
        wanted = compute(runtime)
        runtime.end()
        for one, other in zip(graph.replay(), wanted, strict=True):
            torch.testing.assert_close(one, other)


def test_rows_of_a_scope_come_from_the_host_once(session, make_model, make_edit):
    """Of a selection that acts whatever a router would decide."""
    rows, row_of_each, bounds = (("a",), ()), torch.tensor([0, 1, 1]), torch.tensor([[0, 9]])
    store = LayerEdits()
    store.set({"a": make_edit(make_model("llama")).layers[2]})
    selection = Selection(rows=2, edits=rows, forced=True)
    made = Pass(NOTHING, selection, prompted=True, scoped=True, shape=(2, 1))
    compute = lambda: (made.entries(bounds), store.of_tokens("relu", rows, row_of_each).pool.row_edits)  # noqa: E731
    wanted = compute()
    assert same(Graph(session, compute).replay(), wanted)


def test_the_public_operators_look_at_no_values_of_another_device():
    """Of the lists of edits and of ranges, which are refused on a CPU."""
    away = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    assert not api._readable(away) and api._readable(torch.zeros(1))
    meta = functools.partial(torch.zeros, device="meta")
    _, ids = reference_search.cosine_topk(meta(2, D), meta(N, D), 3, ranges=meta(2, 2, dtype=torch.int64))
    assert ids.shape == (2, 3)


# --- memory of streams ----------------------------------------------------------------------------------------------


def test_scratch_that_grows_lets_the_former_one_go(session):
    """Also what launches keep: prompts that come sorted by their length would hold all of it."""
    known, former, x = [], [], torch.randn(1, D)
    for neurons in (2, 20, 200):
        known.append(PreparedNeurons(make_pool(D, sizes=(neurons,), rows=([0],)), "relu"))
        wanted = known[0](x, x)
        known[-1](x, x)
        session.forget()
        gc.collect()  # what the interpreter leaves
        assert all(scratch.expired() for scratch in former)
        (scratch,) = _triton.workspace_of(torch.device("cpu")).floats(1)
        former.append(StorageWeakRef(scratch.untyped_storage()))
        del scratch
        assert torch.equal(known[0](x, x), wanted)  # in the new one
    assert not former[-1].expired()


def test_sizes_that_rise_are_few():
    workspace, sizes = _triton.Workspace("cpu"), []
    for count in range(1000, 200_000, 100):
        (scratch,) = workspace.floats(count)
        assert scratch.numel() == count
        sizes.append(scratch.untyped_storage().nbytes())
    assert len({*sizes}) <= 15 and sizes[-1] <= 1.5 * 4 * 200_000


def test_the_former_scratch_is_let_go_before_the_next_is_asked_for(session):
    """The two of them need not fit at once; and a failure leaves a workspace that can be used."""
    workspace = _triton.Workspace("cpu")
    former = StorageWeakRef(workspace.floats(100)[0].untyped_storage())
    session.forget()
    usual, seen = workspace._floats, []

    def fail(count):
        seen.append(former.expired())
        raise torch.OutOfMemoryError("no memory")

    workspace._floats = fail
    with pytest.raises(torch.OutOfMemoryError):
        workspace.floats(1000)
    assert seen == [True]
    workspace._floats = usual
    assert workspace.floats(1000)[0].numel() == 1000


def test_memory_of_the_cuda_search(session):
    """Its state is zero at first, and stays where it is; the rest grows by half at least, one piece at a time."""
    device, sizes = torch.device("cpu"), []
    cuda._of_stream.cache_clear()
    workspace = cuda.workspace_of(device, 3)
    assert cuda.workspace_of(device, 3) is workspace is not cuda.workspace_of(device, 4)
    state = workspace.state
    assert state.nbytes >= 64 and not state.any()
    state.fill_(5)  # as a launch leaves it
    for size in range(64, 20_000, 64):
        former = StorageWeakRef(workspace._memory.untyped_storage())
        before = workspace._memory.numel()
        session.forget()
        memory = workspace.sized(size)
        assert memory.numel() >= size
        if memory.numel() != before:
            sizes.append(memory.numel())
            assert former.expired()
        memory.fill_(1)
        del memory
    assert len(sizes) <= 16 and sizes[-1] <= 30_000
    assert workspace.sized(64) is workspace.sized(20_000)
    assert workspace.state is state and (state == 5).all()


@pytest.mark.parametrize("warm", [True, False])
def test_memory_of_a_cuda_search_in_a_graph(warm, session):
    """Of it alone; a node of the graph zeroes its state where there is no spare one, and nothing else."""
    device = torch.device("cpu")
    cuda._of_stream.cache_clear()
    if warm:
        cuda.workspace_of(device, STREAM)

    def parts():
        workspace = cuda.workspace_of(device, STREAM)
        return workspace.state, workspace.sized(1000)

    graphs = [Graph(session, parts) for _ in range(2)]
    for graph in graphs:
        assert graph.operators == ([] if warm else ["zeros"])
    if warm:
        assert not any(graph.result[0].any() for graph in graphs)
    for graph in (graphs[1], graphs[0], graphs[1]):
        for t in graph.result:
            t.fill_(7)
        state, memory = graph.replay()
        assert state.any() == warm and memory.all()
    assert cuda._of_stream.cache_info().currsize == warm
    addresses = {t.data_ptr() for graph in graphs for t in graph.result}
    assert len(addresses | {cuda._of_stream(device, STREAM).state.data_ptr()}) == 5


def test_memory_that_is_kept_is_of_no_pool(monkeypatch):
    """torch lets a thread's allocations go to a pool: another thread makes what is kept, for the same stream."""
    entered, threads = [], []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: ("stream of", device.type))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: entered.append(stream) or on_stream(1))
    away = SimpleNamespace(type="cuda")
    made = _workspace.kept(away, lambda: threads.append(threading.get_ident()) or torch.ones(1))
    assert made.item() == 1 and entered == [("stream of", "cuda")]
    assert threads != [threading.get_ident()]
    with pytest.raises(ZeroDivisionError):
        _workspace.kept(away, lambda: 1 / 0)
