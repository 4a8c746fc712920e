"""Numbers with a bound on their error: a formula written in them gives its value and how far a kernel may be from it.

Running error analysis (Higham, section 3.3): each operation adds what its own rounding can cost to what the errors of
its operands cost. Values and bounds are float64 tensors, whose own rounding is far below either. The units are the
worst of what a kernel may do: a sum of n terms in float32 in any order, rounded or truncated (tensor cores truncate)
each time; products of a dot exact for half operands, and within 2^-19 where float32 operands are split into two parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

TRUNCATION = 2.0**-23
SPLIT = 2.0**-19  # of tf32x3: two second parts cut to 11 bits, and their product left out
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@dataclass(frozen=True)
class Approx:
    """`value`, which a kernel has to within `error`."""

    value: Tensor
    error: Tensor

    def __getitem__(self, index) -> Approx:
        return Approx(self.value[index], self.error[index])

    @property
    def T(self) -> Approx:  # noqa: N802
        return Approx(self.value.T, self.error.T)

    def __add__(self, other: Approx) -> Approx:
        value = self.value + other.value
        return Approx(value, self.error + other.error + (self.value.abs() + other.value.abs()) * TRUNCATION)

    def __sub__(self, other: Approx) -> Approx:
        return self + Approx(-other.value, other.error)

    def __mul__(self, other: Approx) -> Approx:
        value = self.value * other.value
        error = self.error * other.value.abs() + self.value.abs() * other.error + self.error * other.error
        return Approx(value, error + value.abs() * TRUNCATION)

    def __matmul__(self, other: Approx) -> Approx:
        """A dot of operands that are not both of one half dtype."""
        return self._dot(other, SPLIT)

    def exact_dot(self, other: Approx) -> Approx:
        """A dot of operands of one half dtype."""
        return self._dot(other, 0.0)

    def _dot(self, other: Approx, product: float) -> Approx:
        a, b = self.value.abs(), other.value.abs()
        unit = product + (3 * a.shape[-1] + 8) * TRUNCATION  # three products for each pair of split operands
        error = self.error @ b + a @ other.error + self.error @ other.error + unit * (a @ b)
        return Approx(self.value @ other.value, error)

    def unsqueeze(self, dim: int) -> Approx:
        return Approx(self.value.unsqueeze(dim), self.error.unsqueeze(dim))

    def sum(self, dim: int, keepdim: bool = False) -> Approx:
        unit = (self.value.shape[dim] + 2) * TRUNCATION
        error = self.error.sum(dim, keepdim) + unit * self.value.abs().sum(dim, keepdim)
        return Approx(self.value.sum(dim, keepdim), error)

    def where(self, mask: Tensor) -> Approx:
        """0 where the mask is not set."""
        return Approx(torch.where(mask, self.value, 0.0), torch.where(mask, self.error, 0.0))

    def apply(self, f: Callable[[Tensor], Tensor], slope: Tensor | float, ulps: Tensor | float = 8.0) -> Approx:
        """f, whose slope is at most `slope`, computed to so many units of the larger of f(x) and x."""
        value = f(self.value)
        own = ulps * TRUNCATION * torch.maximum(value.abs(), self.value.abs())
        return Approx(value, slope * self.error + own)

    def exp(self) -> Approx:
        return self.apply(torch.exp, (self.value + self.error).exp(), ulps=8 + 2 * self.value.abs())

    def sqrt(self) -> Approx:
        """Of what is not negative."""
        value = self.value.sqrt()
        # |sqrt(x + e) - sqrt(x)| <= |e| / sqrt(x), and never above sqrt(|e|).
        moved = torch.minimum(self.error / value.clamp(min=1e-300), self.error.sqrt())
        return Approx(value, moved + 4 * TRUNCATION * value)

    def inverse(self) -> Approx:
        """1 / x, and 0 for an exact 0; no bound where the error reaches 0."""
        away = self.value.abs() - self.error
        value = torch.where(self.value == 0, 0.0, 1 / torch.where(self.value == 0, 1.0, self.value))
        moved = torch.where(away > 0, self.error * value.abs() / away.clamp(min=1e-300), torch.inf)
        exact = (self.value == 0) & (self.error == 0)
        return Approx(value, torch.where(exact, 0.0, moved + 4 * TRUNCATION * value.abs()))

    def rounded(self, dtype: torch.dtype) -> Approx:
        """After the last rounding, to the dtype of a result."""
        tiny = torch.finfo(dtype).smallest_normal * ROUNDING[dtype]
        return Approx(self.value, self.error + (self.value.abs() + self.error) * ROUNDING[dtype] + tiny)

    def admits(self, result: Tensor) -> None:
        """Raises AssertionError where `result` is further away than the bound."""
        assert result.shape == self.value.shape
        excess = (result.double() - self.value).abs() - self.error
        worst = int(excess.nan_to_num(nan=torch.inf).argmax()) if excess.numel() else 0
        assert not excess.numel() or excess.flatten()[worst] <= 0, (
            f"element {worst}: {result.flatten()[worst]} is more than {self.error.flatten()[worst]} "
            f"from {self.value.flatten()[worst]}"
        )


def given(t: Tensor) -> Approx:
    """An operand as it is stored: without an error."""
    return Approx(t.double(), torch.zeros(t.shape, dtype=torch.float64))
