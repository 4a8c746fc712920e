"""The file of results is one that pytest-benchmark reads."""

import json
import subprocess
import sys

import pytest
from pytest_benchmark.logger import Logger
from pytest_benchmark.stats import Stats
from pytest_benchmark.storage.file import FileStorage
from unike_bench.report import results
from unike_bench.report.results import Recorded

from unike_kernels.artifacts.files import write_text

STAMP = {"CPU": "a CPU", "commit": "0123456789ab, with changes", "date": "2026-01-01 12:00 UTC"}


@pytest.fixture
def file(rows, tmp_path):
    path = tmp_path / "new" / "bench.json"
    write_text(path, json.dumps(results.document(rows, STAMP)))
    return path


def test_pytest_benchmarks_loader_reads_it(file):
    found = list(FileStorage(file.parent, Logger()).load_benchmarks(str(file)))
    assert [b["name"] for b in found] == [
        "test_case[retrieval-N9-unike int8]",
        "test_case[retrieval-N9-faiss flat]",
        "test_case[decode-T1-unike patched]",
    ]
    assert set(Stats.fields) <= set(found[0])
    assert found[0]["group"] == "a retrieval"
    assert found[0]["median"] == 2e-3


def test_pytest_benchmarks_compare_prints_it(file):
    command = [sys.executable, "-m", "pytest_benchmark", "compare", str(file), "--columns=median,iqr,outliers"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=file.parent)
    assert done.returncode == 0, done.stderr
    assert "test_case[retrieval-N9-unike int8]" in done.stdout


def test_the_figures_are_pytest_benchmarks(make_row):
    times = [5.0, 1.0, 2.0, 30.0, 3.0, 4.0, 2.5]
    (found,) = results.document([make_row(seconds=times)], STAMP)["benchmarks"]
    theirs = Stats()
    theirs.data = times
    same = set(Stats.fields) - {"q1", "q3", "iqr"}  # which it interpolates in a way of its own
    assert {n: found["stats"][n] for n in same} == {n: pytest.approx(getattr(theirs, n)) for n in same}
    assert found["stats"]["data"] == times


def test_what_a_row_says_beside_its_times(file):
    document = json.loads(file.read_text())
    first, second, third = document["benchmarks"]
    assert first["extra_info"] == {
        "op": "retrieval", "N": 9, "system": "unike int8", "role": "ours", "speedup": 2.5,
        "speedup_quartiles": [2.0, 3.0], "against": "faiss flat", "read": 5e-4, "bound": 1e-3, "reached": 0.5,
        "checked": True,
    }  # fmt: skip
    assert second["extra_info"]["recall"] == 0.999
    assert third["extra_info"]["over_base"] == 1.25 and third["extra_info"]["over_base_quartiles"] == [0.99, 1.3]
    assert document["failed"] == {
        "retrieval-N9-torch": "AssertionError: other | ids",
        "ffn-d8-unike ffn": "AssertionError: off by one",
    }
    assert document["machine_info"] == STAMP
    assert (document["commit_info"]["id"], document["commit_info"]["dirty"]) == ("0123456789ab", True)


def test_loads_what_it_wrote(file):
    machine, found = results.load(file)
    assert machine == STAMP
    assert found["retrieval-N9-unike int8"] == Recorded(2e-3, pytest.approx(5e-4))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"benchmarks": [{"param": "a"}]}', '{"benchmarks": []}'])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ValueError, match=r"other\.json: expected a file in pytest-benchmark's schema"):
        results.load(tmp_path / "other.json")
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        results.load(tmp_path / "none.json")
