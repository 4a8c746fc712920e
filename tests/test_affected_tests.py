"""Which tests a change touches, in repositories made for it."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("affected_tests", ROOT / "tools" / "affected_tests.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """commit(name, hour): writes a file and commits it at that hour; the folder is `commit.root`."""
    monkeypatch.delenv("UNIKE_CI_BASE", raising=False)

    def git(*arguments, date="2026-01-01T00:00:00Z"):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        environment = {"GIT_AUTHOR_DATE": date, "GIT_COMMITTER_DATE": date, "PATH": "/usr/bin:/bin"}
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True, env=environment)

    def commit(name, hour):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{hour}")
        git("add", "-A")
        git("commit", "-m", name, date=f"2026-01-01T{hour:02}:00:00Z")

    git("init", "-b", "main")
    commit.root, commit.git = tmp_path, git
    return commit


def test_the_table_names_what_is_there(script):
    for source, tests in script.EXERCISED_BY.items():
        for path in (source, *tests):
            assert (ROOT / path).exists(), path


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        ([], []),
        (["README.md", "tests/conftest.py"], []),
        (["csrc/cpu/rows.h"], ["tests/test_core.py", "tests/test_native.py"]),
        (["unike_kernels/ops/_triton.py"], ["tests/ops"]),
        (["tests/cuda_tests/plan.cpp"], ["tests/cuda_tests"]),
        (["tests/ops/test_check.py", "tests/ops/test_gone.py"], ["tests/ops/test_check.py"]),
        (["tests/ops/test_check.py", "unike_kernels/ops/_check.py"], ["tests/ops"]),
        (["tools/ptxsim/ptxsim/warps.py"], ["tests/cuda_tests", "tests/ops/gpu"]),
        (["evaluation/unike_eval/suite.py", "evaluation/tests/test_metrics.py"], ["evaluation/tests"]),
        (["benchmarks/tests/test_stamp.py"], ["benchmarks/tests/test_stamp.py"]),
        (None, ["tests", "benchmarks/tests", "evaluation/tests"]),
    ],
)
def test_from_files_to_tests(script, changed, wanted):
    assert script.affected(changed) == wanted


def test_on_a_branch_the_change_begins_where_it_left_main(script, repository):
    repository("old", 1)
    repository.git("update-ref", "refs/remotes/origin/main", "HEAD")
    repository("new", 2)
    repository("newer", 20)
    assert script.changed_files(repository.root) == ["new", "newer"]


def test_in_a_clone_of_main_the_change_is_that_of_the_last_hours(script, repository):
    for name, hour in (("old", 1), ("new", 9), ("newer", 12)):
        repository(name, hour)
    repository.git("update-ref", "refs/remotes/origin/main", "HEAD")
    assert script.changed_files(repository.root) == ["new", "newer"]


def test_a_given_base_goes_before(script, repository, monkeypatch):
    for name, hour in (("old", 1), ("new", 9), ("newer", 12)):
        repository(name, hour)
    monkeypatch.setenv("UNIKE_CI_BASE", "HEAD~1")
    assert script.changed_files(repository.root) == ["newer"]
    monkeypatch.setenv("UNIKE_CI_BASE", "nonsense")
    assert script.changed_files(repository.root) is None


def test_where_git_cannot_tell_everything_has_changed(script, repository, tmp_path_factory):
    repository("first", 1)
    assert script.changed_files(repository.root) is None  # there is nothing before it
    assert script.changed_files(tmp_path_factory.mktemp("none")) is None
