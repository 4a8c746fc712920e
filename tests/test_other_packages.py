"""Tests once more with packages that are not installed with the others: each in an environment of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENTS = {
    "transformers 4.57": (
        ["transformers==4.57.*"],
        [
            "tests/backbones", "tests/editing", "tests/nn", "tests/test_folding.py", "tests/test_hot_swap.py",
            "tests/test_interoperability.py", "tests/test_patching.py",
        ],
    ),
    "quantised weights": (
        ["--no-deps", "torchao==0.18.0", "bitsandbytes==0.50.2"],  # beside the others, transformers imports them always
        ["tests/test_interoperability.py"],
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_in_an_environment_of_its_own(name, tmp_path):
    packages, tests = ENVIRONMENTS[name]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(tmp_path), *packages], check=True
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment["PYTHONPATH"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *tests],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert name != "quantised weights" or "could not import" not in done.stdout, done.stdout
    versions = [sys.executable, "-c", "import transformers; print(transformers.__version__)"]
    found = subprocess.check_output(versions, env=environment, text=True)
    assert found.startswith("4.57.") == (name == "transformers 4.57")
