"""The search kernels of csrc/cuda on the interpreter: compiled to PTX by nvcc, laid out as the library does it."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from ptxsim import Launch, LoadedKernel, Session, load

from unike_kernels import ops

ROOT = Path(__file__).resolve().parents[2]
INCLUDES = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/include'}"]
SCANS = {"float32": 0, "float16": 1, "bfloat16": 2, "int8": 3}  # unike_scan
SOURCES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "int8": "i8"}
STATE_BYTES = 64  # UNIKE_CUDA_STATE_BYTES
PARTS = ("query_bounds", "units", "codes", "lower", "counts", "candidates")


class Leading(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("p", "directions", "codes", "bounds"))


class Keys(ctypes.Structure):
    _fields_ = (
        ("n", ctypes.c_int64),
        ("d", ctypes.c_int64),
        ("rows", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("scan", ctypes.c_int),
        ("codes", ctypes.c_void_p),
        ("ranges", ctypes.c_void_p),
        ("direction", ctypes.c_void_p),
        ("leading", Leading),
    )


class Rows(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("dtype", ctypes.c_int), ("stride", ctypes.c_int64))


class Request(ctypes.Structure):
    _fields_ = (
        ("keys", Keys),
        ("queries", Rows),
        ("m", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("ranges", ctypes.c_void_p),
        ("scores", ctypes.c_void_p),
        ("ids", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("value_bytes", ctypes.c_int64),
        ("gathered", ctypes.c_void_p),
        ("state", ctypes.c_void_p),
        ("multiprocessors", ctypes.c_int),
        ("blocks_of_each", ctypes.c_int),
    )


def _compiled(kind: str, scan: str, many: bool, ranged: bool, arch: int) -> bytes:
    """One kernel, as "ptx" or "cubin"."""
    arguments = f"UNIKE_SCAN_{SOURCES[scan].upper()}, {int(many)}, {int(ranged)}"
    name = f"unike::cuda::cosine_topk_kernel<{arguments}>(unike::cuda::Search)"
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "kernel.cu", Path(folder) / "kernel"
        source.write_text(f'#include "cuda/cosine_topk.cuh"\ntemplate __global__ void {name};\n')
        command = ["nvcc", f"-{kind}", f"-arch=sm_{arch}", "-std=c++20", "-O3", "-lineinfo", *INCLUDES]
        subprocess.run([*command, str(source), "-o", str(out)], check=True, capture_output=True)
        return out.read_bytes()


@functools.cache
def kernel(scan: str, many: bool, ranged: bool, arch: int = 80) -> LoadedKernel:
    """For few queries or for many, with ranges or without."""
    module = load(_compiled("ptx", scan, many, ranged, arch).decode())
    return module[module.names[0]]


@functools.cache
def binary(scan: str, many: bool, arch: int) -> bytes:
    """Without ranges, for a device of this architecture."""
    return _compiled("cubin", scan, many, False, arch)


@functools.cache
def planner() -> ctypes.CDLL:
    """plan.cpp of this folder."""
    folder = tempfile.mkdtemp()
    library = Path(folder) / "plan.so"
    own = Path(__file__).with_name("plan.cpp")
    sources = [str(own), *(str(ROOT / f"csrc/{name}.cpp") for name in ("cuda/plan", "common/checked"))]
    subprocess.run(["c++", "-std=c++20", "-shared", "-fPIC", *INCLUDES, *sources, "-o", str(library)], check=True)
    planned = ctypes.CDLL(str(library))
    planned.search_bytes.restype = ctypes.c_int64
    return planned


class Found(NamedTuple):
    scores: torch.Tensor
    ids: torch.Tensor
    gathered: torch.Tensor | None
    launch: Launch
    shape: dict[str, int]
    parts: dict[str, np.ndarray]  # of the workspace
    state: np.ndarray


def search(
    session: Session,
    queries: torch.Tensor,
    rows: torch.Tensor,
    k: int,
    *,
    scan: str = "float32",
    packed: ops.PackedKeys | None = None,
    exact: bool = True,
    ranges: torch.Tensor | None = None,
    values: torch.Tensor | None = None,
    device: tuple[int, int] = (3, 1),
    state: np.ndarray | None = None,
    arch: int = 80,
) -> Found:
    m, n, d = len(queries), len(rows), queries.shape[1]
    if scan != "float32" and packed is None:
        packed = ops.pack_keys(rows, scan)
    if scan == "float32" and rows.stride(0) % 4:
        rows = torch.nn.functional.pad(rows, (0, -d % 4))
    scores, ids = session.empty((m, k), np.float32), session.empty((m, k), np.int64)
    gathered = None if values is None else torch.empty((m, k, *values.shape[1:]), dtype=values.dtype)
    state = np.zeros(STATE_BYTES, np.uint8) if state is None else state
    named = {"queries": queries, "scores": scores, "ids": ids, "ranges": ranges, "values": values, "gathered": gathered}
    named["state"] = state
    if exact:
        named["rows"] = rows
    if packed is not None:
        named |= {"codes": packed.codes, "key_bounds": packed.error_bounds, "direction": packed.direction}
    if gathered is not None:
        session.poison(gathered)

    def address(name):
        t = named.get(name)
        if t is None:
            return None
        return t.data_ptr() if isinstance(t, torch.Tensor) else t.ctypes.data

    request = Request(
        Keys(n, d, address("rows"), rows.stride(0), SCANS[scan], *map(address, ("codes", "key_bounds", "direction"))),
        Rows(address("queries"), {torch.float32: 0, torch.bfloat16: 1}[queries.dtype], queries.stride(0)),
        m, k, address("ranges"), address("scores"), address("ids"), address("values"),
        0 if values is None else values[0].nbytes, address("gathered"), address("state"), *device,
    )  # fmt: skip
    sizes = (ctypes.c_int64 * len(PARTS))()
    planner().workspace_parts(ctypes.byref(request), sizes)
    parts = {name: session.empty(size, np.uint8) for name, size in zip(PARTS, sizes, strict=True)}
    argument = (ctypes.c_char * planner().search_bytes())()
    pointers = (ctypes.c_void_p * len(PARTS))(*(part.ctypes.data for part in parts.values()))
    shape = _laid_out(request, pointers, argument)
    session._exposed = [
        (name, t) for name, t in (named | {f"workspace.{p}": a for p, a in parts.items()}).items() if t is not None
    ]
    function = kernel(scan, bool(shape["many"]), ranges is not None, arch)
    done = session.launch(function, (shape["blocks"],), (shape["threads"],), [bytes(argument)], shared=shape["shared"])
    return Found(torch.from_numpy(scores), torch.from_numpy(ids), gathered, done, shape, parts, state)


def can_compile() -> bool:
    """Whether nvcc is there."""
    return shutil.which("nvcc") is not None


def shape_of(n: int, d: int, m: int, k: int, scan: str, device: tuple[int, int]) -> dict[str, int]:
    """How a search of this size would be laid out."""
    request = Request(keys=Keys(n, d, 64, d, SCANS[scan], 64, 64, 64), m=m, k=k)
    request.multiprocessors, request.blocks_of_each = device
    return _laid_out(request, (ctypes.c_void_p * len(PARTS))(), (ctypes.c_char * planner().search_bytes())())


def scan_of(m: int, *, scan: str = "int8", rows: int = 64, stride: int = 64) -> int:
    """What m queries scan, of keys with rows at this address and distance."""
    request = Request(keys=Keys(100, 64, rows, stride, SCANS[scan], 64, 64, 64), m=m, k=5)
    return int(planner().scan_of(ctypes.byref(request)))


def _laid_out(request: Request, pointers: ctypes.Array, argument: ctypes.Array) -> dict[str, int]:
    """Writes the kernel's argument, and tells the shape of the launch."""
    launch = (ctypes.c_int64 * 7)()
    planner().make_search(ctypes.byref(request), pointers, argument, launch)
    return dict(zip(("blocks", "threads", "shared", "many", "groups", "capacity", "slots"), launch, strict=True))
