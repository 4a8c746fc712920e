#!/usr/bin/env python3
"""Prints the tests that a change touches, a path a line: those whose slow tests .ci/run runs beside the smoke part.

python3 tools/affected_tests.py            paths of tests; nothing where the change touches none
python3 tools/affected_tests.py --ptxsim   instead: "yes" if the change touches tools/ptxsim, else "no"

The change is what lies between a base and HEAD: the commit that UNIKE_CI_BASE names; else the merge base with
origin/main; else, in a clone whose origin/main is HEAD itself, the state before the commits of the last HOURS hours
before HEAD, which is longer than one submission is worked on. Where git cannot tell, everything counts as changed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOURS = 4
PACKAGE, TESTS, PTXSIM = "unike_kernels", "tests", "tools/ptxsim"
ALL_TESTS = (TESTS, "benchmarks/tests", "evaluation/tests")

# What is changed -> what exercises it, beside the tests that mirror it: unike_kernels/<area> has tests/<area> and
# tests/test_<area>.py. Folders end with a slash, and all lines that fit count. Edit this where something moves.
EXERCISED_BY: dict[str, tuple[str, ...]] = {
    "csrc/": ("tests/test_core.py", "tests/test_native.py"),
    "csrc/cuda/": ("tests/cuda_tests",),
    "python/src/": ("tests/test_packaging.py",),
    "setup.py": ("tests/test_build.py", "tests/test_core.py", "tests/test_packaging.py"),
    "pyproject.toml": ("tests/test_packaging.py",),
    "constraints.txt": ("tests/test_other_packages.py",),
    "evaluation/scripts/": ("evaluation/tests/toy",),
    "docs/tutorials/": ("tests/test_docs.py",),
    "docs/how-to/": ("tests/test_docs.py",),
    "docs/pictures/": ("tests/test_pictures.py",),
    "tools/pictures.py": ("tests/test_pictures.py",),
    "docs/gpu-bounds.md": ("tests/ops/gpu",),
    "tests/native/": ("tests/test_core.py",),
    "unike_kernels/backbones/": ("tests/test_other_packages.py",),
    "unike_kernels/serving/vllm.py": ("tests/test_other_packages.py",),
    "unike_kernels/serving/sglang.py": ("tests/serving/test_sglang_requests.py", "tests/test_other_packages.py"),
    "unike_kernels/serving/operators.py": ("tests/serving", "tests/test_other_packages.py"),
    "unike_kernels/serving/served.py": ("tests/serving", "tests/test_other_packages.py"),
    "evaluation/unike_eval/": ("evaluation/tests",),
    "evaluation/unike_eval/demo.py": ("tests/cli", "tests/test_pictures.py"),
    "evaluation/unike_eval/demo_picture.py": ("tests/test_pictures.py",),
    "benchmarks/unike_bench/": ("benchmarks/tests",),
    "unike_kernels/_native.py": ("tests/test_native.py",),
    "tools/ptxsim/ptxsim/": ("tests/ops/gpu", "tests/cuda_tests"),
}


def git(*arguments: str, root: Path) -> str | None:
    """What git says; None where it fails or is missing."""
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def base_of(root: Path) -> str | None:
    """The commit before the change; None where git cannot tell."""
    head = git("rev-parse", "HEAD", root=root)
    if given := os.environ.get("UNIKE_CI_BASE"):
        return git("rev-parse", "--verify", f"{given}^{{commit}}", root=root)
    landed = git("merge-base", "origin/main", "HEAD", root=root)
    if landed and landed != head:
        return landed
    newest = git("log", "-1", "--format=%ct", root=root)
    if not newest:
        return None
    since = int(newest) - HOURS * 3600
    recent = git("rev-list", "--first-parent", f"--since={since}", "HEAD", root=root)
    return git("rev-parse", "--verify", f"{recent.splitlines()[-1]}^", root=root) if recent else None


def changed_files(root: Path = ROOT) -> list[str] | None:
    """The files that the change touches, deleted ones too; None where git cannot tell."""
    base = base_of(root)
    names = git("diff", "--name-only", "--no-renames", base, "HEAD", root=root) if base else None
    return None if names is None else names.splitlines()


def exercising(path: str) -> set[str]:
    """The tests of one file, whether they exist or not."""
    parts = path.split("/")
    found = {
        test
        for source, tests in EXERCISED_BY.items()
        if path == source or (source.endswith("/") and path.startswith(source))
        for test in tests
    }
    if parts[0] == PACKAGE and len(parts) > 1:
        area = parts[1].removesuffix(".py")
        found |= {f"{TESTS}/{area}", f"{TESTS}/test_{area}.py"}
    elif path.startswith(tuple(f"{tests}/" for tests in ALL_TESTS)):
        if parts[-1].startswith("test_"):
            found.add(path)
        elif "/".join(parts[:-1]) != TESTS:  # a helper serves its folder
            found.add("/".join(parts[:-1]))
    return found


def affected(changed: Iterable[str] | None, root: Path = ROOT) -> list[str]:
    """The tests of the changed files, without those inside of others; all where the change is not known."""
    if changed is None:
        return list(ALL_TESTS)
    tests = {test for path in changed for test in exercising(path) if (root / test).exists()}
    return sorted(test for test in tests if not any(test.startswith(f"{other}/") for other in tests))


def main(arguments: list[str]) -> int:
    """Prints what the docstring of this file says."""
    changed = changed_files()
    if arguments == ["--ptxsim"]:
        print("yes" if changed is None or any(path.startswith(f"{PTXSIM}/") for path in changed) else "no")
    elif arguments:
        sys.exit((__doc__ or "").strip())
    else:
        for test in affected(changed):
            print(test)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
