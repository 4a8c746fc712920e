"""The core as other programs use it: without Python, from C, and under the sanitizers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WARNINGS = ["-Wall", "-Wextra", "-Werror"]

pytestmark = pytest.mark.slow


def run(*command: object, **environment: str) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_core(folder: Path, **environment: str) -> list[str]:
    """Builds the core into a folder; the flags that compile and link a program with it."""
    run(sys.executable, "setup.py", "-q", "build_core", "--output", folder, **environment)
    return [f"-I{folder}/include", f"-L{folder}/lib", "-lunike", f"-Wl,-rpath,{folder}/lib"]


def test_the_example_in_c(tmp_path):
    flags = build_core(tmp_path)
    source, program = ROOT / "csrc/examples/search_and_edit.c", tmp_path / "example"
    run("cc", "-std=c11", *WARNINGS, source, *flags, "-lm", "-o", program)
    nearest, shifted, edited, refused = run(program).splitlines()
    assert nearest == "nearest 7 1.000000"
    assert shifted.startswith("alpha 0.50 shifted ")
    assert edited == "edited 1 untouched 1"
    assert refused == "refused 1: the number of queries and their stride must not be negative"


# ThreadSanitizer does not know the barriers of OpenMP: there the core starts threads of its own, with the same tasks.
SANITIZERS = {"address": "-fsanitize=address,undefined -fno-sanitize-recover=all", "thread": "-fsanitize=thread"}


@pytest.mark.parametrize("kind", SANITIZERS)
def test_the_core_under_sanitizers(kind, tmp_path):
    sanitize, extra = SANITIZERS[kind], "-fno-openmp" if kind == "thread" else ""
    flags = build_core(tmp_path, CXXFLAGS=f"{sanitize} {extra} -O1 -g", LDFLAGS=sanitize)
    program = tmp_path / "core_test"
    run("c++", "-std=c++20", *sanitize.split(), "-O1", "-g", "tests/native/core_test.cpp", *flags, "-o", program)
    passed = run(program).splitlines()
    assert passed[0] == "baseline passed" and all(line.endswith(" passed") for line in passed)
