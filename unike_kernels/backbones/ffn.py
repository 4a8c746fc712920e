"""What an FFN computes: its activation, and whether its matrices are all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..nn import residual_position, unpatched
from ..ops import ACTIVATIONS
from ..ops.patched_ffn.reference import FFNWeights, activate, ffn

_PROBES = 3  # tokens


_CLOSE = {torch.float32: 1e-4, torch.float64: 1e-8}  # of the largest output; halves: 0.05


def _is_plain(matrix: nn.Module) -> bool:
    """Whether it has a weight, perhaps a bias, and nothing else that could change what it computes."""
    from transformers.pytorch_utils import Conv1D

    parameters = dict(matrix.named_parameters())
    return (
        isinstance(matrix, nn.Linear | Conv1D)
        and parameters.keys() <= {"weight", "bias"}
        and all(type(p) is nn.Parameter and p.is_floating_point() for p in parameters.values())
    )


def _matrices(module: nn.Module) -> Iterator[nn.Module]:
    """The module itself and its children, as far as they hold a matrix."""
    for part in (module, *module.children()):
        if any(p.dim() >= 2 for p in part.parameters(recurse=False)):
            yield part


@torch.no_grad()
def _computes(modules: Sequence[nn.Module], weights: FFNWeights, activation: str) -> bool:
    """Whether the modules, one after the other, are the FFN of these weights: for a few random tokens.

    Of patched ones it is what they are without their neurons.
    """
    d, f = weights.w_in.shape[1], weights.w_in.shape[0]
    device, dtype = weights.w_in.device, weights.w_in.dtype
    if weights.w_out.shape != (d, f) or device.type == "meta":
        return False
    x = torch.randn(_PROBES, d, generator=torch.Generator("cpu").manual_seed(0), dtype=torch.float32, device="cpu").to(
        device, dtype
    )
    training = [part for module in modules for part in module.modules() if part.training]
    try:
        for part in training:  # dropout
            part.training = False
        out: Any = x
        with unpatched(*modules):
            for module in modules:
                rest = (torch.zeros_like(x),) if residual_position(module) is not None else ()
                out = module(out, *rest)
    finally:
        for part in training:
            part.training = True
    wanted = ffn(x, weights, activation)
    if not isinstance(out, Tensor) or out.shape != wanted.shape:
        return False
    return float((out - wanted).abs().max()) <= _CLOSE.get(dtype, 0.05) * float(wanted.abs().max())


def _functions(module: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """What in an FFN may be its activation: itself or a child without parameters, or a function that it keeps."""
    for name, part in [("", module), *module.named_children(), *vars(module).items()]:
        if callable(part) and ("act" in name.lower() or "gelu" in name.lower() or "activation" in _home(part)):
            yield part
        elif name == "" and not any(True for _ in module.parameters()):
            yield module


def _home(part: object) -> str:
    """The module that a module's class is defined in: transformers has one for activations."""
    return type(part).__module__.rpartition(".")[2] if isinstance(part, nn.Module) else ""


def _configured(config: Any, where: str) -> Callable[[Tensor], Tensor]:
    """The activation that a config names: for experts that compute it inside."""
    from transformers.activations import ACT2FN

    for key in ("hidden_act", "hidden_activation", "activation_function", "mlp_hidden_act"):
        name = getattr(config, key, None)
        if isinstance(name, str) and name in ACT2FN:
            function: Callable[[Tensor], Tensor] = ACT2FN[name]
            return function
    raise UnsupportedModelError(
        f"{where}: looked for its activation as a child or in the config as hidden_act, hidden_activation, "
        "activation_function or mlp_hidden_act; found none"
    )


@torch.no_grad()
def match_activation(function: Callable[[Tensor], Tensor], where: str) -> str:
    """The name of an activation, found by what it computes. Raises UnsupportedModelError for an unknown one."""
    if isinstance(function, nn.Module) and any(True for _ in function.parameters()):
        raise UnsupportedModelError(
            f"{where}: its activation {type(function).__name__} has parameters of its own, which extra neurons cannot "
            f"share; supported are {', '.join(ACTIVATIONS)}"
        )
    probe = torch.linspace(-6, 6, 97, dtype=torch.float32, device="cpu")
    got = function(probe.clone())
    for name in ACTIVATIONS:
        if torch.allclose(got, activate(name, probe), atol=1e-6, rtol=1e-5):
            return name
    raise UnsupportedModelError(
        f"{where}: its activation {type(function).__name__} computes none of {', '.join(ACTIVATIONS)}"
    )
