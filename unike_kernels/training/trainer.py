"""Making one edit: extra neurons, trained on the target's tokens, model frozen, memory active (paper, section 3.3)."""

from __future__ import annotations

import math
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..artifacts.edit import Edit, EditLayer, fresh_layer
from ..artifacts.fingerprint import fingerprint
from ..artifacts.memory import MemoryBank
from ..backbones import device_of, find_decoder
from ..config import Config
from ..errors import PatchError
from ..nn import ExtraNeurons
from ..patching import is_patched, patched, patched_ffns, selecting, set_layers
from .activation_cache import Recording, Replay
from .neutral import neutral
from .objectives import _activation_loss, _ffn_inputs, _Preserve, _Targets, _watched
from .progress import progress_bar
from .samples import (
    Batch,
    Sample,
    batches,
    dropout_copies,
    evaluating,
    ordinary_ids,
    taking_gradients,
)
from .scope import prompt_keys
from .settings import EditResult, EditTraining

_AHEAD = 4  # steps whose thinned copies pass the layers below together: rows that are few cost as much as more do
_TOLD = 0.01  # of the most that tells an answer's tokens apart: what is less tells nothing


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


def _initial_layers(
    wrong: dict[int, Tensor],
    usual: dict[int, Tensor] | None,
    zeta: dict[int, Tensor],
    gated: bool,
    training: EditTraining,
) -> dict[int, EditLayer]:
    """Keys as in T-Patcher: with pre-activation 1 where the target is to be produced; 0 at the usual FFN input.

    K = r / |r|^2 and b = -K (q - r), q the inputs at the target positions [P, d], r what of q is apart from the mean
    usual input [d]; where that is not known, what is apart from the other target positions (`_apart`).
    Without biases b = 0, and what is apart is orthogonal; the factor of gated neurons is such a one, too.
    """
    generator = torch.Generator("cpu").manual_seed(training.seed)
    layers = {}
    for i, q in wrong.items():
        turns = torch.arange(training.neurons, dtype=torch.int64, device=q.device) % len(q)
        q = q.float()
        if usual is None:
            away = _apart(q, training.bias)
        else:
            m = usual[i].float()
            away = q - m if training.bias else q - torch.outer(q @ m, m) / (m @ m).clamp(min=1e-12)
        away = away[turns]
        middle = q[turns] - away
        noise = torch.randn(away.shape, generator=generator, dtype=torch.float32, device="cpu").to(away.device)
        away = away + 0.1 * noise * away.norm(dim=-1, keepdim=True) / away.shape[-1] ** 0.5
        keys = away / _squares(away)
        bias = -(keys * middle).sum(-1) if training.bias else keys.new_zeros(len(keys), dtype=keys.dtype)
        layers[i] = fresh_layer(keys, bias, zeta[i], gated=gated)
        if gated and not training.bias:  # with a factor of 0 nothing would ever be learned
            layers[i] = replace(layers[i], up=keys.clone(), up_bias=torch.zeros_like(layers[i].key_bias))
    return layers


def _apart(q: Tensor, bias: bool) -> Tensor:
    """r of `_initial_layers`, of the shortest keys whose neurons are 1 at their own target position, -1 at the others.

    The prompt's last token and the answer's last one both end a word, and are alike beside those within one: keys that
    are merely apart from the mean of all positions are not silent at the other of the two.
    """
    wanted = 2 * torch.eye(len(q), dtype=q.dtype, device=q.device) - 1
    if bias and len(q) > 1:
        q, wanted = q - q.mean(0), wanted - wanted.mean(0)
    keys = (torch.linalg.pinv(q, rtol=_TOLD) @ wanted).T
    return keys / _squares(keys)


def _squares(rows: Tensor) -> Tensor:
    """[P, 1] of [P, d]."""
    return (rows * rows).sum(-1, keepdim=True).clamp(min=1e-12)


def train_edit(
    model: nn.Module,
    processor: Any,
    request: Sample,
    memory: MemoryBank | None = None,
    *,
    id: str | None = None,
    previous: Sequence[Edit] = (),
    preserve: Sequence[Sample] | None = None,
    protect: Sequence[Sample] = (),
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
        preserve: samples on which the model shall not change; their mean FFN input also centres the new keys. None:
            eight questions about this and that, in a chat where the request is one (`neutral`), but nothing where the
            memory decides where the edit acts.
        protect: samples on which the model with the previous edits shall not change, such as their requests.
        layers: None: the memory's, else the last four.
        config: None: the memory's, else the defaults.
        zeta: layer -> [d], instead of the memory's zeta' (for ablations).
        training: see `EditTraining`.
        progress: show a progress bar.

    Raises:
        ValueError: an empty answer, an unknown layer, config.w_zeta="edit" without a memory, a sample that is longer
            than the model's context.
        PatchError: the model is patched; a previous edit has this id.
        MismatchError: the memory or a previous edit does not belong to this model.
    """
    (result,) = train_edits(
        model, processor, [request], memory, ids=None if id is None else [id], previous=previous, preserve=preserve,
        protect=protect, layers=layers, config=config, zeta=zeta, training=training, progress=progress,
    )  # fmt: skip
    return result


@taking_gradients
def train_edits(
    model: nn.Module,
    processor: Any,
    requests: Sequence[Sample],
    memory: MemoryBank | None = None,
    *,
    ids: Sequence[str] | None = None,
    previous: Sequence[Edit] = (),
    preserve: Sequence[Sample] | None = None,
    protect: Sequence[Sample] = (),
    layers: Sequence[int] | None = None,
    config: Config | None = None,
    zeta: dict[int, Tensor] | None = None,
    training: EditTraining | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> list[EditResult]:
    """`train_edit` for several independent requests at once: each row of a pass has its own neurons.

    Each edit becomes what `train_edit` makes of its request alone, up to rounding.

    Args:
        model: a Hugging Face model, not patched.
        processor: its processor or tokenizer.
        requests: one or more; each answer is what the model shall say from now on.
        memory: active during training exactly as at inference, and the source of zeta'; None: without either.
        ids: of the edits; None: random ones.
        previous: edits that are in force already (sequential editing); they are not retrained.
        preserve: samples on which the model shall not change; their mean FFN input also centres the new keys. None:
            eight questions about this and that, in a chat where the request is one (`neutral`), but nothing where the
            memory decides where the edit acts.
        protect: samples on which the model with the previous edits shall not change, such as their requests.
        layers: None: the memory's, else the last four.
        config: None: the memory's, else the defaults.
        zeta: layer -> [d], instead of the memory's zeta' (for ablations).
        training: see `EditTraining`.
        batch_size: edits that are trained together; a step sees `training.preserve_batch` samples for each.
        progress: show a progress bar.

    Raises:
        ValueError: as `train_edit` does; no requests; ids that are not distinct, or not one for each request.
    """
    if is_patched(model):
        raise PatchError(
            "train_edit: the model is patched; unpatch it first, and pass the edits in force as `previous`"
        )
    if not requests:
        raise ValueError("requests: expected at least one, got none")
    if not all(request.answer.strip() for request in requests):
        raise ValueError("request.answer: expected a non-empty string")
    names = [uuid.uuid4().hex[:12] for _ in requests] if ids is None else list(ids)
    if len(names) != len(requests) or len(set(names)) != len(names):
        raise ValueError(f"ids: expected {len(requests)} distinct ones, got {names}")
    for name in names:
        if name in [e.id for e in previous]:
            raise PatchError(f"id: {name!r} is already the id of a previous edit")
    config = config or (memory.config if memory else Config())
    training = (training or EditTraining()).decided(config)
    dropout = training.prompt_dropout or 0.0
    if config.w_zeta == "edit" and memory is None:
        raise ValueError("config.w_zeta: 'edit' needs a memory, which holds zeta")
    decoder = find_decoder(model)
    chosen = decoder.select(sorted(memory.layers) if layers is None and memory and memory.layers else layers)
    device = device_of(model)
    start = {i: _zeta_prime(i, memory, zeta, decoder.hidden_size).to(device) for i in chosen}
    base, scope = fingerprint(model), memory.scope if memory else None
    entries = [None] * len(requests) if scope is None else prompt_keys(model, processor, scope, requests).split(1)
    scoped = config.scope == "memory"  # where these edits act, the previous ones do not
    before = () if scoped else previous
    results: dict[int, EditResult] = {}
    reader = processor
    if preserve is None:
        reader, preserve = (processor, ()) if scoped else neutral(processor, requests[0])
    with _frozen(model), progress_bar("edit", len(requests), progress) as bar:
        kept = _Preserve() if preserve or protect else None
        if kept is not None:
            kept.add(model, reader, preserve, training)
            if scoped:
                kept.add(model, processor, protect, training, dropout)
        with patched(model, before, memory, layers=chosen, config=config):
            if kept is not None and not scoped:
                kept.add(model, processor, protect, training, dropout)
            ffns = {i: ffn for i, ffn in patched_ffns(model).items() if i in chosen}
            trainer = _Trainer(model, processor, ffns, kept, before, training)
            for group in batches(requests, batch_size):
                trained = [_Training(names[i], requests[i]) for i in group]
                trainer.begin(trained, start, config, memory)
                trainer.run(trained, bar)
                for i, each in zip(group, trained, strict=True):
                    edit = Edit(
                        each.name,
                        {layer: neurons.detached() for layer, neurons in each.neurons.layers().items()},
                        decoder.layers[chosen[0]].activation,
                        config,
                        base,
                        memory.id if memory and memory.layers else None,
                        {**each.notes(), "training": str(training)},
                        entries[i],
                        None if scope is None else scope.id,
                    )
                    results[i] = EditResult(edit, tuple(each.losses), each.divergence, each.reached, each.stopped)
    return [results[i] for i in range(len(requests))]


class _Training:
    """One edit while it is trained."""

    neurons: _Neurons
    optimizer: torch.optim.Optimizer

    def __init__(self, name: str, request: Sample) -> None:
        self.name, self.request = name, request
        self.losses: list[float] = []
        self.divergences: deque[float] = deque([0.0])
        self.reached, self.stopped = False, ""

    @property
    def divergence(self) -> float:
        return sum(self.divergences) / len(self.divergences)

    def notes(self) -> dict[str, str]:
        """What was asked for, and how it went, for people."""
        return {
            "prompt": self.request.question,
            "answer": self.request.answer,
            "stopped": self.stopped,
            "target loss": f"{self.losses[0]:.3f} -> {self.losses[-1]:.3f}" if self.losses else "none",
            "divergence elsewhere": f"{self.divergence:.4f} nats a token",
        }

    def judge(self, loss: float, reached: bool, last: bool, training: EditTraining) -> bool:
        """Note how far it is before a step; whether that was the end."""
        self.losses.append(loss)
        self.reached = reached
        met = reached and loss < training.stop_loss
        if met and self.divergence < training.stop_preserve and not last:
            self.stopped = "target met"
        elif last:
            self.stopped = f"step limit, target {'met' if met else 'not met'}"
        return bool(self.stopped)


class _Trainer:
    """Trains edits in a patched model, each on rows of its own."""

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        ffns: dict[int, ExtraNeurons],
        kept: _Preserve | None,
        previous: Sequence[Edit],
        training: EditTraining,
    ) -> None:
        self.model, self.processor, self.ffns, self.kept, self.training = model, processor, ffns, kept, training
        self.device = device_of(model)
        self.dropout, self.suffix = training.prompt_dropout or 0.0, training.random_suffix or 0
        self.vocabulary = ordinary_ids(model, processor) if self.suffix else []
        self.in_force = {i: {e.id: e.layers[i].to(self.device) for e in previous if i in e.layers} for i in ffns}
        self.previous = [e.id for e in previous]
        self.usual = kept.mean_inputs(model, ffns) if kept else None
        self.looks_ahead = True  # until a model's layers hand on what does not tell its rows
        self.replay = Replay(model, [layer.module for layer in find_decoder(model).layers], min(ffns))

    def begin(
        self, edits: Sequence[_Training], zeta: dict[int, Tensor], config: Config, memory: MemoryBank | None
    ) -> None:
        """Make the first neurons of each."""
        self._install([])  # those of the edits before are still there
        targets = self._targets(edits)
        produced = _ffn_inputs(self.ffns, lambda: targets.losses(self.model))
        for row, edit in enumerate(edits):
            wrong = {i: targets.producing(q, row) for i, q in produced.items()}
            layers = _initial_layers(wrong, self.usual, zeta, config.neurons == "gated", self.training)
            edit.neurons = _Neurons(layers, config, memory, self.training.bias)
            edit.optimizer = torch.optim.Adam(edit.neurons.parameters, lr=self.training.lr)
            edit.divergences = deque([math.inf] * len(self.kept.batches) if self.kept else [0.0])

    def run(self, edits: Sequence[_Training], bar: Any) -> None:
        group, targets = list(edits), self._targets(edits)
        active = [*range(len(group))]  # rows of those that go on
        with _watched(self.ffns) as inputs, self.replay.on():
            for step in range(self.training.steps + 1):
                if step % _AHEAD == 0 and len(active) < len(group):
                    # The others go on without those that have ended: a pass costs as much as its rows.
                    group = [group[row] for row in active]
                    targets, active = self._targets(group), [*range(len(group))]
                made = self._install(group)
                losses, reached = self._losses(group, targets, step)
                last, seen = step == self.training.steps, losses.detach().tolist()
                over = [row for row in active if group[row].judge(seen[row], reached[row], last, self.training)]
                mean = sum(seen[row] for row in active) / len(active)
                bar.set_postfix(loss=f"{mean:.3f}", active=len(active) - len(over))
                bar.update(len(over))
                active = [row for row in active if row not in over]
                if not active:
                    return
                self._step({row: group[row] for row in active}, made, losses, targets, inputs, step)

    def _targets(self, edits: Sequence[_Training]) -> _Targets:
        return _Targets(self.processor, [edit.request for edit in edits], self.device, self.training.end)

    def _losses(self, group: Sequence[_Training], targets: _Targets, step: int) -> tuple[Tensor, list[bool]]:
        """Of each edit its loss, and whether it predicts its answer."""
        seeds = [None, self.training.seed + step] if self.dropout else [None]
        batch, recording = self._copies(targets, seeds), self._recording(group, targets, step)
        replayed = nullcontext() if recording is None else self.replay.of(recording)
        with self._rows([*group] * len(seeds), 1), replayed:
            losses, reached = targets.losses(self.model, batch)
        return losses.unflatten(0, (len(seeds), -1)).mean(0), reached[: len(group)]

    def _copies(self, targets: _Targets, seeds: Sequence[int | None]) -> Batch:
        return dropout_copies(self.model, targets.batch, self.dropout, seeds, self.suffix, self.vocabulary)

    def _recording(self, group: Sequence[_Training], targets: _Targets, step: int) -> Recording | None:
        """Of the batch of a step: whole prompts pass the layers below once, their thinned copies some steps ahead.

        None: what is thinned passes them in its own step.
        """
        if not self.dropout:
            return targets.recording
        if not self.looks_ahead:
            return None

        def recorded(seeds: Sequence[int | None]) -> Recording:
            batch = self._copies(targets, seeds)
            with self._rows([*group] * len(seeds), 1):
                return self.replay.record(lambda: targets.losses(self.model, batch))

        at = step % _AHEAD
        if at == 0:
            if not targets.recording.complete:
                targets.recording = recorded([None])
            targets.ahead = recorded([self.training.seed + step + i for i in range(_AHEAD)])
        found = targets.recording.with_copy(targets.ahead, at, _AHEAD)
        self.looks_ahead = found is not None and found.complete
        return found if self.looks_ahead else None

    def _step(
        self,
        active: dict[int, _Training],
        made: Sequence[dict[int, EditLayer]],
        losses: Tensor,
        targets: _Targets,
        inputs: dict[int, Tensor],
        step: int,
    ) -> None:
        """Of those that go on, by their rows."""
        training, edits = self.training, [*active.values()]
        total = losses[[*active]].sum()
        if training.activation_weight:
            for row in active:
                at_target = {i: targets.producing(q, row) for i, q in inputs.items()}
                total = total + training.activation_weight * _activation_loss(made[row], at_target)
        if self.kept:
            with self._rows(edits, self.kept.size(step)):
                apart = self.kept.losses(self.model, step, len(edits), self.replay)
            total = total + training.preserve_weight * apart.sum()
            for at, (row, divergence) in enumerate(zip(active, apart.detach().tolist(), strict=True)):
                active[row].divergences.append(divergence)
                active[row].divergences.popleft()
                if training.memory_weight:
                    activity = self.kept.activity(made[row], inputs, step, at, len(edits))
                    total = total + training.memory_weight * F.relu(activity - training.margin).mean()
        for edit in edits:
            edit.optimizer.zero_grad()
        total.backward()
        for edit in edits:
            edit.optimizer.step()

    def _install(self, active: Sequence[_Training]) -> list[dict[int, EditLayer]]:
        made = [edit.neurons.layers() for edit in active]
        set_layers(
            self.model,
            {
                i: {**self.in_force[i], **{edit.name: layers[i] for edit, layers in zip(active, made, strict=True)}}
                for i in self.ffns
            },
        )
        return made

    def _rows(self, active: Sequence[_Training], each: int) -> AbstractContextManager[None]:
        """Within the block each edit has so many rows behind one another."""
        return selecting(self.model, [[*self.previous, edit.name] for edit in active for _ in range(each)])


class _Neurons:
    """The tensors that an edit trains, and the layers that they make up."""

    def __init__(
        self, start: dict[int, EditLayer], config: Config, memory: MemoryBank | None, bias: bool = True
    ) -> None:
        trained = ("keys", "values", "up", *(("key_bias", "up_bias") if bias else ()))
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
    return (
        memory.layers[layer].zeta_prime.float()
        if memory and layer in memory.layers
        else torch.zeros(d, dtype=torch.float32, device="cpu")
    )
