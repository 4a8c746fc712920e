"""Builds unike_kernels._C: the native core (csrc/) and its bindings (python/src/), compiled by ninja, without torch."""

from __future__ import annotations

import functools
import os
import platform
import re
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
ISA_FOLDER = Path("csrc/cpu/isa")
CXX_FLAGS = shlex.split(
    # No contraction: the canonical arithmetic must not depend on what a compiler chooses to fuse.
    "-std=c++20 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -pthread -fopenmp -Wall -Wextra"
)
# Warnings are errors for those who can mend them, not for users with a newer compiler.
WERROR = os.environ.get("UNIKE_WERROR", "") == "1"

# The instruction sets of a machine beside its baseline, and the flags of csrc/cpu/isa/LEVEL.cpp; nothing else gets any.
# These files run where csrc/cpu/isa.cpp has found the same features, and keep their functions in unnamed namespaces:
# the linker could otherwise take their copy of a shared inline function. In them multiplications and additions may be
# fused: canonical products are exact.
AVX2 = "-mavx2 -mfma -mf16c -ffp-contract=fast"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
ISA_FLAGS = {
    "x86_64": {
        "avx2": AVX2,
        "avx512": AVX512,
        "avx512vnni": f"{AVX512} -mavx512vnni",
        "avx512bf16": f"{AVX512} -mavx512vnni -mavx512bf16",
    },
    "aarch64": {
        "neon": "-march=armv8-a -ffp-contract=fast",
        "dotprod": "-march=armv8.2-a+dotprod -ffp-contract=fast",
        "i8mm": "-march=armv8.2-a+dotprod+i8mm -ffp-contract=fast",
    },
}


@functools.cache
def isa_flags() -> dict[str, list[str]]:
    """The flags of each level, by its file's name, for the machine that the compiler compiles for."""
    try:
        command = [*shlex.split(os.environ.get("CXX", "c++")), "-dumpmachine"]
        machine = subprocess.run(command, capture_output=True, text=True, check=True).stdout.partition("-")[0]
    except OSError:
        machine = platform.machine()  # no compiler: a source distribution needs none
    return {level: shlex.split(flags) for level, flags in ISA_FLAGS.get(machine, {}).items()}


CUDA_ARCHS = ("80", "86", "89", "90", "100", "120")


class Cuda:
    """The CUDA toolkit: nvcc of CUDA_HOME, or else of the PATH.

    UNIKE_CUDA=0 does without it, UNIKE_CUDA=1 makes it an error not to find it. UNIKE_CUDA_ARCHS="80;90" compiles for
    these architectures instead of all; the PTX of the first one serves those between them, of the last one later ones.
    """

    def __init__(self, nvcc: str) -> None:
        """Asks nvcc where its parts are, and which architectures it knows."""
        self.nvcc = nvcc
        told = self._run("-dryrun", "-c", "any.cu")
        self.includes, self.libraries = ([*re.findall(rf'"(-{k}[^"]+)"', told)] for k in "IL")
        given = os.environ.get("UNIKE_CUDA_ARCHS")
        known = re.findall(r"sm_(\d+)", self._run("--list-gpu-code"))
        self.archs = given.split(";") if given else [arch for arch in CUDA_ARCHS if arch in known]

    def _run(self, *arguments: str) -> str:
        done = subprocess.run([self.nvcc, *arguments], capture_output=True, text=True)
        return done.stdout + done.stderr

    @classmethod
    def find(cls) -> Cuda | None:
        """The toolkit that this build uses."""
        wanted, home = os.environ.get("UNIKE_CUDA", ""), os.environ.get("CUDA_HOME")
        if wanted not in ("", "0", "1"):
            raise SystemExit(f"UNIKE_CUDA: expected 0 or 1, got {wanted!r}")
        nvcc = None if wanted == "0" else shutil.which("nvcc", path=f"{home}/bin" if home else None)
        if nvcc is None and wanted == "1":
            raise SystemExit(f"UNIKE_CUDA=1: there is no nvcc in {f'{home}/bin' if home else 'the PATH'}")
        return None if nvcc is None else cls(nvcc)

    def compile_flags(self) -> list[str]:
        """The flags of a .cu file."""
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in self.archs]
        codes += [f"-gencode=arch=compute_{a},code=compute_{a}" for a in sorted({self.archs[0], self.archs[-1]})]
        warnings = shlex.split("-Xptxas --warn-on-spills")
        if WERROR:
            warnings += shlex.split("-Xptxas -Werror --Werror all-warnings")
        host = shlex.split("-Xcompiler -fPIC -Xcompiler -fvisibility=hidden")
        return ["-std=c++20", "-O3", *codes, *warnings, *host, *(f"-I{ROOT / f}" for f in ("csrc", "csrc/include"))]


def find_sources(*folders: str) -> list[str]:
    """All sources, relative to the root; of the instruction sets' those that the target machine may have."""
    suffixes = (".cpp", ".cu") if Cuda.find() else (".cpp",)
    paths = [path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*")]
    levels = {"baseline", *isa_flags()}
    wanted = [path for path in paths if path.parent != ISA_FOLDER or path.stem in levels]
    return sorted(str(path) for path in wanted if path.suffix in suffixes)


def compile_flags(source: Path, cuda: Cuda | None) -> list[str]:
    """The flags of one file: the core sees no Python, and the bindings see only the public headers of the core."""
    if source.suffix == ".cu":
        assert cuda is not None
        return cuda.compile_flags()
    flags = [*CXX_FLAGS, *(["-Werror"] if WERROR else []), f"-I{ROOT / 'csrc/include'}"]
    if source.parent == ISA_FOLDER:
        flags += isa_flags().get(source.stem, [])
    if cuda is not None and str(source.parent) == "csrc/cuda":
        flags += ["-DUNIKE_WITH_CUDA", *cuda.includes]
    if source.parts[0] == "csrc":
        flags.append(f"-I{ROOT / 'csrc'}")
    else:
        # -isystem: the warnings of other people's headers are none of ours.
        flags += [f"-isystem{folder}" for folder in (sysconfig.get_path("include"), pybind11.get_include())]
    return flags + shlex.split(os.environ.get("CXXFLAGS", ""))


def link(sources: list[str], target: Path, build_dir: Path) -> None:
    """Compiles the sources and links them into one shared object, in one ninja run: in parallel, only what changed."""
    compiler, cuda = os.environ.get("CXX", "c++"), Cuda.find()
    runtime = [] if cuda is None else [*cuda.libraries, "-lcudart_static", "-ldl", "-lrt"]
    build_dir.mkdir(parents=True, exist_ok=True)
    with open(build_dir / "build.ninja", "w") as file:
        ninja = Writer(file)
        ninja.rule("compile", f"{compiler} $flags -MMD -MF $out.d -c $in -o $out", "compile $in", "$out.d", deps="gcc")
        ninja.rule("link", f"{compiler} -shared -pthread -fopenmp $in $flags -o $out", "link $out")
        if cuda is not None:
            ninja.rule("cuda", f"{cuda.nvcc} $flags -MD -MF $out.d -c $in -o $out", "nvcc $in", "$out.d", deps="gcc")
        objects = []
        for source in map(Path, sources):
            flags, rule = (
                {"flags": shlex.join(compile_flags(source, cuda))},
                "cuda" if source.suffix == ".cu" else "compile",
            )
            objects += ninja.build(f"{source}.o", rule, str(ROOT / source), variables=flags)
        flags = {"flags": shlex.join([*runtime, *shlex.split(os.environ.get("LDFLAGS", ""))])}
        ninja.build(str(target), "link", objects, variables=flags)
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
