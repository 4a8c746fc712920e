"""The release: what no wheel may be or hold, and that the workflow runs what is run by hand."""

from __future__ import annotations

import importlib.util
import re
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("release", ROOT / "tools" / "release.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wheel(folder, name, *files, content=b""):
    with zipfile.ZipFile(folder / name, "w") as archive:
        for file in files:
            archive.writestr(file, content)
    return folder / name


def test_what_a_wheel_may_hold(script, tmp_path):
    extension = "unike_kernels/_C.cpython-311-x86_64-linux-gnu.so"
    good = "unike_kernels-1-cp311-cp311-manylinux_2_28_x86_64.whl"
    script.check(wheel(tmp_path, good, extension, "unike_kernels/__init__.py"))
    wrong = {
        "manylinux wheel": ("unike_kernels-1-cp311-cp311-linux_x86_64.whl", extension),
        "none of .*libgomp": (good, extension, "unike_kernels.libs/libgomp-a1.so.1"),
        r"none of .*a\.cpp": (good, extension, "unike_kernels/a.cpp"),
        "the extension": (good, "unike_kernels/__init__.py"),
    }
    for said, made in wrong.items():
        with pytest.raises(SystemExit, match=said):
            script.check(wheel(tmp_path, *made))
    with pytest.raises(SystemExit, match="no symbols for debuggers"):
        script.check(wheel(tmp_path, good, extension, content=b"\0.shstrtab\0.symtab\0"))


def test_classifiers_name_the_versions_that_wheels_are_built_and_tested_for():
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())["jobs"]["wheels"]
    built = {re.match(r"cp3(\d+)-", python)[1] for python in job["strategy"]["matrix"]["python"]}
    text = (ROOT / "pyproject.toml").read_text()
    assert set(re.findall(r'"Programming Language :: Python :: 3\.(\d+)"', text)) == built
    assert f'requires-python = ">=3.{min(map(int, built))}"' in text


def test_the_workflow_runs_the_script(script):
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())["jobs"]["wheels"]
    (command,) = (step["run"] for step in job["steps"] if "tools/release.py" in step.get("run", ""))
    options = set(re.findall(r"--[a-z]+", command))
    assert options <= set(re.findall(r'"(--[a-z]+)"', (ROOT / "tools/release.py").read_text())) and "--plat" in options
    for test in script.TESTED:
        assert (ROOT / test).is_file()
    assert {each["machine"] for each in job["strategy"]["matrix"]["include"]} == {"x86_64", "aarch64"}
