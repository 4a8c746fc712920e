"""Recorded times come out of pytest-benchmark as they went in."""

import json
import os
import subprocess
import sys

import pytest

from unike_kernels.bench.replay import Replay


def test_each_round_takes_what_was_recorded():
    replay = Replay()
    for times in ([0.25, 1e-9, 3.0], [7.0]):
        replay.load(times)
        assert [-replay() + replay() for _ in times] == times


@pytest.mark.slow
def test_in_pytest_benchmark(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "from unike_kernels.bench.replay import Replay\n"
        "replay = Replay()\n"
        "@pytest.mark.benchmark(timer=replay)\n"
        "@pytest.mark.parametrize('times', [[0.5, 0.125, 0.25], [1.0, 2.0, 4.0, 8.0]])\n"
        "def test_it(benchmark, times):\n"
        "    replay.load(times)\n"
        "    benchmark.pedantic(lambda: None, rounds=len(times), iterations=1)\n"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--benchmark-json=out.json",
        "test_it.py",
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # of workers
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout
    found = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    assert [b["stats"]["data"] for b in found] == [[0.5, 0.125, 0.25], [1.0, 2.0, 4.0, 8.0]]
    assert [b["options"]["timer"] for b in found] == ["interleaved"] * 2
