"""The sample kernels, each launched on data of its own and compared with what it should compute.

Every function takes a session, and raises AssertionError where the result is wrong.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ptxsim import LoadedModule, Session, load

SOURCE = Path(__file__).with_name("samples.cu")
Sample = Callable[[Session], None]
CUDA: dict[str, Sample] = {}
TRITON: dict[str, Sample] = {}


@functools.cache
def cuda_kernels(arch: int = 80) -> LoadedModule:
    """samples.cu, compiled by nvcc."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "samples.ptx"
        command = ["nvcc", "-ptx", f"-arch=sm_{arch}", "-std=c++17", str(SOURCE), "-o", str(out)]
        subprocess.run(command, check=True, capture_output=True)
        return load(out.read_text())


def has_nvcc() -> bool:
    return shutil.which("nvcc") is not None


def cuda(sample: Sample) -> Sample:
    CUDA[sample.__name__] = sample
    return sample


def on_triton(sample: Sample) -> Sample:
    TRITON[sample.__name__] = sample
    return sample


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@cuda
def block_sum(session: Session) -> None:
    x, out = rng().standard_normal(1000).astype("f4"), np.zeros(1, "f4")
    arguments = [x, out, np.int32(1000), np.float32(2)]
    session.launch(cuda_kernels()["block_sum"], (3,), (128,), arguments, names=["x", "out", "n", "scale"])
    assert abs(out[0] - 2 * x.astype("f8").sum()) < 1e-3


@cuda
def reverse(session: Session) -> None:
    x, out = np.arange(256, dtype="i4"), session.empty(256, "i4")
    session.launch(cuda_kernels()["reverse"], (2,), (128,), [x, out], shared=512)
    assert (out.reshape(2, -1)[:, ::-1] == x.reshape(2, -1)).all()


@cuda
def transpose(session: Session) -> None:
    x, out = rng().standard_normal((50, 70)).astype("f4"), session.empty((70, 50), "f4")
    shape = np.array((50, 70, 2.0), dtype=[("rows", "i4"), ("columns", "i4"), ("scale", "f4")]).tobytes()
    session.launch(cuda_kernels()["transpose"], (3, 2), (32, 8), [x, out, shape], names=["x", "out", "shape"])
    assert (out == 2 * x.T).all()


@cuda
def topk(session: Session) -> None:
    x = rng().standard_normal((3, 300)).astype("f4")
    scores, ids = session.empty((3, 5), "f4"), session.empty((3, 5), "i4")
    arguments = [x, scores, ids, np.int32(300), np.int32(5)]
    session.launch(cuda_kernels()["topk"], (3,), (64,), arguments, shared=64 * 5 * 8)
    order = np.argsort(-x, axis=1, kind="stable")[:, :5]
    assert (ids == order).all() and (scores == np.take_along_axis(x, order, 1)).all()


@cuda
def last_block_min(session: Session) -> None:
    x = rng().standard_normal(512)
    partial, out = session.empty(8, "f8"), session.empty(1, "f8")
    session.launch(cuda_kernels()["last_block_min"], (8,), (64,), [x, partial, out, np.int32(64)])
    assert out[0] == x.min()


@cuda
def spin(session: Session) -> None:
    values, counter, out = session.empty(6, "i4"), np.zeros(1, "u4"), session.empty((6, 6), "i4")
    session.launch(cuda_kernels()["spin"], (6,), (64,), [values, counter, out], names=["values", "counter", "out"])
    assert (out == 100 + np.arange(6)).all()


@cuda
def pipelined_sum(session: Session) -> None:
    for tiles in (4, 5, 6, 7, 10):  # nvcc unrolls the loop by four: each copy of its body has to be the last one once
        x, out = rng().integers(-9, 9, (tiles, 64, 4)).astype("f4"), np.zeros(1, "f4")
        session.launch(cuda_kernels()["pipelined_sum"], (1,), (64,), [x, out, np.int32(tiles)])
        assert out[0] == x.sum()


@cuda
def half_axpy(session: Session) -> None:
    x = rng().standard_normal(128).astype("f2")
    y = (rng().standard_normal(128).astype("f4").view("u4") >> 16).astype("u2")
    h, b = session.empty(128, "f2"), session.empty(128, "u2")
    session.launch(cuda_kernels()["half_axpy"], (2,), (32,), [x, y, h, b, np.float32(1.5)])
    assert (h == (x.astype("f8") * 1.5 + x).astype("f2")).all()
    product = (y.astype("u4") << 16).view("f4") * 1.5
    assert (np.abs((b.astype("u4") << 16).view("f4") - product) <= np.abs(product) * 2.0**-8).all()


@cuda
def warp_votes(session: Session) -> None:
    x = rng().integers(0, 8, 128).astype("i4")
    ballots, sums, peers = session.empty(4, "u4"), session.empty(128, "i4"), session.empty(128, "i4")
    session.launch(cuda_kernels()["warp_votes"], (2,), (64,), [x, ballots, sums, peers])
    warps = x.reshape(4, 32)
    assert (ballots == ((warps % 2 == 0) * (1 << np.arange(32))).sum(axis=1)).all()
    first = np.array([w[w < 4][0] for w in warps])[:, None]  # the value of the first lane that holds one below 4
    assert (sums.reshape(4, 32) == warps.sum(axis=1)[:, None] + np.where(warps < 4, first, 0)).all()
    same = (warps[:, :, None] == warps[:, None, :]).sum(axis=2) + 100 * (warps == 3).any(axis=1)[:, None]
    assert (peers.reshape(4, 32) == same).all()


def tensors():
    """torch and the Triton kernels, imported where they are used: both may be missing."""
    import torch
    import triton_samples

    torch.manual_seed(0)
    return torch, triton_samples


def fresh(session: Session, *shape: int, dtype=None):
    import torch

    tensor = torch.empty(shape, dtype=dtype or torch.float32)
    session.poison(tensor)
    return tensor


@on_triton
def triton_softmax(session: Session) -> None:
    torch, kernels = tensors()
    x, out = torch.randn(3, 300), fresh(session, 3, 300)
    kernels.softmax[(3,)](x, out, 300, 512)
    torch.testing.assert_close(out, x.softmax(1))


def _matmul(session: Session, dtype: str, precision: str, tolerance: float) -> None:
    torch, kernels = tensors()
    a, b = torch.randn(40, 72).to(getattr(torch, dtype)), torch.randn(72, 24).to(getattr(torch, dtype))
    out = fresh(session, 40, 24)
    kernels.matmul[(2, 1)](a, b, out, 40, 24, 72, 32, 32, 32, precision)
    error = (out.double() - a.double() @ b.double()).abs().max()
    assert error < tolerance, error


@on_triton
def triton_matmul_f16(session: Session) -> None:
    _matmul(session, "float16", "tf32", 1e-4)


@on_triton
def triton_matmul_bf16(session: Session) -> None:
    _matmul(session, "bfloat16", "tf32", 1e-4)


@on_triton
def triton_matmul_tf32(session: Session) -> None:
    _matmul(session, "float32", "tf32", 0.05)


@on_triton
def triton_matmul_f32(session: Session) -> None:
    _matmul(session, "float32", "ieee", 1e-4)


@on_triton
def triton_int8_matmul(session: Session) -> None:
    torch, kernels = tensors()
    a, b = (torch.randint(-128, 128, (32, 32), dtype=torch.int8) for _ in range(2))
    out = fresh(session, 32, 32, dtype=torch.int32)
    kernels.int8_matmul[(1,)](a, b, out, 32, 32, 32)
    assert (out == a.int() @ b.int().T).all()


@on_triton
def triton_fused_ffn(session: Session) -> None:
    torch, kernels = tensors()
    x, up, down = (torch.randn(*s).bfloat16() for s in ((16, 128), (128, 64), (64, 128)))
    out = torch.zeros(16, 128)
    kernels.fused_ffn[(2,)](x, up, down, out, 128, 64, 16, 32, 64)
    hidden = torch.nn.functional.gelu(x.double() @ up.double())
    torch.testing.assert_close(out.double(), hidden @ down.double(), rtol=2e-2, atol=2.0)


@on_triton
def triton_histogram(session: Session) -> None:
    torch, kernels = tensors()
    x, counts = torch.randint(0, 10, (300,), dtype=torch.int32), torch.zeros(10, dtype=torch.int32)
    kernels.histogram[(3,)](x, counts, 300, 128)
    assert (counts == torch.bincount(x.long(), minlength=10)).all()


@on_triton
def triton_scan(session: Session) -> None:
    torch, kernels = tensors()
    x, out = torch.randint(-9, 9, (2, 512)).float(), fresh(session, 2, 512)
    kernels.scan[(2,)](x, out, 512)
    assert (out == x.cumsum(1)).all()


@on_triton
def triton_sort(session: Session) -> None:
    torch, kernels = tensors()
    x, out = torch.randn(2, 256), fresh(session, 2, 256)
    kernels.sort[(2,)](x, out, 256)
    assert (out == x.sort(1, descending=True)[0]).all()


@on_triton
def triton_topk(session: Session) -> None:
    torch, kernels = tensors()
    x, out = torch.randn(2, 256), fresh(session, 2, 8, dtype=torch.int64)
    kernels.topk[(2,)](x, out, 256, 8)
    assert (255 - (out & 0xFFFFFFFF) == x.topk(8)[1]).all()


@on_triton
def triton_split_k(session: Session) -> None:
    torch, kernels = tensors()
    a, b = torch.randn(16, 128).bfloat16(), torch.randn(128, 16).bfloat16()
    out, partial = fresh(session, 16, 16), fresh(session, 4, 16, 16)
    kernels.split_k[(4,)](a, b, partial, torch.zeros(1, dtype=torch.int32), out, 128, 4, 16, 16, 32)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-3, atol=1e-3)


@on_triton
def triton_spin_barrier(session: Session) -> None:
    torch, kernels = tensors()
    x, scratch, out = torch.rand(512), fresh(session, 4), fresh(session, 512)
    kernels.spin_barrier[(4,)](x, scratch, torch.zeros(1, dtype=torch.int32), out, 4, 128)
    torch.testing.assert_close(out, x / x.sum())
