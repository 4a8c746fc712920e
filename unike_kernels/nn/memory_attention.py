"""An attention module whose output is shifted towards a memory of hidden states (paper, section 3.2-3.3)."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from typing_extensions import override

from ..artifacts.pictures import Pictures
from ..config import Config
from ..errors import PatchError
from ..ops import PackedKeys, SemanticEncoder, cosine_topk, normalize_rows, pack_keys, project_values
from ..ops._backend import compiles
from ..ops._library import differentiated, looped
from ..ops._workspace import capturing
from ..ops.cosine_topk import Leading, leading_of
from ..ops.latent_attention import LatentOperands, PreparedAttention, blend_of
from ..ops.latent_attention import attend as attend_known
from ..ops.memory_attention import MemoryOperands, PreparedMemory, attend
from ..retrieval import Retriever
from ._drop_in import DropIn, Record, Tables, adopt, first_argument, record_of, residual_of, residual_position
from .context import ModelContext
from .passes import Pass, on_gpu
from .trace import LayerTrace, seconds_since


class MemoryTables(Tables):
    """One layer of a memory as the operators take it."""

    index: Tensor  # float32 [N, d], unit rows; none of it and of the next six where a retriever has the keys
    codes: Tensor | None  # of the index, as `pack_keys` makes them; None where there is no native scan
    code_bounds: Tensor | None
    direction: Tensor | None
    leading_directions: Tensor | None  # of the index, as `leading_of` makes it; None where it would not pay
    leading_codes: Tensor | None
    leading_bounds: Tensor | None
    all: Tensor  # int64 [1, 2], the bounds of all entries
    keys: Tensor  # [N, H, c]; unit ones for Config(scale="cosine")
    values: Tensor | None  # [N, H, d]; None: keys
    projected: Tensor  # [N, H, r], the first layer of Enc_sem on the values
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    handle: int

    def __init__(
        self,
        index: Tensor,
        keys: Tensor,
        values: Tensor | None,
        encoder: SemanticEncoder,
        id: str | None = None,
        retriever: Retriever | None = None,
        *,
        cosine: bool = False,
        texts: tuple[str, ...] | None = None,
        pictures: Pictures | None = None,
    ) -> None:
        """Lay out one layer of a memory.

        Args:
            index: [N, d], the retrieval keys.
            keys: [N, H, c], what the queries attend to.
            values: [N, H, d]; None: the keys.
            encoder: Enc_sem.
            id: of the `MemoryBank`.
            retriever: searches the same retrieval keys, which are then not copied here; None: an exact search.
            cosine: queries attend by cosine: the keys are made unit, once, and values that they were are kept apart.
            texts: what the entries say, for people.
            pictures: what they show, for people.
        """
        super().__init__()
        if cosine:
            keys, values = _unit(keys), keys if values is None else values
        self.id, self.retriever, self.entries, self.texts = id, retriever, len(index), texts
        self.pictures = pictures
        self.retrieval_keys = index  # as the memory has them, no copy
        self._register()
        packed, leading = None, None
        if retriever is None:
            self.table("index", normalize_rows(index.detach()))
            packed = pack_keys(self.index, "int8") if index.shape[1] <= 65536 else None
            leading = leading_of(self.index, packed)
        for name, t in zip(("codes", "code_bounds", "direction"), packed or (None,) * 3, strict=True):
            self.table(name, t)
        for name, t in zip(("directions", "codes", "bounds"), leading or (None,) * 3, strict=True):
            self.table(f"leading_{name}", t)
        self.table("all", torch.tensor([[0, len(index)]], dtype=torch.int64, device=index.device))
        self.table("keys", keys)
        self.table("values", values)
        self.table("projected", project_values(keys if values is None else values, encoder))
        for name, t in encoder._asdict().items():
            self.table(name, t)

    def retrieve(self, queries: Tensor, k: int, bounds: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scores float32 [M, k] and ids int64 [M, k] of the entries that each query retrieves.

        Args:
            queries: [M, d], any float dtype.
            k: entries for each query; the ids have fewer columns if the memory has fewer entries.
            bounds: int64 [M, 2], the entries start, ..., stop - 1 that each query may retrieve; None: all.
        """
        queries, k = queries.detach(), self.at_most(k)
        if self.retriever is None and torch.compiler.is_compiling():
            return cosine_topk(queries, self.index, k, normalized=True, ranges=bounds, packed=self.packed)
        if self.retriever is None:
            return self.prepared().search(queries, k, bounds)
        scores, ids = retrieve(queries, k, bounds, self.handle)
        return scores, ids

    def unit_keys(self, ids: Tensor) -> Tensor:
        """The retrieval keys of these entries, normalised. ids int64 [...] -> [..., d]."""
        if self.retriever is None:
            return self.index[ids]
        found = self.retrieval_keys[ids.to(self.retrieval_keys.device)].to(ids.device)
        return torch.nn.functional.normalize(found.float(), dim=-1)

    def _register(self) -> None:
        """By a number, which is what compiled code knows the retriever by."""
        self.__dict__["handle"] = next(_handles)
        _retrievers[self.handle] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._register()

    def at_most(self, k: int) -> int:
        """So many of k entries as there are, at least one: more would be ids -1 that cost as much as others."""
        return max(min(k, self.entries), 1)

    def prepared(self) -> PreparedMemory:
        """The tables, laid out for many calls of the operator."""
        if self._plan is None:
            values = self.keys if self.values is None else self.values
            self._plan = PreparedMemory(
                self.index, self.packed, self.keys, values, self.projected, self.encoder, self.leading
            )
        prepared: PreparedMemory = self._plan
        return prepared

    def attention(self) -> PreparedAttention:
        """To entries that are known, laid out for many calls."""
        if self.retriever is None:
            return self.prepared().attention
        if self._plan is None:
            values = self.keys if self.values is None else self.values
            self._plan = PreparedAttention(self.keys, values, self.projected, self.encoder)
        attention: PreparedAttention = self._plan
        return attention

    @property
    def packed(self) -> PackedKeys | None:
        """The packed index for a native scan; None: there is no such scan, or a retriever has the keys."""
        if self.codes is None or self.code_bounds is None or self.direction is None:
            return None
        return PackedKeys(self.codes, self.code_bounds, self.direction)

    @property
    def leading(self) -> Leading | None:
        """What a native scan of few tokens reads first; None: there is nothing of this."""
        if self.leading_directions is None or self.leading_codes is None or self.leading_bounds is None:
            return None
        return Leading(self.leading_directions, self.leading_codes, self.leading_bounds)

    @property
    def encoder(self) -> SemanticEncoder:
        """Enc_sem, from its four tensors."""
        return SemanticEncoder(self.w1, self.b1, self.w2, self.b2)


_handles = itertools.count()
_retrievers: WeakValueDictionary[int, MemoryTables] = WeakValueDictionary()


@torch.library.custom_op("unike::retrieve", mutates_args=())
def retrieve(queries: Tensor, k: int, ranges: Tensor | None, memory: int) -> tuple[Tensor, Tensor]:
    """The search of a memory's retriever, which tracing does not look into.

    Args:
        queries: [M, d].
        k: entries for each query.
        ranges: int64 [M, 2]; None: all entries.
        memory: the `handle` of its `MemoryTables`.
    """
    retriever = _retrievers[memory].retriever
    assert retriever is not None
    scores, ids = retriever.search(queries, k, ranges)
    return scores, ids


@retrieve.register_fake
def _(queries: Tensor, k: int, ranges: Tensor | None, memory: int) -> tuple[Tensor, Tensor]:
    shape = queries.shape[0], k
    return queries.new_empty(shape, dtype=torch.float32), queries.new_empty(shape, dtype=torch.int64)


retrieve.register_vmap(looped(torch.ops.unike.retrieve.default))


class MemoryShift(Record):
    """The shift of one attention module's output towards a memory, at "pre" = its input and "out" = its output.

    Attributes:
        module: the attention module.
        config: the switches.
        context: shared with the model's other patched modules; its versions have the memory.
        layer: index in the decoder.
        project: see `MemoryAttention.from_module`.
    """

    def __init__(
        self,
        module: nn.Module,
        config: Config,
        context: ModelContext,
        layer: int,
        project: Callable[[nn.Module, Tensor], Tensor] | None,
    ) -> None:
        self.module, self.config, self.context, self.layer, self.project = module, config, context, layer, project
        self._residual = residual_position(module)

    @property
    def memory(self) -> MemoryTables | None:
        """That of the current version; None: the output is the base module's own. One that is set makes a version."""
        found: MemoryTables | None = self.context.current.memories.get(self.layer)
        return found

    @memory.setter
    def memory(self, value: MemoryTables | None) -> None:
        self.context.install(self.layer, memories=value)

    @override
    def move(self, fn: Any) -> None:
        if self.memory is not None:
            self.memory._apply(fn)

    @override
    def run(self, module: nn.Module, base: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = base(*args, **kwargs)
        now = self.context.now()
        memory: MemoryTables | None = now.version.memories.get(self.layer)
        if memory is None or now.idle():
            return result
        hidden = first_argument(args, kwargs)
        out = result[0] if isinstance(result, tuple) else result
        residual = residual_of(self._residual, args, kwargs)
        if residual is None:
            shifted = self._shift(now, memory, module, hidden, out)
        else:  # it has been added already; a token that is not shifted gets no difference
            bare = out - residual
            shifted = out + (self._shift(now, memory, module, hidden, bare) - bare)
        return (shifted, *result[1:]) if isinstance(result, tuple) else shifted

    def _shift(self, now: Pass, memory: MemoryTables, module: nn.Module, hidden: Tensor, out: Tensor) -> Tensor:
        config = self.config
        start = 0.0 if now.trace is None else time.perf_counter()
        batch, tokens, d = hidden.shape
        flat, inputs = hidden.reshape(-1, d), out.reshape(-1, d)
        rows = self._row_ranges(now, memory)
        bounds = self._bounds(now, memory, rows, batch, tokens)
        queries = flat.unsqueeze(1) if self.project is None else self.project(module, flat)
        anchor = None
        if config.alpha == "last":
            anchor = self._from_prompt_end(now, "anchor", lambda last: out[self._rows(last), last])
        if config.retrieval == "token":
            shifted = shift_tokens(memory, config, flat, queries, inputs, bounds, anchor)
            per_token = None
        else:
            ids = self._from_prompt_end(now, "ids", lambda last: self._retrieve(memory, rows, hidden, last))
            per_token = ids if tokens == 1 else ids.repeat_interleave(tokens, 0)
            if bounds is not None:  # a token that may not be shifted has an empty range
                per_token = torch.where((bounds[:, :1] < bounds[:, 1:]), per_token, -1)
            shifted, _ = _attended(memory, config, queries, inputs, per_token, anchor)
        if now.trace is not None:
            record = now.trace.at(self.layer)
            record.memory_seconds = seconds_since(start)
            self._record(record, memory, hidden, out, queries, bounds, per_token, anchor)
        return shifted.reshape(out.shape)

    @torch.no_grad()
    def warm_up(self, tokens: int, dtype: torch.dtype) -> torch.device | None:
        """Compute once what passes of so many tokens do, with and without bounds of what they may retrieve.

        Returns the device; None where nothing is compiled, and the memory is laid out alone.
        """
        memory, config = self.memory, self.config
        if memory is None:
            return None
        hidden = torch.zeros(tokens, memory.retrieval_keys.shape[1], dtype=dtype, device=memory.all.device)
        if not compiles(hidden):
            if memory.retriever is None:
                memory.prepared()
            return None
        projected = hidden.new_zeros(tokens, *memory.keys.shape[1:], dtype=dtype)
        queries = hidden.unsqueeze(1) if self.project is None else projected
        anchor = hidden[:1] if config.alpha == "last" else None
        for bounds in (None, memory.all.repeat(tokens, 1)):
            if config.retrieval == "token":
                shift_tokens(memory, config, hidden, queries, hidden, bounds, anchor)
                continue
            for rows in (1, tokens):
                _, ids = memory.retrieve(hidden[:rows], config.k, None if bounds is None else bounds[:rows])
                _attended(memory, config, queries, hidden, ids.repeat_interleave(tokens // rows, 0), anchor)
        return hidden.device

    def _record(
        self,
        record: LayerTrace,
        memory: MemoryTables,
        hidden: Tensor,
        out: Tensor,
        queries: Tensor,
        bounds: Tensor | None,
        ids: Tensor | None,
        anchor: Tensor | None,
    ) -> None:
        """Compute once more what the fused operators keep to themselves."""
        config, shape = self.config, out.shape[:-1]
        flat, inputs = hidden.reshape(-1, hidden.shape[-1]).detach(), out.reshape(-1, out.shape[-1])
        if ids is None:
            scores, ids = memory.retrieve(flat, config.k, bounds)
        else:  # the cosines of what the prompt's last token has retrieved with each token
            found = memory.unit_keys(ids.clamp(min=0))
            unit = torch.nn.functional.normalize(flat.to(found.dtype), dim=-1)
            scores = torch.einsum("md,mkd->mk", unit, found)
            scores = scores.masked_fill(ids < 0, float("-inf"))
        shifted, alpha = _attended(memory, config, queries, inputs, ids, anchor)
        alpha = torch.where((ids >= 0).any(-1), alpha.detach().float(), 0.0)
        record.shift = (shifted - inputs).detach().float().norm(dim=-1).view(shape).cpu()
        record.effective = _effective(memory, config, queries.detach(), ids).view(shape).cpu()
        rest = (0, config.k - ids.shape[-1])  # where the memory has fewer entries than k
        ids, scores = (torch.nn.functional.pad(t, rest, value=v) for t, v in ((ids, -1), (scores, float("-inf"))))
        record.entries, record.scores = ids.view(*shape, -1).cpu(), scores.view(*shape, -1).cpu()
        record.alpha, record.texts, record.pictures = alpha.view(shape).cpu(), memory.texts, memory.pictures

    def _row_ranges(self, now: Pass, memory: MemoryTables) -> Tensor | None:
        """int64 [R, 2]: the entries that each row of the batch may retrieve; None: all of them."""
        selection = now.selection
        if selection.ranges_memory_id is not None and selection.ranges_memory_id != memory.id:
            raise RuntimeError("rows: the memory whose tenants these rows name was swapped; name them anew")
        ranges = selection.memory_ranges
        if ranges is None:
            return None
        if on_gpu(ranges) and not now.traced:
            captured = self.context.captured
            if capturing(ranges.device):
                ranges = captured.read_ranges(ranges)
            else:
                captured.lay_out_ranges(ranges)
        return torch.where(ranges < 0, memory.all, ranges)

    @staticmethod
    def _rows(last: Tensor) -> Tensor:
        return torch.arange(len(last), dtype=torch.int64, device=last.device)

    def _retrieve(self, memory: MemoryTables, rows: Tensor | None, hidden: Tensor, last: Tensor) -> Tensor:
        bounds = None if rows is None else rows.repeat_interleave(len(last) // len(rows), 0)
        ends = hidden[self._rows(last), last]
        return memory.retrieve(ends, self.config.k, bounds)[1]

    def _bounds(self, now: Pass, memory: MemoryTables, rows: Tensor | None, batch: int, tokens: int) -> Tensor | None:
        """int64 [B * T, 2]: the entries that each token may retrieve; None: all tokens, all entries."""
        shifted = now.shifted
        if self.config.tokens == "answer" and not now.prompted:
            raise _unknown_prompt("tokens='answer'")
        if shifted is None and rows is None and not now.scoped:
            return None
        if shifted is not None and shifted.shape != (batch, tokens):
            raise RuntimeError(
                f"the patched attention got hidden states of [{batch}, {tokens}] tokens, the decoder announced "
                f"{list(shifted.shape)}: call it through the model"
            )
        bounds = memory.all if rows is None else rows.repeat_interleave(batch * tokens // len(rows), 0)
        if now.scoped:
            bounds = now.entries(bounds)
        return bounds if shifted is None else torch.where(shifted.reshape(-1, 1), bounds, 0)

    def _from_prompt_end(self, now: Pass, name: str, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """What the last prompt token gives: computed in the pass that holds it, remembered in those that follow."""
        if not now.prompted:
            raise _unknown_prompt("alpha='last' or retrieval='sequence'")
        key, saved = (self.layer, name), now.generation.saved
        if now.last is not None:
            saved[key] = compute(now.last)
        if key not in saved:
            raise ValueError("the prompt itself was not seen; start with the prompt, in the same uk.rows(...) block")
        return saved[key]


class MemoryAttention(DropIn):
    """The class of an attention module whose output is shifted towards a memory."""

    @classmethod
    def from_module(
        cls,
        base: nn.Module,
        config: Config,
        *,
        context: ModelContext | None = None,
        layer: int = 0,
        project: Callable[[nn.Module, Tensor], Tensor] | None = None,
    ) -> nn.Module:
        """Let an attention module shift its output, in place: hidden_states [B, T, d] -> [B, T, d], or a tuple.

        Args:
            base: the attention module.
            config: the switches of the memory attention.
            context: of the model, whose versions have the memory; None: a new one of this module alone.
            layer: its index in the decoder.
            project: (base, hidden [M, d]) -> queries [M, H, c], needed for values="projected".

        Returns:
            `base`, the same object; `memory_shift` of it has the memory.

        Raises:
            TypeError: `base` is not a module.
            ValueError: `project` is needed.
            PatchError: it is patched already.
        """
        if not isinstance(base, nn.Module):
            raise TypeError(f"base: expected nn.Module, got {type(base).__name__}")
        if config.values == "projected" and project is None:
            raise ValueError("project: expected a function, since config.values is 'projected'")
        adopt(base, cls, MemoryShift(base, config, context or ModelContext(), layer, project))
        return base


def memory_shift(module: nn.Module) -> MemoryShift:
    """Of a patched attention module. Raises PatchError for another module."""
    record = record_of(module)
    if isinstance(record, MemoryShift):
        return record
    raise PatchError(f"{type(module).__name__} is not a patched attention module")


def shift_tokens(
    memory: MemoryTables,
    config: Config,
    hidden: Tensor,
    queries: Tensor,
    inputs: Tensor,
    bounds: Tensor | None,
    anchor: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The shifted attention output [M, d] of tokens, each of which retrieves its own entries.

    Args:
        memory: of the layer.
        config: k, scale, alpha, convention and norm are read.
        hidden: [M, d], the attention's input, which retrieves.
        queries: [M, H, c], of the latent attention.
        inputs: [M, d], the attention's output, which is shifted.
        bounds: int64 [M, 2], the entries that each token may retrieve; None: all.
        anchor: see `ops.latent_attention`.
        out: see `PreparedMemory`.
    """
    if memory.retriever is not None:
        _, ids = memory.retrieve(hidden, config.k, bounds)
        shifted = _attended(memory, config, queries, inputs, ids, anchor)[0]
        return shifted if out is None else out.copy_(shifted)
    alpha, k = fixed_alpha(config, inputs), memory.at_most(config.k)
    queries, scale = asking(config, queries)
    blend = blend_of(queries, scale, config.convention, config.norm)
    if torch.compiler.is_compiling():  # a trace sees the operator, not how it is prepared
        values = memory.keys if memory.values is None else memory.values
        return attend(MemoryOperands(
            hidden, memory.index, k, bounds, queries, inputs, memory.keys, values, memory.encoder, alpha, anchor, blend,
            memory.packed, memory.projected,
        ))[0]  # fmt: skip
    return memory.prepared()(hidden, queries, inputs, k, bounds, alpha, anchor, blend, out)


def _attended(
    memory: MemoryTables, config: Config, queries: Tensor, inputs: Tensor, ids: Tensor, anchor: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The shifted output [M, d] and the gate [M] of tokens whose entries `ids` [M, k] are known."""
    queries, scale = asking(config, queries)
    alpha, blend = fixed_alpha(config, inputs), blend_of(queries, scale, config.convention, config.norm)
    if torch.compiler.is_compiling():  # a trace sees the operator, not how it is prepared
        values = memory.keys if memory.values is None else memory.values
        operands = queries, inputs, memory.keys, values, ids, memory.encoder, alpha, anchor, blend, memory.projected
        return attend_known(LatentOperands(*operands))
    return memory.attention()(queries, inputs, ids, alpha, anchor, blend)


def logits_of(memory: MemoryTables, config: Config, queries: Tensor, ids: Tensor) -> Tensor:
    """What the softmax of tokens [M] over their entries `ids` [M, k] is taken of: [M, H, k], -inf for the id -1.

    In float32, float64 for queries of that dtype.
    """
    queries, scale = asking(config, queries)
    blend = blend_of(queries, scale, config.convention, config.norm)
    wide = torch.promote_types(queries.dtype, torch.float32)
    found = [queries.new_empty(0, queries.shape[1], ids.shape[1], dtype=wide)]
    for q, entries in zip(queries.split(256), ids.split(256), strict=True):  # the entries' keys, [256, k, H, c]
        keys = memory.keys[entries.clamp(min=0)].to(wide)
        found.append(blend.scale * torch.einsum("mhc,mkhc->mhk", q.to(wide), keys))
    return torch.cat(found).masked_fill((ids < 0).unsqueeze(1), float("-inf"))


def _effective(memory: MemoryTables, config: Config, queries: Tensor, ids: Tensor) -> Tensor:
    """float32 [M], see `LayerTrace`: exp of the entropy of each head's softmax, in the mean over the heads."""
    p = logits_of(memory, config, queries, ids).softmax(-1)
    count = torch.special.entr(p).sum(-1).exp().mean(-1)
    return torch.where((ids >= 0).any(-1), count.float(), 0.0)


def asking(config: Config, queries: Tensor) -> tuple[Tensor, float | None]:
    """Queries [M, H, c] as they are multiplied with the keys of `MemoryTables`, and the scale of their products."""
    if not isinstance(config.scale, str):
        return queries, config.scale
    if torch.compiler.is_compiling() or differentiated(queries):  # by the norm, whose derivative at 0 is finite
        return _unit(queries), 1 / config.tau
    # Of length sqrt(c): one kernel of torch's where a division by the norm takes five. 0 stays 0.
    c = queries.shape[-1]
    return torch.rms_norm(queries, (c,), eps=_tiny(queries.dtype)), c**-0.5 / config.tau


@functools.cache
def _tiny(dtype: torch.dtype) -> float:
    """The smallest normal number of what squares of this dtype are added up in."""
    return torch.finfo(torch.promote_types(dtype, torch.float32)).tiny


def _unit(vectors: Tensor) -> Tensor:
    """Of length 1, or 0 where they are 0. [..., c] -> [..., c], of the same dtype."""
    wide = vectors.to(torch.promote_types(vectors.dtype, torch.float32))  # whose squares are in its range
    norm = wide.norm(dim=-1, keepdim=True)
    return (wide / torch.where(norm == 0, 1.0, norm)).to(vectors.dtype)


def fixed_alpha(config: Config, inputs: Tensor) -> Tensor | None:
    """The gate [1] that the config says; None: it is computed."""
    if isinstance(config.alpha, str):
        return None
    wide = torch.promote_types(inputs.dtype, torch.float32)
    return torch.full((1,), float(config.alpha), dtype=wide, device=inputs.device)


def _unknown_prompt(modes: str) -> ValueError:
    return ValueError(
        f"this Config needs the prompt's end ({modes}): call the model inside uk.rows(model, prompt_lengths=[...])"
    )
