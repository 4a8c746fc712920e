"""Replacing a module in place: a clone of its own dynamic subclass that shares everything with it.

The clone stands where the module stood: the same class family (`isinstance` holds), the same parameters, buffers and
children (so state_dict keys, offload hooks and adapters stay as they are). It computes by calling the original module
object, hooks and all, which it keeps outside of the registered children; putting that object back undoes everything.
"""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T", bound="DropIn")

_CALL_HOOKS = tuple(name for name in vars(nn.Module()) if name.startswith(("_forward_", "_backward_")))


_subclasses: dict[tuple[type, type], Any] = {}


def _subclass(mixin: type[DropIn], base: type[nn.Module]) -> Any:
    key = (mixin, base)
    if key not in _subclasses:
        _subclasses[key] = type(f"{mixin.__name__}{base.__name__}", key, {"__module__": mixin.__module__})
    return _subclasses[key]


def _restore(mixin: type[DropIn], base: type[nn.Module]) -> Any:
    cls = _subclass(mixin, base)
    return cls.__new__(cls)


class DropIn(nn.Module):
    """A stand-in for one module of a model. Made by `from_module` of a subclass, undone by `originals`."""

    _originals: tuple[nn.Module, ...]

    @classmethod
    def _adopt(cls: type[T], *originals: nn.Module) -> T:
        """A clone of the first of `originals`; all of them together are what it calls."""
        base = originals[0]
        new = _restore(cls, type(base))
        new.__dict__.update(base.__dict__)
        new.__dict__.pop("forward", None)  # an instance forward (accelerate's hook) belongs to the original
        new._modules = dict(base._modules)
        for name in _CALL_HOOKS:  # these run with the original
            new.__dict__[name] = type(base.__dict__[name])() if name in base.__dict__ else {}
        # Not assigned as attributes: the originals must not become children.
        new.__dict__["_originals"] = originals
        return new

    @property
    def originals(self) -> tuple[nn.Module, ...]:
        """The module objects that this one stands for."""
        return self._originals

    def train(self: T, mode: bool = True) -> T:
        for original in self._originals:
            original.train(mode)
        super().train(mode)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        mixin, base = type(self).__bases__
        return _restore, (mixin, base), self.__dict__


def original(module: nn.Module) -> nn.Module:
    """The module that `module` stands for; itself if it stands for none."""
    return module.originals[0] if isinstance(module, DropIn) else module


def residual_position(module: nn.Module) -> int | None:
    """Where a module's forward takes a residual that it adds to its output (bloom); None: it takes none."""
    names = list(inspect.signature(type(original(module)).forward).parameters)
    return names.index("residual") - 1 if "residual" in names else None


def residual_of(position: int | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The residual of a call, or None."""
    if position is None:
        return None
    found: Tensor = kwargs["residual"] if "residual" in kwargs else args[position]
    return found


class Tables(nn.Module):
    """Tensors that follow the model from device to device and keep their dtype, outside of its state_dict."""

    _plan: Any = None  # what a subclass makes of the tensors once; gone with any change of an attribute

    def table(self, name: str, value: Tensor | None) -> None:
        if value is not None and value.is_inference() and not torch.is_inference_mode_enabled():
            value = value.clone()  # of another mode; gradients could not be taken with it
        self.register_buffer(name, value, persistent=False)
        self.__dict__["_plan"] = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_plan":
            self.__dict__[name] = value
        else:
            self.__dict__["_plan"] = None
            super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plan": None}  # its addresses are those of this process

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.__dict__["_plan"] = None
        for name, t in self._buffers.items():
            if t is not None:
                device = fn(torch.empty(0, dtype=t.dtype, device=t.device)).device
                self._buffers[name] = t if device == t.device else t.to(device)
        return self
