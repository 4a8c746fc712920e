"""`unike eval`: the paper's tables on the built-in suite, and the requests of a file on a model of one's own."""

from __future__ import annotations

import argparse
import importlib.util
import platform
from pathlib import Path
from typing import Literal

import torch

from unike_kernels import __version__
from unike_kernels.artifacts.files import replacing, write_text
from unike_kernels.cli.edit import add_form, form_of
from unike_kernels.cli.models import NAMES

from . import figures, speed, tables
from .editors import EDITORS, UniKE
from .experiments import BACKBONES, load, perform, table
from .files import evaluate_file
from .flags import flag_facts
from .flags.accuracy import accuracies
from .metrics import PROTOCOLS
from .results import precision

_PERCENTAGES = "Percentages with 95% confidence intervals over requests."


HELP = "the paper's tables, or the requests of a file on a model of your own: editing systems, measured"
_TABLES = (
    "1", "2", "3", "4", "4a", "4b", "4c", "5a", "easyvqa", "countries", "flags", "search", "countries-search", "speed",
)  # fmt: skip
# What decides: edits of the digits are not trained to end, and "exact" says what "unike" says.
SEARCHES = {"search": ("unike", "mmedit"), "countries-search": ("generated",)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument(
        "--table",
        nargs="+",
        choices=_TABLES,
        default=["1"],
        help="1: one step; 2: sequences of one task; 3: of both; 4: ablation; 4a to 5a: the figures; easyvqa: one "
        "step, about coloured shapes; countries: facts about them in a language model, 1, 10 and 100 in force; "
        "flags: the same of pictures of flags, one step; "
        "search, countries-search: settings, on validation requests; speed: of editing (default: 1)",
    )
    parser.add_argument("--systems", nargs="+", metavar="NAME", help="only these, such as FT MEND UniKE")
    own = parser.add_argument_group("a model of your own", "in place of a table; see docs/evaluate-your-model.md")
    own.add_argument("--data", dest="file", type=Path, help="requests: MMEdit, VLKEB, KnowEdit, ZsRE, CounterFact, ...")
    own.add_argument("--model", help=NAMES)
    own.add_argument("--train", type=Path, help="other requests, for systems that learn from some (UniKE's memory)")
    own.add_argument("--steps", type=int, default=1, help="edits in force together (default: %(default)s)")
    add_form(own)
    parser.add_argument("--split", choices=("validation", "test"), default="test", help="(default: %(default)s)")
    parser.add_argument("--requests", type=int, help="at most so many of each suite (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of all training (default: %(default)s)")
    parser.add_argument(
        "--matmul-precision",
        choices=("highest", "high", "medium"),
        default="highest",
        help="of products of float32 matrices, in training and in what is measured, as torch calls it: those below "
        "%(default)s are faster where a processor multiplies bfloat16 or TF32 by itself (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("unike-eval"),
        help="folder of the results; a run that was interrupted goes on from there (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """See `evaluate_file` and `write_tables`."""
    if (args.file is None) != (args.model is None):
        raise ValueError("--data: expected it together with --model, or neither")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(args.matmul_precision)
    try:
        return _run(args)
    finally:
        torch.set_float32_matmul_precision(before)


def _run(args: argparse.Namespace) -> int:
    if args.file is not None:
        _check(args.systems, args.requests)
        evaluate_file(
            args.file, args.model, args.out, form_of(args), train=args.train, systems=args.systems, steps=args.steps,
            limit=args.requests, device=args.device, seed=args.seed,
        )  # fmt: skip
        return 0
    chosen = {"names": args.table, "systems": args.systems, "split": args.split, "requests": args.requests}
    return write_tables(args.out, **chosen, seed=args.seed)


def write_tables(
    out: Path,
    *,
    names: list[str],
    systems: list[str] | None = None,
    split: Literal["validation", "test"] = "test",
    requests: int | None = None,
    seed: int = 0,
) -> int:
    """Perform the runs of these tables that are not yet in `out`, and write each as Markdown and CSV.

    Args:
        out: a folder, created if it does not exist. What an interrupted run has measured stays there, and is not
            measured again.
        names: of tables, see `experiments.table`; "5a" is Figure 5a.
        systems: only these; None: all.
        split: "validation" or "test", whose requests are edited.
        requests: at most so many of them, the first ones; None: all.
        seed: of everything that is random.

    Returns:
        The exit status.

    Raises:
        ValueError: an unknown table or system, no requests; or `out` holds results of other settings.
    """
    _check(systems, requests)
    if SEARCHES.keys() & names and split != "validation":
        raise ValueError("split: settings are searched for on validation requests alone; say --split validation")
    for name in names:
        if name == "5a":
            _spaces(out, requests, seed)
            continue
        if name == "speed":
            _speed(out, requests)
            continue
        runs = [r for r in table(name) if systems is None or r.system in systems]
        if not runs:
            raise ValueError(f"systems: table {name} has no run of {' or '.join(systems or ())}")
        found = []
        for number, each in enumerate(runs, 1):
            print(f"[table {name}: {number}/{len(runs)}] {each.name}", flush=True)
            found.append((each, perform(each, out, split=split, limit=requests, seed=seed)))
        text = f"# Table {name}\n\n{_environment(split, seed)}. {_PERCENTAGES}\n"
        if name in SEARCHES:
            text += f"\n{tables.choice(found, SEARCHES[name])}"
        if name == "flags":
            text += f"\n## The unedited model\n\n{accuracies(*load('flags-smollm2'), flag_facts()['test'])}"
        for protocol in PROTOCOLS:
            text += f"\n## Protocol {protocol}: {PROTOCOLS[protocol]}\n\n{tables.markdown(found, protocol)}"
            write_text(out / f"table-{name}-{protocol}.csv", tables.as_csv(found, protocol))
        write_text(out / f"table-{name}.md", text)
        if name in ("4a", "4b", "4c") and importlib.util.find_spec("matplotlib"):
            of_unike = [(run, rows) for run, rows in found if run.system == UniKE.name]
            _write(out / f"figure-{name}.png", figures.sweep(of_unike, "unike"))
        print(f"\n{text}\nwritten: table-{name}.md and .csv in {out}")
    return 0


def _check(systems: list[str] | None, requests: int | None) -> None:
    unknown = [name for name in systems or () if name not in EDITORS]
    if unknown:
        raise ValueError(f"systems: expected some of {', '.join(EDITORS)}; got {unknown[0]!r}")
    if requests is not None and requests < 1:
        raise ValueError(f"requests: expected a positive number, got {requests}")


def _spaces(out: Path, requests: int | None, seed: int) -> None:
    """Figure 5a of each backbone, of its training requests."""
    for backbone in BACKBONES:
        found, told = figures.spaces(backbone, limit=requests, seed=seed)
        _write(out / f"figure-5a-{backbone}.png", figures.visualized(found, told, seed))
        print(f"{told}\nwritten: figure-5a-{backbone}.png in {out}")


def _speed(out: Path, requests: int | None) -> None:
    """How long editing takes with the threads that torch has here."""
    lines = [speed.editing_speed(backbone, requests or 24).markdown() for backbone in BACKBONES]
    told = f"{_environment('validation', 0)}, {torch.get_num_threads()} threads."
    text = "\n".join(["# Speed of editing", "", told, "", speed.HEADER, *lines, ""])
    write_text(out / "table-speed.md", text)
    print(f"{text}\nwritten: table-speed.md in {out}")


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as file:
        file.write(content)


def _environment(split: str, seed: int) -> str:
    return (
        f"{split} requests, seed {seed}; unike-kernels {__version__}, torch {torch.__version__}, Python "
        f"{platform.python_version()}, {platform.machine()}{precision()}"
    )
