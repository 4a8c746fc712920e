"""MEND (Mitchell et al., ICLR 2022): a network turns the factors of a request's gradient into a change of weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override

from unike_kernels.training.samples import Sample, evaluating

from ..suite import Suite
from .base import only
from .hyper import HyperEditor

_MEASURED = 64  # requests that the scales of the factors are taken from
_FIRST_RATE = 1e-2
_FLOOR = 0.5  # of the mean deviation


class MEND(HyperEditor):
    """The gradient of a weight is a sum over tokens of delta u^T; the network edits u and delta, and so the sum.

    Weights of one shape share a network, with a scale and an offset of their own, and a learnt rate each.
    """

    name = "MEND"

    @override
    def build(self) -> nn.Module:
        self._keys = {name: name.replace(".", "/") for name in self.linears}
        shapes = {(m.in_features, m.out_features) for m in self.linears.values()}
        self._transforms = nn.ModuleDict({_shape(*s): _Transform(*s) for s in shapes})
        self._layers = nn.ModuleDict(
            {self._keys[name]: _Layer(m.in_features + m.out_features) for name, m in self.linears.items()}
        )
        return nn.ModuleList([self._transforms, self._layers])

    @override
    def learn(self, suite: Suite) -> None:
        with evaluating(self.model), only(self.model, []):
            seen = [self.gradients(r.case.request) for r in suite.train[:_MEASURED]]
        for name, key in self._keys.items():
            factors = torch.cat([torch.cat(s[name], -1) for s in seen])
            inputs = self.linears[name].in_features
            self._layers[key].measure(factors[_counts(factors, inputs)], inputs)  # type: ignore[operator]
        super().learn(suite)

    @override
    def changes(self, request: Sample) -> dict[str, Tensor]:
        found = {}
        for name, (u, delta) in self.gradients(request).items():
            layer, transform = self._layers[self._keys[name]], self._transforms[_shape(u.shape[1], delta.shape[1])]
            factors = torch.cat([u, delta], -1)
            factors = factors[_counts(factors, u.shape[1])]
            u, delta = transform(layer(factors), layer).split([u.shape[1], delta.shape[1]], -1)
            found[name] = -layer.rate.exp() * delta.T @ u  # type: ignore[operator]
        return found


def _shape(inputs: int, outputs: int) -> str:
    return f"{inputs}x{outputs}"


def _counts(factors: Tensor, inputs: int) -> Tensor:
    """Tokens whose gradient is not zero."""
    return (factors[:, inputs:] != 0).any(-1)


class _Layer(nn.Module):
    """What a weight has of its own."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))
        self.scale, self.offset = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.rate = nn.Parameter(torch.tensor(_FIRST_RATE).log())

    def measure(self, factors: Tensor, inputs: int) -> None:
        self.mean.copy_(factors.mean(0))
        # A unit that was silent in all of these requests has no scale: without a floor, one that wakes it explodes.
        for part, found in zip(
            self.deviation.tensor_split([inputs]), factors.std(0).tensor_split([inputs]), strict=True
        ):
            part.copy_(found.clamp(min=_FLOOR * float(found.mean())))

    def forward(self, factors: Tensor) -> Tensor:
        return (factors - self.mean) / self.deviation


class _Transform(nn.Module):
    """A residual network of low rank that starts as the identity."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        width = inputs + outputs
        self.down, self.up = nn.Linear(width, width // 2), nn.Linear(width // 2, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, factors: Tensor, layer: nn.Module) -> Tensor:
        hidden = torch.relu(self.down(factors))
        return factors + layer.scale * self.up(hidden) + layer.offset
