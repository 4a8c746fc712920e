"""The command `unike`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unike", description="Knowledge editing of multimodal language models (UniKE)."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="edit a small real model from end to end")
    demo.add_argument(
        "--model",
        choices=("digits-opt", "digits-llama", "smollm2"),
        default="digits-opt",
        help="BLIP-2 on handwritten digits with an OPT or a LLaMA decoder, or SmolLM2-135M (default: %(default)s)",
    )
    demo.add_argument(
        "--out", type=Path, default=Path("unike-demo"), help="folder for the artifacts (default: %(default)s)"
    )
    demo.add_argument(
        "--seed", type=int, default=0, help="of the memory's encoders and the edit (default: %(default)s)"
    )
    demo.add_argument("--reload", action="store_true", help="load the artifacts of an earlier run and show the answers")
    commands.add_parser("info", help="versions, CPU and backends")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = _parser().parse_args(argv)
    if args.command == "info":
        from ..environment import show_config

        print(show_config())
        return 0
    from .demo import run

    try:
        return run(args.model, args.out, seed=args.seed, reload=args.reload)
    except (ImportError, FileNotFoundError, ValueError) as error:
        print(f"unike demo: {error}", file=sys.stderr)
        return 1
