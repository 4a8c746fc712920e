"""The report on a GPU: what its parts tell, where they fail, and that one without an end is stopped."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
XML = """<testsuites><testsuite>
<testcase classname="a" name="good"/>
<testcase classname="a" name="bad"><failure message="off by one"/></testcase>
<testcase classname="a" name="torn"><error message="fixture"/></testcase>
<testcase classname="a" name="other"><skipped message="there is one GPU"/></testcase>
</testsuite></testsuites>"""


def loaded(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script():
    return loaded(ROOT / "tools" / "gpu_report.py")


@pytest.fixture(scope="module")
def run():
    return loaded(ROOT / "run.py")


@pytest.fixture
def parts(script, monkeypatch):
    """Code of the three parts -> main(["--out", folder]) runs these, as if there were a GPU."""

    def set_them(tests="", tuning="", benchmark="", limit=60.0):
        code = {"tests": tests, "tuning": tuning, "benchmark": benchmark}
        monkeypatch.setattr(
            script,
            "parts",
            lambda out: [script.Part(n, ["-c", f"out = {str(out)!r}; {c}"], limit) for n, c in code.items()],
        )
        monkeypatch.setattr("unike_kernels.ops._backend.triton_missing", lambda: None)

    return set_them


def test_all_parts_in_one_report(script, parts, tmp_path):
    parts(
        f"open(out + '/tests.xml', 'w').write({XML!r})",
        "print('patched_ffn: 90 us -> 80 us with stages 3'); print('written: tiles.json')",
        "import os; os.mkdir(out + '/bench'); open(out + '/bench/report.md', 'w').write('# unike bench\\n## Ours\\n')",
    )
    assert script.main(["--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    for line in (
        "1 passed, 2 failed, 1 skipped", "failed: a::bad", "failed: a::torn", "skipped: there is one GPU",
        "patched_ffn: 90 us -> 80 us with stages 3", "## Ours", f"torch {torch.__version__}",
    ):  # fmt: skip
        assert line in text
    assert "written: tiles.json" not in text
    found = json.loads((tmp_path / "report.json").read_text())
    assert [(p["title"], p["status"]) for p in found["parts"]] == [("tests", 0), ("tuning", 0), ("benchmark", 0)]


def test_a_part_that_fails_shows_its_output_and_the_others_run(script, parts, tmp_path):
    parts("import sys; print('a trace'); sys.exit(3)", "print('op: 2 us -> 1 us')")
    assert script.main(["--out", str(tmp_path)]) == 1
    text = (tmp_path / "report.md").read_text()
    assert "| tests | FAILED, exit status 3 |" in text
    assert "a trace" in text and "op: 2 us -> 1 us" in text and "no result" in text


def test_results_of_an_earlier_run_are_not_reported(script, parts, tmp_path):
    (tmp_path / "bench").mkdir()
    (tmp_path / "tests.xml").write_text(XML)
    (tmp_path / "bench" / "report.md").write_text("# unike bench\n## Old\n")
    parts(tests="import sys; sys.exit(3)", benchmark="import sys; sys.exit(3)")
    assert script.main(["--out", str(tmp_path)]) == 1
    text = (tmp_path / "report.md").read_text()
    assert "no result" in text and "1 passed" not in text and "Old" not in text


def test_a_part_without_an_end_is_stopped(script, parts, tmp_path):
    parts("import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])", limit=1.5)
    assert script.main(["--out", str(tmp_path)]) == 1
    assert "| tests | stopped after 2 s |" in (tmp_path / "report.md").read_text()


def test_the_real_parts_are_commands_that_exist(script, tmp_path):
    tests, tuning, benchmark = script.parts(tmp_path)
    assert tests.command[:4] == ["-m", "pytest", "-m", "gpu"]
    for part in (tuning, benchmark):
        shown = script.subprocess.run([sys.executable, *part.command[:3], "--help"], capture_output=True, text=True)
        assert shown.returncode == 0
    assert "--device" in shown.stdout and "--out" in shown.stdout
    assert sum(part.limit for part in (tests, tuning, benchmark)) < 600


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(script, capsys, tmp_path):
    assert script.main(["--out", str(tmp_path / "out")]) == 1
    assert "there is no GPU: torch" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tests_of_a_gpu_fail_without_one(script):
    """They do not pass by being skipped."""
    command = [
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-q",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        "tests/cuda_tests/test_device.py",
    ]
    done = script.subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "there is no GPU: torch" in done.stdout and " passed" not in done.stdout


class Driver:
    def __init__(self, version):
        self.version = version

    def cuDriverGetVersion(self, address):  # noqa: N802
        address._obj.value = self.version


@pytest.mark.parametrize(
    ("version", "index", "told"),
    [
        (13000, None, None),
        (12080, None, "the driver is that of CUDA 12.8, torch==2.13.0 needs 13.0"),
        (12080, "https://an.index/cu128", None),
        (None, None, "libcuda.so.1 cannot be loaded"),
    ],
)
def test_the_driver_is_asked_first(run, monkeypatch, version, index, told):
    def load(name):
        if version is None:
            raise OSError(name)
        return Driver(version)

    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.delenv("TORCH_INDEX_URL", raising=False)
    if index:
        monkeypatch.setenv("TORCH_INDEX_URL", index)
    monkeypatch.setattr(run.Path, "exists", lambda path: False)
    reason = run.driver_missing()
    assert (reason is None) if told is None else (told in reason)


def test_gpus_of_amd_need_an_index(run, monkeypatch):
    monkeypatch.setattr(run.Path, "exists", lambda path: str(path) == "/dev/kfd")
    monkeypatch.delenv("TORCH_INDEX_URL", raising=False)
    assert "ROCm in TORCH_INDEX_URL" in run.driver_missing()
    monkeypatch.setenv("TORCH_INDEX_URL", "https://an.index/rocm7.0")
    assert run.driver_missing() is None
