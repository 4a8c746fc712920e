"""The core as other programs use it: without Python, from C, and under the sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import unike_kernels as uk

ROOT = Path(__file__).resolve().parents[1]
MAJOR, MINOR, _ = uk.__version__.split(".")
ABI = f"{MAJOR}.{MINOR}" if MAJOR == "0" else MAJOR
WARNINGS = ["-Wall", "-Wextra", "-Werror"]

pytestmark = pytest.mark.slow(minutes=1)


def run(*command: object, **environment: str) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_core(folder: Path, **environment: str) -> list[str]:
    """Builds the core into a folder; the flags that compile and link a program with it."""
    run(sys.executable, "setup.py", "-q", "build_core", "--output", folder, UNIKE_WERROR="1", **environment)
    return [f"-I{folder}/include", f"-L{folder}/lib", "-lunike", f"-Wl,-rpath,{folder}/lib"]


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    """The flags of a core that was built once."""
    return build_core(tmp_path_factory.mktemp("core"))


def test_the_library_has_a_name_of_its_abi_and_exports_nothing_else(core):
    lib = Path(core[1].removeprefix("-L"))
    version = uk.__version__
    assert (lib / "libunike.so").resolve().name == f"libunike.so.{version}"
    told = run("readelf", "-d", lib / "libunike.so")
    assert f"soname: [libunike.so.{ABI}]" in told.lower() and (lib / f"libunike.so.{ABI}").exists()
    symbols = [line.split() for line in run("nm", "-D", "--defined-only", lib / "libunike.so").splitlines()]
    names = {name.partition("@")[0] for _, _, name in symbols}
    assert "unike_cosine_topk" in names and not [name for name in names if not name.startswith("unike_")]
    assert sorted(p.name for p in lib.parent.iterdir()) == ["include", "lib"]


PROJECT = """
cmake_minimum_required(VERSION 3.15)
project(example LANGUAGES C)
find_package(unike {wanted} REQUIRED)
add_executable(example {source})
target_link_libraries(example PRIVATE unike::unike m)
"""


def test_cmake_and_pkg_config_find_it(tmp_path, core):
    """After the folder was moved, too."""
    prefix = Path(shutil.copytree(Path(core[1].removeprefix("-L")).parent, tmp_path / "moved", symlinks=True))
    source = ROOT / "examples/search_and_edit.c"
    if shutil.which("pkg-config"):
        env = {"PKG_CONFIG_PATH": f"{prefix}/lib/pkgconfig"}
        assert run("pkg-config", "--modversion", "unike", **env).strip() == uk.__version__
        flags = run("pkg-config", "--cflags", "--libs", "unike", **env).split()
        run("cc", "-std=c11", source, *flags, "-lm", f"-Wl,-rpath,{prefix}/lib", "-o", tmp_path / "by_pkg_config")
        assert run(tmp_path / "by_pkg_config").startswith("nearest 7")
    if shutil.which("cmake") is None:
        pytest.skip("there is no cmake; Debian: apt install cmake, or pip install cmake")
    project = tmp_path / "project"
    project.mkdir()

    def configured(wanted: str) -> subprocess.CompletedProcess[str]:
        (project / "CMakeLists.txt").write_text(PROJECT.format(wanted=wanted, source=source))
        command = ["cmake", "-S", project, "-B", project / "build", f"-DCMAKE_PREFIX_PATH={prefix}"]
        shutil.rmtree(project / "build", ignore_errors=True)
        return subprocess.run(command, capture_output=True, text=True)

    for wanted in (f"{ABI}.99", "99.0", "0.0.1"):
        done = configured(wanted)
        assert done.returncode and "unike" in done.stderr, wanted
    for wanted in ("", ABI, uk.__version__):
        done = configured(wanted)
        assert done.returncode == 0, done.stderr
    run("cmake", "--build", project / "build")
    assert run(project / "build/example").startswith("nearest 7 1.000000")


def test_the_example_in_c(tmp_path, core):
    source, program = ROOT / "examples/search_and_edit.c", tmp_path / "example"
    run("cc", "-std=c11", *WARNINGS, source, *core, "-lm", "-o", program)
    nearest, shifted, edited, refused = run(program).splitlines()
    assert nearest == "nearest 7 1.000000"
    assert shifted.startswith("alpha 0.50 shifted ")
    assert edited == "edited 1 untouched 1"
    assert refused == "refused 1: m: expected a size of at least 0, got -1"


def test_the_engine_in_cpp(tmp_path, core, make_model, make_memory, make_edit):
    """It computes what the operators do, from the library's own files."""
    model = make_model("llama")
    memory = make_memory(model, entries=30)
    edits = [make_edit(model, name, memory, seed=seed, neurons=seed) for seed, name in enumerate("abc", 2)]
    memory.save(tmp_path / "memory.safetensors")
    for edit in edits:
        edit.save(tmp_path / f"{edit.id}.safetensors")
    batch = {name: torch.randn(4, 64) for name in ("hidden", "attention", "ffn_in", "ffn_out")}
    save_file(batch, tmp_path / "batch.safetensors")
    program, out = tmp_path / "engine", tmp_path / "out.bin"
    run("c++", "-std=c++20", *WARNINGS, ROOT / "examples/engine.cpp", *core, "-o", program)
    files = [tmp_path / f"{name}.safetensors" for name in ("memory", "batch")]
    run(program, 3, 5, *files, out, *(tmp_path / f"{edit.id}.safetensors" for edit in edits))
    shifted, edited = torch.frombuffer(bytearray(out.read_bytes()), dtype=torch.float32).reshape(2, 4, 64)

    m = memory.layers[3]
    index = uk.ops.normalize_rows(m.index)
    wanted, _, _ = uk.ops.memory_attention(
        batch["hidden"], batch["attention"], index, m.keys, m.keys if m.values is None else m.values, m.encoder, k=5,
        queries=batch["hidden"].unsqueeze(1),
    )  # fmt: skip
    torch.testing.assert_close(shifted, wanted, rtol=1e-5, atol=1e-5)
    bank = uk.EditBank([3], 64, "silu")
    for edit in edits:
        bank.add(replace(edit, layers={3: edit.layers[3]}))
    rows = [["a", "b", "c"][:n] for n in range(4)]
    assert torch.equal(edited, bank.apply(3, batch["ffn_in"], batch["ffn_out"], rows))
    assert torch.equal(edited[0], batch["ffn_out"][0])

    (tmp_path / "cut").write_bytes(files[0].read_bytes()[:500])
    for wrong, message in [(tmp_path / "cut", "truncated"), (tmp_path / "none", "cannot be read")]:
        done = subprocess.run([program, "3", "5", wrong, files[1], out], capture_output=True, text=True)
        assert (done.returncode, message in done.stderr) == (1, True)


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


# Each compiler that is to build the core, by the names that it may have, and the Debian package that has it.
COMPILERS = {
    "clang": ("clang++", *(f"clang++-{version}" for version in range(14, 23))),
    "g++-11": ("g++-11",),
    "g++-aarch64-linux-gnu": ("aarch64-linux-gnu-g++",),
}


@pytest.mark.parametrize("package", COMPILERS)
def test_other_compilers_and_machines(package, tmp_path):
    """The core compiles without a warning, and passes its own test: natively, or on an emulator if there is one."""
    compiler = next(filter(shutil.which, COMPILERS[package]), None)
    if compiler is None:
        pytest.skip(f"there is no {COMPILERS[package][0]}; Debian: apt install {package}")
    openmp = {"CXXFLAGS": "-O1 -fno-openmp", "LDFLAGS": "-fno-openmp"}  # clang's runtime is a package of its own
    flags = build_core(tmp_path, CXX=compiler, UNIKE_CUDA="0", **openmp)
    program, emulator = tmp_path / "core_test", []
    run(compiler, "-std=c++20", *WARNINGS, "-O1", "-pthread", "tests/native/core_test.cpp", *flags, "-o", program)
    if compiler.startswith("aarch64") and os.uname().machine != "aarch64":
        if shutil.which("qemu-aarch64") is None:
            pytest.skip("it compiles; to run it there is no qemu-aarch64; Debian: apt install qemu-user")
        emulator = ["qemu-aarch64", "-cpu", "max", "-L", "/usr/aarch64-linux-gnu"]
    passed = run(*emulator, program).splitlines()
    assert passed[0] == "baseline passed" and all(line.endswith(" passed") for line in passed)
    if emulator:  # which has every instruction set that there are kernels for
        assert passed == [f"{level} passed" for level in ("baseline", "neon", "dotprod", "i8mm")]
