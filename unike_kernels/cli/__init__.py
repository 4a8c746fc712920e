"""The command `unike`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import BackendUnavailableError, UnsupportedModelError


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
    command = commands.add_parser("bench", help="measure the kernels against others and against this machine's bounds")
    command.add_argument(
        "--select",
        choices=("quick", "full"),
        default="quick",
        help="the rows that matter, some minutes, or all, most of an hour (default: %(default)s)",
    )
    command.add_argument("--only", choices=("retrieval", "attention", "ffn", "decode"), help="of the selection, this")
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    command.add_argument("--growth", action="store_true", help="also retrieval from 15,000 to a million keys")
    command.add_argument(
        "--out", type=Path, default=Path("unike-bench"), help="folder for the reports (default: %(default)s)"
    )
    command.add_argument("--compare", type=Path, metavar="JSON", help="bench.json of an earlier run")
    command.add_argument("--rounds", type=int, help="of each case, at least 3 (default: what fits into some seconds)")
    evaluation = commands.add_parser("eval", help="the paper's tables: editing systems on real images, measured")
    evaluation.add_argument(
        "--table",
        nargs="+",
        choices=("1", "2", "3", "4", "4a", "4b", "4c", "5a", "easyvqa", "search", "speed"),
        default=["1"],
        help="1: one step; 2: sequences of one task; 3: of both; 4: ablation; 4a to 5a: the figures; easyvqa: one "
        "step, about coloured shapes; search: settings, on validation requests; speed: of editing (default: 1)",
    )
    evaluation.add_argument("--systems", nargs="+", metavar="NAME", help="only these, such as FT MEND UniKE")
    evaluation.add_argument("--split", choices=("validation", "test"), default="test", help="(default: %(default)s)")
    evaluation.add_argument("--requests", type=int, help="at most so many of each suite (default: all)")
    evaluation.add_argument("--seed", type=int, default=0, help="of all training (default: %(default)s)")
    evaluation.add_argument(
        "--out",
        type=Path,
        default=Path("unike-eval"),
        help="folder of the results; a run that was interrupted goes on from there (default: %(default)s)",
    )
    serve = commands.add_parser("serve", help="transformers' server, in which 'name+edit' is a model with an edit")
    serve.add_argument("--edits", type=Path, required=True, help="folder of edits, <id>.safetensors")
    serve.add_argument("--memory", type=Path, help="a memory that edited models use")
    serve.add_argument("--host", default="localhost", help="(default: %(default)s)")
    serve.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    serve.add_argument("--continuous-batching", action="store_true", help="requests with all edits in one batch")
    commands.add_parser("tune", help="measure tile sizes of the Triton kernels on this GPU, and keep the fastest")
    inspect = commands.add_parser("info", help="versions, CPU and backends; or what would be patched in a model")
    inspect.add_argument(
        "model",
        nargs="?",
        help="digits-opt, digits-llama, easyvqa-opt, easyvqa-llama, a folder, or a name on the Hugging Face hub",
    )
    inspect.add_argument("--neurons", type=int, default=10, help="of an edit, in each layer (default: %(default)s)")
    inspect.add_argument("--entries", type=int, default=15_000, help="of a memory (default: %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = _parser().parse_args(argv)
    if args.command == "info" and args.model is None:
        from ..environment import show_config

        print(show_config())
        return 0
    try:
        if args.command == "bench":
            from unike_bench import command

            selection = {"select": args.select, "only": args.only, "growth": args.growth}
            return command.run(args.out, **selection, device=args.device, compare=args.compare, rounds=args.rounds)
        if args.command == "eval":
            from unike_eval import evaluate

            chosen = {"names": args.table, "systems": args.systems, "split": args.split, "requests": args.requests}
            return evaluate.run(args.out, **chosen, seed=args.seed)
        if args.command == "info":
            from . import inspect

            return inspect.run(args.model, neurons=args.neurons, entries=args.entries)
        if args.command == "serve":
            from ..serving.transformers import serve

            serve(args.edits, args.memory, host=args.host, port=args.port, continuous_batching=args.continuous_batching)
            return 0
        if args.command == "tune":
            from unike_bench import tune_command

            return tune_command.run()
        from unike_eval import demo

        return demo.run(args.model, args.out, seed=args.seed, reload=args.reload)
    except (ImportError, FileNotFoundError, ValueError, BackendUnavailableError, UnsupportedModelError) as error:
        print(f"unike {args.command}: {error}", file=sys.stderr)
        return 1
