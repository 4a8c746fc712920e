"""What a patched model keeps between forward passes, and in which pass each of its layers computes: `ModelContext`."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, Literal
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor

from ..config import Config
from ..errors import PatchError
from ..ops._workspace import capturing
from .ambient import Ambient
from .captured import Captured
from .passes import EVERYTHING, NOTHING, Decided, Generation, Pass, Selection, Version, on_gpu
from .trace import Trace

_DECIDED = "_unike_decided"  # of a cache


def _length(cache: Any) -> int:
    """How many tokens a cache holds; on a GPU some have to be waited for. Raises PatchError where a capture cannot."""
    length = cache.get_seq_length()
    if isinstance(length, Tensor) and capturing(length.device):
        raise PatchError(
            "a CUDA graph is captured of a pass of which nothing but its static cache tells whether it begins a "
            "generation or goes on with one: capture passes of one token, behind a prompt that was not captured and "
            "with the edits that are installed now"
        )
    return int(length)


def _writes(cache: Any) -> int | None:
    """How often the length of a static cache was written, which the host knows; None: torch does not count that, as in
    inference mode, or it is no tensor."""
    length = cache.get_seq_length()
    return length._version if isinstance(length, Tensor) and not length.is_inference() else None


def _emptied(cache: Any, known: Generation) -> bool:
    """Whether nothing is left in the cache of a generation. A GPU is not waited for unless somebody has written there
    since the last pass; of what nobody counts, it is asserted on the device that something is left."""
    length = cache.get_seq_length()
    if isinstance(length, Tensor) and on_gpu(length):
        if length.is_inference():
            torch._assert_async(length > 0, "the key-value cache was reset: expected the whole prompt in one pass")
            return False
        if length._version == known.writes:
            return False
    return _length(cache) == 0


class _Thread(threading.local):
    """What a thread is at. A pass does not leave the thread that it begins in."""

    running: Pass | None = None
    text: Tensor | None = None  # bool [B, T] of the last embedded ids, False at image placeholders
    mask: Tensor | None = None  # [B, T] as the model was given it, which may give its decoder a prepared one
    ids: Tensor | None = None  # [B, T] as the model was given them, which may give its decoder embeddings
    embedded: tuple[Tensor, Tensor] | None = None  # these ids and their embeddings, where a router wants them
    inside: tuple[tuple[Any, Pass | None], ...] = ()  # patched modules whose instance's own forward runs, and where

    def __init__(self) -> None:
        self.inputs: dict[int, Any] = {}  # as a pass has them, for what is outside of any


class _Tracing:
    """The same for what torch.compile traces."""

    def __init__(self) -> None:
        self.running: Pass | None = None
        self.text: Tensor | None = None
        self.mask: Tensor | None = None
        self.ids: Tensor | None = None
        self.embedded: tuple[Tensor, Tensor] | None = None
        self.inputs: dict[int, Any] = {}


class ModelContext:
    """What the modules of a patched model share: what is installed, what is selected, and the pass that runs.

    A generation is known by its key-value cache, and keeps the version that it began with. What torch.compile traces
    knows no logical calls and one version: the current one, and `traced`. It is refused to those who select otherwise.

    Args:
        version: what is installed.
        default: what a pass without a selection computes with, "all" or "none".
        config: of the model whose decoder announces its passes; None: of a module alone.

    Attributes:
        orphaned: whether it was copied with a part of its model alone, so that nobody can select anything for it.
        current: the version that a new pass gets; see `publish`.
        number: of it; of all models, no two have the same.
        needs_prompt_ends: whether a pass must know where prompts end, for what is installed.
        selections, traces: the blocks of `rows` and of `explain` that are open.
        captured: what CUDA graphs read.
    """

    def __init__(
        self, version: Version = NOTHING, default: Literal["all", "none"] = "all", config: Config | None = None
    ) -> None:
        self.default, self.config, self.orphaned = default, config, False
        self.selections: Ambient[Selection] = Ambient()
        self.traces: Ambient[Trace] = Ambient()
        self._begin_anew()
        self.publish(version)

    def _begin_anew(self) -> None:
        self._thread, self._tracing, self._key = _Thread(), _Tracing(), next(_keys)
        self._lock = threading.RLock()
        _contexts[self._key] = self
        self._running: WeakKeyDictionary[Any, Generation] = WeakKeyDictionary()
        self.captured = Captured()

    def forget_running(self) -> None:
        """Let running generations go on with the current version."""
        for generation in list(self._running.values()):
            generation.version = None

    # --- what is installed and selected --------------------------------------------------------------------------

    def publish(self, version: Version) -> None:
        """Let new passes compute with this version."""
        with self._lock:
            traced, idle, ends = self._traced_now(version), Pass(version), self._needs_prompt_ends(version)
            # Together: there is no moment between them.
            self.current, self._idle, self.traced, self.needs_prompt_ends = version, idle, traced, ends
            self.number = next(_numbers)
            self.captured.follow(version)

    def _needs_prompt_ends(self, version: Version) -> bool:
        if self.config is None or not self.config.needs_prompt_ends:
            return False
        return self.config.scope == "memory" or any(memory is not None for memory in version.memories.values())

    def install(self, layer: int, **what: Any) -> None:
        """Publish a version with other `edits` or other `memories` of a layer."""
        with self._lock:
            changed: dict[str, Any] = {
                name: {**getattr(self.current, name), layer: value} for name, value in what.items()
            }
            self.publish(replace(self.current, **changed))

    @contextmanager
    def selecting(self, selection: Selection) -> Iterator[None]:
        """Within the block the logical call that enters it has this selection."""
        try:
            with self.selections.entered(selection):
                self._retrace()
                yield
        finally:
            self._retrace()

    def _retrace(self) -> None:
        with self._lock:
            self.traced = self._traced_now(self.current)
            if self.selections.blocks:
                self.captured.select(self.selections.blocks[-1].value, self.current)

    def _traced_now(self, version: Version) -> Selection | None:
        """What compiled code selects: what the block selects that was entered last, and be it everything, in tables."""
        if not self.selections.blocks:
            return None
        selection, ranges = self.selections.blocks[-1].value, self.selections.blocks[-1].value.memory_ranges
        edits = {i: store for i, store in version.edits.items() if not store.empty}
        memory = next((m for m in version.memories.values() if m is not None), None)
        if ranges is None and memory is not None:
            ranges = torch.full_like(memory.all, -1)
        return replace(
            selection, memory_ranges=ranges, csr={i: store.csr(selection.edits) for i, store in edits.items()}
        )

    def selection(self) -> Selection | None:
        """That of the logical call that asks; None: it has none."""
        block = self.selections.innermost()
        return None if block is None else block.value

    def in_force(self) -> Selection | None:
        """What a pass that begins selects; None: nothing at all."""
        if torch.compiler.is_compiling():
            found = None if self.traced is None else self._checked(self.traced)
        else:
            found = self.selection()
        if found is not None:
            return found
        if self.default == "none":
            return None
        if not torch.compiler.is_compiling() and any(block.value.narrows for block in self.selections.blocks):
            raise PatchError(
                "this pass has no uk.rows(...) block of its own, while another thread, task or generator has one open: "
                "enter uk.rows(model, ...) where the pass runs (without further arguments: everything), start the "
                "thread in a copy of the context (contextvars.copy_context().run), or say patch(..., default='none')"
            )
        return EVERYTHING

    def _checked(self, selection: Selection) -> Selection:
        """With tables that are refused, when compiled code runs, to a logical call that selects otherwise."""
        ranges, prompt, csr = selection.memory_ranges, selection.prompt, selection.csr
        return replace(
            selection,
            memory_ranges=None if ranges is None else check_selected(ranges, self._key),
            prompt_lengths=None if prompt is None else check_selected(prompt.lengths, self._key),
            csr=None if csr is None else {i: (check_selected(ptr, self._key), ids) for i, (ptr, ids) in csr.items()},
        )

    # --- passes ----------------------------------------------------------------------------------------------------

    @property
    def local(self) -> _Thread | _Tracing:
        """What the thread that asks is at."""
        return self._tracing if torch.compiler.is_compiling() else self._thread

    def begin(
        self,
        selection: Selection | None,
        cache: Any = None,
        *,
        batch: int,
        tokens: int,
        past: int | Tensor = 0,
        attention_mask: Tensor | None = None,
        tells: bool = True,
        device: torch.device | None = None,
        ids: Tensor | None = None,
        **inputs: Any,
    ) -> None:
        """Begin a pass.

        Args:
            selection: what `in_force` says; None: nothing, the pass is the base model's.
            cache: the generation's key-value cache, or None.
            batch: B, rows of the batch.
            tokens: T, new tokens of each row.
            past: see `Pass.of`; it matters only where the selection says where prompts end.
            attention_mask: see `Pass.of`.
            tells: whether it can be told from such passes where prompts end.
            device: of the hidden states.
            ids: int64 [B, T], of the tokens, for a trace; None: they are not known.
            **inputs: `text`; see `Pass.of`.

        Raises:
            ValueError: where prompts end must be known, and is not.
        """
        if self.orphaned:
            raise _copied_alone()
        traced, decided = torch.compiler.is_compiling(), None
        if traced and self.config is not None and self.config.scope == "memory":
            decided = self._decided_before(cache, tokens)
        tells = tells and selection is not None and selection.prompt is None
        tells = tells and self.needs_prompt_ends
        if traced and self.config is not None and self.config.needs_whole_prompts:
            tells = False  # compiled code knows nothing of the pass before
        generation = Generation() if traced else self._generation(cache, selection, tokens, past, tells)
        prompt = None if selection is None or traced else selection.prompt
        if prompt is not None and prompt.config.needs_whole_prompts and isinstance(past, Tensor):
            # One token is not the whole of a longer prompt: that has come before, and nobody need wait to know it.
            behind = on_gpu(past) and tokens == 1 < prompt.longest
            past = generation.tokens if behind else _length(cache)
        trace = None if traced else self.traces.innermost()
        ends = self._ends(generation, batch, tokens, attention_mask, device) if tells else None
        generation.tokens += tokens
        local, chosen = self.local, selection or EVERYTHING
        if not traced and device is not None and capturing(device):
            self.captured.keep(generation.version or self.current, chosen)
        if chosen.prompt is not None and self.config is not None and not self.needs_prompt_ends:
            chosen = replace(chosen, prompt=None)
        local.running = Pass.of(
            NOTHING if selection is None else generation.version or self.current,
            chosen,
            batch=batch,
            tokens=tokens,
            past=past,
            attention_mask=attention_mask,
            config=self.config,
            prompted=tells,
            ends=ends,
            generation=generation,
            trace=None if trace is None else trace.value.begin(batch, tokens, ids),
            traced=traced,
            decided=decided,
            graph_task=-1 if traced else torch._C._current_graph_task_id(),
            outer=local.running,
            **inputs,
        )

    def _tracing_now(self) -> bool:
        """Whether torch.compile traces what asks. Raises ValueError where no compiled code can do what is asked for."""
        traced = torch.compiler.is_compiling()
        if traced and self.config is not None and self.config.scope == "memory":
            # Without the break it would take the error for a reason not to compile this, and go on.
            torch._dynamo.graph_break(msg=_COMPILED)
            raise ValueError(_COMPILED)
        return traced

    def _decided_before(self, cache: Any, tokens: int) -> Decided:
        """What compiled code is to do behind a prompt. Raises ValueError for the prompt itself, or another version."""
        found: Decided | None = getattr(cache, _DECIDED, None)
        if found is None or tokens != 1 or found.number != self.number:
            torch._dynamo.graph_break(msg=_COMPILED)
            raise ValueError(_COMPILED)
        return found

    def _note_decided(self, done: Pass, cache: Any) -> None:
        """Let compiled code know by the cache what a pass over a prompt has decided."""
        if not done.scoped or done.last is None or not getattr(cache, "is_compileable", False):
            return
        vars(cache).pop(_DECIDED, None)
        router = done.version.router
        if router is not None and not done.selection.forced and done.version is self.current:
            _, routed = router.routes(done, done.shape[0])
            csr = {i: store.csr(routed) for i, store in done.version.edits.items() if not store.empty}
            vars(cache)[_DECIDED] = Decided(self.number, csr, routed.entries)

    def end(self, cache: Any = None) -> None:
        """The pass that began last has ended, or failed; the cache that it has made is what its generation is known by
        from now on."""
        local = self.local
        if local.running is not None:
            if cache is not None and not local.running.traced:
                with contextlib.suppress(TypeError):
                    self._running.setdefault(cache, local.running.generation)
                    if self.needs_prompt_ends:
                        local.running.generation.writes = _writes(cache)
                self._note_decided(local.running, cache)
            local.running = local.running.outer

    def _generation(
        self, cache: Any, selection: Selection | None, tokens: int, past: int | Tensor, tells: bool
    ) -> Generation:
        """That with this cache; a new one where it is empty, or there is none."""
        prompt = None if selection is None else selection.prompt
        try:
            known = self._running.get(cache)
        except TypeError:  # None, or a tuple: nothing that a generation could be known by
            if prompt is None:
                return Generation(self.current)
            if not past:  # another prompt; the pass of the one before may be computed again
                prompt.generation = Generation()
            return prompt.generation
        if known is not None and ((tells and tokens > 1) or known.version not in (None, self.current)):
            left = _length(cache)  # asked only now: on a GPU, some have to wait for it
            if tells and tokens > 1 and 0 < left < known.tokens:
                raise ValueError(
                    f"the cache (past_key_values): of {known.tokens} tokens {left} are left; where tokens are taken "
                    "back, as in assisted decoding, passes do not tell where a prompt ends: say uk.rows(model, "
                    "prompt_lengths=...)"
                )
            known = known if left else None
        if known is not None and tokens == 1 and (tells or (prompt is not None and prompt.config.needs_whole_prompts)):
            known = None if _emptied(cache, known) else known
        if known is None:
            known = self._running[cache] = Generation(self.current)
        known.version = known.version or self.current
        return known

    def _ends(
        self, generation: Generation, batch: int, tokens: int, mask: Tensor | None, device: torch.device | None
    ) -> Tensor | None:
        """int64 [B], the last token that is no padding; None for one that follows a prompt."""
        assert self.config is not None
        if tokens == 1 and generation.tokens:
            generation.decoding = True
            return None
        if generation.tokens and not generation.decoding and self.config.needs_whole_prompts:
            raise ValueError(
                "with alpha='last' or retrieval='sequence' the whole prompt must come in one forward pass; "
                f"{generation.tokens} tokens of it came before, now {tokens}"
            )
        if generation.decoding:  # a further prompt, say of a chat
            generation.decoding, generation.seen = False, None
        if mask is None or mask.dim() != 2:
            return torch.full((batch,), tokens - 1, dtype=torch.int64, device=device)
        behind = mask[:, mask.shape[1] - tokens :].flip(-1).to(torch.int64).argmax(-1)
        return tokens - 1 - behind

    def now(self) -> Pass:
        """The pass that runs in this thread, for its layers; outside of one, what a pass would get that began now."""
        if torch.compiler.is_compiling():
            return self._tracing.running or self._outside()
        running = self._thread.running
        if running is None:
            return self._outside()
        if running.graph_task != torch._C._current_graph_task_id():
            raise _lost()
        return running

    def _outside(self) -> Pass:
        if self.orphaned:
            raise _copied_alone()
        traced = self._tracing_now()
        if not traced:
            if self.config is not None and torch._C._current_graph_task_id() != -1:
                raise _lost()
            if not self.selections.blocks and self.default == "all":
                return self._idle
        selection = self.in_force()
        if selection is None:
            return Pass(NOTHING)
        return Pass(self.current, selection, generation=Generation(), traced=traced)

    @property
    def inputs(self) -> dict[int, Any]:
        """`Pass.inputs` of the pass that runs in this thread."""
        local = self.local
        return local.inputs if local.running is None else local.running.inputs

    @contextmanager
    def running(self, made: Pass) -> Iterator[None]:
        """Within the block the layers that this thread calls compute in this pass."""
        local = self.local
        outer, local.running = local.running, made
        try:
            yield
        finally:
            local.running = outer

    def running_nothing(self) -> AbstractContextManager[None]:
        """The same with a pass that has no edits and no memory."""
        return self.running(Pass(NOTHING, graph_task=torch._C._current_graph_task_id()))

    def bound(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose later calls compute in the pass that runs now, in whatever thread they come."""
        made = self._thread.running
        if made is None:
            return function

        def run(*args: Any, **kwargs: Any) -> Any:
            task = torch._C._current_graph_task_id()
            again = made if task == made.graph_task else replace(made, graph_task=task, trace=None)
            with self.running(again):
                return function(*args, **kwargs)

        return run

    # --- copies ----------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        own = ("_thread", "_tracing", "_running", "_key", "_lock", "_idle", "traced", "captured")
        return {name: value for name, value in vars(self).items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, orphaned=state["config"] is not None)  # until the model's own state comes along
        self._begin_anew()
        self.publish(self.current)


def _copied_alone() -> PatchError:
    return PatchError(
        "a part of a patched model was copied or pickled alone, and would not know what uk.rows and the like select: "
        "copy the whole model, or unpatch it before its parts are copied (PEFT's modules_to_save copies them)"
    )


def _lost() -> PatchError:
    return PatchError(
        "a patched layer is computed again in the backward pass, by a checkpoint that does not know its forward pass: "
        "use model.gradient_checkpointing_enable()"
    )


# --- compiled code ---------------------------------------------------------------------------------------------------

_COMPILED = (
    "scope='memory': expected a pass over a prompt that is not compiled, as its text decides where an edit acts. "
    "Compiled code computes the tokens behind it, one at a time, with the same static cache, until an edit changes: "
    "call the model itself for the prompt"
)

_keys, _numbers = itertools.count(), itertools.count()
_contexts: WeakValueDictionary[int, ModelContext] = WeakValueDictionary()


@torch.library.custom_op("unike::check_selected", mutates_args=())
def check_selected(table: Tensor, context: int) -> Tensor:
    """A copy of a table of the selection that compiled code reads; refused to a call that selects otherwise."""
    found = _contexts[context]
    block, last = found.selections.innermost(), found.selections.blocks[-1:]
    if block is None or [block] != last:
        raise PatchError(
            "a model that torch.compile has compiled was called while another thread, task or generator has a "
            "uk.rows(...) block open with another selection: compiled code knows one; open these blocks one after the "
            "other, or call the model uncompiled"
        )
    return table.clone()


@check_selected.register_fake
def _(table: Tensor, context: int) -> Tensor:
    return torch.empty_like(table)
