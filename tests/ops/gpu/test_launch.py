"""Launches that are looked up once: of what form they are, and that a second one computes what the first would have."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from ops.test_patched_ffn import as_csr, make_pool

from unike_kernels import _native, ops
from unike_kernels.ops import _backend, _tiles, _triton
from unike_kernels.ops.cosine_topk import PreparedSearch, cuda
from unike_kernels.ops.cosine_topk import reference as reference_search
from unike_kernels.ops.cosine_topk.reference import SearchOperands
from unike_kernels.ops.latent_attention import blend_of
from unike_kernels.ops.memory_attention import PreparedMemory
from unike_kernels.ops.memory_attention import triton as memory_kernel
from unike_kernels.ops.patched_ffn import FFNWeights, PreparedNeurons
from unike_kernels.ops.patched_ffn import triton as forward

D = 24


@pytest.fixture
def looked_up(monkeypatch):
    """How often Triton has looked for a kernel's code."""
    jitted, times = type(forward.add_extra_neurons_kernel), []
    usual = jitted.run
    monkeypatch.setattr(jitted, "run", lambda self, *a, **k: times.append(1) or usual(self, *a, **k))
    return times


def states(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, D).to(dtype), torch.randn(*shape, D).to(dtype)


@pytest.fixture
def pool():
    return make_pool(D, sizes=(3, 18), rows=([1], [0, 1]), kind="plain", dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def triton(on_gpu):
    _triton._workspaces.clear()
    with on_gpu() as session, torch.no_grad(), ops.backend("triton"):
        yield session


def test_a_second_call_computes_for_its_own_tensors(pool, looked_up, triton):
    prepared, wanted = PreparedNeurons(pool, "relu"), []
    given = [states(2, 3) for _ in range(3)]
    for x, base in given:
        wanted.append(ops.patched_ffn(x, base, pool, activation="relu"))
    looked_up.clear()
    found = [prepared(x, base) for x, base in given]
    assert len(looked_up) == 1 and len(triton.launches) == 6
    assert len({t.data_ptr() for t in found}) == 3
    assert all(map(torch.equal, found, wanted)) and not torch.equal(found[0], found[1])
    x, base = given[0]
    out = torch.empty_like(base)
    assert prepared(x, base, out) is out and torch.equal(out, wanted[0])
    assert prepared(x, base, base) is base and torch.equal(base, wanted[0])
    assert len(looked_up) == 1


def test_each_form_is_looked_up(pool, looked_up):
    prepared, forms = PreparedNeurons(pool, "relu"), [((2,), torch.bfloat16), ((4,), torch.bfloat16)]
    forms += [((2, 2), torch.bfloat16), ((2,), torch.float16), ((2,), torch.float32)]
    for shape, dtype in forms * 2:
        x, base = states(*shape, dtype=dtype)
        looked_up.clear()
        found = prepared(x, base)
        assert torch.equal(found, ops.patched_ffn(x, base, pool, activation="relu"))
    assert len(looked_up) == 1  # the operator's own
    looked_up.clear()
    with _tiles.forced("add_extra_neurons", forward.Tiles()._replace(slices=1)):
        prepared(x, base)
    prepared(x, base)
    assert len(looked_up) == 2


def test_addresses_that_ask_for_other_code(pool, looked_up):
    """Triton reads 16 bytes at once where an address allows it."""
    prepared, (x, base) = PreparedNeurons(pool, "relu"), states(2)
    room = torch.empty(2 * D + 1, dtype=torch.bfloat16)
    apart = room[1:].view(2, D).copy_(x)
    assert apart.data_ptr() % 16 == 2
    wanted = prepared(x, base)
    looked_up.clear()
    for _ in range(2):
        assert torch.equal(prepared(apart, base), wanted)
    assert len(looked_up) == 2
    assert torch.equal(prepared(x, base), wanted) and len(looked_up) == 2


def test_other_rows_of_the_same_neurons(pool):
    prepared, (x, base) = PreparedNeurons(pool, "relu"), states(2)
    other = prepared.of_rows(*as_csr([[0], []]), None)
    first, second = prepared(x, base), other(x, base)
    assert torch.equal(second[1], base[1]) and not torch.equal(first[1], base[1])
    assert torch.equal(prepared(x, base), first)


def test_a_change_of_the_neurons_is_seen(pool, looked_up):
    prepared, (x, base) = PreparedNeurons(pool, "relu"), states(2)
    before = prepared(x, base)
    pool.values.mul_(2)
    assert not torch.equal(prepared(x, base), before) and len(looked_up) == 1


def test_a_change_of_neurons_that_are_copied_to_be_read_is_seen(pool):
    pool = pool._replace(values=pool.values.T.contiguous().T)
    prepared, (x, base) = PreparedNeurons(pool, "relu"), states(2)
    before = prepared(x, base)
    pool.values.mul_(2)
    assert not torch.equal(prepared(x, base), before)
    assert torch.equal(prepared(x, base), ops.patched_ffn(x, base, pool, activation="relu"))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_a_copy_looks_its_launch_up(pool, looked_up, how):
    prepared, (x, base) = PreparedNeurons(pool, "relu"), states(2)
    wanted = prepared(x, base)
    again = how(prepared)
    looked_up.clear()
    assert torch.equal(again(x, base), wanted) and len(looked_up) == 1


def test_each_stream_has_its_own_scratch(pool, looked_up, triton, monkeypatch):
    """And the same code."""
    prepared, (x, base), seen = PreparedNeurons(pool, "relu"), states(2), []
    usual = triton.launch

    def launch(kernel, grid, threads, arguments, names, **options):
        seen.append(tuple(arguments[names.index(name)].data_ptr() for name in ("counters", "scratch")))
        return usual(kernel, grid, threads, arguments, names, **options)

    monkeypatch.setattr(triton, "launch", launch)
    driver = type(_triton.triton.runtime.driver.active)
    wanted = prepared(x, base)
    for stream in (1, 2, 0):
        monkeypatch.setattr(driver, "get_current_stream", lambda self, device, stream=stream: stream)
        assert torch.equal(prepared(x, base), wanted)
    assert all(len({*each}) == 3 for each in zip(*seen, strict=True)) and seen[0] == seen[-1]
    assert len(looked_up) == 1


def test_what_goes_another_way(pool, looked_up):
    """Gradients, and tensors whose values are not in their memory side by side."""
    prepared, (x, base) = PreparedNeurons(pool, "relu"), states(4)
    wanted = prepared(x, base)
    wide = torch.empty(4, 2 * D, dtype=torch.bfloat16)[:, :D].copy_(x)
    assert torch.equal(prepared(wide, base), wanted)
    assert torch.equal(prepared(torch._neg_view(-x), base), wanted)
    with torch.enable_grad():
        asking = base.clone().requires_grad_()
        prepared(x, asking).sum().backward()
    assert torch.equal(asking.grad, torch.ones_like(base))
    assert prepared(x[:0], base[:0]).shape == (0, D)


def test_a_launch_hook_is_told(pool, monkeypatch):
    """Of a profiler, by every launch."""
    prepared, (x, base), told = PreparedNeurons(pool, "relu"), states(2), []
    monkeypatch.setattr(_triton.triton.knobs.runtime, "launch_exit_hook", told.append)
    monkeypatch.setattr(_triton.triton.knobs.runtime, "launch_enter_hook", told.append)
    for _ in range(2):
        prepared(x, base)
    assert len(told) == 4


def test_chains_of_launch_hooks_are_told_where_they_have_some(pool, monkeypatch):
    """Which newer versions of Triton have; they are empty as a rule."""
    prepared, (x, base), told = PreparedNeurons(pool, "relu"), states(2), []
    wanted = prepared(x, base)
    for calls, names in (((), []), ((print,), ["add_extra_neurons_kernel"] * 2)):
        chain = type("Chain", (), {"calls": calls, "__call__": lambda self, it: told.append(it.get()["name"])})()
        for hook in ("launch_enter_hook", "launch_exit_hook"):
            monkeypatch.setattr(_triton.triton.knobs.runtime, hook, chain)
        assert torch.equal(prepared(x, base), wanted) and told == names


# --- a memory -------------------------------------------------------------------------------------------------------


class Remembering:
    """A memory of 20 entries with two heads, prepared and as an operator."""

    def __init__(self) -> None:
        index, keys, values = ops.normalize_rows(torch.randn(20, D)), torch.randn(20, 2, 8), torch.randn(20, 2, D)
        encoder = ops.SemanticEncoder(torch.randn(8, D), torch.randn(8), torch.randn(D, 8), torch.randn(D))
        self.index, self.tables = index, (keys, values, encoder)
        self.prepared = PreparedMemory(index, None, keys, values, None, encoder)

    def given(self, tokens, dtype=torch.float32):
        return tuple(torch.randn(tokens, *shape).to(dtype) for shape in ((D,), (2, 8), (D,)))

    def by_operator(self, hidden, queries, inputs, k, ranges=None, alpha=None, anchor=None, **switches):
        return ops.memory_attention(
            hidden, inputs, self.index, *self.tables, k=k, queries=queries, ranges=ranges, alpha=alpha, anchor=anchor,
            **switches,
        )[0]  # fmt: skip

    def by_launch(self, hidden, queries, inputs, k, ranges=None, alpha=None, anchor=None, out=None, **switches):
        blend = blend_of(queries, switches.get("scale"), *(switches.get(n, d) for n, d in USUAL.items()))
        return self.prepared(hidden, queries, inputs, k, ranges, alpha, anchor, blend, out)


USUAL = {"convention": "inclusion", "norm": "match"}


def test_a_memory_is_looked_up_once(looked_up):
    memory = Remembering()
    calls = [memory.given(2) for _ in range(3)]
    wanted = [memory.by_operator(*given, k=3) for given in calls]
    looked_up.clear()
    found = [memory.by_launch(*given, k=3) for given in calls]
    assert len(looked_up) == 1 and all(map(torch.equal, found, wanted)) and not torch.equal(found[0], found[1])
    hidden, queries, inputs = calls[0]
    out = torch.empty_like(inputs)
    assert memory.by_launch(*calls[0], k=3, out=out) is out and torch.equal(out, wanted[0])
    assert memory.by_launch(hidden, queries, inputs, k=3, out=inputs) is inputs and torch.equal(inputs, wanted[0])
    assert len(looked_up) == 1


def test_a_change_of_a_memory_that_is_copied_to_be_read_is_seen():
    memory = Remembering()
    keys, values, encoder = memory.tables
    memory.tables = keys, values.permute(2, 1, 0).contiguous().permute(2, 1, 0), encoder
    memory.prepared = PreparedMemory(memory.index, None, keys, memory.tables[1], None, encoder)
    given = memory.given(2)
    before = memory.by_launch(*given, k=3)
    memory.tables[1].mul_(2)
    assert not torch.equal(memory.by_launch(*given, k=3), before)
    assert torch.equal(memory.by_launch(*given, k=3), memory.by_operator(*given, k=3))


def test_a_search_alone_is_looked_up_once(looked_up):
    keys = ops.normalize_rows(torch.randn(40, D))
    search, calls = PreparedSearch(keys, None), [torch.randn(3, D) for _ in range(3)]
    ranges = torch.tensor([[0, 9], [4, 20], [3, 3]])
    for own in (None, ranges):
        wanted = [ops.cosine_topk(q, keys, 5, normalized=True, ranges=own) for q in calls]
        looked_up.clear()
        found = [search(q, 5, own) for q in calls]
        assert len(looked_up) == 1
        for got, expected in zip(found, wanted, strict=True):
            assert all(map(torch.equal, got, expected))
    other = search(calls[0].bfloat16(), 7, None)
    assert all(map(torch.equal, other, ops.cosine_topk(calls[0].bfloat16(), keys, 7, normalized=True)))
    assert [t.shape for t in search(calls[0][:0], 5, None)] == [(0, 5)] * 2
    strided = torch.randn(3, 2 * D)[:, ::2]
    assert all(map(torch.equal, search(strided, 5, None), ops.cosine_topk(strided, keys, 5, normalized=True)))


def test_attention_to_known_entries_is_looked_up_once(looked_up):
    """Ids of each token, and ids that tokens share."""
    memory = Remembering()
    blend = blend_of(memory.given(2)[1], None, **USUAL)
    for ids, alpha in ((torch.tensor([[0, 3, -1], [7, 2, 19]]), None), (torch.tensor([[5, 1]]), ONE)):
        calls = [memory.given(2)[1:] for _ in range(3)]
        wanted = [
            ops.latent_attention(*given, *memory.tables[:2], ids, memory.tables[2], alpha=alpha) for given in calls
        ]
        looked_up.clear()
        found = [memory.prepared.attention(*given, ids, alpha, None, blend) for given in calls]
        assert len(looked_up) == 1
        for got, expected in zip(found, wanted, strict=True):
            assert all(map(torch.equal, got, expected))
    queries, inputs = calls[0]
    wide = torch.empty(2, 2 * D)[:, :D].copy_(inputs)
    assert torch.equal(memory.prepared.attention(queries, wide, ids, alpha, None, blend)[0], found[0][0])
    assert memory.prepared.attention(queries[:0], inputs[:0], ids[:0], alpha, None, blend)[0].shape == (0, D)
    with torch.enable_grad():
        asking = inputs.clone().requires_grad_()
        memory.prepared.attention(queries, asking, ids, None, None, blend)[0].sum().backward()
    assert asking.grad.isfinite().all() and asking.grad.any()


def test_a_cuda_search_is_laid_out_once(monkeypatch):
    """And anew where a table lies elsewhere; keys that a search would copy are not kept."""
    made, calls = [], []
    core = SimpleNamespace(
        Keys=lambda *given: made.append(given) or given,
        cuda_cosine_topk_workspace=lambda *_: 64,
        cuda_cosine_topk=lambda *given: calls.append(given),
    )
    keys = ops.normalize_rows(torch.randn(40, D))
    packed, ranges = ops.pack_keys(keys, "int8"), torch.tensor([[0, 9], [4, 20]])
    monkeypatch.setattr(cuda, "_native", SimpleNamespace(core=lambda: core, address=_native.address, rows=_native.rows))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    allowed = _backend._table["cosine_topk"]["cuda"]._replace(missing=lambda: None, refuse=lambda o: None)
    monkeypatch.setitem(_backend._table["cosine_topk"], "cuda", allowed)
    search = PreparedSearch(keys, packed)
    with ops.backend("cuda"):
        for own in (None, ranges, None, ranges):
            queries = torch.randn(2, D)
            scores, ids = search(queries, 5, own)
            assert scores.shape == ids.shape == (2, 5) and (scores.dtype, ids.dtype) == (torch.float32, torch.int64)
            assert calls[-1][0] == (40, D, keys.data_ptr(), D, 3, *(t.data_ptr() for t in packed))
            assert calls[-1][1:4] == ((queries.data_ptr(), 0, D), 2, 5)
            assert calls[-1][4:7] == (_native.address(own), scores.data_ptr(), ids.data_ptr())
            assert calls[-1][7:10] == (0, 0, 0) and calls[-1][-1] == 7
        assert len(made) == 2  # with ranges and without
        packed.codes.set_(packed.codes.clone())
        search(queries, 5, None)
        assert len(made) == 3 and calls[-1][0][5] == packed.codes.data_ptr()
    for copied in (keys.bfloat16(), keys[:, :23].contiguous(), torch.randn(D, 40).T):
        assert cuda.launch_of(SearchOperands(torch.randn(2, copied.shape[1]), copied, 5, True)) is None


def test_an_ffn_and_its_neurons_are_looked_up_once(pool, looked_up):
    def weights():
        f = 32
        return FFNWeights(*(torch.randn(s).bfloat16() * 0.2 for s in ((f, D), (f,), (f, D), (f,), (D, f), (D,))))

    prepared, base, given = PreparedNeurons(pool, "relu"), weights(), [states(2, 3)[0] for _ in range(3)]
    wanted = [ops.patched_ffn(x, base, pool, activation="relu") for x in given]
    looked_up.clear()
    found = [prepared.fused(x, base) for x in given]
    assert len(looked_up) == 1 and all(map(torch.equal, found, wanted)) and not torch.equal(found[0], found[1])
    other = weights()  # of a parameter that was replaced
    assert torch.equal(prepared.fused(given[0], other), ops.patched_ffn(given[0], other, pool, activation="relu"))
    base.w_in.mul_(0.5)
    assert torch.equal(prepared.fused(given[0], base), ops.patched_ffn(given[0], base, pool, activation="relu"))
    transposed = base._replace(w_in=base.w_in.T.contiguous().T)
    assert prepared.fused(given[0], transposed) is None and prepared.fused(states(40, 3)[0], base) is None
    with torch.enable_grad():
        x = given[0].clone().requires_grad_()
        prepared.fused(x, base).sum().backward()
    assert x.grad.isfinite().all()


ONE = torch.tensor([0.25])
FORMS = [
    {"k": 3}, {"k": 4}, {"k": 3, "norm": "none"}, {"k": 3, "convention": "eq7"}, {"k": 3, "scale": 0.7},
    {"k": 3, "alpha": ONE}, {"k": 3, "alpha": torch.rand(2)}, {"k": 3, "ranges": torch.tensor([[0, 9], [4, 20]])},
    {"k": 3, "anchor": torch.randn(1, D)}, {"k": 3, "anchor": torch.randn(2, D)},
]  # fmt: skip


def test_each_form_of_a_memory_is_looked_up(looked_up):
    memory, given = Remembering(), []
    for each in FORMS * 2:
        given = memory.given(2)
        wanted = memory.by_operator(*given, **each)
        looked_up.clear()
        assert torch.equal(memory.by_launch(*given, **each), wanted)
    assert not looked_up
    half = tuple(t.bfloat16() for t in given)
    assert memory.by_launch(*half, k=3).dtype == torch.bfloat16 and looked_up
    more = memory.given(5)
    assert torch.equal(memory.by_launch(*more, k=3), memory.by_operator(*more, k=3))


def test_what_of_a_memory_goes_another_way(looked_up, monkeypatch, triton):
    memory = Remembering()
    hidden, queries, inputs = memory.given(2)
    wanted = memory.by_launch(hidden, queries, inputs, k=3)
    wide = torch.empty(2, 2 * D)[:, :D].copy_(inputs)
    assert torch.equal(memory.by_launch(hidden, queries, wide, k=3), wanted)
    with torch.enable_grad():
        asking = inputs.clone().requires_grad_()
        memory.by_launch(hidden, queries, asking, k=3).sum().backward()
    assert asking.grad.isfinite().all() and asking.grad.any()
    monkeypatch.setattr(memory_kernel, "MOST_TOKENS", 3)
    before, more = len(triton.launches), memory.given(4)
    found = memory.by_launch(*more, k=3)
    assert len(triton.launches) == before + 2 and torch.equal(found, memory.by_operator(*more, k=3))
    assert memory.by_launch(*memory.given(0), k=3).shape == (0, D)


def test_a_search_of_another_kind_before_the_attention(looked_up, monkeypatch):
    """As of CUDA's search, whose attention is a second launch."""
    memory, kinds = Remembering(), ("triton", _backend.COMPOSED, "reference")
    monkeypatch.setattr(_backend, "_PREFERENCE", kinds)
    monkeypatch.setattr(_backend, "forced_backend", lambda: None)
    table = {**_backend._table["memory_attention"]}
    table["triton"] = table["triton"]._replace(refuse=lambda o: "a search in fewer bits is faster")
    monkeypatch.setitem(_backend._table, "memory_attention", table)
    searched = []
    search = _backend._table["cosine_topk"]["triton"]

    def launch_of(o):
        def launch(queries, ranges, scores, ids):
            searched.append(ranges)
            found = reference_search.cosine_topk(queries, o.keys, o.k, o.normalized, ranges)
            scores.copy_(found[0]), ids.copy_(found[1])

        return launch

    monkeypatch.setitem(_backend._table["cosine_topk"], "triton", search._replace(launch_of=launch_of))
    for each in ({"k": 3}, {"k": 3, "ranges": torch.tensor([[0, 9], [4, 20]]), "alpha": ONE}):
        calls = [memory.given(2) for _ in range(2)]
        wanted = [memory.by_operator(*given, **each) for given in calls]
        looked_up.clear(), searched.clear()
        found = [memory.by_launch(*given, **each) for given in calls]
        assert all(map(torch.equal, found, wanted)) and len(looked_up) == 1
        assert len(searched) == 2 and all(ranges is each.get("ranges") for ranges in searched)


# --- several devices ------------------------------------------------------------------------------------------------


@pytest.fixture
def second_device(triton, monkeypatch):
    """All tensors are on GPU 1 and GPU 0 is the current one; -> the device of each launch, and of each look at one."""
    driver, state, launches = type(_triton.triton.runtime.driver.active), {"device": 0}, []
    monkeypatch.setattr(_triton, "device_of", lambda t: 1)
    monkeypatch.setattr(driver, "get_current_device", lambda self: state["device"])
    monkeypatch.setattr(driver, "set_current_device", lambda self, device: state.update(device=device))
    monkeypatch.setattr(driver, "get_current_stream", lambda self, device: 70 + device)
    usual = triton.launch

    def launch(*args, **options):
        launches.append(state["device"])
        return usual(*args, **options)

    monkeypatch.setattr(triton, "launch", launch)
    monkeypatch.setattr(_triton, "_multiprocessors", lambda device: launches.append(device) or 8)
    yield launches
    assert state["device"] == 0


def _search(x):
    return ops.cosine_topk(x, torch.randn(20, D), 3)[1]


def _latent(x):
    encoder = ops.SemanticEncoder(torch.randn(8, D), torch.randn(8), torch.randn(D, 8), torch.randn(D))
    table, ids = torch.randn(20, D), torch.tensor([[0, 3]] * len(x))
    return ops.latent_attention(x, x, table, table, ids, encoder)[0]


def _memory(x):
    encoder = ops.SemanticEncoder(torch.randn(8, D), torch.randn(8), torch.randn(D, 8), torch.randn(D))
    table = ops.normalize_rows(torch.randn(20, D))
    return ops.memory_attention(x, x, table, table, table, encoder, k=3)[0]


def _fused(x):
    base = FFNWeights(torch.randn(32, D), None, None, None, torch.randn(D, 32), None)
    return ops.patched_ffn(x, base, make_pool(D, sizes=(3,), rows=([0],)), activation="relu")


def _beside(x):
    return ops.patched_ffn(x, x, make_pool(D, sizes=(3,), rows=([0],)), activation="relu")


@pytest.mark.parametrize("operator", [_search, _latent, _memory, _fused, _beside])
@pytest.mark.parametrize("gradient", [False, True])
def test_every_launch_is_on_its_tensors_device(operator, gradient, second_device):
    x = torch.randn(2, D)
    if gradient and operator is not _search:
        with torch.enable_grad():
            x.requires_grad_()
            operator(x).sum().backward()
    else:
        operator(x)
    assert set(second_device) == {1}
    assert {stream for _, stream in _triton._workspaces} <= {71}


def test_a_prepared_launch_is_on_its_tensors_device(pool, second_device):
    prepared = PreparedNeurons(pool, "relu")
    found = [prepared(*states(2)) for _ in range(3)]
    assert len(found) == 3 and second_device == [1, 1, 1, 1]


def test_the_device_is_given_back_after_a_failure(pool, second_device, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no memory")

    monkeypatch.setattr(forward, "tiling", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        PreparedNeurons(pool, "relu")(*states(2))
