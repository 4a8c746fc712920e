"""MEMIT (Meng et al., ICLR 2023) and AlphaEdit (Fang et al., ICLR 2025): facts written into FFNs by least squares."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from unike_kernels.backbones import find_decoder
from unike_kernels.training.samples import Batch, Sample, batches, evaluating, forward

from ..suite import Suite
from .base import WeightEditor, answer_loss, down_projection, only

_PREFIXES = 4  # texts that a request is also put behind
_KL, _DECAY = 0.0625, 1e-3  # weights of the subject's essence and of the shift's size, as the papers' code has them

T = TypeVar("T")
_KNOWN: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], Any]] = WeakKeyDictionary()


class LocatedEditor(WeightEditor):
    """A system that finds what a late state should be, and changes the FFNs below so that it comes about.

    A request's key in a layer is the input of the FFN's last matrix at the last token of its subject (of its prompt,
    where no subject is known), the mean over the prompt as it is and behind other texts. Edits come one after another;
    keys of earlier ones count among what must stay.

    Args:
        layers: whose FFNs are changed, the last of them is the late state's; None: the 5th to the 9th of 32, as usual
            for LLaMA, or in proportion.
        lr: of Adam, for the late state.
        steps: at most.
        stop_loss: of the answer, in nats a token.
        clamp: longest shift of the late state, as a share of its own norm.
    """

    learns = True

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        *,
        layers: Sequence[int] | None = None,
        lr: float = 0.1,
        steps: int = 25,
        stop_loss: float = 0.05,
        clamp: float = 4.0,
    ) -> None:
        count = len(find_decoder(model).layers)
        self.layers = list(range(count * 4 // 32, count * 8 // 32 + 1)) if layers is None else sorted(layers)
        self._linears = [down_projection(model, layer) for layer in self.layers]
        super().__init__(model, processor, [linear.get_parameter("weight") for linear in self._linears])
        self.lr, self.steps, self.stop_loss, self.clamp = lr, steps, stop_loss, clamp
        self._subjects: dict[str, str] = {}
        self._prefixes: list[str] = []
        self._earlier, self._fitted = self._none(), False
        self._learnt_from: tuple[Any, ...] = ()

    def _none(self) -> list[Tensor]:
        """Sums of k k^T over no keys, float64 [f, f] for each layer."""
        return [torch.zeros(m.in_features, m.in_features, dtype=torch.float64) for m in self._linears]

    @override
    @torch.no_grad()
    def learn(self, suite: Suite) -> None:
        """The suite's training requests and preserved questions stand for the Wikipedia of the papers."""
        self._subjects = suite.subjects()
        texts = [*suite.preserve, *(r.case.request for r in suite.train)]
        self._prefixes = [f"{s.prompt} {s.answer}." for s in suite.preserve if s.image is None][:_PREFIXES]
        self._learnt_from = suite.name, tuple(r.id for r in suite.train), tuple(s.question for s in suite.preserve)
        self.keep(self.once("moments", lambda: self._moments_over(texts)))
        self._fitted = True

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What `make` computes of the unedited model and what was learnt from: editors of one model share it."""
        known, key = _KNOWN.setdefault(self.model, {}), (name, tuple(self.layers), self._learnt_from)
        if key not in known:
            known[key] = make()
        found: T = known[key]
        return found

    def _moments_over(self, texts: Sequence[Sample]) -> list[Tensor]:
        """E[k k^T] of each layer over all tokens of these texts, float64 [f, f]."""
        sums, count = self._none(), 0
        with evaluating(self.model):
            for group in batches(texts, 32):
                batch = self.encode([texts[i] for i in group])
                real = batch.inputs["attention_mask"].bool()
                for total, keys in zip(sums, self._inputs(batch), strict=True):
                    k = keys[real].double().cpu()
                    total += k.T @ k
                count += int(real.sum())
        return [total / max(count, 1) for total in sums]

    @abstractmethod
    def keep(self, moments: Sequence[Tensor]) -> None:
        """Prepare for `solve`, given E[k k^T] of each layer over what must stay, float64 [f, f]."""

    @abstractmethod
    def solve(self, at: int, key: Tensor, residual: Tensor) -> Tensor:
        """The change [d, f] of the `at`-th of the matrices by which key [f] gives residual [d] more; float64."""

    @override
    def edit(self, request: Sample) -> None:
        if not self._fitted:
            raise ValueError(f"{self.name}: expected `fit` before an edit, with what must stay")
        subject = self._subjects.get(request.prompt, "")
        asked = [request, *(replace(request, prompt=f"{p} {request.prompt}") for p in self._prefixes if request.prompt)]
        batch = self.targets(asked)
        at = self._positions(asked, batch, subject)
        with evaluating(self.model), only(self.model, []):
            wanted = self._late_state(batch, at, subject)
            with torch.no_grad():
                rows = torch.arange(len(at))
                for i, linear in enumerate(self._linears):
                    keys, out = self._seen(batch, [(linear, True), self._late])
                    key = keys[rows, at].double().mean(0).cpu()
                    left = (wanted - out[0, at[0]].double().cpu()) / (len(self.layers) - i)
                    linear.weight += self.solve(i, key, left).to(linear.weight)
                for total, keys in zip(self._earlier, self._inputs(batch), strict=True):
                    k = keys[rows, at].double().mean(0).cpu()
                    total += torch.outer(k, k)

    @override
    def reset(self) -> None:
        super().reset()
        self._earlier = self._none()

    def _late_state(self, batch: Batch, at: Tensor, subject: str) -> Tensor:
        """What the last layer's output at the subject should be, float64 [d]."""
        rows, shift = torch.arange(len(at)), torch.zeros(find_decoder(self.model).hidden_size)
        with torch.no_grad():
            (out,) = self._seen(batch, [self._late])
            state = out[0, at[0]].float()
        shift = shift.to(state.device).requires_grad_()
        essence = self.encode([Sample(f"{subject} is a")]) if subject else None
        if essence is not None:
            there = self._positions([Sample(f"{subject} is a")], essence, subject)
            with torch.no_grad():
                usual = self._next_token(essence)
        optimizer = torch.optim.Adam([shift], self.lr)
        for _ in range(self.steps):
            with self._shifted(shift, rows, at):
                loss = answer_loss(self.model, batch)
            if float(loss.detach()) < self.stop_loss:
                break
            if essence is not None:
                with self._shifted(shift, rows[:1], there):
                    found = self._next_token(essence)
                loss = loss + _KL * F.kl_div(usual, found, reduction="sum", log_target=True)
            loss = loss + _DECAY * shift.square().sum() / state.square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                shift *= (self.clamp * state.norm() / shift.norm()).clamp(max=1)
        return (state + shift.detach()).double().cpu()

    def _positions(self, samples: Sequence[Sample], batch: Batch, subject: str) -> Tensor:
        """int64 [B], where in its row the last token of the subject is, or of the prompt where it has none."""
        tokenizer, found = getattr(self.processor, "tokenizer", self.processor), []
        for sample, end in zip(samples, batch.ends.tolist(), strict=True):
            behind = 0
            if subject and subject in sample.prompt:
                last = sample.prompt.rindex(subject) + len(subject)
                offsets = tokenizer(sample.prompt, return_offsets_mapping=True)["offset_mapping"]
                behind = sum(start >= last for start, _ in offsets)
            found.append(end - behind)
        return torch.tensor(found, dtype=torch.int64, device=batch.ends.device)

    def _inputs(self, batch: Batch) -> list[Tensor]:
        """Of each of the matrices [B, T, f]."""
        return self._seen(batch, [(linear, True) for linear in self._linears])

    def _next_token(self, batch: Batch) -> Tensor:
        """Log-probabilities [V] of what follows the first text."""
        last = torch.tensor([batch.inputs["input_ids"].shape[1] - 1])
        return forward(self.model, batch.inputs, last)[0, 0].float().log_softmax(-1)

    @property
    def _late(self) -> tuple[nn.Module, bool]:
        """Where the late state comes out."""
        return find_decoder(self.model).layers[self.layers[-1]].module, False

    @torch.no_grad()
    def _seen(self, batch: Batch, modules: Sequence[tuple[nn.Module, bool]]) -> list[Tensor]:
        """What goes into modules (True) or comes out of them, in one pass, which ends with the last of them."""
        found: dict[int, Tensor] = {}

        def keep(i: int, into: bool) -> Any:
            def hook(_: nn.Module, args: tuple[Tensor, ...], out: Any) -> None:
                found[i] = args[0] if into else _states(out)
                if len(found) == len(modules):
                    raise _SeenAllError

            return hook

        handles = [module.register_forward_hook(keep(i, into)) for i, (module, into) in enumerate(modules)]
        try:
            with suppress(_SeenAllError):
                forward(self.model, batch.inputs)
        finally:
            for handle in handles:
                handle.remove()
        return [found[i].view(len(batch.ends), -1, found[i].shape[-1]) for i in range(len(modules))]

    @contextmanager
    def _shifted(self, shift: Tensor, rows: Tensor, at: Tensor) -> Iterator[None]:
        """Within the block the last layer's output has a shift at these places."""

        def hook(_: nn.Module, args: tuple[Tensor, ...], out: Any) -> Any:
            states = _states(out)
            changed = states.index_put((rows, at), shift.to(states), accumulate=True)
            return (changed, *out[1:]) if isinstance(out, tuple) else changed

        handle = find_decoder(self.model).layers[self.layers[-1]].module.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()


class _SeenAllError(Exception):
    """The rest of a pass is not needed."""


def _states(out: Any) -> Tensor:
    """A layer's hidden states; some layers return more."""
    states: Tensor = out[0] if isinstance(out, tuple) else out
    return states


class MEMIT(LocatedEditor):
    """The change is the least squares of Eq. 14: the new value at the key, none at what must stay and at earlier edits.

    Args:
        weight: lambda, of what must stay; the papers' code has 15,000.
        settings: see `LocatedEditor`.
    """

    name = "MEMIT"

    def __init__(self, model: nn.Module, processor: Any, *, weight: float = 15000.0, **settings: Any) -> None:
        super().__init__(model, processor, **settings)
        self.weight = weight

    @override
    def keep(self, moments: Sequence[Tensor]) -> None:
        self._moments = list(moments)

    @override
    def solve(self, at: int, key: Tensor, residual: Tensor) -> Tensor:
        normal = self.weight * self._moments[at] + self._earlier[at] + torch.outer(key, key)
        # Few texts leave directions without a key: a ridge that does not count makes their part of the change zero.
        normal.diagonal().add_(1e-10 * normal.diagonal().mean())
        return torch.outer(residual, torch.linalg.solve(normal, key))


class AlphaEdit(LocatedEditor):
    """The change is projected into the null space of what must stay, whose outputs it leaves as they are (Eq. 12).

    Args:
        threshold: directions are null where E[k k^T] is below this share of its mean eigenvalue.
        ridge: weight of the change's own size.
        settings: see `LocatedEditor`.
    """

    name = "AlphaEdit"

    def __init__(
        self, model: nn.Module, processor: Any, *, threshold: float = 1e-2, ridge: float = 1.0, **settings: Any
    ) -> None:
        super().__init__(model, processor, **settings)
        self.threshold, self.ridge = threshold, ridge

    @override
    def keep(self, moments: Sequence[Tensor]) -> None:
        self._projections = []
        for size, directions in self.once("directions", lambda: [torch.linalg.eigh(moment) for moment in moments]):
            null = directions[:, size < self.threshold * size.mean()]
            self._projections.append(null @ null.T)

    @override
    def solve(self, at: int, key: Tensor, residual: Tensor) -> Tensor:
        projection, identity = self._projections[at], torch.eye(len(key), dtype=torch.float64)
        normal = projection @ (self._earlier[at] + torch.outer(key, key)) + self.ridge * identity
        return torch.outer(residual, torch.linalg.solve(normal, projection @ key))
