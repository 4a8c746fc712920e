"""What setup.py compiles, and with which flags: asked of compilers that only note how they are called."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ("UNIKE_NATIVE", "UNIKE_CUDA", "UNIKE_CUDA_ARCHS", "UNIKE_WERROR", "CXX", "CXXFLAGS", "LDFLAGS", "CUDA_HOME")

pytestmark = pytest.mark.slow

COMPILER = """#!/usr/bin/env python3
import pathlib, sys
given = sys.argv[1:]
if given == ["-dumpmachine"]:
    print("x86_64-linux-gnu")
elif "--list-gpu-code" in given:
    print("sm_75 sm_80 sm_86 sm_89 sm_90 sm_100 sm_103 sm_120")
elif "-dryrun" in given:
    print('#$ INCLUDES="-I/toolkit/include"\\n#$ LIBRARIES="-L/toolkit/lib"')
else:
    with open({log!r}, "a") as file:
        print(*given, file=file)
    pathlib.Path(given[given.index("-o") + 1]).write_text("")
    if "-MF" in given:
        pathlib.Path(given[given.index("-MF") + 1]).write_text("")
"""


class Machine:
    """With a compiler and, where they are asked for, nvcc and GPUs."""

    def __init__(self, folder: Path, capabilities: str | None = None, nvcc: bool = False) -> None:
        self.folder, self.log = folder, folder / "log"
        self.log.write_text("")
        for name in ["c++", *(["nvcc"] if nvcc else [])]:
            self._program(name, COMPILER.format(log=str(self.log)))
        if capabilities is not None:
            self._program("nvidia-smi", f"#!/bin/sh\nprintf '{capabilities}'\n")

    def _program(self, name: str, text: str) -> None:
        path = self.folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def build(self, *command: str, **settings: str) -> tuple[int, str]:
        """The exit status of setup.py, and all that it said."""
        (self.folder / "bin/python3").unlink(missing_ok=True)
        (self.folder / "bin/python3").symlink_to(sys.executable)
        clean = {name: value for name, value in os.environ.items() if name not in SETTINGS}
        env = clean | {"PATH": str(self.folder / "bin")} | settings
        done = subprocess.run(
            [sys.executable, "setup.py", "-q", *command], cwd=ROOT, env=env, capture_output=True, text=True
        )
        return done.returncode, done.stdout + done.stderr

    def core(self, **settings: str) -> tuple[list[str], str]:
        """How the compilers were called for the core, and what was said."""
        status, said = self.build("build_core", "--output", str(self.folder / "core"), **settings)
        assert status == 0, said
        return self.log.read_text().splitlines(), said


def test_a_users_build(tmp_path):
    calls, said = Machine(tmp_path).core()
    assert len(calls) > 10 and not [call for call in calls if "-Werror" in call or "-march=native" in call]
    assert (
        "by c++, for baseline, avx2, avxvnni, avx512, avx512vnni, avx512bf16, amx, "
        "without CUDA kernels (there is no nvcc" in said
    )
    assert [call for call in calls if "isa/avx2.cpp" in call and "-mavx2" in call]
    assert not [call for call in calls if "cosine_topk.cpp" in call and "-mavx2" in call]


def test_the_extension_of_a_wheel_is_stripped(tmp_path):
    machine = Machine(tmp_path)
    status, said = machine.build(
        "build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")
    )
    assert status == 0, said
    (linked,) = (call.split() for call in machine.log.read_text().splitlines() if "-shared" in call.split())
    assert "-s" in linked and any("_C." in word for word in linked)


def test_warnings_are_errors_for_those_who_ask(tmp_path):
    calls, _ = Machine(tmp_path).core(UNIKE_WERROR="1")
    assert all("-Werror" in call for call in calls if " -c " in call)


@pytest.mark.parametrize(
    ("capabilities", "settings", "archs"),
    [
        (None, {}, []),  # nvcc alone
        (None, {"UNIKE_CUDA": "1"}, [80, 86, 89, 90, 100, 120]),  # a release
        (None, {"UNIKE_CUDA_ARCHS": "80;90"}, [80, 90]),
        ("9.0\\n9.0\\n", {}, [90]),
        ("12.0\\n8.6\\n", {}, [86, 120]),
        ("10.3\\n", {}, [103]),
        ("7.5\\n", {}, []),  # too old for the kernels
        ("[N/A]\\n", {}, []),
        ("9.0\\n", {"UNIKE_CUDA": "1"}, [80, 86, 89, 90, 100, 120]),
        ("9.0\\n", {"UNIKE_CUDA": "0"}, []),
    ],
)
def test_the_gpus_that_kernels_are_compiled_for(capabilities, settings, archs, tmp_path):
    calls, said = Machine(tmp_path, capabilities, nvcc=True).core(**settings)
    kernels = [call for call in calls if ".cu " in call]
    for call in kernels:
        assert [f"code=sm_{arch} " in call for arch in (75, 80, 86, 89, 90, 100, 103, 120)] == [
            arch in archs for arch in (75, 80, 86, 89, 90, 100, 103, 120)
        ]
        assert f"compute_{archs[0]},code=compute_{archs[0]}" in call
    assert len(kernels) == (4 if archs else 0)
    assert [call for call in calls if "-DUNIKE_WITH_CUDA" in call] == [] or archs
    if archs:
        assert f"with CUDA kernels for {', '.join(f'sm_{arch}' for arch in archs)} by" in said
    elif settings:
        assert "without CUDA kernels (UNIKE_CUDA=0)" in said
    else:
        assert "without CUDA kernels (nvcc is here, but no GPU that it knows; UNIKE_CUDA=1 builds them)" in said


@pytest.mark.parametrize("settings", [{"UNIKE_NATIVE": "0"}, {"CXX": "/none/c++"}])
def test_a_wheel_of_python_alone(settings, tmp_path):
    place = ["egg_info", "--egg-base", ".", "build", "--build-base", "."]
    command = [str(tmp_path) if part == "." else part for part in place]
    command += ["bdist_wheel", "-d", str(tmp_path / "dist"), "-b", str(tmp_path / "wheel")]
    status, said = Machine(tmp_path).build(*command, **settings)
    assert status == 0, said
    (wheel,) = (tmp_path / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    wanted = "there is no C++ compiler '/none/c++': install GCC 11, clang 14 or later"
    assert (wanted in said) == ("CXX" in settings)


@pytest.mark.parametrize(
    ("lacks", "told"),
    [
        ("import setuptools; setuptools.__version__ = '65.5.0'", "setuptools 77, here is 65.5.0"),
        ("import sys; sys.modules['ninja'] = None", "ninja, which this Python does not have"),
    ],
)
def test_a_python_without_the_tools(lacks, told, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(lacks)
    status, said = Machine(tmp_path).build("build_core", "--output", str(tmp_path / "core"), PYTHONPATH=str(tmp_path))
    assert status and said.strip() == f'setup.py needs {told}: python3 -m pip install "setuptools>=77" ninja'


def test_what_is_refused(tmp_path):
    machine = Machine(tmp_path)
    for settings, message in (
        ({"UNIKE_NATIVE": "yes"}, "UNIKE_NATIVE: expected 0 or 1, got 'yes'"),
        ({"UNIKE_NATIVE": "1", "CXX": "/none/c++"}, "UNIKE_NATIVE=1: there is no C++ compiler '/none/c++'"),
        ({"UNIKE_CUDA": "1"}, "UNIKE_CUDA=1: there is no nvcc in the PATH"),
    ):
        status, said = machine.build("--version", **settings)
        assert status and message in said
    (tmp_path / "bin/c++").write_text('#!/bin/sh\n[ "$1" = -dumpmachine ] && echo x86_64-linux-gnu\n')
    status, said = machine.build("build_core", "--output", str(tmp_path / "core"))
    assert status and "the core was not compiled, see above. It needs GCC 11, clang 14 or later" in said
    assert "UNIKE_NATIVE=0 installs without it" in said and "Traceback" not in said
