"""`unike fold`: edits as a part of a plain checkpoint, for engines that know nothing of edits."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..artifacts.edit import Edit
from ..patching import fold
from ..patching.fold_gguf import fold_into_gguf
from .models import NAMES, load

HELP = "write a plain model whose FFNs hold the neurons of edits"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("model", help=NAMES)
    parser.add_argument("edits", type=Path, nargs="+", help="files of edits, in their order")
    parser.add_argument("--out", type=Path, required=True, help="folder of the new checkpoint")
    parser.add_argument(
        "--gguf", type=Path, metavar="BASE", help="a GGUF file of the base model: writes it with the edits, model.gguf"
    )
    parser.add_argument(
        "--override", action="store_true", help="fold what was made for other weights or trained with a memory, too"
    )


def run(args: argparse.Namespace) -> int:
    """Fold and save.

    Raises:
        ArtifactError: a damaged edit.
        FileNotFoundError: no such model or file.
        MismatchError, UnsupportedModelError: as `fold` and `fold_into_gguf` do.
    """
    edits = [Edit.load(file) for file in args.edits]
    model, processor = load(args.model, "cpu")
    folded = fold(model, edits, override=args.override)
    folded.save_pretrained(args.out)  # type: ignore[operator]
    processor.save_pretrained(args.out)
    print(f"saved {args.out}: {type(folded).__name__} with {', '.join(edit.id for edit in edits)} in its FFNs")
    if args.gguf is not None:
        file = args.out / "model.gguf"
        fold_into_gguf(folded, args.gguf, file)
        print(f"saved {file} ({file.stat().st_size:,} bytes)")
    return 0
