"""What is built and shipped: the extension's own dependencies, one version everywhere, a wheel that works elsewhere."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
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
        "csrc/package/unike.pc.in",
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

    code = """
import json, torch, unike_kernels
from unike_kernels import _native
keys = torch.randn(4, 9)
ids = unike_kernels.CosineIndex(keys).search(keys, k=1)[1].flatten().tolist()
print(json.dumps([unike_kernels.__file__, _native.available(), ids]))
"""
    file, available, ids = json.loads(run_elsewhere(wheel, tmp_path, code))
    assert Path(file).is_relative_to(tmp_path)
    assert available and ids == [0, 1, 2, 3]


def run_elsewhere(wheel: Path, folder: Path, code: str) -> str:
    """What the code prints in a fresh environment that has the wheel, and sees this one's other packages."""
    environment = folder / "environment"
    venv.create(environment)
    purelib = next(environment.glob("lib/python*/site-packages"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "install", "--no-deps", "--no-compile", "--target", purelib, wheel], check=True)
    # The same torch, but not the editable install: a .pth file that is itself not followed from a second one.
    (purelib / "outer.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    done = subprocess.run(
        [environment / "bin/python", "-c", code], cwd=folder, check=True, stdout=subprocess.PIPE, text=True,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )  # fmt: skip
    return done.stdout


def checkout(folder: Path) -> Path:
    """A copy of the sources, without what builds have left in them."""
    leave = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.egg-info", "*.so", "__pycache__", ".*_cache")
    return Path(shutil.copytree(ROOT, folder, ignore=leave))


@pytest.mark.slow(minutes=1)
def test_a_wheel_of_python_alone_works(tmp_path):
    """Without the extension: an index, a patched model and its edit, with one warning that says what to do."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    source = checkout(tmp_path / "checkout")
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    subprocess.run(build, check=True, env=os.environ | {"UNIKE_NATIVE": "0"})
    (wheel,) = tmp_path.glob("*-py3-none-any.whl")
    code = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, unike_kernels as uk
    from unike_kernels.artifacts import fingerprint
    from transformers import LlamaConfig, LlamaForCausalLM
(told,) = [str(w.message) for w in caught if "unike_kernels._C" in str(w.message)]
assert "install GCC 11, clang 14 or later" in told
assert "missing" in uk.show_config()
keys = torch.randn(50, 9)
assert uk.CosineIndex(keys).search(keys, k=1)[1].flatten().tolist() == list(range(50))
sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, vocab_size=40)
model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
n = torch.randn
layers = {2: uk.EditLayer(n(3, 16), n(3), n(3, 16), n(16), torch.tensor(0.1))}
encoder = uk.ops.SemanticEncoder(n(4, 16), n(4), n(16, 4), n(16))
tables = {2: uk.MemoryLayer(n(9, 16), n(9, 1, 16), n(9, 1, 16), encoder, n(5), n(16))}
config, base, ids = uk.Config(tokens="all"), fingerprint(model), torch.tensor([[1, 2, 3]])
memory = uk.MemoryBank(tables, config, base)
edit = uk.Edit("a", layers, "silu", config, base, memory.id)
with torch.no_grad():
    before = model(ids).logits
    with uk.patched(model, [edit], memory):
        assert not torch.equal(model(ids).logits, before)
    assert torch.equal(model(ids).logits, before)
"""
    run_elsewhere(wheel, tmp_path, code)


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this Python has the GIL in any case")
def test_the_extension_does_not_enable_the_gil():
    code = "import sys, unike_kernels; assert not sys._is_gil_enabled()"
    subprocess.run([sys.executable, "-c", code], check=True)
