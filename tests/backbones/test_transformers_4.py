"""The tests of backbones and patching once more, with transformers 4.57 in the place of the version installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TESTS = (
    "tests/backbones", "tests/editing", "tests/nn", "tests/test_folding.py", "tests/test_hot_swap.py",
    "tests/test_interoperability.py", "tests/test_patching.py",
)  # fmt: skip


@pytest.mark.slow
def test_with_transformers_4_57(tmp_path):
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(tmp_path), "transformers==4.57.*"]
    subprocess.run(install, check=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = str(tmp_path)
    version = [sys.executable, "-c", "import transformers; print(transformers.__version__)"]
    assert subprocess.check_output(version, env=environment, text=True).startswith("4.57.")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    print(done.stdout.splitlines()[-1])
