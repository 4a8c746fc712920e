"""Extracting h_sem, h_pos and h_neg of in-context knowledge (paper, section 3.3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..backbones import device_of, find_decoder
from ..errors import PatchError
from ..nn import residual_of, residual_position
from ..patching import is_patched
from .samples import Sample, Triplet, batches, encode, evaluating, forward


@dataclass(frozen=True)
class Hidden:
    """Hidden states of N triplets at one layer's attention module: its input ("pre") and its output ("out").

    All are float32 [N, d] on the CPU. sem: the last token of the question; pos and neg: the last token of the question
    with the true and with the wrong answer.
    """

    sem_pre: Tensor
    sem_out: Tensor
    pos_pre: Tensor
    pos_out: Tensor
    neg_pre: Tensor
    neg_out: Tensor


@contextmanager
def _record(modules: dict[int, nn.Module]) -> Iterator[dict[tuple[int, str], Tensor]]:
    """Within the block, each pass leaves the input and the output of each module in the dictionary."""
    store: dict[tuple[int, str], Tensor] = {}

    def hook(index: int) -> Any:
        def after(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            store[index, "pre"] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            out = output[0] if isinstance(output, tuple) else output
            residual = residual_of(residual_position(module), args, kwargs)
            store[index, "out"] = out if residual is None else out - residual

        return after

    handles = [m.register_forward_hook(hook(i), with_kwargs=True) for i, m in modules.items()]
    try:
        yield store
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def extract(
    model: nn.Module,
    processor: Any,
    triplets: Sequence[Triplet],
    *,
    layers: Sequence[int] | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> dict[int, Hidden]:
    """Run the positive and the negative knowledge through the unpatched model and keep the states that matter.

    Args:
        model: a Hugging Face model, not patched.
        processor: its processor or tokenizer.
        triplets: at least two (one has no negatives to be told from).
        layers: decoder layers; None: the last four.
        batch_size: triplets per forward pass.
        progress: show a progress bar.

    Returns:
        Layer index -> `Hidden`, rows in the order of `triplets`.

    Raises:
        ValueError: too few triplets, or a positive answer that equals the negative one.
        PatchError: the model is patched; its states would be shifted ones.
    """
    if len(triplets) < 2:
        raise ValueError(f"triplets: expected at least 2, got {len(triplets)}")
    for i, t in enumerate(triplets):
        if t.positive == t.negative:
            raise ValueError(f"triplets[{i}]: the positive and the negative answer are both {t.positive!r}")
    if is_patched(model):
        raise PatchError("extract: the model is patched; unpatch it first")
    decoder = find_decoder(model)
    chosen = decoder.select(layers)
    attention = {i: decoder.layers[i].attention.module for i in chosen}
    device = device_of(model)
    found: dict[tuple[int, str], list[Tensor]] = {
        (i, f"{state}_{site}"): [torch.empty(0)] * len(triplets)
        for i in chosen
        for state in ("sem", "pos", "neg")
        for site in ("pre", "out")
    }
    plan = list(batches([Sample(t.prompt, "", t.image) for t in triplets], batch_size))
    show = tqdm(total=len(triplets), desc="extract", disable=not progress)
    with evaluating(model), _record(attention) as store, show as bar:
        for indices in plan:
            for state in ("pos", "neg"):
                answers = [triplets[i].positive if state == "pos" else triplets[i].negative for i in indices]
                samples = [
                    Sample(triplets[i].prompt, a, triplets[i].image) for i, a in zip(indices, answers, strict=True)
                ]
                batch = encode(processor, samples, device)
                forward(model, batch.inputs)
                rows = torch.arange(len(indices), device=device)
                for (layer, site), states in store.items():
                    wanted = {f"{state}_{site}": batch.lasts}
                    if state == "pos":
                        wanted[f"sem_{site}"] = batch.ends
                    for name, at in wanted.items():
                        for i, row in zip(indices, states[rows, at].float().cpu(), strict=True):
                            found[layer, name][i] = row
            bar.update(len(indices))
    names = list(Hidden.__dataclass_fields__)
    return {i: Hidden(**{name: torch.stack(found[i, name]) for name in names}) for i in chosen}
