"""The compiled library: what its kernels take of each architecture, what it needs, what it says without a GPU."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from cuda_tests import harness
from cuda_tests.harness import SOURCES
from ptxsim import static

import unike_kernels as uk
from unike_kernels import BackendUnavailableError, _native
from unike_kernels.ops.cosine_topk import cuda

pytestmark = pytest.mark.skipif(not harness.can_compile(), reason="nvcc is not installed: it compiles the kernels")
built_with_kernels = pytest.mark.skipif(
    "no CUDA kernels" in (cuda.missing() or ""),
    reason="built without CUDA kernels: set UNIKE_CUDA=1 or UNIKE_CUDA_ARCHS",
)
CUOBJDUMP = triton.knobs.nvidia.cuobjdump.path
THREADS, SHARED = 512, {0: 67_840, 1: 69_632}  # of a block, dynamic shared memory of both shapes
ARCHITECTURES = (80, 86, 89, 90, 100, 120)


@functools.cache
def usage(binary: Path) -> dict[tuple[int, str], dict[str, int]]:
    """(architecture, kernel) -> registers, stack and static shared memory."""
    text = subprocess.run([CUOBJDUMP, "-res-usage", binary], check=True, capture_output=True, text=True).stdout
    found, arch = {}, 0
    for line in text.splitlines():
        if match := re.search(r"arch = sm_(\d+)", line):
            arch = int(match[1])
        elif match := re.search(r"Function (\S*cosine_topk_kernel\S*):", line):
            kernel = match[1]
        elif "REG:" in line and "kernel" in locals():
            found[arch, kernel] = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", line)}
            del kernel
    return found


def check_budget(arch: int, kernel: str, taken: dict[str, int]) -> None:
    """No spills, and of the threads that sm_80, sm_90 and sm_100 hold half for few queries, one block for many."""
    many = int(re.search(r"ELb([01])E", kernel)[1])
    shared = taken["SHARED"] + SHARED[many]
    assert taken["STACK"] == 0, kernel
    assert taken["LOCAL"] == 0, kernel
    assert shared <= static.SHARED_LIMIT[arch]
    occupancy = static.occupancy(arch, THREADS, taken["REG"], shared)
    least = 1 / 3 if arch not in (80, 90, 100) else 0.25 if many else 0.5
    assert occupancy >= least, (kernel, occupancy)


def built() -> Path:
    return Path(_native._C.__file__)


@built_with_kernels
def test_kernels_of_the_built_library():
    found = usage(built())
    archs = {arch for arch, _ in found}
    assert {80, 90} <= archs
    assert len(found) == len(archs) * 4 * len(SOURCES)
    for (arch, kernel), taken in found.items():
        check_budget(arch, kernel, taken)


@built_with_kernels
def test_ptx_for_other_architectures():
    """Of the first one for those between them, of the last one for those to come."""
    text = subprocess.run([CUOBJDUMP, "-lptx", built()], check=True, capture_output=True, text=True).stdout
    archs = sorted({arch for arch, _ in usage(built())})
    found = [int(arch) for arch in re.findall(r"sm_(\d+)\.ptx", text)]
    assert sorted(found) == sorted([archs[0], archs[-1]] * len(SOURCES))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES.values())
def test_kernels_of_every_architecture(arch, source, tmp_path):
    out = tmp_path / "kernel.cubin"
    file = harness.ROOT / f"csrc/cuda/cosine_topk_{source}.cu"
    command = ["nvcc", "-cubin", f"-arch=sm_{arch}", "-std=c++20", "-O3", *harness.INCLUDES, file, "-o", out]
    subprocess.run(command, check=True)
    found = usage(out)
    assert len(found) == 4
    for (_, kernel), taken in found.items():
        check_budget(arch, kernel, taken)


def test_no_library_of_cuda_is_needed():
    text = subprocess.run(["readelf", "-d", built()], check=True, capture_output=True, text=True).stdout
    assert "NEEDED" in text
    assert not re.search(r"NEEDED.*(cuda|cudart|nvrtc)", text)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_device_everything_says_so():
    index = uk.CosineIndex(torch.randn(9, 8))
    with pytest.raises(BackendUnavailableError, match=r"CosineIndex.to\('cuda'\): no CUDA device"):
        index.to("cuda")
    with uk.backend("cuda"), pytest.raises(BackendUnavailableError, match=r"cosine_topk: .*no CUDA device"):
        uk.ops.cosine_topk(torch.randn(2, 8), torch.randn(9, 8), 2)
    assert "cuda (no CUDA device" in uk.show_config()
    with pytest.raises(RuntimeError, match="no CUDA device"):
        _native._C.cuda_devices()
    keys = _native._C.Keys(1, 4, 64, 4, 0, 0, 0, 0)
    with pytest.raises(RuntimeError, match="no CUDA device"):
        _native._C.cuda_cosine_topk(keys, (64, 0, 4), 1, 1, 0, 64, 64, 0, 0, 0, 64, 64, 1 << 20, 0, 0)


@built_with_kernels
@pytest.mark.parametrize("state", [0, 32])
def test_a_state_is_memory_of_its_own_alignment(state):
    keys = _native._C.Keys(1, 4, 64, 4, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="state: expected"):
        _native._C.cuda_cosine_topk(keys, (64, 0, 4), 1, 1, 0, 64, 64, 0, 0, 0, state, 64, 1 << 20, 0, 0)


def test_the_import_takes_milliseconds():
    """What the extension adds to an import of the package, its libraries included, in the best of some tries."""
    code = """
import importlib.util, time
start = time.perf_counter()
spec = importlib.util.spec_from_file_location("unike_kernels._C", path)
spec.loader.exec_module(importlib.util.module_from_spec(spec))
print(time.perf_counter() - start)
"""
    run = [sys.executable, "-c", f"path = {str(built())!r}\n{code}"]
    took = [float(subprocess.run(run, check=True, capture_output=True, text=True).stdout) for _ in range(5)]
    assert min(took) < 0.1


def test_an_index_stays_where_it_is():
    index = uk.CosineIndex(torch.randn(9, 8))
    assert index.to("cpu") is index
    assert index.device == torch.device("cpu")
    with pytest.raises(ValueError, match="device: expected a CUDA device or the CPU, got meta"):
        index.to("meta")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"UNIKE_CUDA": "yes"}, "UNIKE_CUDA: expected 0 or 1, got 'yes'"),
        ({"UNIKE_CUDA": "1", "CUDA_HOME": "/none"}, "there is no nvcc in /none/bin"),
    ],
)
def test_what_a_build_refuses(given, message, monkeypatch):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run([sys.executable, "setup.py", "--version"], cwd=harness.ROOT, capture_output=True, text=True)
    assert done.returncode
    assert message in done.stderr
