"""Adopting a module in place: the same object, of a subclass of its class, with one record of what it does more.

Whatever is done to the module, its children and its attributes, before or after, reaches what computes, since it is the
module itself that does. Its hooks run around all of it, as around any forward: they see, and may replace, what the
model uses. All names that are added to it begin with `_unike`, so that none of its own is hidden.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import PatchError

if TYPE_CHECKING:
    from .context import ModelContext

_RECORD = "_unike_record"  # where an adopted module keeps its record
_BASE = "_unike_base"  # where a class of ours keeps the class that it extends


class Record:
    """What an adopted module computes beside what is its own."""

    context: ModelContext

    def run(self, module: nn.Module, base: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the module returns for a call.

        Args:
            module: the adopted module.
            base: its own forward.
            args: of the call.
            kwargs: of the call.
        """
        raise NotImplementedError

    def move(self, fn: Any) -> None:
        """Take tensors along, as `nn.Module._apply` does."""


class _Over:
    """The patched forward over one that somebody has put on the instance; what `module.forward` then is."""

    def __init__(self, module: nn.Module, own: Callable[..., Any]) -> None:
        self.module, self.own = module, own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _run(self.module, self.own, args, kwargs)


def _run(module: nn.Module, own: Callable[..., Any] | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The patched forward over `own`, or over the class's forward.

    A wrapper may hold a patched forward that it took from the module, and stand on the module now: called by it, that
    is the module's own part, to which the call around it adds. It may also have outlived the patch.
    """
    record: Record | None = vars(module).get(_RECORD)
    base = class_forward(module) if own is None else own
    if record is None:
        return base(*args, **kwargs)
    if torch.compiler.is_compiling():  # which may begin in the wrapper
        nested = own is not vars(module).get("forward")
        return base(*args, **kwargs) if nested else record.run(module, base, args, kwargs)
    local: Any = record.context.local
    if any(inside is module and running is local.running for inside, running in local.inside):
        return base(*args, **kwargs)
    outer = local.inside
    local.inside = (*outer, (module, local.running))
    try:
        return record.run(module, base, args, kwargs)
    finally:
        local.inside = outer


class _Forward(property):
    """`forward`, which wins over one in the instance's `__dict__`; of the class it is the function, as any method."""

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return DropIn._unike_forward if instance is None else instance._unike_get()


class DropIn(nn.Module):
    """The part of an adopted module's class that is ours."""

    def _unike_forward(self, *args: Any, **kwargs: Any) -> Any:
        own = self.__dict__
        record = own.get(_RECORD)
        if record is None or "forward" in own:
            return _run(self, None, args, kwargs)
        return record.run(self, super().forward, args, kwargs)

    def _unike_get(self) -> Callable[..., Any]:
        own = self.__dict__.get("forward")
        return self._unike_forward if own is None else _Over(self, own)

    def _unike_set(self, value: Any) -> None:
        if isinstance(value, _Over) and value.module is self:
            value = value.own
        elif isinstance(value, MethodType) and value == self._unike_forward:  # as it was before
            self.__dict__.pop("forward", None)
            return
        self.__dict__["forward"] = value

    def _unike_delete(self) -> None:
        if "forward" not in self.__dict__:
            raise AttributeError("forward")
        del self.__dict__["forward"]

    forward = _Forward(_unike_get, _unike_set, _unike_delete)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        record = self.__dict__.get(_RECORD)
        if record is not None:
            record.move(fn)
        return super()._apply(fn, recurse)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if _BASE not in vars(type(self)):  # somebody's subclass of ours
            return super().__reduce_ex__(protocol)
        return _restore, type(self).__bases__, self.__dict__


_subclasses: dict[tuple[type, type], Any] = {}


def _subclass(mixin: type[DropIn], base: type[nn.Module]) -> Any:
    key = (mixin, base)
    if key not in _subclasses:
        name, own = f"{mixin.__name__}{base.__name__}", {"__module__": mixin.__module__, _BASE: base}
        _subclasses[key] = type(name, key, own)
    return _subclasses[key]


def _restore(mixin: type[DropIn], base: type[nn.Module]) -> Any:
    cls = _subclass(mixin, base)
    return cls.__new__(cls)


def check_free(module: nn.Module) -> None:
    """Raises PatchError for a module that is adopted already."""
    if isinstance(module, DropIn):
        name = base_class(module).__name__
        raise PatchError(f"this {name} is patched already: one module cannot be patched twice, nor in two places")


def adopt(module: nn.Module, mixin: type[DropIn], record: Record) -> None:
    """Let a module compute what a record says, in place.

    Args:
        module: any module; it becomes an instance of a subclass of its class.
        mixin: the first base of that subclass.
        record: what is computed.

    Raises PatchError if the module is adopted already.
    """
    check_free(module)
    module.__dict__[_RECORD] = record
    set_class(module, _subclass(mixin, type(module)))


def release(module: nn.Module) -> None:
    """Give a module its class back; nothing happens to one that is not adopted."""
    if isinstance(module, DropIn):
        set_class(module, _without(type(module)))
    module.__dict__.pop(_RECORD, None)


def record_of(module: nn.Module) -> Record | None:
    """The record of an adopted module; None for another one."""
    return module.__dict__.get(_RECORD)


def base_class(module: nn.Module) -> type:
    """The module's class, without ours on top."""
    found: type = vars(type(module)).get(_BASE, type(module))
    return found


@contextmanager
def unpatched(*modules: nn.Module) -> Iterator[None]:
    """Within the block, these modules compute in this thread as if they were not adopted."""
    contexts = {id(r.context): r.context for r in map(record_of, modules) if r is not None}
    with ExitStack() as stack:
        for context in contexts.values():
            stack.enter_context(context.running_nothing())
        yield


def adoption(module: nn.Module) -> tuple[type, Record | None]:
    """What adopting and releasing change, for `put_back`."""
    return type(module), record_of(module)


def put_back(module: nn.Module, before: tuple[type, Record | None]) -> None:
    """Let `adoption` be what it was."""
    cls, record = before
    if type(module) is not cls:
        set_class(module, cls)
    module.__dict__.pop(_RECORD, None)
    if record is not None:
        module.__dict__[_RECORD] = record


def set_class(module: nn.Module, cls: type) -> None:
    """Whatever the module's own `__setattr__` does."""
    object.__setattr__(module, "__class__", cls)


def _without(cls: type) -> type:
    """The class as it is without ours among its bases; others may have derived theirs from it (parametrizations)."""
    own = dict(vars(cls))
    if _BASE in own:
        base: type = own[_BASE]
        return base
    bases = tuple(_without(base) if issubclass(base, DropIn) else base for base in cls.__bases__)
    for name in ("__dict__", "__weakref__"):
        own.pop(name, None)
    made: type = type(cls)(cls.__name__, bases, own)
    return made


def class_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward of a module's own class, ours and an instance's left out."""
    if isinstance(module, DropIn):
        found: Callable[..., Any] = super(DropIn, module).forward
        return found
    return MethodType(type(module).forward, module)


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states of a call."""
    if args:
        found: Tensor = args[0]
    else:  # whatever the module calls it
        found = kwargs["hidden_states"] if "hidden_states" in kwargs else next(iter(kwargs.values()))
    return found


def residual_position(module: nn.Module) -> int | None:
    """Where a module's forward takes a residual that it adds to its output (bloom); None: it takes none."""
    names = list(inspect.signature(class_forward(module)).parameters)
    return names.index("residual") if "residual" in names else None


def residual_of(position: int | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The residual of a call, from its `residual_position`; None: there is no such position."""
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
