"""What can be said of a compiled Triton kernel without running it, from its binary for each architecture."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget

from .sass import tool
from .triton_driver import SHARED_LIMIT, compiling

TARGETS = (
    *(GPUTarget("cuda", arch, 32) for arch in (80, 90, 100, 120)),
    *(GPUTarget("hip", arch, 64) for arch in ("gfx942", "gfx950")),
)


class Multiprocessor(NamedTuple):
    """Limits of one multiprocessor, from NVIDIA's table of compute capabilities."""

    threads: int
    blocks: int
    shared: int


MULTIPROCESSOR = {
    80: Multiprocessor(2048, 32, 167_936),
    86: Multiprocessor(1536, 16, 102_400),
    89: Multiprocessor(1536, 24, 102_400),
    90: Multiprocessor(2048, 32, 233_472),
    100: Multiprocessor(2048, 32, 233_472),
    120: Multiprocessor(1536, 24, 102_400),
}
REGISTERS = 65_536
RESERVED_SHARED = 1024  # that the driver takes for each block


@dataclass(frozen=True)
class Resources:
    """What one kernel needs, and which instructions it has."""

    architecture: str
    registers: int
    stack: int  # bytes for each thread
    local_accesses: int  # loads and stores of local memory in the binary: spills, or arrays that are indexed
    shared: int
    shared_limit: int
    occupancy: float  # of the threads that a multiprocessor holds; 0 where a block does not fit
    wide_loads: int  # of 16 bytes from global memory, copies to shared memory included
    global_loads: int
    ahead: int  # groups of copies to shared memory that some wait leaves on their way
    tensor_core: Counter[str]

    @property
    def spills(self) -> bool:
        """Whether anything lives in local memory."""
        return self.stack > 0 or self.local_accesses > 0


def compile_for(kernel: Any, target: GPUTarget, arguments: tuple, **options: Any) -> Any:
    """Compile a @triton.jit function as a launch with these arguments would: with the same hints on alignment."""
    with compiling(target):
        return kernel.warmup(*arguments, grid=(1,), **options)


def resources(compiled: Any) -> Resources:
    """Read the binary of a compiled kernel."""
    target = compiled.metadata.target
    return _amd(compiled, target.arch) if target.backend == "hip" else _cuda(compiled, target.arch)


def everywhere(kernel: Any, arguments: tuple, **options: Any) -> list[Resources]:
    """The resources on every architecture of interest."""
    return [resources(compile_for(kernel, target, arguments, **options)) for target in TARGETS]


def occupancy(arch: int, threads: int, registers: int, shared: int) -> float:
    """Resident threads over the most there can be, by registers (in units of 256 a warp), shared memory and blocks."""
    limits = MULTIPROCESSOR[arch]
    if shared > SHARED_LIMIT[arch]:
        return 0.0
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS // 4 // max(per_warp, 1) * 4 // warps  # a quarter of the file for each scheduler
    per_block = -(-(shared + RESERVED_SHARED) // 128) * 128
    blocks = min(limits.blocks, limits.threads // threads, by_registers, limits.shared // per_block)
    return blocks * threads / limits.threads


def _cuda(compiled: Any, arch: int) -> Resources:
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        usage = tool(triton.knobs.nvidia.cuobjdump.path, "-res-usage", binary)
        sass = tool(triton.knobs.nvidia.nvdisasm.path, "-c", binary)
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    operations = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", sass)
    metadata = compiled.metadata
    loads = [name for name in operations if name.split(".")[0] in ("LDG", "LDGSTS")]
    return Resources(
        architecture=f"sm_{arch}",
        registers=registers,
        stack=stack,
        local_accesses=sum(name.split(".")[0] in ("LDL", "STL") for name in operations),
        shared=metadata.shared,
        shared_limit=SHARED_LIMIT[arch],
        occupancy=occupancy(arch, metadata.num_warps * 32, registers, metadata.shared),
        wide_loads=sum(".128" in name for name in loads),
        global_loads=len(loads),
        ahead=max((int(n, 16) for n in re.findall(r"DEPBAR\.LE SB0, (0x[0-9a-f]+)", sass)), default=0),
        tensor_core=Counter(name for name in operations if re.match(r"([HIQDOU][TG]?[CM]*MMA|UTC\w*MMA)", name)),
    )


def _amd(compiled: Any, arch: str) -> Resources:
    text, shared, limit = compiled.asm["amdgcn"], compiled.metadata.shared, SHARED_LIMIT[arch]

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

    loads = re.findall(r"^\s+((?:global|buffer|flat)_load_\w+)", text, re.MULTILINE)
    vectors = field("vgpr_count")
    return Resources(
        architecture=arch,
        registers=vectors,
        stack=field("private_segment_fixed_size"),
        local_accesses=field("vgpr_spill_count"),  # scalar registers go to lanes of vector registers, not to memory
        shared=shared,
        shared_limit=limit,
        # Eight waves for each SIMD unit, which has 512 registers a lane in units of 8.
        occupancy=min(8, 512 // max(-(-vectors // 8) * 8, 1)) / 8 * (shared <= limit),
        wide_loads=sum(name.endswith("dwordx4") for name in loads),
        global_loads=len(loads),
        ahead=0,
        tensor_core=Counter(re.findall(r"^\s+(v_mfma_\w+)", text, re.MULTILINE)),
    )
