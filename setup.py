"""Builds unike_kernels._C: the native core (csrc/) and its bindings (python/src/), compiled by ninja, without torch.

Settings are variables of the environment:

UNIKE_NATIVE=0       nothing is compiled: the package works by its definitions in plain torch, slowly. Without a C++
                     compiler that is so as well, unless UNIKE_NATIVE=1.
UNIKE_CUDA=0, 1      no CUDA kernels; or those of all architectures, as a release has them, and an error without nvcc.
                     By default they are compiled for the GPUs of this machine, where it has nvcc and some.
UNIKE_CUDA_ARCHS     compile for these, "80;90", whatever this machine has.
UNIKE_WERROR=1       warnings are errors.
CXX, CXXFLAGS, LDFLAGS, CUDA_HOME
"""

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
import tempfile
from pathlib import Path
from typing import ClassVar

import setuptools
from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TOOLS = 'python3 -m pip install "setuptools>=77" ninja'  # which pip brings along for `pip install .`
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
        "avxvnni": f"{AVX2} -mavxvnni",
        "avx512": AVX512,
        "avx512vnni": f"{AVX512} -mavx512vnni",
        "avx512bf16": f"{AVX512} -mavx512vnni -mavx512bf16",
        "amx": f"{AVX512} -mavx512vnni -mavx512bf16 -mamx-tile -mamx-int8",
    },
    "aarch64": {
        "neon": "-march=armv8-a -ffp-contract=fast",
        "dotprod": "-march=armv8.2-a+dotprod -ffp-contract=fast",
        "i8mm": "-march=armv8.2-a+dotprod+i8mm -ffp-contract=fast",
    },
}


def compiler() -> list[str]:
    """The C++ compiler, as a command."""
    return shlex.split(os.environ.get("CXX", "c++"))


def native() -> bool:
    """Whether the extension is compiled."""
    wanted = setting("UNIKE_NATIVE")
    if wanted == "0" or shutil.which(compiler()[0]):
        return wanted != "0"
    missing = f"there is no C++ compiler {compiler()[0]!r}: install GCC 11, clang 14 or later, or name one in CXX"
    if wanted == "1":
        raise SystemExit(f"UNIKE_NATIVE=1: {missing}")
    print(f"unike_kernels: nothing is compiled, everything will run in plain torch, slowly; {missing}", file=sys.stderr)
    return False


def setting(name: str) -> str:
    """ "0", "1", or "" where the environment does not say. Exits for anything else."""
    given = os.environ.get(name, "")
    if given not in ("", "0", "1"):
        raise SystemExit(f"{name}: expected 0 or 1, got {given!r}")
    return given


@functools.cache
def isa_flags() -> dict[str, list[str]]:
    """The flags of each level, by its file's name, for the machine that the compiler compiles for."""
    try:
        told = subprocess.run([*compiler(), "-dumpmachine"], capture_output=True, text=True, check=True).stdout
        machine = told.partition("-")[0]
    except (OSError, subprocess.CalledProcessError):
        machine = platform.machine()  # no compiler: a source distribution needs none
    return {level: shlex.split(flags) for level, flags in ISA_FLAGS.get(machine, {}).items()}


CUDA_ARCHS = ("80", "86", "89", "90", "100", "120")


class Cuda:
    """The CUDA toolkit, and the architectures that it compiles for.

    The PTX of the first one serves those between them, of the last one later ones.
    """

    def __init__(self, nvcc: str) -> None:
        """Asks nvcc where its parts are, and which architectures it knows."""
        self.nvcc = nvcc
        told = self._run("-dryrun", "-c", "any.cu")
        self.includes, self.libraries = ([*re.findall(rf'"(-{k}[^"]+)"', told)] for k in "IL")
        known = re.findall(r"sm_(\d+)", self._run("--list-gpu-code"))
        given = os.environ.get("UNIKE_CUDA_ARCHS")
        if given:
            self.archs = given.split(";")
        elif setting("UNIKE_CUDA") == "1":
            self.archs = [arch for arch in CUDA_ARCHS if arch in known]
        else:
            self.archs = [arch for arch in archs_of_gpus() if arch in known and int(arch) >= int(CUDA_ARCHS[0])]

    def _run(self, *arguments: str) -> str:
        done = subprocess.run([self.nvcc, *arguments], capture_output=True, text=True)
        return done.stdout + done.stderr

    def compile_flags(self) -> list[str]:
        """The flags of a .cu file."""
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in self.archs]
        codes += [f"-gencode=arch=compute_{a},code=compute_{a}" for a in sorted({self.archs[0], self.archs[-1]})]
        warnings = shlex.split("-Xptxas --warn-on-spills")
        if WERROR:
            warnings += shlex.split("-Xptxas -Werror --Werror all-warnings")
        host = shlex.split("-Xcompiler -fPIC -Xcompiler -fvisibility=hidden")
        return ["-std=c++20", "-O3", *codes, *warnings, *host, *(f"-I{ROOT / f}" for f in ("csrc", "csrc/include"))]


@functools.cache
def cuda() -> tuple[Cuda | None, str]:
    """The toolkit that this build uses, nvcc of CUDA_HOME or else of the PATH; or why it uses none."""
    wanted, home = setting("UNIKE_CUDA"), os.environ.get("CUDA_HOME")
    if wanted == "0":
        return None, "UNIKE_CUDA=0"
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if nvcc is None:
        missing = f"there is no nvcc in {f'{home}/bin' if home else 'the PATH'}"
        if wanted == "1":
            raise SystemExit(f"UNIKE_CUDA=1: {missing}")
        return None, missing
    found = Cuda(nvcc)
    return (found, "") if found.archs else (None, "nvcc is here, but no GPU that it knows; UNIKE_CUDA=1 builds them")


def archs_of_gpus() -> list[str]:
    """Of this machine, such as "90", ascending."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return sorted({"".join(numbers) for numbers in re.findall(r"^(\d+)\.(\d)$", told, re.MULTILINE)}, key=int)


def find_sources(*folders: str) -> list[str]:
    """All sources, relative to the root; of the instruction sets' those that the target machine may have."""
    suffixes = (".cpp", ".cu") if cuda()[0] else (".cpp",)
    paths = [path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*")]
    levels = {"baseline", *isa_flags()}
    wanted = [path for path in paths if path.parent != ISA_FOLDER or path.stem in levels]
    return sorted(str(path) for path in wanted if path.suffix in suffixes)


def compile_flags(source: Path, toolkit: Cuda | None) -> list[str]:
    """The flags of one file: the core sees no Python, and the bindings see only the public headers of the core."""
    if source.suffix == ".cu":
        assert toolkit is not None
        return toolkit.compile_flags()
    flags = [*CXX_FLAGS, *(["-Werror"] if WERROR else []), f"-I{ROOT / 'csrc/include'}"]
    if source.parent == ISA_FOLDER:
        flags += isa_flags().get(source.stem, [])
    if toolkit is not None and str(source.parent) == "csrc/cuda":
        flags += ["-DUNIKE_WITH_CUDA", *toolkit.includes]
    if source.parts[0] == "csrc":
        flags.append(f"-I{ROOT / 'csrc'}")
    else:
        import pybind11  # which the core alone does not need

        # -isystem: the warnings of other people's headers are none of ours.
        flags += [f"-isystem{folder}" for folder in (sysconfig.get_path("include"), pybind11.get_include())]
    return flags + shlex.split(os.environ.get("CXXFLAGS", ""))


def link(sources: list[str], target: Path, build_dir: Path, *flags: str) -> None:
    """Compiles the sources and links them into one shared object, in one ninja run: in parallel, only what changed."""
    try:
        from ninja.ninja_syntax import Writer
    except ImportError:
        raise SystemExit(f"setup.py needs ninja, which this Python does not have: {TOOLS}") from None

    toolkit, why_not = cuda()
    kernels = f"without CUDA kernels ({why_not})"
    if toolkit is not None:
        kernels = f"with CUDA kernels for sm_{', sm_'.join(toolkit.archs)} by {toolkit.nvcc}, which takes minutes"
    levels = ", ".join(["baseline", *isa_flags()])
    print(f"unike_kernels: compiling {target.name} by {shlex.join(compiler())}, for {levels}, {kernels}", flush=True)
    runtime = [] if toolkit is None else [*toolkit.libraries, "-lcudart_static", "-ldl", "-lrt"]
    build_dir.mkdir(parents=True, exist_ok=True)
    with open(build_dir / "build.ninja", "w") as file:
        ninja, command = Writer(file), shlex.join(compiler())
        ninja.rule("compile", f"{command} $flags -MMD -MF $out.d -c $in -o $out", "compile $in", "$out.d", deps="gcc")
        ninja.rule("link", f"{command} -shared -pthread -fopenmp $in $flags -o $out", "link $out")
        if toolkit is not None:
            ninja.rule("cuda", f"{toolkit.nvcc} $flags -MD -MF $out.d -c $in -o $out", "nvcc $in", "$out.d", deps="gcc")
        objects = []
        for source in map(Path, sources):
            own, rule = shlex.join(compile_flags(source, toolkit)), "cuda" if source.suffix == ".cu" else "compile"
            objects += ninja.build(f"{source}.o", rule, str(ROOT / source), variables={"flags": own})
        linked = shlex.join([*flags, *runtime, *shlex.split(os.environ.get("LDFLAGS", ""))])
        ninja.build(str(target), "link", objects, variables={"flags": linked})
    if subprocess.run([sys.executable, "-m", "ninja", "-C", str(build_dir)]).returncode:
        raise SystemExit(
            "unike_kernels: the core was not compiled, see above. It needs GCC 11, clang 14 or later; CXX names one. "
            "UNIKE_NATIVE=0 installs without it: everything then runs in plain torch, slowly."
        )


class BuildExt(build_ext):
    """The extension: core and bindings."""

    def build_extension(self, ext: Extension) -> None:
        """Links it where setuptools wants it."""
        build_dir = Path(self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        bindings = build_dir / "bindings.cpp"  # all as one: pybind11's headers take longer than what is in them
        text = "".join(f'#include "{ROOT / s}"\n' for s in ext.sources if not s.startswith("csrc"))
        if not bindings.exists() or bindings.read_text() != text:  # ninja compiles what is newer
            bindings.write_text(text)
        sources = [*(s for s in ext.sources if s.startswith("csrc")), str(bindings)]
        # What only debuggers and profilers read stays where the sources are, and not in wheels.
        flags = () if self.inplace else ("-s",)
        link(sources, Path(self.get_ext_fullpath(ext.name)).resolve(), build_dir, *flags)


class BuildCore(Command):
    """The core alone, for programs without Python: `python setup.py build_core --output DIR` puts the library into
    DIR/lib, its headers into DIR/include, and what pkg-config and CMake's find_package(unike) need beside it."""

    user_options: ClassVar = [("output=", None, "folder of lib/ and include/")]

    def initialize_options(self) -> None:
        """No folder yet."""
        self.output: str | None = None

    def finalize_options(self) -> None:
        """The folder must be given."""
        if self.output is None:
            raise SystemExit("build_core: --output DIR is missing")

    def run(self) -> None:
        """Compiles csrc/, and copies the public headers."""
        assert self.output is not None
        output = Path(self.output).resolve()
        header = (ROOT / "csrc/include/unike/unike.h").read_text()
        (version,) = re.findall(r'#define UNIKE_VERSION "(.+)"', header)
        major, minor, _ = version.split(".")
        abi = f"{major}.{minor}" if major == "0" else major  # what is compatible has the same
        library = output / "lib" / f"libunike.so.{version}"
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            exported = Path(folder, "exported")
            exported.write_text("{ global: unike_*; local: *; };")
            flags = (f"-Wl,-soname,libunike.so.{abi}", f"-Wl,--version-script={exported}")
            link(find_sources("csrc"), library, Path(folder), *flags)
        for name in (f"libunike.so.{abi}", "libunike.so"):
            (library.parent / name).unlink(missing_ok=True)
            (library.parent / name).symlink_to(library.name)
        for name, place in PACKAGE_FILES.items():
            text = (ROOT / f"csrc/package/{name}.in").read_text()
            (library.parent / place).mkdir(parents=True, exist_ok=True)
            (library.parent / place / name).write_text(text.replace("@VERSION@", version).replace("@ABI@", abi))
        shutil.copytree(ROOT / "csrc/include", output / "include", dirs_exist_ok=True)


# What other builds find the core by -> its folder in lib/.
PACKAGE_FILES = {
    "unike.pc": "pkgconfig",
    "unike-config.cmake": "cmake/unike",
    "unike-config-version.cmake": "cmake/unike",
}

if int(setuptools.__version__.partition(".")[0]) < 77:  # which cannot read pyproject.toml, and does not say why
    raise SystemExit(f"setup.py needs setuptools 77, here is {setuptools.__version__}: {TOOLS}")
cuda()  # what it refuses it refuses at once
setup(
    ext_modules=[Extension("unike_kernels._C", find_sources("csrc", "python/src"))] if native() else [],
    cmdclass={"build_ext": BuildExt, "build_core": BuildCore},
)
