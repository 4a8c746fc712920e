"""What of the GPU benchmarks can be checked without one: the cases run on the CPU, and wrong answers are not timed."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from unike_bench import suite
from unike_bench.cases import retrieval_gpu
from unike_bench.harness import device, optional
from unike_bench.harness.case import Case, Run, System
from unike_bench.harness.measure import measure
from unike_bench.harness.roofline import Bound

from unike_kernels.cli import main


@pytest.fixture
def tables():
    return retrieval_gpu.Tables(200, 24, 3, 5, "cpu")


def test_a_case_from_its_data_to_its_rows(monkeypatch):
    monkeypatch.setattr(retrieval_gpu, "PEERS", {"torch": retrieval_gpu.with_torch})
    rows = measure(retrieval_gpu.case(200, 24, 3, "cpu"), rounds=3)
    rough = list(retrieval_gpu.ROUGH)
    assert [row.system for row in rows] == ["unike int8", "unike float16", "unike float32", "torch", *rough]
    assert all(row.failure is None and len(row.seconds) == 3 for row in rows)
    assert all(row.recall > 0.8 for row in rows[3:])
    assert all(row.bound for row in rows[:3])


def test_bytes_that_a_scan_must_read(tables):
    systems = retrieval_gpu.case(200, 24, 3, "cpu").systems
    read = {
        scan: sum(t.nbytes for t in systems[f"unike {scan}"].prepare(tables).bound.reads)
        for scan in retrieval_gpu.SCANS
    }
    queries = 3 * 24 * 4
    assert read == {
        "int8": 200 * (64 + 16) + queries, "float16": 200 * (64 + 16) + queries, "float32": 200 * 24 * 4 + queries
    }  # fmt: skip


def test_wrong_answers_are_not_timed(tables):
    run = retrieval_gpu.case(200, 24, 3, "cpu").systems["torch"].prepare(tables)
    scores, ids = run.call()
    assert run.check((scores, ids)) == 1.0
    with pytest.raises(AssertionError):
        run.check((scores, (ids + 1) % 200))


@pytest.mark.parametrize("select", suite.SELECTIONS)
def test_the_selections(select):
    cases = suite.cases(select, device="cuda")
    assert len({case.name for case in cases}) == len(cases)
    assert {case.op for case in cases} == {"retrieval", "attention", "ffn", *(["decode"] if optional.smollm2() else [])}
    assert all(case.device == "cuda" and case.name.endswith("-cuda") for case in cases)
    assert {case.op for case in suite.cases(select, only="ffn", device="cuda")} == {"ffn"}
    (first, *_) = next(case for case in cases if case.op == "ffn").systems
    assert first == "unike fused"


def test_unknown_devices():
    with pytest.raises(ValueError, match="device: expected one of cpu, cuda; got 'tpu'"):
        suite.cases(device="tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(capsys, tmp_path):
    assert main(["bench", "--device", "cuda", "--out", str(tmp_path / "out")]) == 1
    assert "--device cuda: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("built", [True, False])
def test_searches_by_what_this_build_has(monkeypatch, built):
    monkeypatch.setattr(retrieval_gpu.cuda, "missing", lambda: None if built else "no nvcc")
    ours = [name for name, system in retrieval_gpu.case(200, 24, 3).systems.items() if system.role == "ours"]
    assert ours == [*(["unike int8", "unike float16", "unike float32"] if built else []), "unike Triton"]


class Recorder(TorchDispatchMode):
    """A CUDA graph: the operators that a capture sees, which `replay` computes again into the same memory."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        for func, args, kwargs, out in self.calls:
            out.copy_(func(*args, **kwargs))


@pytest.fixture
def fake_gpu(monkeypatch, clock):
    """The CPU in the place of a GPU, whose events read `clock`; returns how often what L2 holds was replaced."""
    filled = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock.now

        def elapsed_time(self, end):
            return (end.at - self.at) * 1e3

    @contextlib.contextmanager
    def graph(recorder):
        with recorder:
            yield

    for name, fake in {
        "Event": Event, "CUDAGraph": Recorder, "graph": graph, "synchronize": lambda: None
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(device, "_fill_l2", lambda: filled.append(clock.now))
    return filled


@pytest.fixture
def doubled(fake_gpu, clock):
    """(call, role, bound) -> the row of a system that doubles [1, 2], 1 s a call."""
    x = torch.tensor([1.0, 2.0])

    def measured(call=lambda x: x * 2, role="ours", bound=None, **more):
        def timed():
            clock.now += 1.0
            return call(x)

        def check(found):
            assert torch.equal(found, torch.tensor([2.0, 4.0])), "not the double"

        case = Case(
            "ffn", "a double", {}, object, {"s": System(role, lambda _: Run(timed, check, bound))}, "cuda", **more
        )
        (row,) = measure(case, rounds=3, clock=clock)
        return row

    return measured


def by_numpy(x):
    """Past torch, so that a graph knows nothing of it."""
    return torch.from_numpy(x.numpy() * 2)


def waiting(x):
    if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
        raise KeyError("what others raise")
    return x * 2


def test_a_graph_is_timed_and_the_host_beside_it(doubled, fake_gpu):
    row = doubled()
    assert (row.failure, row.graph) == (None, True)
    assert row.seconds == (0.0,) * 3  # by the events: a replay does not run the Python that takes a second
    assert len(fake_gpu) >= 3
    assert row.host >= 0.0
    assert doubled(captured=False).seconds == (1.0,) * 3


@pytest.mark.parametrize("call", [by_numpy, waiting])
def test_a_replay_that_computes_nothing_is_an_error_of_ours_and_a_peer_is_timed_as_it_is(doubled, call):
    assert "CUDA graph" in doubled(call).failure
    row = doubled(call, "peer")
    assert (row.failure, row.graph, row.seconds) == (None, False, (1.0,) * 3)


def test_what_is_faster_than_its_bound_is_an_error(doubled, known_bound):
    def row(reading):
        return doubled(bound=known_bound(reading), captured=False)

    assert (row(0.9).failure, row(0.9).reached) == (None, pytest.approx(0.9))
    assert row(1.2).failure == "faster than its bound: 120% of it"
    assert row(1.2).seconds == ()


class Meta:
    """In the place of a CUDA device: memory that cannot be read."""

    type = "cuda"


def test_the_bound_of_a_gpu_is_that_of_its_copy(monkeypatch):
    """At 100 bytes a second copied and 10 multiply-adds a second."""
    monkeypatch.setattr(device, "copy", lambda where: 200)
    monkeypatch.setattr(device, "multiply", lambda dtype, where: 50.0)
    tensor = torch.empty(3, 5)
    bound = Bound((tensor,), {torch.bfloat16: 70.0})
    monkeypatch.setattr(torch.Tensor, "device", property(lambda self: Meta()))
    assert set(bound.probes()) == {"read", "torch.bfloat16"}
    assert bound.probes()["read"]() == 200
    assert bound.seconds({"read": 2.0, "torch.bfloat16": 5.0}) == (0.6, 7.0)
