"""The paper's figures as PNG images: metrics of a sweep (Figure 4), and the two spaces of hidden states (Figure 5a)."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from unike_kernels.training import build_memory

from .experiments import Backbone, load, suite
from .metrics import METRICS
from .settings import DEFAULTS
from .tables import Results, figures

Spaces = Mapping[str, tuple[Tensor, Tensor]]  # name -> states of right answers and of wrong ones, [n, width] each


def sweep(results: Results, protocol: str) -> bytes:
    """Each metric over the variants of a system, in their order, with 95% confidence intervals.

    Raises:
        ImportError: matplotlib is not installed.
    """
    names = [run.variant or run.system for run, _ in results]
    found = [figures(rows, protocol) for _, rows in results]
    figure, axes = _figure(1)
    for metric in (*METRICS, "mean"):
        at = [i for i, each in enumerate(found) if metric in each]
        means = [100 * found[i][metric].mean for i in at]
        errors = [100 * min(found[i][metric].half_width, 1.0) for i in at]
        width = 3.0 if metric == "mean" else 1.2
        axes[0].errorbar(at, means, yerr=errors, label=metric, marker="o", capsize=3, linewidth=width)
    axes[0].set_xticks(range(len(names)), names, rotation=20, ha="right")
    axes[0].set_ylabel(f"% ({protocol})")
    axes[0].legend(ncols=3)
    return _png(figure)


def spaces(
    backbone: Backbone, layer: int | None = None, *, limit: int | None = None, seed: int = 0
) -> tuple[Spaces, str]:
    """Hidden states of right and wrong answers in the semantic and in the truthfulness space of a layer.

    Args:
        backbone: whose memory of the training requests about digits is made.
        layer: None: the last one.
        limit: at most so many requests.
        seed: of the encoders' training.

    Returns:
        The states, and a line that says how well held-out ones are told apart.
    """
    model, processor = load(backbone)
    triplets = [request.triplet for request in suite(backbone, model, processor, "vqa").train][:limit]
    encoders = dataclasses.replace(DEFAULTS["UniKE"]["encoders"], seed=seed)
    made = build_memory(model, processor, triplets, training=encoders, progress=False)
    chosen = max(made.spaces) if layer is None else layer
    space, states = made.spaces[chosen], made.hidden[chosen]
    with torch.no_grad():
        found = {
            # Of the states that Enc_sem was trained on: those of the default values="out".
            "semantic space": (space.semantic(states.pos_out), space.semantic(states.neg_out)),
            "truthfulness space": (space.truth(states.pos_pre), space.truth(states.neg_pre)),
        }
    told = (
        f"{backbone}, layer {chosen}, {len(triplets)} requests; held out: truthfulness {space.truth_accuracy:.1%}, "
        f"semantics {space.semantic_accuracy:.1%}"
    )
    return found, told


def visualized(found: Spaces, told: str, seed: int = 0) -> bytes:
    """t-SNE of each space on its own.

    Raises:
        ImportError: matplotlib or scikit-learn is not installed.
    """
    from sklearn.manifold import TSNE

    figure, axes = _figure(len(found))
    for each, (name, (right, wrong)) in zip(axes, found.items(), strict=True):
        states = torch.nn.functional.normalize(torch.cat([right, wrong]), dim=-1)
        placed = TSNE(random_state=seed, perplexity=min(30, len(states) // 4)).fit_transform(states.numpy())
        each.scatter(*placed[: len(right)].T, s=8, label="right answers")
        each.scatter(*placed[len(right) :].T, s=8, label="wrong answers")
        each.set_title(name)
        each.legend()
    figure.suptitle(told)
    return _png(figure)


def _figure(columns: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 + 4 * columns, 5), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()
