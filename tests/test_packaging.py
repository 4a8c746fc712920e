"""What is built and shipped: the extension's own dependencies, one version everywhere, a wheel that works elsewhere."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from unike_kernels import _native, _version

ROOT = Path(__file__).resolve().parents[1]


def extension() -> Path:
    return Path(_native.__dict__["_C"].__file__)


def needed_libraries(library: Path) -> set[str]:
    """The names of the shared libraries that an ELF file asks for."""
    output = subprocess.run(["readelf", "-d", library], check=True, capture_output=True, text=True).stdout
    return set(re.findall(r"\(NEEDED\).*\[(.+)\]", output))


def test_the_extension_depends_on_neither_torch_nor_libpython():
    assert {name.split(".so")[0] for name in needed_libraries(extension())} <= {
        "libstdc++",
        "libm",
        "libgcc_s",
        "libc",
        "libgomp",
        "libpthread",
        "ld-linux-x86-64",
        "ld-linux-aarch64",
    }


def test_the_extension_loads_without_torch():
    code = (
        "import importlib.util, sys; spec = importlib.util.spec_from_file_location('_C', sys.argv[1]);"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module);"
        "print(module.version()); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, extension()], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == _version.__version__


def test_one_version_everywhere():
    assert importlib.metadata.version("unike-kernels") == _version.__version__
    assert f'#define UNIKE_VERSION "{_version.__version__}"' in (ROOT / "csrc/include/unike/unike.h").read_text()
    for folder in ("evaluation", "benchmarks"):
        assert f'version = "{_version.__version__}"' in (ROOT / folder / "pyproject.toml").read_text()


@pytest.mark.slow(minutes=3)
def test_the_wheel_of_the_sdist_works_elsewhere(tmp_path):
    """Source -> sdist -> wheel -> a fresh environment that sees this one's torch, run far from the sources."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = "import setuptools.build_meta as backend, sys; print(backend.build_sdist(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", build, tmp_path], cwd=checkout(tmp_path / "checkout"), check=True)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "csrc/include/unike/unike.h",
        "csrc/cpu/isa/avx2.cpp",
        "csrc/cpu/EXACTNESS.md",
        "python/src/bindings.h",
        "examples/engine.cpp",
        "LICENSE",
    } <= names
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, sdist]
    subprocess.run(build, check=True, env=os.environ | {"UNIKE_CUDA": "0"})
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        shipped = set(archive.namelist())
    assert "unike_kernels/py.typed" in shipped
    assert not [name for name in shipped if name.endswith((".cpp", ".h", ".o"))]
    assert not [name for name in shipped if name.endswith(".safetensors")]
    assert {name.split("/")[0].partition("-")[0] for name in shipped} == {"unike_kernels"}
    assert wheel.stat().st_size <= 4_000_000

    environment = tmp_path / "environment"
    venv.create(environment)
    purelib = next(environment.glob("lib/python*/site-packages"))
    subprocess.run([*pip, "install", "--no-deps", "--no-compile", "--target", purelib, wheel], check=True)
    # The same torch, but not the editable install: a .pth file that is itself not followed from a second one.
    (purelib / "outer.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    code = """
import json, torch, unike_kernels
from unike_kernels import _native
keys = torch.randn(4, 9)
ids = unike_kernels.CosineIndex(keys).search(keys, k=1)[1].flatten().tolist()
print(json.dumps([unike_kernels.__file__, _native.available(), ids]))
"""
    done = subprocess.run(
        [environment / "bin/python", "-c", code], cwd=tmp_path, check=True, stdout=subprocess.PIPE, text=True,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )  # fmt: skip
    file, available, ids = json.loads(done.stdout)
    assert Path(file).is_relative_to(environment)
    assert available and ids == [0, 1, 2, 3]


def checkout(folder: Path) -> Path:
    """A copy of the sources, without what builds have left in them."""
    leave = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.egg-info", "*.so", "__pycache__", ".*_cache")
    return Path(shutil.copytree(ROOT, folder, ignore=leave))
