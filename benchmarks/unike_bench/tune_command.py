"""`unike tune`: measures tile sizes on this GPU and keeps the fastest."""

from __future__ import annotations

import argparse
import json

import torch

from unike_kernels.artifacts.files import write_text
from unike_kernels.errors import BackendUnavailableError
from unike_kernels.ops import _backend, _tiles

from .report.tables import duration
from .tune import TUNABLES, merged, tune

HELP = "measure tile sizes of the Triton kernels on this GPU, and keep the fastest"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        nargs="+",
        default=["bfloat16"],
        help="of the weights (default: bfloat16)",
    )


def run(args: argparse.Namespace) -> int:
    """Tune all kernels and write the cache; returns the exit status.

    Raises:
        BackendUnavailableError: there is no GPU, or no Triton.
    """
    if reason := _backend.triton_missing():
        raise BackendUnavailableError(reason)
    found = []
    for each in tune(TUNABLES, [getattr(torch, name) for name in args.dtype]):
        sizes = ", ".join(f"{name} {value}" for name, value in each.sizes._asdict().items())
        print(f"{each.op}, {each.form}: {duration(each.before)} -> {duration(each.after)} with {sizes}", flush=True)
        found.append(each)
    write_text(_tiles.path(), json.dumps(merged(found, _tiles.device_name()), indent=1))
    _tiles.forget()
    print(f"written: {_tiles.path()}")
    return 0
