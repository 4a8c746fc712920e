"""The command `unike`: a command is a module with HELP, add_arguments(parser) and run(arguments) -> exit status.

Other packages add theirs by entry points of the group "unike.commands".
"""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

from .._version import __version__
from ..errors import BackendUnavailableError, UnsupportedModelError

_OURS = {"edit": "edit", "fold": "fold", "info": "inspect", "memory": "memory", "serve": "serve"}
# Commands of packages that may not be installed.
_ELSEWHERE = {"bench": "unike-bench", "tune": "unike-bench", "demo": "unike-eval", "eval": "unike-eval"}


def _commands() -> dict[str, Callable[[], Any]]:
    """Name -> what imports its module."""
    found: dict[str, Callable[[], Any]] = {
        name: functools.partial(importlib.import_module, f".{module}", __name__) for name, module in _OURS.items()
    }
    for entry in metadata.entry_points(group="unike.commands"):
        found.setdefault(entry.name, entry.load)
    return found


def _parser(commands: dict[str, Callable[[], Any]], named: str | None) -> argparse.ArgumentParser:
    """Only the module of the command that is named is imported; without one, all are, for their help."""
    parser = argparse.ArgumentParser(
        prog="unike", description="Knowledge editing of multimodal language models (UniKE)."
    )
    parser.add_argument("--version", action="version", version=f"unike_kernels {__version__}")
    added = parser.add_subparsers(dest="command", required=True)
    for name, load in sorted(commands.items()):
        if named in commands and name != named:
            added.add_parser(name)
            continue
        module = load()
        command = added.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    commands, named = _commands(), argv[0] if argv else None
    if named in _ELSEWHERE and named not in commands:
        package = _ELSEWHERE[named]
        print(f"unike {named}: this command is part of the package {package}: pip install {package}", file=sys.stderr)
        return 1
    args = _parser(commands, named).parse_args(argv)
    try:
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # who reads has had enough, as in `unike info | head`; nor is there one for what is left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ImportError, FileNotFoundError, ValueError, BackendUnavailableError, UnsupportedModelError) as error:
        print(f"unike {args.command}: {error}", file=sys.stderr)
        return 1
