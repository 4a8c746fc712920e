"""`unike serve`: transformers' server, in which 'name+edit' is a model with an edit."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "transformers' server, in which 'name+edit' is a model with an edit"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("--edits", type=Path, required=True, help="folder of edits, <id>.safetensors")
    parser.add_argument("--memory", type=Path, help="a memory that edited models use")
    parser.add_argument("--host", default="localhost", help="(default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    parser.add_argument("--device", default="auto", help="of the models, such as cuda:0 (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="of the models, such as bfloat16 (default: the weights')")
    parser.add_argument("--log-level", default="warning", help="(default: %(default)s)")
    parser.add_argument("--max-edits", type=int, default=16, help="of one request (default: %(default)s)")
    parser.add_argument("--continuous-batching", action="store_true", help="requests with all edits in one batch")


def run(args: argparse.Namespace) -> int:
    """Serve until interrupted."""
    from ..serving.transformers import serve

    names = ("host", "port", "device", "dtype", "log_level", "continuous_batching")
    serve(args.edits, args.memory, max_edits=args.max_edits, **{name: getattr(args, name) for name in names})
    return 0
