"""What this installation is and what it can use."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

from . import _native, ops
from ._version import __version__

_PACKAGES = ("transformers", "triton", "faiss-cpu", "faiss-gpu", "safetensors")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def show_config() -> str:
    """Versions, CPU, native extension and the backends of each operator, one per line. For bug reports."""
    native = f"{_native.isa()}" if _native.available() else f"missing: {_native.reason()}"
    lines = [
        f"unike_kernels {__version__}, Python {platform.python_version()}, torch {torch.__version__}",
        f"CPU: {platform.machine()}, {torch.get_num_threads()} threads; native extension: {native}",
        f"CUDA: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'no device'}",
        *(f"{name}: {_version(name)}" for name in _PACKAGES),
    ]
    for op in ops.operators():
        backends = (f"{name} ({reason})" if reason else name for name, reason in ops.available(op).items())
        lines.append(f"{op}: {', '.join(backends)}")
    return "\n".join(lines)
