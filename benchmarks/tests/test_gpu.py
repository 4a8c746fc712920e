"""What of the GPU benchmarks can be checked without one: the cases run on the CPU, and wrong answers are not timed."""

import pytest
import torch
from unike_bench import suite
from unike_bench.cases import retrieval_gpu
from unike_bench.harness import device
from unike_bench.harness.measure import measure
from unike_bench.harness.roofline import Bound

from unike_kernels.cli import main


@pytest.fixture
def tables():
    return retrieval_gpu.Tables(200, 24, 3, 5, "cpu")


def test_a_case_from_its_data_to_its_rows(monkeypatch):
    monkeypatch.setattr(retrieval_gpu, "PEERS", {"torch": retrieval_gpu.with_torch})
    rows = measure(retrieval_gpu.case(200, 24, 3, "cpu"), rounds=3)
    assert [row.system for row in rows] == ["unike int8", "unike float16", "unike float32", "torch"]
    assert all(row.failure is None and len(row.seconds) == 3 for row in rows)
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
    assert {case.op for case in cases} == {"retrieval", "attention", "ffn"}
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
