"""Making one edit: extra neurons, trained on the target's tokens, model frozen, memory active (paper, section 3.3)."""

from __future__ import annotations

import math
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..backbones import device_of, find_decoder
from ..config import Config
from ..edits import Edit, EditLayer, fresh_layer
from ..errors import PatchError
from ..fingerprint import fingerprint
from ..memory import MemoryBank
from ..nn import PatchedFFN
from ..patching import is_patched, patched, patched_ffns
from .samples import Batch, Sample, batches, encode, evaluating, forward, telling_prompts


@dataclass(frozen=True)
class EditTraining:
    """How an edit is trained.

    Attributes:
        neurons: per layer (the paper's 10).
        lr: of Adam.
        steps: at most.
        stop_loss: stop when every target token is predicted and the target's loss is below this ...
        stop_preserve: ... and the divergence on the `preserve` samples was below this, in nats a token, in the mean of
            the last pass over them.
        preserve_weight: of the divergence from the unedited model on the `preserve` samples.
        preserve_batch: how many of them are seen in a step.
        activation_weight: of T-Patcher's activation loss: exp(-a) in the mean over the neurons, a the pre-activation of
            a neuron at the token of the answer that its key was made from.
        memory_weight: of T-Patcher's memory loss: max(0, a - margin) in the mean over neurons and `preserve` tokens.
        margin: see there; the pre-activation below which a neuron counts as silent.
        seed: of the initialisation and of the order of the preserve samples.
    """

    neurons: int = 10
    lr: float = 1e-2
    steps: int = 100
    stop_loss: float = 0.05
    stop_preserve: float = 0.01
    preserve_weight: float = 10.0
    preserve_batch: int = 16
    activation_weight: float = 0.0
    memory_weight: float = 0.0
    margin: float = -3.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("neurons", "lr", "steps", "stop_loss", "stop_preserve", "preserve_batch"):
            if not getattr(self, name) > 0:
                raise ValueError(f"EditTraining.{name}: expected a positive number, got {getattr(self, name)!r}")
        for name in ("preserve_weight", "activation_weight", "memory_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"EditTraining.{name}: expected 0 or more, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class EditResult:
    """An edit and how its training went.

    Attributes:
        edit: ready to patch in or save.
        losses: loss of the target at each step, before the step.
        divergence: from the unedited model on the `preserve` samples at the end, in nats a token; 0 without samples.
        reached: whether the edited model predicts every target token.
        stopped: why training ended: "target met" (and the preserve samples kept), "step limit, target met" or
            "step limit, target not met".
    """

    edit: Edit
    losses: tuple[float, ...]
    divergence: float
    reached: bool
    stopped: str

    @property
    def steps(self) -> int:
        return len(self.losses)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Within the block the model is in eval mode and its parameters ask for no gradient."""
    asked = [p for p in model.parameters() if p.requires_grad]
    for p in asked:
        p.requires_grad_(False)
    try:
        with evaluating(model):
            yield
    finally:
        for p in asked:
            p.requires_grad_(True)


@contextmanager
def _watched(ffns: dict[int, PatchedFFN]) -> Iterator[dict[int, Tensor]]:
    """Within the block each pass leaves the FFN inputs [tokens, d] of each layer in the dictionary."""
    seen: dict[int, Tensor] = {}
    handles = [
        ffn.register_forward_pre_hook(lambda _, args, i=i: seen.__setitem__(i, args[0].flatten(0, -2)))
        for i, ffn in ffns.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _ffn_inputs(ffns: dict[int, PatchedFFN], run: Callable[[], object]) -> dict[int, Tensor]:
    """The FFN inputs [tokens, d] of each layer in one forward pass."""
    with _watched(ffns) as seen, torch.no_grad():
        run()
    return seen


def _pre_activations(layers: dict[int, EditLayer], inputs: dict[int, Tensor]) -> list[Tensor]:
    """Of each layer's neurons at each input, [tokens, n]; of gated ones those of the gate."""
    return [inputs[i].float() @ layer.keys.T + layer.key_bias for i, layer in layers.items()]


def _activation_loss(layers: dict[int, EditLayer], at_target: dict[int, Tensor]) -> Tensor:
    """exp(-a) of each neuron at its own token of the answer, in the mean; see `_initial_layers`."""
    own = []
    for a in _pre_activations(layers, at_target):
        neurons = torch.arange(a.shape[1], device=a.device)
        own.append(a[neurons % len(a), neurons])
    return torch.cat(own).neg().exp().mean()


def _initial_layers(
    wrong: dict[int, Tensor], usual: dict[int, Tensor], zeta: dict[int, Tensor], gated: bool, training: EditTraining
) -> dict[int, EditLayer]:
    """Keys as in T-Patcher: with pre-activation 1 where the target is to be produced; 0 at the usual FFN input.

    K = (q - m) / |q - m|^2 and b = -K m, q the inputs at the target positions [P, d], m the mean usual input [d].
    """
    generator = torch.Generator().manual_seed(training.seed)
    layers = {}
    for i, q in wrong.items():
        away = (q - usual[i])[torch.arange(training.neurons) % len(q)].float()
        noise = torch.randn(away.shape, generator=generator).to(away.device)
        away = away + 0.1 * noise * away.norm(dim=-1, keepdim=True) / away.shape[-1] ** 0.5
        keys = away / (away * away).sum(-1, keepdim=True).clamp(min=1e-12)
        layers[i] = fresh_layer(keys, -(keys @ usual[i].float()), zeta[i], gated=gated)
    return layers


def _target_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, bool]:
    """Mean negative log-likelihood of the answer tokens, and whether each is the model's first choice."""
    with telling_prompts(model, batch):
        logits = forward(model, batch.inputs)
    answer = batch.answer_mask()[:, 1:]
    predicted, wanted = logits[:, :-1][answer], batch.inputs["input_ids"][:, 1:][answer]
    return F.cross_entropy(predicted.float(), wanted), bool((predicted.argmax(-1) == wanted).all())


class _Preserve:
    """Samples on which the edited model is held to what the unedited one says, over all their tokens."""

    def __init__(self, model: nn.Module, processor: Any, samples: Sequence[Sample], size: int) -> None:
        groups = batches(samples, size)
        self.batches = [encode(processor, [samples[i] for i in group], device_of(model)) for group in groups]
        with torch.no_grad():
            self.targets = [forward(model, b.inputs).float().log_softmax(-1) for b in self.batches]

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        with telling_prompts(model, batch):
            return forward(model, batch.inputs)

    def mean_inputs(self, model: nn.Module, ffns: dict[int, PatchedFFN]) -> dict[int, Tensor]:
        """The mean FFN input [d] of each layer over all tokens but padding."""
        sums, count = {i: torch.zeros(()) for i in ffns}, 0
        for batch in self.batches:
            mask = batch.inputs["attention_mask"].bool().flatten()
            seen = _ffn_inputs(ffns, lambda batch=batch: self._logits(model, batch))  # type: ignore[misc]
            sums = {i: sums[i].to(q.device) + q[mask].sum(0) for i, q in seen.items()}
            count += int(mask.sum())
        return {i: s / count for i, s in sums.items()}

    def loss(self, model: nn.Module, step: int) -> Tensor:
        batch, target = self.batches[step % len(self.batches)], self.targets[step % len(self.batches)]
        found = self._logits(model, batch).float().log_softmax(-1)
        mask = batch.inputs["attention_mask"].bool()
        return F.kl_div(found[mask], target[mask], reduction="batchmean", log_target=True)

    def activity(self, layers: dict[int, EditLayer], inputs: dict[int, Tensor], step: int, margin: float) -> Tensor:
        """max(0, a - margin) of the neurons, in the mean; `inputs` are those of the pass of `loss` of this step."""
        mask = self.batches[step % len(self.batches)].inputs["attention_mask"].bool().flatten()
        found = _pre_activations(layers, {i: q[mask] for i, q in inputs.items()})
        return torch.cat([F.relu(a - margin).flatten() for a in found]).mean()


def train_edit(
    model: nn.Module,
    processor: Any,
    request: Sample,
    memory: MemoryBank | None = None,
    *,
    id: str | None = None,
    previous: Sequence[Edit] = (),
    preserve: Sequence[Sample] = (),
    layers: Sequence[int] | None = None,
    config: Config | None = None,
    zeta: dict[int, Tensor] | None = None,
    training: EditTraining | None = None,
    progress: bool = True,
) -> EditResult:
    """Train extra neurons that make `model` answer `request.answer`; the model itself is untouched.

    Args:
        model: a Hugging Face model, not patched.
        processor: its processor or tokenizer.
        request: the answer is what the model shall say from now on.
        memory: active during training exactly as at inference, and the source of zeta'; None: without either.
        id: of the edit; None: a random one.
        previous: edits that are in force already (sequential editing); they are not retrained.
        preserve: samples on which the model shall not change; their mean FFN input also centres the new keys.
        layers: None: the memory's, else the last four.
        config: None: the memory's, else the defaults.
        zeta: layer -> [d], instead of the memory's zeta' (for ablations).
        training: see `EditTraining`.
        progress: show a progress bar.

    Raises:
        ValueError: an empty answer, an unknown layer, config.w_zeta="edit" without a memory.
        PatchError: the model is patched; a previous edit has this id.
        MismatchError: the memory or a previous edit does not belong to this model.
    """
    if is_patched(model):
        raise PatchError(
            "train_edit: the model is patched; unpatch it first, and pass the edits in force as `previous`"
        )
    if not request.answer:
        raise ValueError("request.answer: expected a non-empty string")
    training = training or EditTraining()
    config = config or (memory.config if memory else Config())
    if config.w_zeta == "edit" and memory is None:
        raise ValueError("config.w_zeta: 'edit' needs a memory, which holds zeta")
    decoder = find_decoder(model)
    chosen = decoder.select(sorted(memory.layers) if layers is None and memory else layers)
    device = device_of(model)
    batch = encode(processor, [request], device)
    if not batch.answer_mask().any():
        raise ValueError(f"request.answer: {request.answer!r} has no tokens")
    name = id or uuid.uuid4().hex[:12]
    if name in [e.id for e in previous]:
        raise PatchError(f"id: {name!r} is already the id of a previous edit")
    in_force = {i: {e.id: e.layers[i].to(device) for e in previous if i in e.layers} for i in chosen}

    with _frozen(model):
        kept = _Preserve(model, processor, preserve, training.preserve_batch) if preserve else None
        with patched(model, previous, memory, layers=chosen, config=config):
            ffns = {i: ffn for i, ffn in patched_ffns(model).items() if i in chosen}
            produced = _ffn_inputs(ffns, lambda: _target_loss(model, batch))
            at_target = slice(int(batch.ends[0]), int(batch.lasts[0]))
            wrong = {i: q[at_target] for i, q in produced.items()}
            usual = kept.mean_inputs(model, ffns) if kept else {i: torch.zeros_like(q[0]) for i, q in wrong.items()}
            start = {i: _zeta_prime(i, memory, zeta, decoder.hidden_size).to(device) for i in chosen}
            neurons = _Neurons(
                _initial_layers(wrong, usual, start, config.neurons == "gated", training), config, memory
            )
            optimizer = torch.optim.Adam(neurons.parameters, lr=training.lr)
            losses: list[float] = []
            divergences: deque[float] = deque([math.inf] * len(kept.batches) if kept else [0.0])
            bar = tqdm(range(training.steps + 1), desc="edit", disable=not progress, leave=False)
            with bar, _watched(ffns) as inputs:
                for step in bar:
                    made = neurons.layers()
                    for i, layer in made.items():
                        ffns[i].edits.set(in_force[i] | {name: layer})
                    loss, reached = _target_loss(model, batch)
                    losses.append(float(loss.detach()))
                    divergence = sum(divergences) / len(divergences)
                    bar.set_postfix(loss=f"{losses[-1]:.3f}", divergence=f"{divergence:.3f}")
                    met = reached and losses[-1] < training.stop_loss
                    if (met and divergence < training.stop_preserve) or step == training.steps:
                        break
                    if training.activation_weight:
                        produced = {i: q[at_target] for i, q in inputs.items()}
                        loss = loss + training.activation_weight * _activation_loss(made, produced)
                    if kept:
                        apart = kept.loss(model, step)
                        divergences.append(float(apart.detach()))
                        divergences.popleft()
                        loss = loss + training.preserve_weight * apart
                        if training.memory_weight:
                            loss = loss + training.memory_weight * kept.activity(made, inputs, step, training.margin)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
    stopped = "target met" if step < training.steps else f"step limit, target {'met' if met else 'not met'}"
    edit = Edit(
        name,
        {i: layer.detached() for i, layer in neurons.layers().items()},
        decoder.layers[chosen[0]].activation,
        config,
        fingerprint(model),
        memory.id if memory else None,
        {"prompt": request.prompt, "answer": request.answer, "training": str(training)},
    )
    return EditResult(edit, tuple(losses), divergence, reached, stopped)


class _Neurons:
    """The tensors that an edit trains, and the layers that they make up."""

    def __init__(self, start: dict[int, EditLayer], config: Config, memory: MemoryBank | None) -> None:
        trained = ("keys", "key_bias", "values", "up", "up_bias")
        self._leaves = {
            i: {name: t.clone().requires_grad_(name in trained) for name, t in layer.tensors().items()}
            for i, layer in start.items()
        }
        self._zeta: dict[int, Tensor] = {}
        for i, leaves in self._leaves.items():
            leaves["beta"] = torch.full_like(leaves["beta"], config.beta)
            if config.w_zeta == "edit" and memory is not None and i in memory.layers:
                # W_zeta begins where W_zeta zeta = zeta' and is trained with the edit, as in the authors' code.
                self._zeta[i] = memory.layers[i].zeta.to(leaves["zeta"])
                size = (self._zeta[i] @ self._zeta[i]).clamp(min=1e-12)
                leaves["w_zeta"] = torch.outer(leaves["zeta"], self._zeta[i] / size).requires_grad_()
        self.parameters = [t for leaves in self._leaves.values() for t in leaves.values() if t.requires_grad]

    def layers(self) -> dict[int, EditLayer]:
        made = {}
        for i, leaves in self._leaves.items():
            tensors = dict(leaves)
            w = tensors.pop("w_zeta", None)
            if w is not None:
                tensors["zeta"] = w @ self._zeta[i]
            made[i] = EditLayer(**tensors)
        return made


def _zeta_prime(layer: int, memory: MemoryBank | None, given: dict[int, Tensor] | None, d: int) -> Tensor:
    if given is not None:
        if layer not in given:
            raise ValueError(f"zeta: expected one for each layer that is edited, got none for layer {layer}")
        return given[layer].float()
    return memory.layers[layer].zeta_prime.float() if memory and layer in memory.layers else torch.zeros(d)
