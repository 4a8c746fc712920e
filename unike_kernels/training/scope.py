"""Making the scope of a memory: an encoder of prompts that tells facts apart in whatever words, and a threshold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..artifacts.edit import Edit
from ..artifacts.fingerprint import fingerprint
from ..artifacts.memory import MemoryBank
from ..artifacts.scope import Scope
from ..backbones import device_of, find_decoder
from ..config import Config
from ..errors import PatchError
from ..nn import first_argument
from ..ops.prompt_encoder import PromptEncoder, encode_prompts, pool_tokens, prompt_features
from ..patching import is_patched
from .samples import Sample, batches, encode, evaluating, forward, taking_gradients


@dataclass(frozen=True)
class Fact:
    """A fact, as prompts that ask for it in different words; their answers do not matter.

    Attributes:
        wordings: two or more, with images or without.
        subject, relation: what it is about, and what is asked of that. Facts that have one of them in common are
            neighbours, which the threshold is to keep apart; "": not known.
    """

    wordings: Sequence[Sample]
    subject: str = ""
    relation: str = ""

    @property
    def name(self) -> str:
        """For people."""
        return self.wordings[0].prompt


@dataclass(frozen=True)
class ScopeTraining:
    """How a scope's encoder is trained and its threshold is found.

    Attributes:
        width: c, of a key.
        hidden: r, of the network.
        queries: H, that attend to the embeddings; 0: the key is made of the last token alone.
        lr: of AdamW, at its highest.
        weight_decay: of AdamW.
        steps: of training.
        facts: of a step.
        wordings: of each of these facts.
        tau: temperature of the contrastive loss.
        token_dropout: share of the embeddings that the queries do not see.
        dropout: in front of the network.
        held_out: share of the facts, all of a subject together, that threshold and `same` are found with.
        false_alarms: share of the neighbouring facts' prompts that may be above the threshold.
        seed: of all that is random.
    """

    width: int = 64
    hidden: int = 256
    queries: int = 4
    lr: float = 1e-3
    weight_decay: float = 1e-2
    steps: int = 300
    facts: int = 96
    wordings: int = 3
    tau: float = 0.1
    token_dropout: float = 0.2
    dropout: float = 0.1
    held_out: float = 0.2
    false_alarms: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("width", "hidden", "lr", "steps", "facts", "tau"):
            if not getattr(self, name) > 0:
                raise ValueError(f"ScopeTraining.{name}: expected a positive number, got {getattr(self, name)!r}")
        if self.wordings < 2:
            raise ValueError(f"ScopeTraining.wordings: expected at least 2, got {self.wordings!r}")
        if self.queries < 0:
            raise ValueError(f"ScopeTraining.queries: expected 0 or more, got {self.queries!r}")
        for name in ("token_dropout", "dropout", "held_out", "false_alarms"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"ScopeTraining.{name}: expected 0 or more, below 1; got {getattr(self, name)!r}")


@dataclass(frozen=True)
class ScopeResult:
    """A scope, and how well it tells held-out facts apart.

    Attributes:
        scope: to be a part of a memory.
        reached: share of the held-out facts' prompts that would reach an edit that was made in other words.
        false_alarms: share of the prompts for neighbouring facts that would.
        losses: of each step.
    """

    scope: Scope
    reached: float
    false_alarms: float
    losses: tuple[float, ...]

    def memory(self, model: nn.Module, config: Config | None = None) -> MemoryBank:
        """A memory that has this scope alone, for a model and with further settings."""
        config = replace(config or Config(), scope="memory")
        return MemoryBank({}, config, fingerprint(model), {"facts": str(len(self.scope.entries))}, scope=self.scope)

    def __str__(self) -> str:
        return (
            f"scope {self.scope.id}: {self.reached:.1%} of held-out wordings reach their edit, {self.false_alarms:.1%} "
            f"of the neighbours' do; margin above {self.scope.threshold:.3f}"
        )


@dataclass(frozen=True)
class _Seen:
    """What a key is made of, for n prompts.

    Attributes:
        embeddings: [n, T, d], zeros in front.
        within: bool [n, T], the tokens.
        states: [n, L, d].
    """

    embeddings: Tensor
    within: Tensor
    states: Tensor

    def rows(self, rows: Tensor) -> _Seen:
        within = self.within[rows]
        first = int(within.any(0).long().argmax())  # the longest of these may be shorter than the longest of all
        return _Seen(self.embeddings[rows, first:], within[:, first:], self.states[rows])


@contextmanager
def _inputs(modules: dict[int, nn.Module]) -> Iterator[dict[int, Tensor]]:
    """Within the block, each pass leaves what comes to these layers."""
    found: dict[int, Tensor] = {}

    def hook(index: int) -> Any:
        def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            found[index] = first_argument(args, kwargs)

        return before

    handles = [module.register_forward_pre_hook(hook(i), with_kwargs=True) for i, module in modules.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _see(model: nn.Module, processor: Any, samples: Sequence[Sample], layers: Sequence[int], batch_size: int) -> _Seen:
    if is_patched(model):
        raise PatchError("the model is patched; unpatch it first")
    decoder, device = find_decoder(model), device_of(model)
    order = sorted(range(len(samples)), key=lambda i: len(samples[i].prompt))
    asked = [Sample(samples[i].prompt, "", samples[i].image) for i in order]
    states: list[Tensor] = [torch.empty(0)] * len(samples)
    embeddings: list[Tensor] = [torch.empty(0)] * len(samples)
    with evaluating(model), _inputs({i: decoder.layers[i].module for i in {0, *layers}}) as found:
        for group in batches(asked, batch_size):
            batch = encode(processor, [asked[i] for i in group], device)
            forward(model, batch.inputs)
            visible = batch.inputs["attention_mask"].bool()
            for row, i in enumerate(group):
                end = int(batch.ends[row])
                states[order[i]] = torch.stack([found[layer][row, end] for layer in layers]).float().cpu()
                embeddings[order[i]] = found[0][row, : end + 1][visible[row, : end + 1]].float().cpu()
    longest = max(map(len, embeddings))
    within = torch.zeros(len(samples), longest, dtype=torch.bool, device="cpu")
    padded = torch.zeros(len(samples), longest, embeddings[0].shape[-1], dtype=torch.float32, device="cpu")
    for i, own in enumerate(embeddings):
        within[i, longest - len(own) :], padded[i, longest - len(own) :] = True, own
    return _Seen(padded, within, torch.stack(states))


def _keys(encoder: PromptEncoder, seen: _Seen, dropout: float = 0.0, token_dropout: float = 0.0) -> Tensor:
    pooled, within = None, seen.within
    if len(encoder.queries):
        if token_dropout:
            kept = torch.rand(within.shape, dtype=torch.float32, device=within.device) >= token_dropout
            kept[:, -1] = True
            within = within & kept
        pooled = pool_tokens(encoder, seen.embeddings, within)
    return encode_prompts(encoder, F.dropout(prompt_features(encoder, pooled, seen.states), dropout, dropout > 0))


@taking_gradients
def build_scope(
    model: nn.Module,
    processor: Any,
    facts: Sequence[Fact],
    *,
    layers: Sequence[int] | None = None,
    training: ScopeTraining | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> ScopeResult:
    """Train what decides where edits act, from facts that are each asked for in several wordings.

    The facts are also the other facts that a prompt may ask for. They need not be those that will be edited: an edit
    brings an entry of its own (see `train_edit`), and `Scope.extended` takes further ones. Many facts, relations and
    wordings are what makes it hold for new ones.

    Args:
        model: a Hugging Face model, not patched.
        processor: its processor or tokenizer.
        facts: three or more.
        layers: whose input at the last prompt token counts; edits must be in these or later ones. None: four, from the
            middle of the decoder to the last four layers.
        training: see `ScopeTraining`.
        batch_size: prompts per forward pass.
        progress: show a progress bar.

    Raises:
        ValueError: too few facts or wordings.
        PatchError: the model is patched.
    """
    training = training or ScopeTraining()
    if len(facts) < 3:
        raise ValueError(f"facts: expected at least three, got {len(facts)}")
    for i, fact in enumerate(facts):
        if len(fact.wordings) < 2:
            raise ValueError(f"facts[{i}].wordings: expected at least two, got {len(fact.wordings)}")
    decoder = find_decoder(model)
    chosen = decoder.select(_usual_layers(len(decoder.layers)) if layers is None else layers, need=())
    samples = [wording for fact in facts for wording in fact.wordings]
    of = torch.tensor([i for i, fact in enumerate(facts) for _ in fact.wordings], dtype=torch.int64, device="cpu")
    seen = _see(model, processor, samples, chosen, batch_size)
    held = _held_out(facts, training)
    taught = torch.tensor([i not in held for i in of.tolist()], dtype=torch.bool, device="cpu")
    encoder, losses = _train(seen, of, taught.nonzero().flatten(), training, progress)
    with torch.no_grad():
        keys = torch.cat([_keys(encoder, seen.rows(rows)) for rows in torch.arange(len(of)).split(512)])
    right, wrong = _margins(keys, of, taught, facts)
    threshold = float(wrong.quantile(1 - training.false_alarms)) if len(wrong) else 0.0
    scope = Scope(
        tuple(chosen),
        encoder,
        keys,
        of,
        threshold,
        training.false_alarms,
        max(float(wrong.max()), threshold) if len(wrong) else 1.0,
        tuple(fact.name for fact in facts),
    )
    reached, alarms = (
        float((margins > threshold).float().mean()) if len(margins) else 0.0 for margins in (right, wrong)
    )
    return ScopeResult(scope, reached, alarms, losses)


def _usual_layers(count: int) -> list[int]:
    last = max(count - 4, 0)
    return sorted({last * i // 6 for i in (3, 4, 5, 6)})


def _held_out(facts: Sequence[Fact], training: ScopeTraining) -> set[int]:
    """Numbers of the facts that are only for validation: all of a subject, or each by itself."""
    subjects = [fact.subject or i for i, fact in enumerate(facts)]
    names = list(dict.fromkeys(subjects))
    order = torch.randperm(len(names), generator=torch.Generator("cpu").manual_seed(training.seed), device="cpu")
    chosen = {names[i] for i in order[: round(training.held_out * len(names))].tolist()}
    return {i for i, subject in enumerate(subjects) if subject in chosen}


def _initial(seen: _Seen, training: ScopeTraining) -> PromptEncoder:
    """Enc_key before training, for states like these."""
    tokens, d = seen.embeddings[seen.within], seen.embeddings.shape[-1]
    inputs = (training.queries + seen.states.shape[1]) * d
    first, second = (
        nn.Linear(*size, dtype=torch.float32, device="cpu")
        for size in ((inputs, training.hidden), (training.hidden, training.width))
    )
    return PromptEncoder(
        tokens.mean(0),
        tokens.std(0).clamp(min=1e-4),
        0.02 * torch.randn(training.queries, d, dtype=torch.float32, device="cpu"),
        seen.states.mean(0),
        *(t.detach() for layer in (first, second) for t in (layer.weight, layer.bias)),
    )


def _train(
    seen: _Seen, of: Tensor, rows: Tensor, training: ScopeTraining, progress: bool
) -> tuple[PromptEncoder, tuple[float, ...]]:
    """Enc_key, by a contrastive loss: wordings of one fact against all others of the step."""
    torch.manual_seed(training.seed)
    encoder = _initial(seen.rows(rows), training)
    leaves = [getattr(encoder, name).requires_grad_() for name in ("queries", "w1", "b1", "w2", "b2")]
    optimizer = torch.optim.AdamW(leaves, lr=training.lr, weight_decay=training.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, training.lr, total_steps=training.steps)
    by_fact = [rows[of[rows] == fact] for fact in of[rows].unique()]
    losses = []
    with tqdm(range(training.steps), desc="scope", disable=not progress, leave=False) as bar:
        for _ in bar:
            picked = [by_fact[i] for i in torch.randperm(len(by_fact))[: training.facts].tolist()]
            batch = torch.cat([own[torch.randperm(len(own))[: training.wordings]] for own in picked])
            keys = _keys(encoder, seen.rows(batch), training.dropout, training.token_dropout)
            loss = _contrastive_loss(keys, of[batch], training.tau)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return PromptEncoder(*(t.detach() for t in encoder)), tuple(losses)


def _contrastive_loss(keys: Tensor, of: Tensor, tau: float) -> Tensor:
    """In the mean over pairs of wordings of one fact: -log of the pair's share against all wordings of other facts.

    Args:
        keys: [n, c], unit vectors.
        of: int64 [n], their facts.
        tau: temperature of the cosines.
    """
    s, same = keys @ keys.T / tau, of.unsqueeze(1) == of
    pairs = same & ~torch.eye(len(of), dtype=torch.bool, device=of.device)
    others = s.masked_fill(same, float("-inf")).logsumexp(1, keepdim=True)
    return (torch.logaddexp(s, others) - s)[pairs].mean()


def _margins(keys: Tensor, of: Tensor, taught: Tensor, facts: Sequence[Fact]) -> tuple[Tensor, Tensor]:
    """Margins of held-out prompts, each wording in turn the entry of an edit: for its fact, and for its neighbours."""
    rows = (~taught).nonzero().flatten()
    own, fact, others = keys[rows], of[rows], keys[taught]
    margins = own @ own.T - (own @ others.T).max(1).values.unsqueeze(1)  # of prompt i with entry j
    same = fact.unsqueeze(1) == fact
    near = ~same
    numbers = {name: _numbered([getattr(facts[i], name) for i in fact.tolist()]) for name in ("subject", "relation")}
    shared = torch.zeros_like(same)
    for n in numbers.values():
        shared |= (n.unsqueeze(1) == n) & (n >= 0)
    if (shared & ~same).any():
        near &= shared
    apart = ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    return margins[same & apart], margins[near]


def _numbered(names: Sequence[str]) -> Tensor:
    """int64 [n], one number for each name, -1 for none."""
    known = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([known[name] if name else -1 for name in names], dtype=torch.int64, device="cpu")


@taking_gradients
def prompt_keys(
    model: nn.Module, processor: Any, scope: Scope, prompts: Sequence[Sample], *, batch_size: int = 32
) -> Tensor:
    """The keys float32 [n, c] of prompts, unit vectors on the CPU; answers do not matter.

    Args:
        model: the Hugging Face model that the scope was made for, not patched.
        processor: its processor or tokenizer.
        scope: of a memory.
        prompts: one or more.
        batch_size: prompts per forward pass.

    Raises:
        ValueError: no prompts.
        PatchError: the model is patched.
    """
    if not prompts:
        raise ValueError("prompts: expected at least one, got none")
    with torch.no_grad():
        return _keys(scope.encoder, _see(model, processor, prompts, scope.layers, batch_size))


def with_entries(
    model: nn.Module, processor: Any, edit: Edit, scope: Scope, prompts: Sequence[Sample], *, batch_size: int = 32
) -> Edit:
    """The edit with entries of its own, so that the memory can decide where it acts.

    Args:
        model: see `prompt_keys`.
        processor: see `prompt_keys`.
        edit: which it leaves as it is.
        scope: of the memory.
        prompts: that it is meant for, its request's first.
        batch_size: prompts per forward pass.

    Raises as `prompt_keys` does.
    """
    entries = prompt_keys(model, processor, scope, prompts, batch_size=batch_size)
    return replace(edit, entries=entries, scope_id=scope.id)


def extend_scope(
    model: nn.Module, processor: Any, scope: Scope, facts: Sequence[Fact], *, batch_size: int = 32
) -> Scope:
    """The scope with further facts that a prompt may ask for; its encoder and threshold stay what they are.

    Args:
        model: see `prompt_keys`.
        processor: see `prompt_keys`.
        scope: which it leaves as it is.
        facts: one or more, in one wording or more each.
        batch_size: prompts per forward pass.

    Raises as `prompt_keys` does.
    """
    prompts = [wording for fact in facts for wording in fact.wordings]
    of = torch.tensor([i for i, fact in enumerate(facts) for _ in fact.wordings], dtype=torch.int64, device="cpu")
    keys = prompt_keys(model, processor, scope, prompts, batch_size=batch_size)
    return scope.extended(keys, of, tuple(fact.name for fact in facts))
