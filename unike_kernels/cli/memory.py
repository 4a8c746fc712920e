"""`unike memory`: a memory from a file of triplets, or one with further entries."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..artifacts.memory import MemoryBank
from ..config import Config
from ..training import build_memory, extend_memory
from .edit import add_arguments_of_files, form_of
from .models import load
from .rows import read_triplets

HELP = "make a memory of what a model gets wrong, or add to one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.epilog = (
        "A row has a prompt (or messages), positive, the true answer, and negative, the model's wrong one, and may "
        "have an image; MMEdit's src, alt and pred are understood, too."
    )
    add_arguments_of_files(parser)
    parser.add_argument("--out", type=Path, required=True, help="file of the memory")
    parser.add_argument("--extend", type=Path, help="a memory that is added to; its encoders stay as they are")
    parser.add_argument("--layers", type=int, nargs="+", help="(default: those of --extend, else the last four)")
    parser.add_argument("--values", choices=("out", "pre", "projected", "context"), help="(default: out)")
    parser.add_argument("--store", type=Path, help="folder for extracted states, so that an interrupted run goes on")


def run(args: argparse.Namespace) -> int:
    """Extract, train the encoders, and save.

    Raises:
        ArtifactError: a damaged memory or store.
        FileNotFoundError: no such model, file or image.
        MismatchError: the memory to be extended is another model's.
        ValueError: a file of another form; too few triplets; layers or values beside --extend.
    """
    if args.extend is not None and (args.layers is not None or args.values is not None):
        raise ValueError("--extend: expected no --layers and no --values, as the memory has its own")
    triplets, unused = read_triplets(args.file, form_of(args))
    old = None if args.extend is None else MemoryBank.load(args.extend)
    if unused:
        print(f"fields that are not known: {', '.join(unused)}")
    model, processor = load(args.model, args.device)
    if old is not None:
        memory = extend_memory(model, processor, old, triplets, store=args.store)
        print(f"memory {memory.id}: {len(old):,} entries and {len(memory) - len(old):,} more")
    else:
        config = Config(**({} if args.values is None else {"values": args.values}))
        made = build_memory(model, processor, triplets, config=config, layers=args.layers, store=args.store)
        memory = made.memory
        print(made)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    memory.save(args.out)
    print(f"saved {args.out} ({args.out.stat().st_size:,} bytes)")
    return 0
