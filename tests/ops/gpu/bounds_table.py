"""The tables of docs/gpu-bounds.md: what each GPU kernel must move, what it takes by the cost model, what others do.

PYTHONPATH=.:tests:tools/ptxsim python -m ops.gpu.bounds_table > docs/gpu-bounds.md
"""

from __future__ import annotations

from ops.gpu.real_launches import EAGER, GEMM_REACHES, REAL, Real
from ops.gpu.test_costs import measure
from ptxsim import cost
from ptxsim.cost import H100, MACHINES

COMMAND = __doc__.rsplit("\n", 2)[-2]
PARTS = ("waiting", "memory", "L2", "issue", "tensor cores", "float64")


def amount(count: float) -> str:
    return f"{count / 1e6:.3g} MB" if count >= 1e6 else f"{count / 1e3:.3g} KB"


def micro(seconds: float) -> str:
    return f"{1e6 * seconds:.3g}"


def row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def heading(*names: str) -> str:
    return row(list(names)) + "\n" + row(["---"] * len(names))


def lines(real: Real) -> tuple[str, str]:
    """Of the first and the second table."""
    times, parts, figures = [], [], None
    for machine in MACHINES.values():
        budget, found = measure(real, machine)
        times.append(" / ".join(micro(s) for s in (real.bound(machine), found.seconds, real.peer(machine))))
        if machine is H100:
            figures = budget
            parts = [micro(machine.launch), *(micro(found.parts[name]) for name in PARTS)]
    numbers = [f"{figures.asked:.2f}", f"{figures.scratch:.2f}", f"{figures.flight:.3g}", str(figures.rounds)]
    return (
        row([real.op, real.shape, amount(real.must), *numbers, *times]),
        row([real.op, real.shape, *parts]),
    )


COLUMNS = ("code", "multiprocessors", "clock", "memory", "reached", "L2", "bfloat16", "float64 warps a cycle", "launch")
MACHINE_ROWS = "\n".join([heading("GPU", *COLUMNS), *(
    row([
        m.name, f"sm_{m.arch}", str(m.multiprocessors), f"{m.clock / 1e9:.3g} GHz", f"{m.bandwidth / 1e12:.3g} TB/s",
        f"{100 * m.reached:.0f}%", f"{m.l2 / 1e12:.2g} TB/s", f"{m.flops / 1e12:.3g} T", f"{m.doubles:g}",
        f"{1e6 * m.launch:.2g} us",
    ])
    for m in MACHINES.values()
)])  # fmt: skip

HEAD = f"""# What the GPU kernels must move, and what they take by a model

No GPU was at hand: every time here comes from a model, `tools/ptxsim/ptxsim/cost.py`, of the compiled kernels; none was
measured. It is meant for orderings, and for seeing a kernel become worse; a time may be off by a third.
`unike bench --device cuda` measures the kernels and the bandwidth on a GPU.

Made by `{COMMAND}`;
`python -m ops.gpu.cost_report` prints a launch loop by loop, and `tests/ops/gpu/test_costs.py` holds each to its
figures.

*Must move* is counted from the shapes. *Asked* is what the operands' sectors of 32 bytes add up to, as a multiple of
it: what is asked for more than once can come from a cache. *Scratch* is the same for what the blocks exchange.
*KB in flight* is on one multiprocessor, on average over the loop that asks for most: the latency of an H100's memory at
full rate wants 20 to 30. *Rounds* are loads that the longest warp awaits one after the other, meetings of blocks
included. These four are of an H100. Then microseconds: the bound, the model of this kernel, and a model of others.

"""

NOTES = """
## Where the time goes, on an H100

In microseconds. The launch comes on top of the largest of the others: *waiting*, the longest block alone, with the
latency that memory has at this load; *memory*, each byte once at the rate that a copy reaches; *L2*, all that
multiprocessors ask L2 for; *issue*, warp instructions over the four that a multiprocessor starts in a cycle; tensor
cores and float64, likewise.

"""

ASSUMPTIONS = f"""
## What the model assumes

{MACHINE_ROWS}

| cycles of | |
| --- | --- |
| a load from L1 | {cost.LATENCY[cost.L1]} |
| from L2 | {cost.LATENCY[cost.L2]} |
| from memory that is idle | {cost.LATENCY[cost.DRAM]} |
| from memory at full rate | {cost.LOADED} |
| an atomic of global memory | {cost.ATOMIC} |
| a fence of device scope | {cost.FENCE} |
| a barrier of a block | {cost.BARRIER} |

A line of 128 bytes comes from memory when its block touches it first, scratch from L2. Data sheets give
multiprocessors, memory and bfloat16 rates; `tools/ptxsim/README.md` names the sources of the rest.

Others are: for the FFN, three products of a vendor's library at the rate of a copy, or at {100 * GEMM_REACHES:.0f}% of
the arithmetic, an activation and a side product, in a CUDA graph; for the side product a shrink and an expand; for
latent attention torch, one launch for each of its operations; for a search a float32 product and a selection of 10 us.
Launches of torch are at least {1e6 * EAGER:.0f} us apart.

## Entries that tokens share

Latent attention gathers the entries of each token for itself. A product over the union of what a tile of tokens reads,
masked, would ask for each entry once. It is not done: of 15,000 entries, 16 tokens with 40 independent ones each read
627 different ones of 640, so that the union saves 2% of the bytes, while its products are 16 times as many; all of 512
tokens read 11,178 of 20,480, which is why their launch asks for twice what must move, but they are not in one block. It
would pay where the tokens of a tile have most entries in common; `retrieval="sequence"`, whose tokens share all of
theirs, has a kernel of its own ("shared ids" above).

## What it does not know

- Conditions on floats, and on what other blocks do: they are guessed, and the report counts them. A search by Triton,
  or of many queries, rescores sixteen candidates a block, whatever the data. A CUDA search of one query rescores four a
  block by int8 codes and two by others: random keys have 3.1 and 0.2 on average, ten and two at most, and up to sixteen
  take as long. A wait for other blocks ends after two looks. Blocks are taken to arrive together, and the block that
  merges last is the one that is walked. What was prefetched into L2 is taken to have come when it is read.
- Warps disturb each other only through the sums above. Bank conflicts, instruction fetch, queues between L1 and L2, the
  two halves of L2, the TLB and clocks under load cost nothing.
- One to five blocks stand for all. A line that several blocks read comes from memory once for each of them, up to the
  size of its argument.
- What the products of Blackwell's tensor cores (tcgen05) take is a guess: their shape is in a register.
- The host: the times are of a launch in a CUDA graph, or behind a busy stream. The Python of a call that is prepared,
  with the driver's launch left out, takes by the fastest of thousands of calls on a server's CPU: a search 16 us by
  CUDA and by Triton, the fused FFN and the side product 10, memory attention 16, attention to entries that are known,
  as `retrieval="sequence"` has them, 16, and with `scale="cosine"` one more operation of torch.
"""


def table() -> str:
    """The document."""
    both = [lines(real) for name, real in REAL.items() if "bfloat16 scan" not in name]  # which is as the float16 one
    gpus = [f"{name}: bound / model / others" for name in MACHINES]
    first = heading("operator", "shape", "must move", "asked", "scratch", "KB in flight", "rounds", *gpus)
    second = heading("operator", "shape", "launch", *PARTS)
    tables = ["\n".join([first, *(a for a, _ in both)]), "\n".join([second, *(b for _, b in both)])]
    return HEAD + tables[0] + "\n" + NOTES + tables[1] + "\n" + ASSUMPTIONS


if __name__ == "__main__":
    print(table(), end="")
