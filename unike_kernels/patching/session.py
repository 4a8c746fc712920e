"""What `patch` keeps on a model, where its modules stand, and the hooks that tell them about a pass."""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor, nn

from .. import backbones
from ..artifacts.edit import Edit
from ..artifacts.memory import MemoryBank
from ..config import Config
from ..errors import PatchError
from ..nn import (
    DropIn,
    ExtraNeurons,
    MemoryShift,
    ModelContext,
    Version,
    adoption,
    base_class,
    first_argument,
    put_back,
)
from ..retrieval import Retriever

_ATTRIBUTE = "_unike"


Running = Literal["keep", "switch"]


_log = logging.getLogger("unike_kernels")


@dataclass
class Place:
    """Where a patched module stands.

    Attributes:
        layer: index of the decoder layer.
        holder, name: the module that it is a child of, and as which.
        module: itself.
        path: from the decoder to it.
        between: whether it is a part of an FFN that nothing is lost without: its activation.
    """

    layer: int
    holder: nn.Module
    name: str
    module: nn.Module
    path: tuple[str, ...]
    between: bool = False


@dataclass
class Places:
    """Whether what was patched is still what the decoder calls.

    Attributes:
        decoder: that calls it.
        each: the places.
        ffns: of the layers.
    """

    decoder: nn.Module
    each: list[Place]
    ffns: dict[int, ExtraNeurons]

    def check(self) -> None:
        """Raises PatchError for a place where another module stands, which the edits or the memory do not reach."""
        for place in self.each:
            if _at(self.decoder, place.path) is not place.module or not isinstance(place.module, DropIn):
                self._look(place)

    def _look(self, place: Place) -> None:
        where = f"layer {place.layer}"
        if _at(self.decoder, place.path[:-1]) is not place.holder:
            found = [name for name, module in self.decoder.named_modules() if module is place.holder]
            if not found:
                raise _changed(f"{where} ({type(place.holder).__name__}) is not in the model any more")
            place.path = (*found[0].split("."), place.name)  # somebody has wrapped what is around it
        stands = place.holder._modules.get(place.name)
        adopted = isinstance(place.module, DropIn)
        if stands is place.module and adopted:
            return
        if place.between or (adopted and _only_adds(stands, place.module)):
            self.ffns[place.layer].dense = None  # one launch would leave out what stands there
            return
        raise _changed(
            f"{where}: where its {place.name} ({base_class(place.module).__name__}) was patched, there is now "
            f"{'none' if stands is None else type(stands).__name__}, which the edits or the memory do not reach"
        )


def _changed(what: str) -> PatchError:
    return PatchError(f"{what}: call unike_kernels.unpatch(model), then change the model, and patch it again")


def _at(module: nn.Module | None, path: tuple[str, ...]) -> nn.Module | None:
    for name in path:
        if module is None:
            return None
        module = module._modules.get(name)
    return module


def _only_adds(wrapper: nn.Module | None, module: nn.Module) -> bool:
    """Whether a wrapper calls the module with what it is given, and adds something to what that returns: plain LoRA.

    Others scale or rotate (DoRA, IA3, OFT), and would do so to the neurons.
    """
    lora = sys.modules.get("peft.tuners.lora")
    if lora is None or not isinstance(wrapper, lora.LoraLayer):
        return False
    variants = [*getattr(wrapper, "lora_variant", {}), *filter(None, getattr(wrapper, "use_dora", {}).values())]
    return wrapper.base_layer is module and not variants


@dataclass
class DecoderHook:
    """Forward pre-hook of the decoder: begins a pass. Picklable with the model."""

    context: ModelContext
    places: Places
    placeholders: frozenset[int] | None  # given where those of images and the like must be told from text

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Check that the patched modules are still in place, and begin a pass over this call's batch.

        Raises:
            PatchError: another module stands where one was patched.
            ValueError: the config needs input_ids or a mask [batch, tokens], and the call has none.
        """
        context, cache = self.context, _cache_of(kwargs)
        if not torch.compiler.is_compiling():
            self.places.check()
        if module.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            _bind_checkpoints(module, context)
        ids = kwargs.get("input_ids", args[0] if args else None)
        source = ids if ids is not None else kwargs.get("inputs_embeds")
        batch, tokens = (1, 0) if source is None else (source.shape[0], source.shape[1])
        text, context.local.text = context.local.text, None  # it is about this pass alone
        if ids is not None and self.placeholders is not None and text is None:
            text = _is_text(ids, self.placeholders)
        elif source is not None and self.placeholders is not None and text is None:
            raise ValueError("inputs_embeds: Config(tokens='text') tells images from text by input_ids; give those")
        mask = kwargs.get("attention_mask")
        plain = mask if _is_plain(mask) else None
        if mask is not None and plain is None:
            noted = context.local.mask
            plain = noted if noted is not None and noted.shape[1] >= tokens else None
        past: int | Tensor = 0
        selection = context.in_force()
        if selection is not None and selection.prompt is not None and context.needs_prompt_ends:
            if mask is not None and plain is None:
                raise ValueError(
                    "attention_mask: uk.rows(prompt_lengths=...) finds the prompt's end in a mask [batch, tokens]; a "
                    "prepared one (static cache) does not tell"
                )
            past = 0 if cache is None else cache.get_seq_length()  # a tensor, where it is a static one
        context.begin(
            selection,
            cache,
            batch=batch,
            tokens=tokens,
            past=past,
            attention_mask=plain,
            text=text,
            tells=cache is not None or kwargs.get("use_cache") is not False,
            device=None if source is None else source.device,
            ids=context.local.ids if ids is None else ids,
        )


@dataclass
class DecoderEndHook:
    """Forward hook of the decoder, which runs after failures too: ends the pass. Picklable with the model."""

    context: ModelContext

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """End the pass, and forget which of its tokens were text."""
        self.context.local.text = None  # an embedding inside of the decoder has noted it for nobody
        self.context.local.embedded = self.context.local.mask = self.context.local.ids = None
        made = output.cache if hasattr(output, "cache") else getattr(output, "past_key_values", None)
        # Some return no cache that they were given; what has failed returns nothing.
        self.context.end(_cache_of(kwargs) if made is None and output is not None else made)


def _cache_of(kwargs: dict[str, Any]) -> Any:
    """What a call is given to keep keys and values in: transformers renamed it in 5.24."""
    cache = kwargs.get("cache")
    return kwargs.get("past_key_values") if cache is None else cache


@dataclass
class EmbeddingHook:
    """Forward pre-hook of the embedding, and of what is given the ids before: notes which tokens are text.

    Ids may have been replaced when they come to the embedding, so what was noted before stands. Picklable with the
    model.
    """

    context: ModelContext
    placeholders: frozenset[int]
    first: bool = False  # whether its module comes before the embedding

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note which of this call's ids are text; without ids [B, T], the embedding's hook forgets what was noted."""
        local, ids = self.context.local, kwargs.get("input_ids", args[0] if args else None)
        if isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point():
            if self.first or local.text is None or local.text.shape != ids.shape:
                local.text = _is_text(ids, self.placeholders)
        elif not self.first:
            local.text = None


def _is_text(ids: Tensor, placeholders: frozenset[int]) -> Tensor:
    text = torch.ones_like(ids, dtype=torch.bool)
    for placeholder in placeholders:
        text &= ids != placeholder
    return text


@dataclass
class MaskHook:
    """Forward pre-hook of the modules that a decoder is in: notes mask and ids [B, T]. Picklable with the model.

    Some models prepare the mask before their decoder, which it does not tell then where prompts end, and give it
    embeddings, which do not tell a trace what the tokens are.
    """

    context: ModelContext

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note this call's mask; a prepared one tells nothing about what a module outside was given. Note its ids."""
        local, mask = self.context.local, kwargs.get("attention_mask")
        if mask is None or _is_plain(mask):
            local.mask = mask
        ids = kwargs.get("input_ids", args[0] if args else None)
        if isinstance(ids, Tensor):
            local.ids = ids


def _is_plain(mask: Any) -> TypeGuard[Tensor]:
    """Whether it is a mask of tokens, [B, T]."""
    return isinstance(mask, Tensor) and mask.dim() == 2


@dataclass
class PromptHook:
    """Forward pre-hook of a decoder layer whose input tells something about the prompt. Picklable with the model."""

    context: ModelContext
    layer: int

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Show the router of this pass what comes to the layer."""
        now = self.context.now()
        if now.version.router is not None and now.last is not None and not (now.selection.forced or now.traced):
            now.version.router.see(now, self.layer, first_argument(args, kwargs), self.context.local.embedded)


@dataclass
class EmbeddedHook:
    """Forward hook of the embedding: notes ids and embeddings for the router. Picklable with the model."""

    context: ModelContext

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Note what was embedded last."""
        ids = first_argument(args, kwargs)
        noted = isinstance(output, Tensor) and ids.dim() == 2 and not ids.is_floating_point()
        self.context.local.embedded = (ids, output.detach()) if noted else None


HOOKS = (DecoderHook, DecoderEndHook, EmbeddingHook, MaskHook, PromptHook, EmbeddedHook)


@dataclass
class BoundCheckpoint:
    """In the place of a layer's checkpointing function: what it computes again, it computes in the first pass."""

    checkpoint: Callable[..., Any]
    context: ModelContext

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoint `function`, bound to the pass that runs now. torch.compile traces it unbound."""
        if not torch.compiler.is_compiling():
            function = self.context.bound(function)
        return self.checkpoint(function, *args, **kwargs)


_CHECKPOINT = "_gradient_checkpointing_func"  # of transformers, on the layers or on the decoder


def _bind_checkpoints(decoder: nn.Module, context: ModelContext) -> None:
    """In each pass, as `gradient_checkpointing_enable` may have been called since the last one."""
    for module in decoder.modules():
        checkpoint = module.__dict__.get(_CHECKPOINT)
        if checkpoint is not None and not isinstance(checkpoint, BoundCheckpoint):
            module.__dict__[_CHECKPOINT] = BoundCheckpoint(checkpoint, context)


def release_checkpoints(model: nn.Module) -> None:
    """Give the layers their own checkpointing functions back."""
    for module in model.modules():
        bound = module.__dict__.get(_CHECKPOINT)
        if isinstance(bound, BoundCheckpoint):
            module.__dict__[_CHECKPOINT] = bound.checkpoint


@dataclass(frozen=True, eq=False)
class Installed(Version):
    """A version, and the artifacts that it is made of."""

    artifacts: Mapping[str, Edit] = field(default_factory=dict)
    memory: MemoryBank | None = None


@dataclass
class PatchedState:
    """What `patch` installed in a model, kept on it."""

    context: ModelContext
    decoder: backbones.Decoder
    config: Config
    places: Places
    ffns: dict[int, ExtraNeurons]
    attentions: dict[int, MemoryShift]
    retriever: Callable[[Tensor], Retriever] | None = None  # see `patch`
    lock: threading.RLock = field(default_factory=threading.RLock)  # of changes

    @property
    def installed(self) -> Installed:
        """The current version."""
        version = self.context.current
        assert isinstance(version, Installed)
        return version

    @property
    def edits(self) -> Mapping[str, Edit]:
        """id -> edit, of the current version."""
        return self.installed.artifacts

    @property
    def memory(self) -> MemoryBank | None:
        """The memory of the current version, or None."""
        return self.installed.memory

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, lock=threading.RLock())
        self.context.orphaned = False  # the whole model has been copied


def state_of(model: nn.Module) -> PatchedState | None:
    """What `patch` keeps on the model, in whatever wrappers it is (see `backbones.unwrap`), or None."""
    return backbones.unwrap(model).__dict__.get(_ATTRIBUTE)


def require_state(model: nn.Module, *, changed: bool = False) -> PatchedState:
    """The same.

    Raises PatchError if the model is not patched or, unless it may be `changed`, if something that was patched is not
    in it any more.
    """
    state = state_of(model)
    if state is None:
        raise PatchError(f"{type(model).__name__} is not patched: call unike_kernels.patch(model, ...) first")
    if not changed:
        inner = backbones.unwrap(model)
        path = tuple(state.decoder.path.split(".")) if state.decoder.path else ()
        if _at(inner, path) is not state.decoder.module:
            raise _changed(f"{type(inner).__name__}: its decoder {state.decoder.path} is another one than was patched")
        state.places.check()
    return state


def set_state(model: nn.Module, state: PatchedState | None) -> None:
    """Keep this on the model; None: nothing."""
    model = backbones.unwrap(model)
    before = model.__dict__.get(_SAVE)
    if state is None:
        model.__dict__.pop(_ATTRIBUTE, None)
        if isinstance(before, SaveOfTheBase):
            model.__dict__.pop(_SAVE)
            model.__dict__.update({} if before.own is None else {_SAVE: before.own})
        return
    model.__dict__[_ATTRIBUTE] = state
    if hasattr(model, _SAVE) and not isinstance(before, SaveOfTheBase):
        model.__dict__[_SAVE] = SaveOfTheBase(model, before)


_SAVE = "save_pretrained"  # of transformers


@dataclass(eq=False, repr=False)
class SaveOfTheBase:
    """In the place of a patched model's `save_pretrained`, which writes what the model was: says what is left out.

    Picklable with the model.
    """

    model: nn.Module
    own: Callable[..., Any] | None  # what stood on the object itself, in front of its class's

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Save the model as it does without a patch, with a warning where edits or a memory are in force."""
        state = state_of(self.model)
        left = [] if state is None else [f"the edit {id!r}" for id in state.edits]
        if state is not None and state.memory is not None:
            left.append(f"the memory {state.memory.id}")
        if left:
            warnings.warn(
                f"save_pretrained writes the base model, without {', '.join(left)}: keep them beside it with "
                "Edit.save_pretrained(folder, memory=...), or put edits into the weights of a model that is not "
                "patched with unike_kernels.fold(model, edits)",
                stacklevel=2,
            )
        save = self.own or partial(getattr(type(self.model), _SAVE), self.model)
        return save(*args, **kwargs)


_STRUCTURE = (
    "_modules", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)  # fmt: skip


class AllOrNothing:
    """After any exception within the block, an interrupt too, the model has the classes, hooks and state of before."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._state = model, state_of(model)
        places = [] if self._state is None else self._state.places.each
        modules = {*model.modules(), *(place.module for place in places)}
        self._before = [(m, adoption(m), {name: m.__dict__[name].copy() for name in _STRUCTURE}) for m in modules]

    def __enter__(self) -> None: ...

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        if error is None:
            return
        for module, adopted, structure in self._before:
            put_back(module, adopted)
            for name, held in structure.items():
                module.__dict__[name].clear()
                module.__dict__[name].update(held)
        set_state(self._model, self._state)


def outside_inference_mode() -> AbstractContextManager[Any]:
    """Within the block, tensors that are made can be written to and trained with later."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


def log_event(event: str, state: PatchedState, **more: Any) -> None:
    """Log what has happened to a patched model, at level INFO, as "unike_kernels"; the record's `unike` is a dict.

    Args:
        event: the function that did it.
        state: the model's, afterwards.
        **more: further entries.
    """
    memory = state.memory
    entry = {"event": event, "edits": len(state.edits), "memory": memory.id if memory else None, **more}
    _log.info("%s", " ".join(f"{k}={v}" for k, v in entry.items()), extra={"unike": entry})
