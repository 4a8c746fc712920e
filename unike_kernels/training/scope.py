"""Making the scope of a memory: an encoder of prompts that tells facts apart in whatever words, and a threshold."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..artifacts.edit import Edit
from ..artifacts.fingerprint import fingerprint
from ..artifacts.memory import MemoryBank
from ..artifacts.scope import OwnKey, Scope, own_keys
from ..backbones import device_of, find_decoder
from ..config import Config
from ..errors import PatchError
from ..ops.prompt_encoder import (
    SPELLING,
    PromptEncoder,
    StateBlock,
    Text,
    TextBlock,
    Vocabulary,
    encode_prompts,
)
from ..patching import is_patched
from .extract import _record
from .progress import progress_bar
from .samples import Batch, Sample, batches, encode, evaluating, forward, taking_gradients


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
        return self.wordings[0].question


@dataclass(frozen=True)
class ScopeTraining:
    """How a scope's encoder is trained and its threshold is found.

    Attributes:
        blocks: that read the text.
        heads: H, queries of a block.
        head_width: of what a query sees; a block's part of the key has H times that.
        hidden: h, of a block's tokens, and r, of the network that reads the last token's states.
        lr: of AdamW, at its highest.
        weight_decay: of AdamW.
        steps: of training.
        subjects: of a step, with all their facts: neighbours of both kinds.
        wordings: of each of these facts.
        tau: temperature of the contrastive loss.
        token_dropout: share of the tokens that the queries do not see.
        held_out: share of the subjects that threshold and `same_fact` are found with.
        false_alarms: share of the neighbouring facts' prompts that may be above the threshold.
        entries: wordings of each fact that the scope keeps; more of them hardly tell more.
        seed: of all that is random.
    """

    blocks: int = 2
    heads: int = 4
    head_width: int = 32
    hidden: int = 64
    lr: float = 2e-3
    weight_decay: float = 1e-2
    steps: int = 300
    subjects: int = 20
    wordings: int = 3
    tau: float = 0.05
    token_dropout: float = 0.1
    held_out: float = 0.2
    false_alarms: float = 0.01
    entries: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("blocks", "heads", "head_width", "hidden", "lr", "steps", "subjects", "tau", "entries"):
            if not getattr(self, name) > 0:
                raise ValueError(f"ScopeTraining.{name}: expected a positive number, got {getattr(self, name)!r}")
        if self.wordings < 2:
            raise ValueError(f"ScopeTraining.wordings: expected at least 2, got {self.wordings!r}")
        for name in ("token_dropout", "held_out", "false_alarms"):
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
        return MemoryBank({}, config, fingerprint(model), {"facts": str(self.scope.count)}, scope=self.scope)

    def __repr__(self) -> str:
        return (
            f"scope {self.scope.id}: {self.reached:.1%} of held-out wordings reach their edit, {self.false_alarms:.1%} "
            f"of the neighbours' do; margin above {self.scope.threshold:.3f}"
        )


@dataclass(frozen=True)
class _Seen:
    """What a key is made of, for n prompts.

    Attributes:
        text: of them.
        states: [n, L, d], or None.
    """

    text: Text
    states: Tensor | None

    def rows(self, rows: Tensor) -> _Seen:
        within = self.text.within[rows]
        most = int(within.sum(-1).max())  # the longest of these may be shorter than the longest of all
        at = {name: getattr(self.text, name)[rows, :most] for name in ("token", "word", "within")}
        return _Seen(self.text._replace(**at), None if self.states is None else self.states[rows])


def _pieces(processor: Any, count: int) -> tuple[str, ...]:
    """What tokens spell: byte-level and SentencePiece vocabularies mark the space in front of a word, WordPiece what
    goes on with one; a vocabulary that marks neither is of whole words."""
    tokenizer = getattr(processor, "tokenizer", processor)
    special = set(tokenizer.all_special_ids)
    pieces = tokenizer.convert_ids_to_tokens(list(range(min(count, len(tokenizer)))))
    plain = [_MARKS.sub(" ", piece or "") for piece in pieces]
    if not any(piece.startswith(" ") for piece in plain):
        plain = [piece[2:] if piece.startswith("##") else f" {piece}" for piece in plain]
    return tuple("" if i in special or _CHAT.fullmatch(piece.strip()) else piece for i, piece in enumerate(plain))


_KNOWN = 8  # prompts by which a key function is known

_IDENTICAL = 1 - 1e-5  # a cosine of two keys of one prompt, which were computed in other batches, is more

_MARKS = re.compile("[ĠĊ▁]|<0x0A>")
_CHAT = re.compile(r"<\|.*\|>")


@torch.no_grad()
def _see(
    model: nn.Module,
    processor: Any,
    pieces: Sequence[str],
    samples: Sequence[Sample],
    layers: Sequence[int],
    batch_size: int,
) -> _Seen:
    """Without layers, and without images, the model itself need not compute anything."""
    decoder = find_decoder(model)
    states: list[Tensor] = [torch.empty(0, dtype=torch.float32, device="cpu")] * len(samples)
    ids: list[list[int]] = [[]] * len(samples)
    with evaluating(model), _record({i: decoder.layers[i].module for i in layers}) as found:
        for group, batch, prompts in _encoded(model, processor, samples, batch_size):
            if layers:
                forward(model, batch.inputs)
            for row, i in enumerate(group):
                ids[i] = prompts[row]
                if layers:
                    ends = int(batch.ends[row])
                    states[i] = torch.stack([found[layer, "pre"][row, ends] for layer in layers]).float().cpu()
    return _Seen(_text(model, Vocabulary(pieces), ids), torch.stack(states) if layers else None)


def _encoded(
    model: nn.Module, processor: Any, samples: Sequence[Sample], batch_size: int
) -> Iterator[tuple[list[int], Batch, list[list[int]]]]:
    """The prompts in batches: their places, what the processor makes of them, and the ids of each."""
    if is_patched(model):
        raise PatchError("the model is patched; unpatch it first")
    for group in batches(samples, batch_size):
        batch = encode(processor, [samples[i].asked for i in group], device_of(model))
        visible, prompts = batch.inputs["attention_mask"].bool(), []
        for row, end in enumerate(batch.ends.tolist()):
            prompts.append(batch.inputs["input_ids"][row, : end + 1][visible[row, : end + 1]].tolist())
        yield group, batch, prompts


def _made_by(
    key: OwnKey, model: nn.Module, processor: Any, samples: Sequence[Sample], batch_size: int
) -> tuple[list[list[int]], Tensor]:
    """The token ids of prompts, and the keys [n, c] that the user's own function makes of them, on the CPU."""
    if any(sample.images for sample in samples):
        raise ValueError("key: expected prompts without images, as the function is given token ids alone")
    ids: list[list[int]] = [[]] * len(samples)
    for group, _, prompts in _encoded(model, processor, samples, batch_size):
        for row, i in enumerate(group):
            ids[i] = prompts[row]
    parts = [own_keys(key, ids[i : i + batch_size]).cpu() for i in range(0, len(ids), batch_size)]
    if len({part.shape[1] for part in parts}) > 1:
        raise ValueError(f"key: expected keys of one width, got {sorted({part.shape[1] for part in parts})}")
    return ids, torch.cat(parts)


def _text(model: nn.Module, vocabulary: Vocabulary, ids: Sequence[Sequence[int]]) -> Text:
    """What embeddings and spellings there are, once each."""
    lengths = torch.tensor([len(own) for own in ids], dtype=torch.int64, device="cpu")
    within = torch.arange(int(lengths.max()), dtype=torch.int64, device="cpu") < lengths.unsqueeze(1)
    given = torch.zeros(within.shape, dtype=torch.int64, device="cpu")
    given[within] = torch.tensor([i for own in ids for i in own], dtype=torch.int64, device="cpu")
    distinct, token = given.unique(return_inverse=True)
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    tokens = embedding(distinct.to(device_of(embedding))).float().cpu()
    known: dict[bytes, int] = {}
    word = torch.zeros_like(given)
    for rows in torch.arange(len(ids), dtype=torch.int64, device="cpu").split(256):
        spelled, own = vocabulary.spelled(given[rows], within[rows]).flatten(0, 1).unique(dim=0, return_inverse=True)
        numbers = [known.setdefault(one.tobytes(), len(known)) for one in spelled.numpy()]
        word[rows] = torch.tensor(numbers, dtype=torch.int64, device="cpu")[own].view(len(rows), -1)
    words = torch.frombuffer(bytearray(b"".join(known)), dtype=torch.float32).view(-1, SPELLING)
    return Text(tokens, words, token, word, within)


def _keys(encoder: PromptEncoder, seen: _Seen, token_dropout: float = 0.0) -> Tensor:
    attended = None
    if token_dropout:
        attended = torch.rand(seen.text.within.shape, dtype=torch.float32, device="cpu") >= token_dropout
    return encode_prompts(encoder, seen.text, seen.states, attended)


def _all_keys(encoder: PromptEncoder, seen: _Seen) -> Tensor:
    rows = torch.arange(len(seen.text.within), dtype=torch.int64, device="cpu")
    with torch.no_grad():
        return torch.cat([_keys(encoder, seen.rows(part)) for part in rows.split(512)])


@taking_gradients
def build_scope(
    model: nn.Module,
    processor: Any,
    facts: Sequence[Fact],
    *,
    layers: Sequence[int] | None = None,
    training: ScopeTraining | None = None,
    key: OwnKey | None = None,
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
        layers: whose input at the last prompt token counts, too; edits must be in these or later ones. None: where
            there are images, four from the middle of the decoder to the last four layers; else none.
        training: see `ScopeTraining`.
        key: a function of your own that makes the keys: token ids of n prompts, as lists, -> a tensor [n, c], such as
            a sentence encoder's embeddings of the decoded texts. Nothing is trained then; the threshold is found with
            all facts that `training` holds out. Files do not hold it: see `MemoryBank.with_key`. None: Enc_key is
            trained.
        batch_size: prompts per forward pass.
        progress: show a progress bar.

    Raises:
        ValueError: too few facts or wordings; with `key`, layers or images, or keys of another form.
        PatchError: the model is patched.
    """
    training = training or ScopeTraining()
    if len(facts) < 3:
        raise ValueError(f"facts: expected at least three, got {len(facts)}")
    for i, fact in enumerate(facts):
        if len(fact.wordings) < 2:
            raise ValueError(f"facts[{i}].wordings: expected at least two, got {len(fact.wordings)}")
    samples = [wording for fact in facts for wording in fact.wordings]
    of = torch.tensor([i for i, fact in enumerate(facts) for _ in fact.wordings], dtype=torch.int64, device="cpu")
    subjects = _subjects(facts)
    held = _held_out(subjects, training)
    taught = torch.tensor([i not in held for i in of.tolist()], dtype=torch.bool, device="cpu")
    kept = torch.cat([(of == i).nonzero().flatten()[: training.entries] for i in range(len(facts))])
    chosen: Sequence[int] = ()
    pieces: tuple[str, ...] = ()
    encoder: PromptEncoder | None = None
    losses: tuple[float, ...] = ()
    known: tuple[tuple[int, ...], ...] = ()
    if key is not None:
        if layers:
            raise ValueError(f"layers: expected none where a key is given, got {list(layers)}")
        ids, keys = _made_by(key, model, processor, samples, batch_size)
        known = tuple(tuple(ids[i]) for i in kept[:_KNOWN].tolist())
    else:
        decoder = find_decoder(model)
        usual = _usual_layers(len(decoder.layers)) if any(sample.images for sample in samples) else []
        wanted = usual if layers is None else layers
        chosen = decoder.select(wanted, need=()) if wanted else []
        pieces = _pieces(processor, model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
        seen = _see(model, processor, pieces, samples, chosen, batch_size)
        encoder, losses = _train(seen, of, subjects, taught.nonzero().flatten(), training, progress)
        keys = _all_keys(encoder, seen)
    right, wrong, alike = _validated(keys, of, taught, facts)
    threshold = float(wrong.quantile(1 - training.false_alarms)) if len(wrong) else 0.0
    scope = Scope(
        encoder,
        pieces,
        tuple(chosen),
        keys[kept],
        of[kept],
        threshold,
        training.false_alarms,
        min(alike, _IDENTICAL),
        tuple(fact.name for fact in facts),
        known,
        key,
    )
    reached, alarms = (
        float((margins > threshold).float().mean()) if len(margins) else 0.0 for margins in (right, wrong)
    )
    return ScopeResult(scope, reached, alarms, losses)


def _usual_layers(count: int) -> list[int]:
    last = max(count - 4, 0)
    return sorted({last * i // 6 for i in (3, 4, 5, 6)})


def _subjects(facts: Sequence[Fact]) -> list[int]:
    """A number for each fact, the same for those of one subject."""
    names = [fact.subject or i for i, fact in enumerate(facts)]
    known = {name: n for n, name in enumerate(dict.fromkeys(names))}
    return [known[name] for name in names]


def _held_out(subjects: Sequence[int], training: ScopeTraining) -> set[int]:
    """Numbers of the facts, given as the subjects of each, that are only for validation: all of a subject."""
    count = max(subjects) + 1
    generator = torch.Generator("cpu").manual_seed(training.seed)
    order = torch.randperm(count, generator=generator, dtype=torch.int64, device="cpu")
    chosen = set(order[: round(training.held_out * count)].tolist())
    return {i for i, subject in enumerate(subjects) if subject in chosen}


def _initial(seen: _Seen, training: ScopeTraining) -> PromptEncoder:
    """Enc_key before training, for prompts like these."""
    assert seen.text.token is not None
    used = seen.text.tokens[seen.text.token[seen.text.within]]
    e, h, c = used.shape[-1], training.hidden, training.heads * training.head_width

    def layer(inputs: int, outputs: int, *more: int) -> tuple[Tensor, Tensor]:
        bound = (inputs * math.prod(more)) ** -0.5
        shapes = (outputs, inputs, *more), (outputs,)
        weight, bias = (torch.empty(shape, dtype=torch.float32, device="cpu") for shape in shapes)
        return weight.uniform_(-bound, bound), bias.uniform_(-bound, bound)

    def block() -> TextBlock:
        (token, bias), (word, _), (conv, conv_bias) = layer(e, h), layer(SPELLING, h), layer(h, h, 3)
        query, query_bias = layer(h, training.heads)
        return TextBlock(token, word, bias, conv, conv_bias, query, query_bias, layer(e, c)[0], layer(SPELLING, c)[0])

    states = None
    if seen.states is not None:
        d = seen.states.shape[1] * seen.states.shape[2]
        states = StateBlock(seen.states.mean(0), *layer(d, 2 * h), *layer(2 * h, c))
    blocks = tuple(block() for _ in range(training.blocks))
    return PromptEncoder(used.mean(0), used.std(0).clamp(min=1e-4), blocks, states)


def _train(
    seen: _Seen, of: Tensor, subjects: Sequence[int], rows: Tensor, training: ScopeTraining, progress: bool
) -> tuple[PromptEncoder, tuple[float, ...]]:
    """Enc_key, by a contrastive loss: wordings of one fact against those of all other facts of some subjects."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        encoder = _initial(seen.rows(rows), training)
        fixed = {"mean", "spread", "states.means"}
        leaves = [t.requires_grad_() for name, t in encoder.tensors().items() if name not in fixed]
        optimizer = torch.optim.AdamW(leaves, lr=training.lr, weight_decay=training.weight_decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, training.lr, total_steps=training.steps)
        by_fact = {fact: rows[of[rows] == fact] for fact in of[rows].unique().tolist()}
        by_subject: dict[int, list[int]] = {}
        for fact in by_fact:
            by_subject.setdefault(subjects[fact], []).append(fact)
        groups, losses = list(by_subject.values()), []
        with progress_bar("scope", training.steps, progress) as bar:
            for _ in range(training.steps):
                picked = [groups[i] for i in _shuffled(len(groups))[: training.subjects].tolist()]
                own = [by_fact[fact] for group in picked for fact in group]
                batch = torch.cat([of_fact[_shuffled(len(of_fact))[: training.wordings]] for of_fact in own])
                keys = _keys(encoder, seen.rows(batch), training.token_dropout)
                loss = _contrastive_loss(keys, of[batch], training.tau)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(float(loss.detach()))
                bar.set_postfix(loss=f"{losses[-1]:.3f}")
                bar.update()
    for t in leaves:
        t.requires_grad_(False)
    return encoder, tuple(losses)


def _shuffled(count: int) -> Tensor:
    return torch.randperm(count, dtype=torch.int64, device="cpu")


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


def _validated(keys: Tensor, of: Tensor, taught: Tensor, facts: Sequence[Fact]) -> tuple[Tensor, Tensor, float]:
    """Of held-out prompts, each wording in turn the entry of an edit: the margins for its fact, and for its neighbours;
    and the highest cosine of any with a prompt for another fact."""
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
    alike = (own @ keys.T)[fact.unsqueeze(1) != of]
    return margins[same & apart], margins[near], float(alike.max()) if len(alike) else 1.0


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
    if (key := scope.needing_key()) is not None:
        return _made_by(key, model, processor, prompts, batch_size)[1]
    assert scope.encoder is not None
    return _all_keys(scope.encoder, _see(model, processor, scope.pieces, prompts, scope.layers, batch_size))


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
