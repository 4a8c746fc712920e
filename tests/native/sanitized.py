"""Programs with the core inside, under the address and undefined-behaviour sanitizers, compiled once for all tests.

Only the baseline kernels, without optimisation: it is memory that is looked at, and compiling is what takes long. ninja
keeps the objects in build/sanitized, so that a later run compiles what has changed.
"""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

from ninja.ninja_syntax import Writer

ROOT = Path(__file__).resolve().parents[2]
FLAGS = (
    "-std=c++20 -O0 -g1 -pthread -fopenmp -ffp-contract=off -Wall -Wextra -Werror -DUNIKE_ONLY_BASELINE "
    f"-fsanitize=address,undefined -fno-sanitize-recover=all -I{ROOT}/csrc -I{ROOT}/csrc/include"
)
CORE = [
    *sorted(ROOT.glob("csrc/common/*.cpp")),
    *sorted(ROOT.glob("csrc/cpu/*.cpp")),
    *sorted(ROOT.glob("csrc/cpu/isa/baseline.cpp")),
]


def program(source: str) -> Path:
    """The executable of a source file, by its path from the root; built if something has changed."""
    folder = ROOT / "build" / "sanitized"
    folder.mkdir(parents=True, exist_ok=True)
    name = Path(source).stem
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes
        with open(folder / f"{name}.ninja", "w") as file:
            ninja = Writer(file)
            ninja.rule("compile", f"c++ {FLAGS} -MMD -MF $out.d -c $in -o $out", deps="gcc", depfile="$out.d")
            ninja.rule("link", f"c++ {FLAGS} $in -o $out")
            objects = []
            for path in (*CORE, ROOT / source):
                objects += ninja.build(f"{path.relative_to(ROOT)}.o", "compile", str(path))
            ninja.build(name, "link", objects)
        done = subprocess.run(
            [sys.executable, "-m", "ninja", "-C", str(folder), "-f", f"{name}.ninja"], capture_output=True, text=True
        )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / name
