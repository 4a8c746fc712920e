"""Where and with what a report was made."""

from __future__ import annotations

import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

from unike_kernels import _native
from unike_kernels._version import __version__

_PACKAGES = ("torch", "triton", "numpy", "transformers", "faiss-cpu", "faiss-gpu", "usearch", "numkong")


def stamp(device: str = "cpu") -> dict[str, str]:
    """What is measured -> in words: the GPU if it is one, the CPU, threads, versions, kernel, date and commit."""
    found = {"GPU": _gpu()} if device == "cuda" else {}
    found |= {"CPU": _cpu(), "instruction set of the kernels": _native.isa(), "threads": str(torch.get_num_threads())}
    found |= {"unike-kernels": __version__, "Python": platform.python_version()}
    found |= {name: version for name in _PACKAGES if (version := _version(name))}
    found |= {"kernel": f"{platform.system()} {platform.release()}", "date": f"{datetime.now(timezone.utc):%F %R} UTC"}
    return found | ({"commit": commit} if (commit := _commit()) else {})


def _gpu() -> str:
    properties = torch.cuda.get_device_properties()
    platform = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return f"{properties.name}, {properties.multi_processor_count} multiprocessors, {platform}"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the checkout that this file is part of, if it is part of one; changes since are told."""
    here = Path(__file__)

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(here.parent), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", here.name) is None:
        return None
    commit, changes = git("rev-parse", "--short=12", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    return f"{commit}, with changes" if changes else commit
