"""Disentangling hidden states into a semantic and a truthfulness space (paper, Eq. 4 and 5), and the way back."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import SemanticEncoder
from .progress import progress_bar
from .samples import taking_gradients


@dataclass(frozen=True)
class EncoderTraining:
    """How the encoders of a layer are trained.

    Attributes:
        lr: of Adam; the paper's 1e-4 leaves the encoders of a few hundred triplets half trained in 2,000 steps.
        steps: at most.
        batch_size: triplets per step.
        bottleneck: r of both encoders; None: d / 8, at least 16.
        truth_size: width of the truthfulness space; None: the bottleneck.
        tau_truth, tau_semantic: s = cosine / tau in Eq. 4 and in Eq. 5. Eq. 4 keeps the pair of a state with itself,
            which a small tau would let swamp the sum.
        held_out: share of the triplets that are only for validation.
        patience: stop when the validation loss has not fallen for this many checks (one in 50 steps).
        seed: of initialisation and batches.
    """

    lr: float = 1e-3
    steps: int = 2000
    batch_size: int = 256
    bottleneck: int | None = None
    truth_size: int | None = None
    tau_truth: float = 1.0
    tau_semantic: float = 0.1
    held_out: float = 0.1
    patience: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        positive = ("lr", "steps", "batch_size", "tau_truth", "tau_semantic", "patience")
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"EncoderTraining.{name}: expected a positive number, got {getattr(self, name)!r}")
        for name in ("bottleneck", "truth_size"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"EncoderTraining.{name}: expected None or a positive number, got {value!r}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"EncoderTraining.held_out: expected a share between 0 and 1, got {self.held_out!r}")


@dataclass(frozen=True)
class Disentangled:
    """What was learnt for one layer.

    Attributes:
        semantic, truth: Enc_sem [d -> d] and Enc_tru [d -> t].
        zeta: [t], mean Enc_tru(h_pos) - mean Enc_tru(h_neg).
        w_zeta: [d, t], maps a difference in truthfulness space back to h_pos - h_neg.
        truth_accuracy: held-out states on the right side of the plane midway between the two training means.
        semantic_accuracy: held-out questions whose own answer is the nearest of all held-out ones.
        losses: (Eq. 4, Eq. 5) on the training batch, every 50 steps.
    """

    semantic: nn.Sequential
    truth: nn.Sequential
    zeta: Tensor
    w_zeta: Tensor
    truth_accuracy: float
    semantic_accuracy: float
    losses: tuple[tuple[float, float], ...]

    @property
    def zeta_prime(self) -> Tensor:
        """W_zeta zeta, [d]."""
        return self.w_zeta @ self.zeta

    def semantic_weights(self) -> SemanticEncoder:
        """A copy of Enc_sem's weights, as a memory and the operators take them."""
        first, _, last = self.semantic
        assert isinstance(first, nn.Linear)
        assert isinstance(last, nn.Linear)
        return SemanticEncoder(*(p.detach().clone() for p in (first.weight, first.bias, last.weight, last.bias)))


def truthfulness_loss(pos: Tensor, neg: Tensor, tau: float) -> Tensor:
    """Eq. 4, averaged over the 2n states.

    Args:
        pos: [n, t], Enc_tru(h_pos).
        neg: [n, t], Enc_tru(h_neg).
        tau: temperature of the cosines.
    """
    states = F.normalize(torch.cat([pos, neg]), dim=-1)
    s = states @ states.T / tau
    n = len(pos)
    same = torch.cat([s[:n, :n].logsumexp(-1), s[n:, n:].logsumexp(-1)])
    return (s.logsumexp(-1) - same).mean()


def semantic_loss(sem: Tensor, pos: Tensor, neg: Tensor, tau: float) -> Tensor:
    """Eq. 5, averaged over n.

    Args:
        sem: [n, d], h_sem as it is.
        pos: [n, d], Enc_sem(h_pos).
        neg: [n, d], Enc_sem(h_neg).
        tau: temperature of the cosines.
    """
    anchor = F.normalize(sem, dim=-1)
    s = torch.stack([anchor @ F.normalize(h, dim=-1).T for h in (pos, neg)], -1) / tau  # [n, n, 2]
    own = s.diagonal().T.logsumexp(-1)
    return (s.flatten(1).logsumexp(-1) - own).mean()


def _encoder(d: int, r: int, out: int) -> nn.Sequential:
    inner, outer = (nn.Linear(*size, dtype=torch.float32, device="cpu") for size in ((d, r), (r, out)))
    return nn.Sequential(inner, nn.GELU(), outer)


@taking_gradients
def disentangle(
    sem: Tensor,
    pos: Tensor,
    neg: Tensor,
    training: EncoderTraining | None = None,
    *,
    truth_states: tuple[Tensor, Tensor] | None = None,
    progress: bool = True,
) -> Disentangled:
    """Train both encoders of one layer, then zeta and W_zeta.

    Args:
        sem: [N, d], h_sem at the attention's output: the anchors of Eq. 5.
        pos: [N, d], h_pos where the memory takes its values: what Enc_sem sees.
        neg: [N, d], h_neg of the same place.
        training: see `EncoderTraining`.
        truth_states: h_pos and h_neg [N, d] as Enc_tru sees them; None: `pos` and `neg`.
        progress: show a progress bar.

    Raises:
        ValueError: fewer than four triplets.
    """
    training = training or EncoderTraining()
    true, false = truth_states or (pos, neg)
    n, d = sem.shape
    if n < 4:
        raise ValueError(f"triplets: expected at least 4 to train and validate the encoders, got {n}")
    generator = torch.Generator("cpu").manual_seed(training.seed)
    order = torch.randperm(n, generator=generator, dtype=torch.int64, device="cpu")
    held = order[: min(max(2, round(n * training.held_out)), n - 2)]
    taught = order[len(held) :]
    r = training.bottleneck or max(d // 8, 16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        semantic, truth = _encoder(d, r, d), _encoder(d, r, training.truth_size or r)
    optimizer = torch.optim.Adam([*semantic.parameters(), *truth.parameters()], lr=training.lr)

    def losses(rows: Tensor) -> tuple[Tensor, Tensor]:
        one = truthfulness_loss(truth(true[rows]), truth(false[rows]), training.tau_truth)
        return one, semantic_loss(sem[rows], semantic(pos[rows]), semantic(neg[rows]), training.tau_semantic)

    history: list[tuple[float, float]] = []
    best, since = math.inf, 0
    with progress_bar("disentangle", training.steps, progress) as bar:
        for step in range(training.steps):
            rows = taught
            if len(taught) > training.batch_size:
                mixed = torch.randperm(len(taught), generator=generator, dtype=torch.int64, device="cpu")
                rows = taught[mixed[: training.batch_size]]
            one, two = losses(rows)
            optimizer.zero_grad()
            (one + two).backward()
            optimizer.step()
            bar.update()
            if step % 50 == 0:
                history.append((float(one.detach()), float(two.detach())))
                with torch.no_grad():
                    validation = float(sum(losses(held)))
                best, since = (validation, 0) if validation < best - 1e-4 else (best, since + 1)
                bar.set_postfix(truth=f"{history[-1][0]:.3f}", semantic=f"{history[-1][1]:.3f}")
                if since >= training.patience:
                    break
    with torch.no_grad():
        return _conclude(semantic.eval(), truth.eval(), (sem, pos), (true, false), taught, held, tuple(history))


def _conclude(
    semantic: nn.Sequential,
    truth: nn.Sequential,
    meaning: tuple[Tensor, Tensor],
    truthfulness: tuple[Tensor, Tensor],
    taught: Tensor,
    held: Tensor,
    history: tuple[tuple[float, float], ...],
) -> Disentangled:
    """Zeta, W_zeta and the held-out accuracies, from the states (h_sem, h_pos) and (h_pos, h_neg)."""
    true, false = truthfulness
    t_pos, t_neg = truth(true), truth(false)
    zeta = t_pos.mean(0) - t_neg.mean(0)
    # Ridge regression: the differences in truthfulness space are nearly rank one, so plain least squares would blow up.
    x, y = t_pos - t_neg, true - false
    gram = x.T @ x
    ridge = 1e-3 * gram.diagonal().mean().clamp(min=1e-12) * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    w_zeta = torch.linalg.solve(gram + ridge, x.T @ y).T

    u_pos, u_neg = F.normalize(t_pos, dim=-1), F.normalize(t_neg, dim=-1)
    c_pos, c_neg = u_pos[taught].mean(0), u_neg[taught].mean(0)
    sides = [(u[held] - (c_pos + c_neg) / 2) @ (c_pos - c_neg) for u in (u_pos, u_neg)]
    right = torch.cat([sides[0] > 0, sides[1] < 0])
    sem, pos = meaning
    nearest = (F.normalize(sem[held], dim=-1) @ F.normalize(semantic(pos[held]), dim=-1).T).argmax(-1)
    same = nearest == torch.arange(len(held), dtype=torch.int64, device=nearest.device)
    return Disentangled(semantic, truth, zeta, w_zeta, float(right.float().mean()), float(same.float().mean()), history)
