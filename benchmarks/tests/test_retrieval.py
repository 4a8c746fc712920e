"""The cases of retrieval at small shapes: all systems right, wrong ones caught, missing packages left out."""

import pytest
import torch
from unike_bench.baselines import peers
from unike_bench.cases import retrieval
from unike_bench.cases.data import keys_and_queries
from unike_bench.harness.measure import measure
from unike_bench.harness.optional import installed

from unike_kernels import CosineIndex

N, D = 300, 33
SCANS = ["unike int8", "unike float16", "unike bfloat16", "unike float32"]


@pytest.mark.parametrize(("kind", "b"), [("isotropic", 1), ("clumped", 3), ("isotropic", 20)])
def test_every_system_is_checked_and_timed(kind, b):
    case = retrieval.case(kind, N, D, b)
    assert case.name == f"retrieval-N{N}-d{D}-B{b}-k40-{kind}"
    rows = {row.system: row for row in measure(case, rounds=3)}
    assert [row.failure for row in rows.values()] == [None] * len(rows)
    assert list(rows)[:4] == SCANS
    assert ("faiss flat, split" in rows) == (b <= 8 and installed("faiss"))
    for row in rows.values():
        assert (row.recall is None) == (row.role == "ours") == (row.bound is not None)
        assert row.role != "peer" or row.recall > 0.99


def test_a_wrong_search_is_caught(monkeypatch):
    search = CosineIndex.search

    def wrong(self, queries, k):
        scores, ids = search(self, queries, k)
        return scores, ids.flip(1) if self.scan == "float16" else ids

    monkeypatch.setattr(CosineIndex, "search", wrong)
    failed = [row.system for row in measure(retrieval.case("isotropic", N, D, 2), rounds=3) if row.failure]
    assert failed == ["unike float16"]


def test_a_wrong_peer_is_caught(monkeypatch):
    def shifted(rows, unit, k):
        return lambda: (unit @ rows.T).topk(k), lambda found: (found.indices + 1) % len(rows)

    monkeypatch.setattr(peers, "torch_keys_first", shifted)
    failed = [row.system for row in measure(retrieval.case("isotropic", N, D, 2), rounds=3) if row.failure]
    assert failed == ["torch K @ Q.T"]


@pytest.mark.parametrize("missing", ["faiss", "usearch", "numkong"])
def test_without_a_package_its_systems_are_left_out(monkeypatch, missing):
    monkeypatch.setattr(retrieval, "installed", lambda name: name != missing)
    systems = retrieval.case("isotropic", N, D, 2).systems
    assert list(systems)[:4] == SCANS
    assert not [name for name in systems if name.startswith(missing)]


def test_quantizers_are_spared_where_they_take_many_seconds():
    pytest.importorskip("faiss")
    systems = retrieval.case("isotropic", 100_000, D, 512).systems
    assert "faiss flat" in systems
    assert not [name for name in systems if "SQ" in name]


def test_growth():
    pytest.importorskip("faiss")
    case = retrieval._growing(N, D, 2)
    rows = measure(case, rounds=3)
    assert [row.system for row in rows] == list(retrieval._GROWING)
    assert all(row.failure is None for row in rows)
    assert [(c.shape["B"], c.shape["N"]) for c in retrieval.growth()][-1] == (64, 1_000_000)


def test_data_is_the_same_each_time_and_of_its_kind():
    first, again = (keys_and_queries("clumped", 400, 2, 64) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    keys, queries = first
    assert (keys.shape, queries.shape) == ((400, 64), (2, 64))
    assert 1.5 < keys.mean(0).norm() / (keys - keys.mean(0)).norm(dim=1).mean() < 2.5
    assert keys_and_queries("isotropic", 400, 2, 64)[0].mean(0).norm() < 1
    with pytest.raises(ValueError, match="kind: expected one of isotropic, clumped, hidden; got 'other'"):
        keys_and_queries("other", 1, 1, 1)


def test_large_tables_leave_room_by_fewer_scans():
    ours = [name for name in retrieval.case("isotropic", 100_000, 4096, 1).systems if name.startswith("unike")]
    assert ours == ["unike int8", "unike float32"]


def test_rows_that_are_not_the_unit_keys_are_caught(monkeypatch):
    tables = CosineIndex._tensors
    monkeypatch.setattr(CosineIndex, "_tensors", lambda self: {**tables(self), "rows": tables(self)["rows"] * 1.0001})
    assert all(row.failure for row in measure(retrieval.case("isotropic", N, D, 2), rounds=3))
