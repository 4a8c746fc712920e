"""How the matrices of a base FFN are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import FFNWeights


@dataclass(frozen=True)
class Dense:
    """How a base FFN's matrices are read.

    Attributes:
        matrices: modules with a weight and perhaps a bias, in the order of their registration: one or two that lead
            in, and one that leads back. A single one that leads in and is twice as wide holds gate and factor.
        gate_first: whether the gate comes before the factor.
    """

    matrices: tuple[nn.Module, ...]
    gate_first: bool = True

    def weights(self) -> FFNWeights:
        """Views of what the modules hold now."""
        *first, (w_out, b_out) = map(_oriented, self.matrices)
        if len(first) == 1 and first[0][0].shape[0] == 2 * w_out.shape[1]:
            weight, bias = first[0]
            biases = (None, None) if bias is None else bias.chunk(2)
            first = list(zip(weight.chunk(2), biases, strict=True))
        if len(first) == 1:
            return FFNWeights(*first[0], None, None, w_out, b_out)
        gate, up = first if self.gate_first else first[::-1]
        return FFNWeights(*gate, *up, w_out, b_out)

    def named(self, parts: Sequence[tuple[Tensor, Tensor | None]], names: Mapping[int, str]) -> dict[str, Tensor]:
        """Weights [out, in] and biases, as `weights` orders them, by the names that they have in a state_dict.

        Args:
            parts: of gate and factor, or of the only way in, and of the way back.
            names: id of a module -> its name.
        """
        *first, last = parts
        if len(first) == 2 and not self.gate_first:
            first.reverse()
        if len(first) == 2 and len(self.matrices) == 2:
            (gate, b_gate), (up, b_up) = first
            first = [(torch.cat([gate, up]), None if b_gate is None or b_up is None else torch.cat([b_gate, b_up]))]
        found = {}
        for module, (weight, bias) in zip(self.matrices, (*first, last), strict=True):
            name = names[id(module)]
            found[f"{name}.weight"] = weight if isinstance(module, nn.Linear) else weight.T.contiguous()
            if bias is not None:
                found[f"{name}.bias"] = bias
        return found


def _oriented(matrix: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight as [out, in], and the bias; GPT-2's Conv1D holds it the other way round."""
    weight: Any = matrix.weight
    bias: Any = matrix.bias
    return (weight if isinstance(matrix, nn.Linear) else weight.T), bias
