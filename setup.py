"""Builds unike_kernels._C: the native core (csrc/) and its bindings (python/src/), compiled by ninja, without torch."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import ClassVar

import pybind11
from ninja.ninja_syntax import Writer
from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CXX_FLAGS = shlex.split(
    # No contraction: the canonical arithmetic must not depend on what a compiler chooses to fuse.
    "-std=c++20 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -pthread -fopenmp -Wall -Wextra -Werror"
)
# Only the files of these folders get these flags. They run after unike_cpu_isa() has found the same features, and keep
# their functions in unnamed namespaces: the linker could otherwise take their copy of a shared inline function.
# In them multiplications and additions may be fused: canonical products are exact.
AVX2 = "-mavx2 -mfma -mf16c -ffp-contract=fast"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
X86_ISA_FLAGS = {
    "csrc/cpu/avx2": shlex.split(AVX2),
    "csrc/cpu/avx512": shlex.split(AVX512),
    "csrc/cpu/avx512vnni": shlex.split(f"{AVX512} -mavx512vnni"),
    "csrc/cpu/avx512bf16": shlex.split(f"{AVX512} -mavx512vnni -mavx512bf16"),
}


def find_sources(*folders: str) -> list[str]:
    """All C++ files, relative to the root; the per-ISA ones only where the target machine has that ISA."""
    paths = [path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*.cpp")]
    is_x86 = platform.machine() == "x86_64"
    return sorted(str(path) for path in paths if is_x86 or str(path.parent) not in X86_ISA_FLAGS)


def compile_flags(source: Path) -> list[str]:
    """The flags of one file: the core sees no Python, and the bindings see only the public headers of the core."""
    flags = [*CXX_FLAGS, f"-I{ROOT / 'csrc/include'}", *X86_ISA_FLAGS.get(str(source.parent), [])]
    if source.parts[0] == "csrc":
        flags.append(f"-I{ROOT / 'csrc'}")
    else:
        # -isystem: the warnings of other people's headers are not errors of ours.
        flags += [f"-isystem{folder}" for folder in (sysconfig.get_path("include"), pybind11.get_include())]
    return flags + shlex.split(os.environ.get("CXXFLAGS", ""))


def link(sources: list[str], target: Path, build_dir: Path) -> None:
    """Compiles the sources and links them into one shared object, in one ninja run: in parallel, only what changed."""
    compiler = os.environ.get("CXX", "c++")
    build_dir.mkdir(parents=True, exist_ok=True)
    with open(build_dir / "build.ninja", "w") as file:
        ninja = Writer(file)
        ninja.rule("compile", f"{compiler} $flags -MMD -MF $out.d -c $in -o $out", "compile $in", "$out.d", deps="gcc")
        ninja.rule("link", f"{compiler} -shared -pthread -fopenmp $in $flags -o $out", "link $out")
        objects = []
        for source in map(Path, sources):
            flags = {"flags": shlex.join(compile_flags(source))}
            objects += ninja.build(str(source.with_suffix(".o")), "compile", str(ROOT / source), variables=flags)
        ninja.build(str(target), "link", objects, variables={"flags": os.environ.get("LDFLAGS", "")})
    subprocess.run([sys.executable, "-m", "ninja", "-C", str(build_dir)], check=True)


class BuildExt(build_ext):
    """The extension: core and bindings."""

    def build_extension(self, ext: Extension) -> None:
        """Links it where setuptools wants it."""
        link(ext.sources, Path(self.get_ext_fullpath(ext.name)).resolve(), Path(self.build_temp).resolve())


class BuildCore(Command):
    """The core alone, for programs without Python: `python setup.py build_core --output DIR` puts lib/libunike.so and
    include/unike/ there."""

    user_options: ClassVar = [("output=", None, "folder of lib/ and include/")]

    def initialize_options(self) -> None:
        """No folder yet."""
        self.output: str | None = None

    def finalize_options(self) -> None:
        """The folder must be given."""
        if self.output is None:
            raise SystemExit("build_core: --output DIR is missing")

    def run(self) -> None:
        """Compiles csrc/ and copies the public headers."""
        assert self.output is not None
        output = Path(self.output).resolve()
        (output / "lib").mkdir(parents=True, exist_ok=True)
        link(find_sources("csrc"), output / "lib" / "libunike.so", output / "build")
        shutil.copytree(ROOT / "csrc/include", output / "include", dirs_exist_ok=True)


setup(
    ext_modules=[Extension("unike_kernels._C", find_sources("csrc", "python/src"))],
    cmdclass={"build_ext": BuildExt, "build_core": BuildCore},
)
