"""`unike demo`: a model with a mistake, its memory, one edit, what it changes and what it costs."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from unike_kernels.artifacts import files
from unike_kernels.artifacts.edit import Edit
from unike_kernels.artifacts.memory import MemoryBank
from unike_kernels.nn import Trace
from unike_kernels.patching import explain, patched
from unike_kernels.training import Sample, build_memory, train_edit
from unike_kernels.training.samples import encode, forward, prompt_lengths_for

from . import PROTOCOLS, answers, measure_latency, observe_case, score
from .demo_page import Change, demo_page
from .demo_picture import demo_picture, described
from .scenarios import Scenario, load
from .terminal import blocks, shows_pictures

_SHOWN = {
    "reliability": "the edit",
    "t_generality": "the same question in other words",
    "m_generality": "other images of the same thing",
    "t_locality": "unrelated text",
    "m_locality": "unrelated images and questions",
}
_EXAMPLES = 3  # shown of each group


HELP = "edit a small real model from end to end"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument(
        "--model",
        choices=("digits-opt", "digits-llama", "smollm2"),
        default="digits-opt",
        help="BLIP-2 on handwritten digits with an OPT or a LLaMA decoder, or SmolLM2-135M (default: %(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("unike-demo"), help="folder for the artifacts (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the memory's encoders and the edit (default: %(default)s)"
    )
    parser.add_argument(
        "--reload", action="store_true", help="load the artifacts of an earlier run and show the answers"
    )


def run(args: argparse.Namespace) -> int:
    """See `show`."""
    return show(args.model, args.out, seed=args.seed, reload=args.reload)


def show(name: str, out: Path, *, seed: int = 0, reload: bool = False) -> int:
    """Run the demo, or with `reload` only show the answers of the artifacts in `out`. Returns the exit status."""
    scenario = load(name, seed)
    edit_file, memory_file = out / f"{name}-edit.safetensors", out / f"{name}-memory.safetensors"
    if reload:
        with patched(scenario.model, [Edit.load(edit_file)], MemoryBank.load(memory_file)):
            print(json.dumps(_answers(scenario)))
        return 0

    started = time.monotonic()
    introduce(name, scenario)
    triplets = scenario.triplets()
    print(f"memory of {len(triplets)} answers that the model gets wrong (of {len(scenario.knowledge)} questions asked)")
    before = _answers(scenario), observe_case(scenario.model, scenario.processor, scenario.case)

    made = build_memory(scenario.model, scenario.processor, triplets, training=scenario.encoders)
    print(made)
    result = train_edit(
        scenario.model,
        scenario.processor,
        scenario.request(),
        made.memory,
        id="demo",
        preserve=scenario.preserve,
        training=scenario.training,
    )
    print(result)
    result.edit.save(edit_file)
    made.memory.save(memory_file)
    for file in (edit_file, memory_file):
        print(f"saved {file} ({file.stat().st_size:,} bytes)")

    with patched(scenario.model, [result.edit], made.memory) as report:
        print(f"\n{report}\n")
        after = _answers(scenario), observe_case(scenario.model, scenario.processor, scenario.case)
        trace = _explained(scenario)
    changes = _changes(scenario, before[0], after[0])
    _print_changes(changes)
    scores = {protocol: score(before[1], after[1], protocol) for protocol in PROTOCOLS}
    for protocol, values in scores.items():
        print(f"{protocol:9s} " + "  ".join(f"{metric} {value:.1%}" for metric, value in values.items()))

    request = encode(scenario.processor, [Sample(scenario.case.request.prompt, "", scenario.case.request.image)])
    print(f"\n{measure_latency(scenario.model, request.inputs, [result.edit], made.memory)}\n")

    told = [str(part) for part in (result, result.edit, made.memory)]
    files.write_text(out / "demo.html", demo_page(name, scenario.case.request, changes, told, scores, trace))
    asked = trace.said(0, 0, range(trace.shapes[0][1]))
    _save(trace.plot(), out / "explain.png", f"for each layer and token of {asked!r}: the gate, the shift, the neurons")
    if scenario.case.request.image is not None:
        _save(demo_picture(changes), out / "demo.png", described(changes))
    print(f"all of it in a page: {out / 'demo.html'}, with pictures beside it")

    command = [sys.executable, "-m", "unike_kernels", "demo", "--reload", "--model", name, "--out", str(out)]
    fresh = subprocess.run(command, capture_output=True, text=True)
    same = fresh.returncode == 0 and json.loads(fresh.stdout.splitlines()[-1]) == after[0]
    print(f"loaded in a fresh process: {'the same answers' if same else 'OTHER ANSWERS ' + fresh.stderr[-2000:]}")
    reached = scores["unike"]["reliability"] == 1.0
    print(f"done in {time.monotonic() - started:.0f} s; the edit {'holds' if reached else 'FAILED'}")
    return 0 if same and reached else 1


def introduce(name: str, scenario: Scenario) -> None:
    """Print what will be edited, on a terminal with its picture."""
    request = scenario.case.request
    if request.image is not None and shows_pictures():
        print(blocks(request.image))
    print(f"== {name}: {request.prompt!r} should be answered {request.answer!r}")


def _save(figure: Any, file: Path, said: str) -> None:
    """As a PNG that holds what it shows in words, too."""
    figure.savefig(file, dpi=100, metadata={"Description": said})


def _answers(scenario: Scenario) -> dict[str, list[str]]:
    """Metric -> answers to its first examples."""
    return {
        metric: answers(scenario.model, scenario.processor, samples[:_EXAMPLES])
        for metric, samples in scenario.case.groups().items()
        if samples
    }


@torch.no_grad()
def _explained(scenario: Scenario) -> Trace:
    """What the patched model does in a pass over the request with its answer."""
    batch = encode(scenario.processor, [scenario.case.request])
    with prompt_lengths_for(scenario.model, batch), explain(scenario.model, scenario.processor) as trace:
        forward(scenario.model, batch.inputs)
    return trace


def _changes(scenario: Scenario, before: dict[str, list[str]], after: dict[str, list[str]]) -> list[Change]:
    """What became of the answers, each in a line."""
    return [
        Change(_SHOWN[metric], sample.prompt, " ".join(old.split()), " ".join(new.split()), sample.image)
        for metric, samples in scenario.case.groups().items()
        if samples
        for sample, old, new in zip(samples, before[metric], after[metric], strict=False)
    ]


def _print_changes(changes: list[Change]) -> None:
    for group, own in groupby(changes, lambda change: change.group):
        print(f"{group}:")
        for _, prompt, old, new, _ in own:
            print(f"  {prompt:50.50s}  {old:24.24s} -> {new:.24s}")
